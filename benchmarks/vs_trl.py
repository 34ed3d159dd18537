"""Compare this program with TRL on a CPU: its critic PPO and its GRPO.

    python -m benchmarks.vs_trl [--lengths 8 64 256] [--episodes 640] [--rounds 2]

All programs train the same Qwen2 of 0.1M random weights on the same 256 prompts of 8 to 24 tokens,
with as many episodes, 32 an optimizer step, at the same learning rate. The reward is 1 if more than
half of a response's ids are odd. T = 1, top-p 1, γ = λ = 1, no KL, float32, one thread. PPO samples
one response to each of 32 prompts and takes one step of policy and critic. GRPO samples 8 responses
to each of 4 prompts. Only the end-of-sequence token or the length ends a response.

Each run is a new process (benchmarks/vs_trl_worker.py), and programs take turns. The releases of
TRL are 1.12.0, the last that has a critic PPO, and 1.16.0 for GRPO. On first use, each is installed
into a virtual environment under .cache/peers.

| column | meaning |
|---|---|
| length, tokens | most tokens of a response, and their mean |
| loop s, CPU s | seconds of the training loop, and processor seconds in it, with children |
| process s | seconds of the whole process: imports, loading, loop, export |
| peak GB | peak memory of the process, and what its children hold at the end of the loop |
| reward | mean reward in each quarter of the steps |
| speed ×, memory × | episodes per second and peak memory / TRL's in the same round |

Figures are medians over the rounds; rewards are means.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import AddedToken, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.record import Row, record
from benchmarks.vs_trl_worker import BATCH, PROMPT_END, RATE, Run
from tools.lock import pin

ROOT = Path(__file__).resolve().parents[1]
WORKER = "vs_trl_worker"
RELEASES = {"trl-ppo": "1.12.0", "trl-grpo": "1.16.0"}
TITLES = {
    "ours-ppo": "this, PPO",
    "trl-ppo": "TRL PPO",
    "ours-grpo": "this, GRPO",
    "trl-grpo": "TRL GRPO",
}
PEERS = {"ours-ppo": "trl-ppo", "ours-grpo": "trl-grpo"}
NUM_PROMPTS = 256
VOCABULARY = 1024
EOS = "<|endoftext|>"

Figures = dict[str, Any]  # what a run leaves
Round = dict[str, Figures]  # program → its figures


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    lengths: tuple[int, ...] = (8, 64, 256)
    """Most tokens of a response; all programs run at each length."""
    episodes: int = 640
    """Episodes of each run, a multiple of 32."""
    rounds: int = 2
    """Number of runs of each program at each length, with different seeds."""


# ── what all programs train ───────────────────────────────────────────────────────────────────────


def make_tokenizer() -> Qwen2Tokenizer:
    """Its tokens are 256 bytes, EOS, and words that cannot form a stop string of this program."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token=EOS, pad_token=EOS)
    words = [AddedToken(f" w{i}", normalized=False) for i in range(len(tokenizer), VOCABULARY)]
    tokenizer.add_tokens(words)
    return tokenizer


def make_model(eos: int) -> Qwen2ForCausalLM:
    """0.1M random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    return model


def prepare(folder: Path) -> None:
    """Write the model, its tokenizer and the prompts."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer.eos_token_id).save_pretrained(folder)
    rng = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(NUM_PROMPTS):
            letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=7 + i % 17)
            text = "".join(letters) + PROMPT_END
            print(json.dumps({"text": text, "ids": tokenizer.encode(text)}), file=file)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────


def install(release: str) -> str:
    """The interpreter of a virtual environment with this release of TRL, made if there is none."""
    folder = ROOT / ".cache" / "peers" / f"trl-{release}"
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        venv.create(folder, clear=True, with_pip=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", pin("torch"), f"trl=={release}"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        complete.touch()
    return str(interpreter)


def start(run: Run) -> Figures:
    """One run in a new process: its figures, and the seconds of the process."""
    argument = json.dumps(run._asdict())
    if run.program in RELEASES:
        worker = str(ROOT / "benchmarks" / f"{WORKER}.py")
        # -P: TRL's libraries must not find this project's modules.
        command = [install(RELEASES[run.program]), "-P", worker, argument]
    else:
        command = [sys.executable, "-m", f"benchmarks.{WORKER}", argument]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"benchmarks.vs_trl: {run.name} ended with {done.returncode}\n{done.stderr.strip()}"
        )
    figures = json.loads(done.stdout.splitlines()[-1])
    figures["process"] = time.perf_counter() - began
    rate = run.episodes / figures["seconds"]
    progress = f"round {run.seed}, length {run.length}: {TITLES[run.program]} {rate:.1f} episodes/s"
    print(progress, file=sys.stderr, flush=True)
    return figures


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def row(program: str, length: int, episodes: int, rounds: list[Round]) -> Row:
    """The row of a program at a length."""

    def median(figure: Callable[[Figures], float]) -> float:
        return statistics.median(figure(one[program]) for one in rounds)

    cells = {
        "length": length,
        "tokens": median(lambda f: f["tokens"]),
        "program": TITLES[program],
        "episodes/s": median(lambda f: episodes / f["seconds"]),
        "tokens/s": median(lambda f: episodes * f["tokens"] / f["seconds"]),
        "loop s": median(lambda f: f["seconds"]),
        "CPU s": median(lambda f: f["cpu"]),
        "process s": median(lambda f: f["process"]),
        "peak GB": median(lambda f: f["gb"]),
        "reward": " ".join(quarters([one[program]["rewards"] for one in rounds])),
    }
    peer = PEERS.get(program)
    if peer:
        speeds = [one[peer]["seconds"] / one[program]["seconds"] for one in rounds]
        memories = [one[program]["gb"] / one[peer]["gb"] for one in rounds]
        cells["speed ×"] = statistics.median(speeds)
        cells["memory ×"] = statistics.median(memories)
    return cells


def quarters(curves: list[list[float]]) -> list[str]:
    """Mean reward of all rounds in each quarter of the steps.

    >>> quarters([[0, 0, 0, 1, 1, 1, 1, 1]])
    ['0.00', '0.50', '1.00', '1.00']
    """
    size = max(1, len(curves[0]) // 4)
    means = []
    for start in range(0, 4 * size, size):
        rewards = [reward for curve in curves for reward in curve[start : start + size]]
        means.append(f"{statistics.mean(rewards):.2f}")
    return means


def versions(programs: Round) -> str:
    """The libraries of TRL's runs."""
    return "; ".join(
        f"{TITLES[program]}: trl {release}, {programs[program]['versions']}"
        for program, release in RELEASES.items()
    )


def main() -> None:
    cfg = tyro.cli(Settings, description=__doc__, prog="python -m benchmarks.vs_trl")
    if cfg.episodes % BATCH or cfg.episodes < 4 * BATCH:
        sys.exit(
            f"benchmarks.vs_trl: --episodes {cfg.episodes}: must be a multiple of {BATCH}, at "
            f"least {4 * BATCH}"
        )
    for release in RELEASES.values():
        install(release)
    rows: list[Row] = []
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for length in cfg.lengths:
            rounds = []
            for seed in range(cfg.rounds):
                runs = {p: Run(p, folder, length, cfg.episodes, seed) for p in TITLES}
                rounds.append({program: start(run) for program, run in runs.items()})
            rows += [row(program, length, cfg.episodes, rounds) for program in TITLES]
    notes = [
        f"{cfg.episodes} episodes a run, {BATCH} a step, learning rate {RATE}; medians of "
        f"{cfg.rounds} rounds.",
        f"{versions(rounds[0])}.",
    ]
    record("vs_trl", "Beside TRL's PPO and GRPO", rows, notes)


if __name__ == "__main__":
    main()
