"""Compare the updates of this program with TRL's on the same responses.

    python -m benchmarks.vs_trl_gradients [--length 64] [--steps 5] [--seed 0]

TRL's PPO and GRPO train as in benchmarks/vs_trl.py, and record the responses and the gradients of
each step. This program then starts from the same weights and takes its own steps on these
responses. Learning curves also differ by chance, since each program samples responses of its own;
these gradients do not. What they differ by is listed in benchmarks/vs_trl_worker.py: in GRPO, the
second normalization, and √(8/7) between the standard deviations of a group of 8.

| column | meaning |
|---|---|
| ended | responses that ended before the limit, of all steps |
| norm, TRL's | norm of the gradient at the optimizer step, mean over the steps |
| cosine | cosine of the two gradients, the smallest of the steps |
| difference | norm of their difference / norm of TRL's, the largest of the steps |
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch

import train
from benchmarks import flags
from benchmarks.record import Row, record
from benchmarks.vs_trl import Length, prepare, start
from benchmarks.vs_trl_worker import (
    BATCH,
    Curve,
    Gradients,
    Run,
    keep_gradients,
    our_settings,
    reward,
)
from config import Config, Range, Seed
from data import Problem
from gae import normalize_advantages
from rollout import Rollout


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    length: Length = 64
    """Most tokens of a response."""
    steps: Annotated[int, Range(4, 1000)] = 5
    """Optimizer steps of each program."""
    seed: Seed = 0
    """Seed of weights, prompts and responses."""


def compare(cfg: Settings, method: str, folder: Path) -> list[Row]:
    """Train with TRL's `method` and then with this program on its responses; rows of the policy
    and, with PPO, of the critic."""
    file = folder / f"{method}.pt"
    run = Run(f"trl-{method}", str(folder), cfg.length, BATCH * cfg.steps, cfg.seed, str(file))
    start(run)
    curve, theirs = torch.load(file, weights_only=False)  # made by the line above
    ours = our_settings(run._replace(program=f"ours-{method}"))
    policy, critic = take_steps(ours, curve)
    ended = sum(len(ids) < cfg.length for batch in curve for ids in batch["responses"])
    if method == "grpo":
        by_group, _ = take_steps(ours, curve, normalize=False)
        return [
            row("GRPO, policy", ended, policy, theirs),
            row("GRPO, policy, normalized by group only", ended, by_group, theirs),
        ]
    return [
        row("PPO, policy", ended, policy, [part(step, "policy.") for step in theirs]),
        row("PPO, critic", ended, critic, [part(step, "value_model.") for step in theirs]),
    ]


def take_steps(
    cfg: Config, curve: Curve, normalize: bool = True
) -> tuple[list[Gradients], list[Gradients]]:
    """Update this program's models on recorded batches; the gradients of policy and critic at each
    step, none of a critic with GRPO. Without `normalize`, advantages are not normalized over the
    batch."""
    models = train.load_models(cfg, cfg.model)
    policy = keep_gradients(models.policy.model)
    critic = keep_gradients(models.critic.model) if models.critic else []
    for step, batch in enumerate(curve):
        rollouts = [
            Rollout(Problem("", "", "", tuple(prompt)), ids, [0.0] * len(ids), "stop", "")
            for prompt, ids in zip(batch["prompts"], batch["responses"], strict=True)
        ]
        for rollout in rollouts:
            rollout.reward = reward(rollout.token_ids)
        if models.critic:
            values = train.predict_values(cfg, models.critic, rollouts)
            advantages, targets = train.compute_advantages(cfg, models, rollouts, values)
            train.update_critic(cfg, models, rollouts, values, targets, step)
        else:
            advantages = train.compute_group_advantages(cfg, rollouts)
        if normalize:
            advantages = normalize_advantages(advantages)
        train.update_policy(cfg, models, rollouts, advantages, step)
    return policy, critic


def part(gradients: Gradients, prefix: str) -> Gradients:
    """The gradients of one of the models that TRL's PPO has in one module."""
    return {n.removeprefix(prefix): g for n, g in gradients.items() if n.startswith(prefix)}


def row(name: str, ended: int, ours: Sequence[Gradients], theirs: Sequence[Gradients]) -> Row:
    """Norms, and how far the gradients of all steps are apart. Raises ValueError when they are not
    those of the same weights."""
    norms, their_norms, cosines, differences = [], [], [], []
    for own, other in zip(ours, theirs, strict=True):
        if own.keys() != other.keys():
            raise ValueError(f"{name}: gradients of other weights: {own.keys() ^ other.keys()}")
        a = torch.cat([own[n].flatten().double() for n in own])
        b = torch.cat([other[n].flatten().double() for n in own])
        norms.append(float(a.norm()))
        their_norms.append(float(b.norm()))
        cosines.append(float(a @ b / (a.norm() * b.norm())))
        differences.append(float((a - b).norm() / b.norm()))
    return {
        "update": name,
        "steps": len(cosines),
        "ended": ended,
        "norm": fmean(norms),
        "TRL's": fmean(their_norms),
        "cosine": f"{min(cosines):.6f}",
        "difference": max(differences),
    }


def main() -> None:
    cfg = flags.parse(Settings, "vs_trl_gradients", __doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), cfg.seed)
        rows = [row for method in ("ppo", "grpo") for row in compare(cfg, method, Path(folder))]
    note = (
        f"{cfg.steps} steps of {BATCH} responses of at most {cfg.length} tokens, seed {cfg.seed}."
    )
    record("vs_trl_gradients", "Updates beside TRL's on the same responses", rows, [note])


if __name__ == "__main__":
    main()
