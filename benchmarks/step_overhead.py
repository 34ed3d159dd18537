"""Measure how much longer a training step takes than the passes that it consists of.

    python -m benchmarks.step_overhead [--steps 40] [flags of train.py]

A short training with a critic runs the stages of train.py. Before and after each step, in the same
process, the bare passes of that step are timed on copies of the models:

- sampling: the sampler decodes the same prompts with the same seeds, and nothing else
- values: the critic's forward pass
- critic and policy: forward, backward and optimizer step

Their packs are made beforehand. What the step takes beyond the sum of these passes is its overhead:
grading, packing, metrics, logs, clipping. The first steps do not count, because the process is
still allocating memory.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import config
import data
import distributed
import ppo
import train
from benchmarks.record import Row, record
from config import Config
from gae import normalize_advantages
from packing import MicroBatch, micro_batches, mini_batches
from preflight import Inputs, prepare
from reports.log import RunLog
from reports.metrics import rollout_metrics
from rollout import Rollout, stream_seed, sync_weights
from train import Models, Sampler

SKIPPED = 4  # first steps
OVERHEAD = {  # phase → what it does beside its bare pass
    "sample": "seeds, texts of the responses",
    "grade": "comparing answers in the grader's processes",
    "values": "packing; advantages",
    "critic": "packing, loss, gradient clipping",
    "policy": "packing, loss, gradient clipping, statistics",
    "sync": "copying the weights to the sampler",
    "the rest": "metrics, files, the line of the step",
}
Seconds = dict[str, float]  # phase → seconds


class Timed(NamedTuple):
    """Seconds of one step."""

    whole: float
    phases: Seconds  # as the step measures them itself
    bare: Seconds  # of the bare passes


# ── the step ──────────────────────────────────────────────────────────────────────────────────────


def run_step(
    cfg: Config, inputs: Inputs, sampler: Sampler, models: Models, log: RunLog, step: int
) -> tuple[list[Rollout], Seconds]:
    """One step of train.train; returns its responses and the seconds of its phases."""
    rollouts = train.collect_rollouts(cfg, inputs, sampler, log, step)
    metrics = rollout_metrics(rollouts)
    if models.critic:
        with log.phase("values"):
            values = train.predict_values(cfg, models.critic, rollouts)
            advantages, targets = train.compute_advantages(cfg, models, rollouts, values)
        with log.phase("critic"):
            metrics |= train.update_critic(cfg, models, rollouts, values, targets, step)
    else:
        values = None
        advantages = train.compute_group_advantages(cfg, rollouts)
    advantages = normalize_advantages(advantages)
    with log.phase("policy"):
        metrics |= train.update_policy(cfg, models, rollouts, advantages, step)
    with log.phase("sync"):
        sync_weights(sampler, models.policy)
    phases = dict(log.seconds)
    log.step(step, metrics, rollouts, inputs.tokenizer, values, advantages)
    return rollouts, phases


# ── the bare passes ───────────────────────────────────────────────────────────────────────────────


class BarePasses:
    """The passes that a step cannot do without, on copies of its models."""

    def __init__(self, cfg: Config, models: Models) -> None:
        self.cfg = cfg
        self.models = models
        self.policy = copy.deepcopy(models.policy)
        self.critic = copy.deepcopy(models.critic)
        self.policy_optimizer = ppo.adamw(list(self.policy.parameters()))
        self.critic_optimizer = ppo.adamw(list(self.critic.parameters()))

    def sample(self, inputs: Inputs, sampler: Sampler, step: int) -> float:
        """Seconds in which the sampler decodes the step's responses. It already holds the weights
        that the step samples with."""
        cfg = self.cfg
        prompts, seeds = [], []
        for p, problem in enumerate(data.take(inputs.problems, step, cfg.prompts, cfg.seed)):
            for i in range(cfg.samples):
                prompts.append(problem.prompt_ids)
                seeds.append(stream_seed(f"{cfg.seed}/{step}/{p}", i))
        return timed(lambda: sampler.generate(prompts, seeds, cfg.sampling))

    def train(self, rollouts: Sequence[Rollout], step: int) -> Seconds:
        """Seconds of the critic's and the policy's passes over the step's responses."""
        cfg = self.cfg
        self.policy.load_state_dict(self.models.policy.state_dict())
        self.critic.load_state_dict(self.models.critic.state_dict())
        lengths = [len(r.token_ids) for r in rollouts]
        batches = mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")
        all_packs = self._packs(rollouts, range(len(rollouts)))
        packs = [self._packs(rollouts, members) for members in batches]
        return {
            "values": timed(lambda: self._predict_values(all_packs)),
            "critic": timed(lambda: self._update_critic(packs)),
            "policy": timed(lambda: self._update_policy(all_packs)),
        }

    def _packs(self, rollouts: Sequence[Rollout], members: Sequence[int]) -> list[MicroBatch]:
        device = distributed.device()
        return list(micro_batches(rollouts, members, self.cfg.micro_tokens, device))

    @torch.no_grad()
    def _predict_values(self, packs: list[MicroBatch]) -> None:
        for micro in packs:
            self.critic(micro)

    def _update_critic(self, batches: list[list[MicroBatch]]) -> None:
        for packs in batches:
            for micro in packs:
                self.critic(micro).square().mean().backward()
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad()

    def _update_policy(self, packs: list[MicroBatch]) -> None:
        for micro in packs:
            logp, _ = self.policy(micro)
            logp.mean().backward()
        self.policy_optimizer.step()
        self.policy_optimizer.zero_grad()


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ── all steps ─────────────────────────────────────────────────────────────────────────────────────


def measure(cfg: Config, inputs: Inputs) -> list[Timed]:
    """Train for cfg.steps steps; returns the seconds of each."""
    sampler = train.start_sampler(cfg, inputs)
    models = train.load_models(cfg, inputs.model_path)
    bare = BarePasses(cfg, models)
    sync_weights(sampler, models.policy)
    steps = []
    log = RunLog(Path(cfg.runs) / cfg.name, cfg)
    with inputs.grader, log:
        for step in range(cfg.steps):
            decoding = bare.sample(inputs, sampler, step)
            start = time.perf_counter()
            rollouts, phases = run_step(cfg, inputs, sampler, models, log, step)
            whole = time.perf_counter() - start
            passes = {"sample": decoding} | bare.train(rollouts, step)
            steps.append(Timed(whole, phases, passes))
    sampler.close()
    return steps


def table(steps: Sequence[Timed]) -> list[Row]:
    """A row for each phase and one for the whole step: means over the steps."""
    whole = mean(step.whole for step in steps)
    phases = {name: mean(step.phases[name] for step in steps) for name in steps[0].phases}
    phases["the rest"] = whole - sum(phases.values())
    bare = {name: mean(step.bare[name] for step in steps) for name in steps[0].bare}
    rows = [
        row(name, seconds, bare.get(name, 0.0)) | {"what more there is": OVERHEAD[name]}
        for name, seconds in phases.items()
    ]
    return [*rows, row("whole step", whole, sum(bare.values()))]


def row(name: str, seconds: float, bare: float) -> Row:
    """Milliseconds of a phase and of its bare pass."""
    return {
        "phase": name,
        "step, ms": 1e3 * seconds,
        "bare pass, ms": 1e3 * bare,
        "more, ms": 1e3 * (seconds - bare),
        "step ÷ bare": seconds / bare if bare else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        flags = ["--steps", "40", "--runs", runs, "--checkpoint-every", "0", *sys.argv[1:]]
        cfg = config.parse(flags, description=__doc__)
        if cfg.advantage != "gae" or cfg.offload or cfg.steps <= SKIPPED:
            sys.exit(
                "benchmarks.step_overhead: needs --advantage gae, no --offload, and more than "
                f"{SKIPPED} steps"
            )
        try:
            inputs = prepare(cfg)
        except (ValueError, OSError) as error:
            sys.exit(f"benchmarks.step_overhead: {error}")
        steps = measure(cfg, inputs)[SKIPPED:]
    note = (
        f"Means of {len(steps)} steps of {cfg.prompts} × {cfg.samples} responses; model "
        f"{cfg.model}, one thread."
    )
    record("step_overhead", "A step beside the passes it needs", table(steps), [note])


if __name__ == "__main__":
    main()
