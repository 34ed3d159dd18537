"""This program beside TRL: its critic PPO (1.12.0, the last release that has it) and its GRPO (1.16.0), on a CPU.

    python -m benchmarks.vs_trl [--lengths 8 64 256] [--episodes N] [--rounds 2]

All train the same Qwen2 of 0.1M random weights on the same 256 prompts of 8 to 24 tokens, for the same reward (1 if more
than half of a response's ids are odd), with as many episodes, 32 an optimizer step, at the same learning rate; T = 1,
top-p 1, γ = λ = 1, no KL, float32, one thread. PPO: 32 prompts, one response each, one step of policy and critic. GRPO: 4
prompts, 8 responses each. Only the end-of-sequence token or the length ends a response. Every run is a process of its own;
programs take turns. Each release of TRL gets a virtual environment under .cache/peers on first use.

| column | meaning |
|---|---|
| length, tokens | most tokens of a response, and their mean |
| loop s, CPU s | seconds of the training loop, and of processor in it, children included |
| process s | seconds of the whole process: imports, loading, loop, export |
| peak GB | largest resident memory of the process, and what its children hold as the loop ends |
| reward | mean reward in each quarter of the steps |
| speed ×, memory × | episodes per second and peak memory, as multiples of TRL's in the same round |

Medians over the rounds; rewards are means.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"trl-ppo": "1.12.0", "trl-grpo": "1.16.0"}  # program → release of TRL
PAIRS = {"ours-ppo": "trl-ppo", "ours-grpo": "trl-grpo"}
TITLES = {
    "ours-ppo": "this, PPO",
    "trl-ppo": "TRL PPO",
    "ours-grpo": "this, GRPO",
    "trl-grpo": "TRL GRPO",
}
BATCH, GROUP, RATE, BETAS = 32, 8, 1e-3, (0.9, 0.95)
PROMPTS, VOCABULARY, EOS = 256, 1024, "<|endoftext|>"
END = "?"  # of every prompt, and nowhere else in it

Curve = list[dict[str, float]]  # mean reward and mean tokens of each batch


def reward(ids: Sequence[int]) -> float:
    """1 if more than half of the ids are odd, else 0."""
    return float(2 * sum(i % 2 for i in ids) > len(ids))


def graded(responses: Sequence[Sequence[int]], curve: Curve) -> list[float]:
    """Rewards of a batch, which becomes the next of the curve."""
    rewards = [reward(ids) for ids in responses]
    curve.append(
        {"reward": statistics.mean(rewards), "tokens": statistics.mean(map(len, responses))}
    )
    return rewards


class Used(NamedTuple):
    """What has been used up to now."""

    seconds: float
    cpu: float  # seconds of processor, children included
    children_gb: float  # held by children now


def used() -> Used:
    """By this process, its children and theirs; also by those that have ended, once they have been waited for."""
    tree = [os.getpid()]
    for pid in tree:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            tree += map(int, (thread / "children").read_text().split())
    ticks = sum(
        sum(map(int, Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[11:15]))
        for p in tree
    )
    children = sum(gigabytes(p, "smaps_rollup", "Pss") for p in tree[1:])
    return Used(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), children)


def gigabytes(pid: int | str, file: str, field: str) -> float:
    """A field of /proc/<pid>/<file>, which counts kilobytes of 1,024."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(f"{field}:"))


def ours(cfg: Any, folder: Path, curve: Curve) -> tuple[Used, Used]:
    """This program; `cfg.program` says with a critic or without. → what had been used before its loop and after."""
    import data
    import preflight
    import train
    from config import Config
    from reports.log import RunLog
    from rollout import Rollout

    marks = []

    class Marked(RunLog):
        def __enter__(self) -> RunLog:
            marks.append(used())
            return super().__enter__()

        def __exit__(self, *wrong: Any) -> None:
            super().__exit__(*wrong)
            marks.append(used())

    def score(rollouts: list[Rollout], *_: Any) -> list[Rollout]:
        for r, value in zip(rollouts, graded([r.token_ids for r in rollouts], curve), strict=True):
            r.reward = value
        return rollouts

    # The program's own gives nothing to a response that is cut off, here nearly all; TRL knows no such rule.
    train.RunLog, train.score = Marked, score
    data.TEMPLATES["authors"] = "{question}"  # TRL adds nothing to a prompt
    prompts, samples = (BATCH // GROUP, GROUP) if cfg.program == "ours-grpo" else (BATCH, 1)
    settings = Config(
        model=str(folder), data=str(folder / "prompts.jsonl"), reward="benchmarks.vs_trl:reward", runs=str(folder / "runs"),
        name=f"{cfg.program}-{cfg.length}-{cfg.seed}", seed=cfg.seed, engine="transformers",
        advantage="grpo" if cfg.program == "ours-grpo" else "gae", steps=cfg.episodes // BATCH, prompts=prompts,
        samples=samples, prompt_tokens=32, response_tokens=cfg.length, critic_steps=1, policy_lr=RATE, critic_lr=RATE,
        policy_lr_warmup=0, critic_lr_warmup=0, checkpoint_every=0, grader_workers=1,
    )  # fmt: skip
    prepared = preflight.prepare(settings)
    assert [list(p.prompt_ids) for p in prepared.problems] == [
        p["ids"] for p in saved_prompts(folder)
    ]
    train.train(settings, prepared)
    return marks[0], marks[1]


def trl_ppo(cfg: Any, folder: Path, curve: Curve) -> tuple[Used, Used]:
    """TRL's PPO. Its padding is an id beyond the vocabulary, which it never shows a model: an id that can be sampled it
    would take for the end of a response."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    args = PPOConfig(
        per_device_train_batch_size=BATCH, num_mini_batches=1, num_ppo_epochs=1, total_episodes=cfg.episodes,
        response_length=cfg.length, stop_token="eos", temperature=1.0, kl_coef=0.0, gamma=1.0, lam=1.0, vf_coef=1.0,
        num_sample_generations=0, **trainer_settings(cfg, folder),
    )  # fmt: skip
    prompts = saved_prompts(folder)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
        reward_model=RewardModel(curve, tokenizer.convert_tokens_to_ids(END)),
        train_dataset=Dataset.from_dict({"input_ids": [p["ids"] for p in prompts]}),
    )
    return around(trainer)


class RewardModel(torch.nn.Module):
    """The reward as TRL's PPO asks for it: a model whose score of the last token is read. A response begins after
    the first `prompt_end`."""

    base_model_prefix = "backbone"

    def __init__(self, curve: Curve, prompt_end: int) -> None:
        super().__init__()
        self.curve, self.prompt_end = curve, prompt_end

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Rewards of sequences (B, T) in place of hidden states, (B, T, 1)."""
        rows = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        rewards = torch.tensor(
            graded([row[row.index(self.prompt_end) + 1 :] for row in rows], self.curve)
        )
        return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, hidden: Tensor) -> Tensor:
        """What `backbone` gave."""
        return hidden


def trl_grpo(cfg: Any, folder: Path, curve: Curve) -> tuple[Used, Used]:
    """TRL's GRPO."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompts, tokenizer = saved_prompts(folder), AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(p["question"])["input_ids"] for p in prompts] == [p["ids"] for p in prompts]
    args = GRPOConfig(
        per_device_train_batch_size=BATCH, num_generations=GROUP, steps_per_generation=1, max_steps=cfg.episodes // BATCH,
        max_completion_length=cfg.length, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", use_vllm=False,
        **trainer_settings(cfg, folder),
    )  # fmt: skip

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return graded(completion_ids, curve)

    dataset = Dataset.from_dict({"prompt": [p["question"] for p in prompts]})
    return around(
        GRPOTrainer(model=str(folder), reward_funcs=rewards, args=args, train_dataset=dataset)
    )


def trainer_settings(cfg: Any, folder: Path) -> dict[str, Any]:
    """Those that TRL's trainers share."""
    return {
        "output_dir": str(folder / f"{cfg.program}-{cfg.length}-{cfg.seed}"), "seed": cfg.seed, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def around(trainer: Any) -> tuple[Used, Used]:
    """Train and export; what had been used before and after the training."""
    before = used()
    trainer.train()
    after = used()
    trainer.save_model()
    return before, after


WORKERS: dict[str, Callable[[Any, Path, Curve], tuple[Used, Used]]]
WORKERS = {"ours-ppo": ours, "trl-ppo": trl_ppo, "ours-grpo": ours, "trl-grpo": trl_grpo}


def work(cfg: Any) -> None:
    """One run, in this process; its figures are the last line printed."""
    curve: Curve = []
    before, after = WORKERS[cfg.program](cfg, Path(cfg.folder), curve)
    assert len(curve) == cfg.episodes // BATCH, "a batch was not graded once"
    own = gigabytes("self", "status", "VmHWM")
    figures = {
        "seconds": after.seconds - before.seconds, "cpu": after.cpu - before.cpu, "gb": own + after.children_gb,
        "rewards": [batch["reward"] for batch in curve], "tokens": statistics.mean(batch["tokens"] for batch in curve),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }  # fmt: skip
    print("\n" + json.dumps(figures))


def saved_prompts(folder: Path) -> list[dict[str, Any]]:
    """The rows that `prepare` wrote: text and ids."""
    return list(map(json.loads, (folder / "prompts.jsonl").read_text().splitlines()))


def prepare(folder: Path) -> None:
    """The model, its tokenizer and the problems, for all programs. The tokens are 256 bytes, EOS, and words
    that no stop string of this program could be made of."""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token=EOS, pad_token=EOS)
    words = [AddedToken(f" w{i}", normalized=False) for i in range(len(tokenizer), VOCABULARY)]
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    rng = random.Random(0)
    texts = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7 + i % 17)) + END
        for i in range(PROMPTS)
    ]
    rows = [
        json.dumps({"question": text, "answer": "1", "ids": tokenizer.encode(text)})
        for text in texts
    ]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def python(program: str) -> str:
    """The interpreter of a program: for TRL that of a virtual environment, made if there is none."""
    if program not in PEERS:
        return sys.executable
    folder = ROOT / ".cache" / "peers" / f"trl-{PEERS[program]}"
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        torch_pin = next(
            x for x in (ROOT / "requirements.txt").read_text().split() if x.startswith("torch==")
        )
        venv.create(folder, clear=True, with_pip=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", torch_pin, f"trl=={PEERS[program]}"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        complete.touch()
    return str(interpreter)


def run(program: str, folder: Path, length: int, episodes: int, seed: int) -> dict[str, Any]:
    """One run as a process of its own: its figures, and its seconds."""
    command = [python(program), "-P", __file__, "--program", program, "--folder", str(folder)]
    command += ["--length", str(length), "--episodes", str(episodes), "--seed", str(seed)]
    settings = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    settings |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: ended with {done.returncode}\n{done.stderr}")
    figures = json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}
    rate = episodes / figures["seconds"]
    print(
        f"round {seed}, length {length}: {TITLES[program]} {rate:.1f} episodes/s",
        file=sys.stderr,
        flush=True,
    )
    return figures


def row(
    program: str, length: int, episodes: int, rounds: list[dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """The row of a program at a length; `rounds` hold the figures of all programs."""

    def median(figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(figure(r[program]) for r in rounds)

    def quarter(k: int) -> str:
        found = [r[program]["rewards"] for r in rounds]
        steps = max(1, len(found[0]) // 4)
        return f"{statistics.mean(x for rewards in found for x in rewards[k * steps : (k + 1) * steps]):.2f}"

    cells = {
        "length": length, "tokens": median(lambda f: f["tokens"]), "program": TITLES[program],
        "episodes/s": median(lambda f: episodes / f["seconds"]),
        "tokens/s": median(lambda f: episodes * f["tokens"] / f["seconds"]),
        "loop s": median(lambda f: f["seconds"]), "CPU s": median(lambda f: f["cpu"]),
        "process s": median(lambda f: f["process"]), "peak GB": median(lambda f: f["gb"]),
        "reward": " ".join(map(quarter, range(4))),
    }  # fmt: skip
    if peer := PAIRS.get(program):
        cells["speed ×"] = statistics.median(
            r[peer]["seconds"] / r[program]["seconds"] for r in rounds
        )
        cells["memory ×"] = statistics.median(r[program]["gb"] / r[peer]["gb"] for r in rounds)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--episodes", type=int, default=640, help="of each run, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=2)
    for name in ("program", "folder", "length", "seed"):  # of one run: for `run`, not for people
        parser.add_argument(
            f"--{name}", type=int if name in ("length", "seed") else str, help=argparse.SUPPRESS
        )
    args = parser.parse_args()
    if args.episodes % BATCH:
        parser.error(f"--episodes {args.episodes}: must be a multiple of {BATCH}")
    if args.program:
        return work(args)
    from benchmarks.record import record

    for program in PEERS:
        python(program)
    rows, versions = [], {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for length in args.lengths:
            rounds = [
                {
                    program: run(program, Path(name), length, args.episodes, seed)
                    for program in TITLES
                }
                for seed in range(args.rounds)
            ]
            rows += [row(program, length, args.episodes, rounds) for program in TITLES]
            versions = {
                p: f"{TITLES[p]}: trl {PEERS[p]}, {rounds[0][p]['versions']}" for p in PEERS
            }
    notes = [
        f"{args.episodes} episodes a run, {BATCH} a step, learning rate {RATE}; medians of {args.rounds} rounds."
    ]
    record(
        "vs_trl", "Beside TRL's PPO and GRPO", rows, [*notes, "; ".join(versions.values()) + "."]
    )


if __name__ == "__main__":
    main()
