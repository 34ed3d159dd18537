"""The reward (§2.1.2): R = 1 if a response is right and ended by itself, else 0.

    text ─┬─ the problem has a gold answer ─▶ grading.pool: extract, compare in a worker ─┐
          ├─ the problem has tests ─────────▶ grading.programs: run in a sandbox ─────────┼─▶ R
          └─ --reward module:function ──────▶ your function of (response, problem) ───────┘

There is no format reward and no partial credit. A truncated response gets 0 whatever it holds.
"""

import inspect
import math
import sys
from collections.abc import Callable
from importlib import import_module
from numbers import Real
from pathlib import Path

from data import Problem
from grading.pool import Grader
from rollout import Rollout

CustomReward = Callable[[str, Problem], float]


class RewardError(Exception):
    """What is wrong with a reward of your own, in one line. Its `__cause__` is the exception that
    the function raised, or None if it returned what is no reward."""


def score(
    rollouts: list[Rollout], grader: Grader, custom_reward: CustomReward | None = None
) -> list[Rollout]:
    """Set R of each rollout, in place, and return them:

        R = points  if the response ended by itself (EOS or a stop string),  else 0

    where the paper's points are 1 for the right answer and 0 for any other. A problem with tests is
    a programming problem; its answer is a program that must pass them. With a `custom_reward`
    (`--reward module:function`) points = custom_reward(response, problem).
    """
    if custom_reward is None:
        points = _grade(rollouts, grader)
    else:
        points = [_call(custom_reward, r) for r in rollouts]
    for r, value in zip(rollouts, points, strict=True):
        r.reward = value if r.finish_reason == "stop" else 0.0
    return rollouts


def _grade(rollouts: list[Rollout], grader: Grader) -> list[float]:
    """1 for each right answer, else 0; sets `answer` and `timeout`."""
    points = [0.0] * len(rollouts)
    compared = [i for i, r in enumerate(rollouts) if not r.problem.tests]
    texts = [rollouts[i].text for i in compared]
    golds = [rollouts[i].problem.answer for i in compared]
    for i, grade in zip(compared, grader.grade(texts, golds), strict=True):
        rollouts[i].answer = grade.answer
        rollouts[i].timeout = grade.timeout
        points[i] = grade.reward
    programs = [i for i, r in enumerate(rollouts) if r.problem.tests]
    passed = _run_programs([rollouts[i] for i in programs])
    for i, value in zip(programs, passed, strict=True):
        points[i] = value
    return points


def _run_programs(rollouts: list[Rollout]) -> list[float]:
    """1 for each program that passes its tests, else 0; sets `answer` and `timeout`. As for
    mathematics, only the last closed `<answer>…</answer>` counts."""
    if not rollouts:
        return []
    from grading import programs  # only programming problems need the sandbox

    for r in rollouts:
        r.answer = programs.extract_program(programs.answer_content(r.text))
    tests = [programs.decode_tests(r.problem.tests) for r in rollouts]
    verdicts = programs.judge([r.answer for r in rollouts], tests)
    for r, verdict in zip(rollouts, verdicts, strict=True):
        r.timeout = verdict.reason == "time limit"
    return [float(verdict.passed) for verdict in verdicts]


def _call(custom_reward: CustomReward, r: Rollout) -> float:
    """The points of a finished response; a truncated one gets 0 without a call. Raises RewardError
    when the function raises anything, or returns anything but a finite number."""
    if r.finish_reason != "stop":
        return 0.0
    where = f"for a response to {r.problem.source} ({r.problem.question[:60]!r})"
    try:
        value = custom_reward(r.text, r.problem)
    except Exception as error:
        raise RewardError(f"{_flag(custom_reward)} raised {_one_line(error)} {where}") from error
    if not (isinstance(value, Real) and math.isfinite(value)):  # Real: bool, int, float, numpy's
        found = f"{type(value).__name__} {value!r:.60}"
        raise RewardError(
            f"{_flag(custom_reward)} returned {found} {where}; expected a finite number"
        )
    return float(value)


def _flag(custom_reward: CustomReward) -> str:
    """The flag that named the function; other callables may have no name."""
    name = getattr(custom_reward, "__qualname__", type(custom_reward).__name__)
    return f"--reward {custom_reward.__module__}:{name}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_custom_reward(name: str) -> CustomReward | None:
    """The function that `--reward module:function` names, from the program's folder or the current
    one; None for "". Raises ValueError when there is no such function of (response, problem)."""
    if not name:
        return None
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        loaded = getattr(import_module(module), function)
    except Exception as error:  # whatever its code raises
        raise ValueError(
            f"--reward {name}: expected module:function of a module that can be imported "
            f"({_one_line(error)})"
        ) from error
    if not callable(loaded):
        raise ValueError(f"--reward {name}: is not a function")
    try:
        inspect.signature(loaded).bind("", None)
    except TypeError as error:
        raise ValueError(
            f"--reward {name}: is no function of (response, problem) ({error})"
        ) from None
    except ValueError:
        pass  # some functions of C do not tell
    return loaded
