"""What the paper's figures plot and its tables list, each quantity defined once.

Figures 2, 4, 5 and 6; Tables 2 and 3.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from rollout import Rollout

# What an evaluation has beside metrics: how it was sampled and graded, a checksum of its problems
SETTINGS, PROBLEMS = "settings", "problems_crc32"
Equal = Callable[[list[str], list[str]], list[bool | None]]

# The paper's five reflection patterns (§3.2). Case does not matter: "Wait," begins sentences.
REFLECTION = re.compile(r"wait,|recheck|retry|alternatively,|however,", re.IGNORECASE)
_NO_TAG = r"(?:(?!</?think>|</?answer>).)*"
FORMAT = re.compile(rf"{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*", re.DOTALL)


def follows_format(text: str) -> bool:
    """Whether a response (which begins after the prompt's `<think>`) closes its thought, gives one
    answer in tags and ends there: the format of Table 1, counted in Fig. 4.

    >>> follows_format(" 2+2=4 </think> <answer> \\\\boxed{4} </answer>")
    True
    >>> follows_format(" it is 4")
    False
    """
    return FORMAT.fullmatch(text.removesuffix("<|endoftext|>")) is not None


def reflects(text: str) -> bool:
    """Whether a response holds any of the paper's reflection patterns (Fig. 6).

    >>> reflects(" 3+4=8, Wait, 7"), reflects(" I await the answer")
    (True, False)
    """
    return REFLECTION.search(text) is not None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing, so that a missing quantity leaves a gap in a figure instead
    of a zero."""
    return sum(values) / len(values) if values else float("nan")


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Every per-response metric of a set of graded rollouts; each mean weighs responses equally.

    | name | meaning |
    |---|---|
    | reward | mean R, the share of correct and finished responses (Fig. 2) |
    | length | mean response tokens, EOS and stop tokens included (Fig. 2) |
    | format | share that `follows_format` (Fig. 4) |
    | reflection | share that `reflects` |
    | correct_length | mean tokens of the correct responses (Fig. 6) |
    | correct_reflection_length | mean tokens of the correct responses that reflect (Fig. 6) |
    | truncated | share cut off at the length limit |
    | pass_at_n | share of problems with at least one correct response |
    | timeout | share on which the grader ran out of time |
    """
    solved: dict[str, bool] = defaultdict(bool)
    for r in rollouts:
        solved[r.problem.source] |= r.reward > 0
    correct = [r for r in rollouts if r.reward > 0]
    return {
        "reward": mean([r.reward for r in rollouts]),
        "length": mean([len(r.token_ids) for r in rollouts]),
        "format": mean([float(follows_format(r.text)) for r in rollouts]),
        "reflection": mean([float(reflects(r.text)) for r in rollouts]),
        "correct_length": mean([len(r.token_ids) for r in correct]),
        "correct_reflection_length": mean([len(r.token_ids) for r in correct if reflects(r.text)]),
        "truncated": mean([float(r.finish_reason == "length") for r in rollouts]),
        "pass_at_n": mean([float(s) for s in solved.values()]),
        "timeout": mean([float(r.timeout) for r in rollouts]),
    }


def heldout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What `rollout_metrics` has, over all held-out responses; with several sets also
    "reward/<set>", the mean reward of each. A problem's set is what stands before the colon of its
    source."""
    sets = defaultdict(list)
    for r in rollouts:
        sets[r.problem.source.rpartition(":")[0]].append(r.reward)
    metrics = rollout_metrics(rollouts)
    if len(sets) > 1:
        metrics |= {f"reward/{name}": mean(rewards) for name, rewards in sets.items()}
    return metrics


def summary(rollouts: Sequence[Rollout], equal: Equal) -> dict[str, float]:
    """What a table of results shows of one benchmark, with everything that `rollout_metrics` has.

    | name | meaning |
    |---|---|
    | problems, samples | how many, and the fewest responses to one |
    | low, high | 95 % interval of "reward" (avg@k) over problems, see `interval` |
    | pass@1, 2, 4 … samples | mean over problems of `pass_at` |
    | maj@samples | share of problems whose most frequent answer is right, see `majority` |
    """
    groups = defaultdict(list)
    for r in rollouts:
        groups[r.problem.source].append(r)
    samples = min(map(len, groups.values()))
    low, high = interval([mean([r.reward for r in group]) for group in groups.values()])
    table = {"problems": len(groups), "samples": samples, "low": low, "high": high}
    table |= rollout_metrics(rollouts)
    right = [(len(group), sum(r.reward > 0 for r in group)) for group in groups.values()]
    for k in sorted({*(2**i for i in range(samples.bit_length())), samples}):
        table[f"pass@{k}"] = mean([pass_at(k, n, c) for n, c in right])
    table[f"maj@{samples}"] = majority(list(groups.values()), equal)
    return table


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that at least one of k responses is right, estimated without bias from c right
    ones among n ≥ k: 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def interval(means: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over problems, mean ± 1.96 s/√n, within [0, 1]: how far the score
    would move on other problems of the same kind. If all problems score alike, s says nothing and
    the rule of three gives 3/n.

    >>> [round(x, 2) for x in interval([0.0, 1.0] * 50)], interval([0.0] * 30)
    ([0.4, 0.6], (0.0, 0.1))
    """
    n = len(means)
    m = mean(means)
    s = math.sqrt(sum((x - m) ** 2 for x in means) / (n - 1)) if n > 1 else 0.0
    half = 1.96 * s / math.sqrt(n) if s else 3 / n
    return max(0.0, m - half), min(1.0, m + half)


def majority(groups: Sequence[Sequence[Rollout]], equal: Equal) -> float:
    """Share of problems whose most frequent answer is right. Answers that `equal` (the grader's)
    finds equal are one answer. A response without an answer, or cut off, has no vote. Among equally
    frequent answers each counts its share."""
    votes = [[r for r in group if r.answer and r.finish_reason == "stop"] for group in groups]
    texts = [sorted({r.answer for r in group if not r.problem.tests}) for group in votes]
    pairs = [pair for answers in texts for pair in combinations(answers, 2)]
    verdicts = equal([a for a, _ in pairs], [b for _, b in pairs])
    same = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict}
    shares = []
    for group in votes:
        camps = _camps(group, same)
        largest = max(map(len, camps), default=0)
        most = [float(camp[0].reward > 0) for camp in camps if len(camp) == largest]
        shares.append(mean(most) if most else 0.0)
    return mean(shares)


def _camps(group: Sequence[Rollout], same: set[tuple[str, str]]) -> list[list[Rollout]]:
    """The responses to one problem, grouped by answer; `same` holds pairs of equal answers."""
    camps: list[list[Rollout]] = []
    for r in sorted(group, key=lambda r: r.answer):
        for camp in camps:
            if camp[0].answer == r.answer or (camp[0].answer, r.answer) in same:
                camp.append(r)
                break
        else:
            camps.append([r])
    return camps


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """1 − Var(target − V) / Var(target) over all response tokens: 1 is a perfect critic, 0 a
    constant one, below 0 worse than a constant. NaN when all targets are equal.

    >>> import torch
    >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    1.0
    """
    variance = targets.var(correction=0)
    if not variance > 0:
        return float("nan")
    return float(1 - (targets - values).var(correction=0) / variance)


def significant(value: float, digits: int = 4) -> float:
    """A number shortened to so many significant digits.

    >>> significant(0.123456), significant(1234567.0)
    (0.1235, 1235000.0)
    """
    return float(f"{value:.{digits}g}")


def comparable(
    evaluations: Sequence[dict[str, Any]], problems: bool = True
) -> list[dict[str, Any]]:
    """Those of a run's evaluations that were made like the last one: with the same settings of
    sampling and grading and, with `problems`, on the same problems. A resumed run may have changed
    them. Early versions did not record them: then all are."""
    names = (SETTINGS, PROBLEMS) if problems else (SETTINGS,)
    last = evaluations[-1]
    return [e for e in evaluations if all(e.get(n, last.get(n)) == last.get(n) for n in names)]
