"""One training run of benchmarks/vs_trl.py, which starts it in a process of its own.

    python -m benchmarks.vs_trl_worker '{"program": "ours-ppo", …}'
    trl/bin/python -P benchmarks/vs_trl_worker.py '{"program": "trl-ppo", …}'

The argument holds the fields of `Run`; the last line printed holds the figures. A virtual
environment with TRL lacks this project's dependencies, so the file imports what a run needs where
it needs it.

Alike in a pair: the base model, the prompts, the reward, the episodes of an optimizer step, T = 1,
top-p 1, AdamW with its betas and no weight decay, a constant learning rate, one optimizer step an
iteration, and the mean of the loss over the tokens of the batch. With PPO: γ = λ = 1, no KL, the
value head's distribution and seed, normalized advantages, and gradients that are not clipped, since
TRL's PPO cannot clip them. With GRPO: groups of 8, and gradients clipped at norm 1. What differs:

- The order of the prompts and the random numbers.
- TRL's PPO divides advantages by the standard deviation with n − 1 tokens, here with n. Its value
  loss also counts the position after an EOS. It clips values at 0.2, which has no effect at the
  first step after sampling. It runs a reference model even without KL.
- TRL's GRPO divides by a group's standard deviation with n − 1 responses, plus 1e-4; here with n.
  Here the advantages are then normalized over the tokens of the batch.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

BATCH = 32  # episodes of an optimizer step
GROUP = 8  # responses of a GRPO group
RATE = 1e-3  # learning rate
BETAS = (0.9, 0.95)  # of AdamW
CLIPPING = 1.0  # of the gradient norm with GRPO
NO_CLIPPING = 1e9  # with PPO: TRL's has no clipping
PROMPT_END = "?"  # ends every prompt, and is nowhere else in it

Curve = list[dict[str, float]]  # mean reward and mean tokens of each batch
Figures = dict[str, Any]  # what a run leaves


class Run(NamedTuple):
    """What to train."""

    program: str
    folder: str  # with model and prompts
    length: int  # most tokens of a response
    episodes: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.program}-{self.length}-{self.episodes}-{self.seed}"


class Usage(NamedTuple):
    """What a process and its descendants have used so far."""

    seconds: float
    cpu: float  # processor seconds
    children_gb: float  # memory that the descendants hold now


# ── reward, time and memory ───────────────────────────────────────────────────────────────────────


def reward(token_ids: Sequence[int]) -> float:
    """1 if more than half of the ids are odd, else 0.

    >>> reward([1, 2, 3]), reward([1, 2])
    (1.0, 0.0)
    """
    return float(2 * sum(i % 2 for i in token_ids) > len(token_ids))


def grade(responses: Sequence[Sequence[int]], curve: Curve) -> list[float]:
    """Rewards of a batch; its means are appended to the curve."""
    rewards = [reward(ids) for ids in responses]
    tokens = statistics.mean(map(len, responses))
    curve.append({"reward": statistics.mean(rewards), "tokens": tokens})
    return rewards


def usage() -> Usage:
    """Of this process and its descendants, also of those that have ended and been waited for."""
    tree = [os.getpid()]
    for pid in tree:  # also over those that the loop itself adds
        for thread in Path(f"/proc/{pid}/task").iterdir():
            tree += map(int, (thread / "children").read_text().split())
    ticks = 0
    for pid in tree:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    children = sum(gigabytes(pid, "smaps_rollup", "Pss") for pid in tree[1:])
    return Usage(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), children)


def spent(before: Usage, after: Usage) -> Figures:
    """Seconds and processor seconds between two readings, and the peak memory until now."""
    return {
        "seconds": after.seconds - before.seconds,
        "cpu": after.cpu - before.cpu,
        "gb": gigabytes("self", "status", "VmHWM") + after.children_gb,
    }


def gigabytes(pid: int | str, file: str, field: str) -> float:
    """A field of /proc/<pid>/<file>, which is in units of 1,024 bytes."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(f"{field}:"))


def load_prompts(folder: str) -> list[dict[str, Any]]:
    """Text and ids of every prompt."""
    return list(map(json.loads, Path(folder, "prompts.jsonl").read_text().splitlines()))


# ── this program ──────────────────────────────────────────────────────────────────────────────────


def train_ours(run: Run, curve: Curve) -> Figures:
    """Train with this program and export; returns what the loop used. Of its seconds, `sampling`
    are the sampler's, and of these, `forward` are those of the passes of transformers' model."""
    import train
    from benchmarks.step_overhead import run_step
    from reports.log import RunLog
    from rollout import sync_weights

    cfg, inputs = our_settings(run), our_inputs(run, curve)
    run_folder = Path(cfg.runs, cfg.name)
    run_folder.mkdir(parents=True)
    sampler = train.start_sampler(cfg, inputs)
    models = train.load_models(cfg, inputs.model_path)
    sync_weights(sampler, models.policy)
    log = RunLog(run_folder, cfg)
    forward = time_forward(sampler.model)
    sampling = 0.0
    before = usage()
    with log:
        for step in range(cfg.steps):
            _, phases = run_step(cfg, inputs, sampler, models, log, step)
            sampling += phases["sample"]
    after = usage()
    train.save_models(cfg, models, inputs, run_folder)
    sampler.close()
    return spent(before, after) | {"sampling": sampling, "forward": sum(forward)}


def time_forward(model: Any) -> list[float]:
    """Seconds of each forward pass of a model from now on; the list grows with them."""
    seconds = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = forward(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    model.forward = timed
    return seconds


def our_settings(run: Run) -> Any:
    """The settings that the docstring of this file lists."""
    from config import Config

    if run.program == "ours-grpo":
        method = {"prompts": BATCH // GROUP, "samples": GROUP, "advantage": "grpo"}
        method |= {"max_grad_norm": CLIPPING}
    else:
        method = {"prompts": BATCH, "samples": 1, "advantage": "gae"}
        method |= {"max_grad_norm": NO_CLIPPING}
    return Config(
        model=run.folder,
        runs=str(Path(run.folder, "runs")),
        name=run.name,
        seed=run.seed,
        engine="transformers",
        steps=run.episodes // BATCH,
        prompt_tokens=32,
        response_tokens=run.length,
        critic_steps=1,
        policy_lr=RATE,
        critic_lr=RATE,
        policy_lr_warmup=0,
        critic_lr_warmup=0,
        checkpoint_every=0,
        **method,
    )


def our_inputs(run: Run, curve: Curve) -> Any:
    """Model, prompts and reward. The prompts have no template, since TRL adds none. The reward does
    not look at how a response ended: this program's own gives 0 to one that is cut off, and here
    nearly all are."""
    from transformers import AutoTokenizer

    from data import Problem
    from preflight import Inputs, eos_ids, model_config
    from rollout import Rollout

    def score(rollouts: list[Rollout]) -> list[Rollout]:
        rewards = grade([r.token_ids for r in rollouts], curve)
        for rollout, value in zip(rollouts, rewards, strict=True):
            rollout.reward = value
        return rollouts

    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    problems = [
        Problem(f"prompts:{i}", prompt["text"], "", tuple(prompt["ids"]))
        for i, prompt in enumerate(load_prompts(run.folder), 1)
    ]
    return Inputs(
        model_path=run.folder,
        tokenizer=tokenizer,
        eos=eos_ids(run.folder, tokenizer, model_config(run.folder).vocab_size),
        problems=problems,
        eval_problems=[],
        resume_from=None,
        grader=None,
        score=score,
    )


# ── TRL ───────────────────────────────────────────────────────────────────────────────────────────


def train_trl_ppo(run: Run, curve: Curve) -> Figures:
    """The same with TRL's PPO. Its padding is an id outside of the vocabulary, which it never shows
    to a model. It would take an id that can be sampled for the end of a response."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(run.folder, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    args = PPOConfig(
        **trainer_settings(run),
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=run.episodes,
        response_length=run.length,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.0,
        gamma=1.0,
        lam=1.0,
        vf_coef=1.0,
        num_sample_generations=0,
    )
    prompt_ids = [prompt["ids"] for prompt in load_prompts(run.folder)]
    value_model = AutoModelForSequenceClassification.from_pretrained(run.folder, num_labels=1)
    head = value_model.score.weight.data
    generator = torch.Generator().manual_seed(run.seed)
    head.normal_(0, 1 / (head.shape[1] + 1), generator=generator)  # as critic.load_critic
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(run.folder),
        ref_model=AutoModelForCausalLM.from_pretrained(run.folder),
        value_model=value_model,
        reward_model=RewardModel(curve, tokenizer.convert_tokens_to_ids(PROMPT_END)),
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids}),
    )
    return measured_training(trainer)


class RewardModel(torch.nn.Module):
    """The reward in the form that TRL's PPO asks for: a model whose score of the last token it
    reads. A response begins after the first `prompt_end`."""

    base_model_prefix = "backbone"

    def __init__(self, curve: Curve, prompt_end: int) -> None:
        super().__init__()
        self.curve = curve
        self.prompt_end = prompt_end

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Rewards of sequences (B, T) in the place of hidden states, (B, T, 1)."""
        responses = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            sequence = ids[mask].tolist()
            responses.append(sequence[sequence.index(self.prompt_end) + 1 :])
        rewards = torch.tensor(grade(responses, self.curve))
        return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, hidden: Tensor) -> Tensor:
        """What `backbone` returned."""
        return hidden


def train_trl_grpo(run: Run, curve: Curve) -> Figures:
    """The same with TRL's GRPO."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    texts = []
    for prompt in load_prompts(run.folder):
        assert tokenizer(prompt["text"])["input_ids"] == prompt["ids"]
        texts.append(prompt["text"])
    args = GRPOConfig(
        **trainer_settings(run),
        num_generations=GROUP,
        steps_per_generation=1,
        max_steps=run.episodes // BATCH,
        max_completion_length=run.length,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        use_vllm=False,
    )

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return grade(completion_ids, curve)

    dataset = Dataset.from_dict({"prompt": texts})
    trainer = GRPOTrainer(model=run.folder, reward_funcs=rewards, args=args, train_dataset=dataset)
    return measured_training(trainer)


def trainer_settings(run: Run) -> dict[str, Any]:
    """The settings that TRL's trainers share."""
    return {
        "output_dir": str(Path(run.folder, run.name)),
        "seed": run.seed,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": CLIPPING,  # without effect in PPO
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def measured_training(trainer: Any) -> Figures:
    """Train and export; returns what the training used."""
    before = usage()
    trainer.train()
    after = usage()
    trainer.save_model()
    return spent(before, after)


# ── the run ───────────────────────────────────────────────────────────────────────────────────────

TRAININGS: dict[str, Callable[[Run, Curve], Figures]] = {
    "ours-ppo": train_ours,
    "trl-ppo": train_trl_ppo,
    "ours-grpo": train_ours,
    "trl-grpo": train_trl_grpo,
}


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    curve: Curve = []
    figures = TRAININGS[run.program](run, curve)
    if len(curve) != run.episodes // BATCH:
        sys.exit(f"{run.program}: {len(curve)} batches were graded, not {run.episodes // BATCH}")
    figures |= {
        "rewards": [batch["reward"] for batch in curve],
        "tokens": statistics.mean(batch["tokens"] for batch in curve),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }
    print("\n" + json.dumps(figures))


if __name__ == "__main__":
    main()
