"""One response, one reward (§2.1.2): compared with the gold answer, run against tests, or judged by a function of one's own.

text ─┬─ the problem has an answer ──▶ grader ──▶ Math-Verify, in a worker         ─┐
      ├─ the problem has tests ──────▶ programs ▶ the program, in a sandbox         ─┼─▶ R, and 0 if truncated
      └─ --reward module:function ───▶ your function of (response, problem)        ─┘
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from data import Problem
from grading import programs
from grading.pool import Grader
from reports.metrics import describe, mean
from rollout import Rollout, gather_rollouts

Reward = Callable[[str, Problem], float]


def score(rollouts: list[Rollout], grader: Grader, reward: Reward | None = None) -> list[Rollout]:
    """Set the reward of each rollout, in place: R = 1 if its answer is right and it stopped by itself, else 0 (§2.1.2).
    A truncated response gets 0 whatever it holds. Returns them.

    A problem with tests is a programming problem: its answer is a program, which is run in a sandbox. With a `reward` of
    one's own (`--reward module:function`) R = reward(response, problem) for every response that stopped by itself.
    """
    if reward:
        for r in rollouts:
            r.reward = _finite(reward, r) if r.finish_reason == "stop" else 0.0
        return rollouts
    compared = [r for r in rollouts if not r.problem.tests]
    grades = grader.grade([r.text for r in compared], [r.problem.answer for r in compared])
    for r, grade in zip(compared, grades, strict=True):
        r.answer, r.timeout, r.reward = (
            grade.answer,
            grade.timeout,
            grade.reward * (r.finish_reason == "stop"),
        )
    _run_programs([r for r in rollouts if r.problem.tests])
    return rollouts


def _run_programs(rollouts: list[Rollout]) -> None:
    if not rollouts:
        return
    for r in rollouts:
        r.answer = programs.extract_program(
            r.text.rpartition("<answer>")[2].partition("</answer>")[0]
        )
    verdicts = programs.judge(
        [r.answer for r in rollouts], [programs.decode_tests(r.problem.tests) for r in rollouts]
    )
    for r, verdict in zip(rollouts, verdicts, strict=True):
        r.reward, r.timeout = (
            float(verdict.passed and r.finish_reason == "stop"),
            verdict.reason == "time limit",
        )


def _finite(reward: Reward, r: Rollout) -> float:
    value = float(reward(r.text, r.problem))
    if not math.isfinite(value):
        name = f"{reward.__module__}:{reward.__name__}"
        raise ValueError(f"--reward {name}: gave {value} for a response to {r.problem.source}")
    return value


def evaluate(
    mine: list[Rollout], grader: Grader, reward: Reward | None = None
) -> tuple[dict[str, float], list[Rollout]]:
    """Score this rank's share of the responses to held-out problems, gather, and describe them; with several sets,
    "reward" is the mean over all responses and "reward/<set>" each set's. Returns the metrics and all responses."""
    rollouts = gather_rollouts(score(mine, grader, reward))
    sets = by_set(rollouts)
    each = (
        {f"reward/{name}": mean([r.reward for r in part]) for name, part in sets.items()}
        if len(sets) > 1
        else {}
    )
    return describe(rollouts) | each, rollouts


def by_set(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """The responses of each set, which is what stands before the colon of a problem's source."""
    sets = defaultdict(list)
    for r in rollouts:
        sets[r.problem.source.rpartition(":")[0]].append(r)
    return dict(sets)


def load_custom_reward(name: str) -> Reward | None:
    """The function that `--reward module:function` names, from the folder of the program or the current one; none for "".
    Raises ValueError when there is no such function."""
    if not name:
        return None
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--reward {name}: expected module:function of a module that can be imported ({error})"
        ) from None
    if not callable(found):
        raise ValueError(f"--reward {name}: is not a function")
    return found
