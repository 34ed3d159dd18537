"""What a step costs beside the passes it cannot do without.

    python -m benchmarks.step_overhead [--steps 40] [flags of train.py]

Trains for some steps and, after each, does the bare passes of that step on the same tensors, with copies of the same models,
in the same process: the engine decoding the same prompts with the same seeds, and nothing else; values forward; critic
and policy forward, backward and optimizer step on micro-batches packed beforehand. What the step takes beyond their sum the
loop adds: grading, packing, metrics, logs, clipping. The first steps, when memory is still being taken, do not count.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import config
import data
import ppo
import preflight
import rollout
import train
from benchmarks.record import record
from packing import micro_batches, mini_batches
from rollout import Rollout

SKIP = 3  # first steps
WHAT = {
    "sample": "seeds, texts of the responses",
    "grade": "comparing answers in the grader's processes",
    "values": "packing; advantages",
    "critic": "packing, loss, gradient clipping",
    "policy": "packing, loss, gradient clipping, statistics",
    "sync": "copying the weights to the sampler",
    "the rest": "metrics, files, the line of the step",
}


class Bare:
    """The bare passes of a run, timed after each of its steps."""

    def __init__(self, cfg: config.Config, problems: list[data.Problem]) -> None:
        self.cfg, self.problems = cfg, problems
        self.seconds: list[dict[str, float]] = []  # of each step
        self.whole: list[float] = []
        self.decoding = 0.0  # of the step to come

    def models(self, engine: Any, policy: torch.nn.Module, critic: torch.nn.Module) -> None:
        self.engine, self.trained = engine, (policy, critic)
        self.copies = [copy.deepcopy(m) for m in self.trained]
        self.optimizers = [ppo.adamw(list(m.parameters())) for m in self.copies]

    def decode(self, step: int, sampling: train.Sampling) -> None:
        """What `rollout.sample` will ask of the engine in `step`, which holds that step's weights already."""
        problems = data.take(self.problems, step, self.cfg.prompts, self.cfg.seed)
        streams = [rollout._number(f"{self.cfg.seed}/{step}/{p}") for p in range(len(problems))]
        prompts = [problem.prompt_ids for problem in problems for _ in range(self.cfg.samples)]
        seeds = [stream + i for stream in streams for i in range(self.cfg.samples)]
        with timed() as seconds:
            self.engine.generate(prompts, seeds, sampling)
        self.decoding = seconds()

    def passes(self, rollouts: list[Rollout], step: int) -> dict[str, float]:
        """Seconds of each, on this step's responses."""
        cfg, (policy, critic), (policy_optimizer, critic_optimizer) = (
            self.cfg,
            self.copies,
            self.optimizers,
        )
        for module, trained in zip(self.copies, self.trained, strict=True):
            module.load_state_dict(trained.state_dict())
        lengths = [len(r.token_ids) for r in rollouts]
        minis = mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")
        packed = [list(micro_batches(rollouts, members, cfg.micro_tokens)) for members in minis]
        whole = list(micro_batches(rollouts, range(len(rollouts)), cfg.micro_tokens))
        with timed() as values, torch.no_grad():
            for micro in whole:
                critic(micro)
        with timed() as critic_update:
            for rows in packed:
                for micro in rows:
                    critic(micro).square().mean().backward()
                critic_optimizer.step()
                critic_optimizer.zero_grad()
        with timed() as policy_update:
            for micro in whole:
                policy(micro)[0].mean().backward()
            policy_optimizer.step()
            policy_optimizer.zero_grad()
        return {
            "sample": self.decoding,
            "values": values(),
            "critic": critic_update(),
            "policy": policy_update(),
        }


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Gives a function that, called afterwards, says how many seconds the block took."""
    start, end = time.perf_counter(), [0.0]
    yield lambda: end[0] - start
    end[0] = time.perf_counter()


def watch(bare: Bare) -> list[dict[str, float]]:
    """Have the training call `bare` between its steps; returns the list that its own phases' seconds will come into."""
    phases: list[dict[str, float]] = []
    write, load, open_sampler = train.RunLog.step, train.load_models, train.open_sampler
    engines: list[Any] = []
    began = [0.0]

    def opened(*args: Any, **kwargs: Any) -> Any:
        engines.append(open_sampler(*args, **kwargs))
        return engines[0]

    def loaded(cfg: config.Config, path: str) -> Any:
        models = load(cfg, path)
        bare.models(engines[0], *models[:2])
        return models

    def step(
        self: Any, number: int, metrics: dict[str, float], rollouts: list[Rollout], *more: Any
    ) -> None:
        phases.append(dict(self.seconds))
        write(self, number, metrics, rollouts, *more)
        whole = time.perf_counter() - began[0]
        if number:  # of step 0 the beginning is not known
            bare.whole.append(whole)
            bare.seconds.append(bare.passes(rollouts, number))
        cfg = bare.cfg
        bare.decode(number + 1, train.Sampling(cfg.response_tokens, cfg.temperature, cfg.top_p))
        began[0] = time.perf_counter()

    train.RunLog.step, train.load_models, train.open_sampler = step, loaded, opened
    return phases


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        flags = ["--steps", "40", "--runs", runs, "--checkpoint-every", "0", *sys.argv[1:]]
        cfg = config.parse(flags)
        prepared = preflight.prepare(cfg)
        bare = Bare(cfg, prepared.problems)
        phases = watch(bare)
        train.train(cfg, prepared)

    def middle(values: list[float]) -> float:
        return statistics.mean(values[SKIP:])

    step, needed = middle(bare.whole), [sum(seconds.values()) for seconds in bare.seconds]
    mine = {name: middle([seconds[name] for seconds in phases[1:]]) for name in phases[1]}
    mine["the rest"] = step - sum(mine.values())
    rows = []
    for name, seconds in mine.items():
        passes = middle([found.get(name, 0.0) for found in bare.seconds])
        row = {
            "phase": name,
            "step, ms": 1e3 * seconds,
            "bare pass, ms": 1e3 * passes,
            "more, ms": 1e3 * (seconds - passes),
        }
        rows.append(
            row
            | {
                "step ÷ bare": seconds / passes if passes else None,
                "what more there is": WHAT[name],
            }
        )
    total = middle(needed)
    sums = {"step, ms": 1e3 * step, "bare pass, ms": 1e3 * total, "more, ms": 1e3 * (step - total)}
    rows.append({"phase": "whole step"} | sums | {"step ÷ bare": step / total})
    note = f"Means of {len(needed) - SKIP} steps of {cfg.prompts} × {cfg.samples} responses; model {cfg.model}, one thread."
    record("step_overhead", "A step beside the passes it needs", rows, [note])


if __name__ == "__main__":
    main()
