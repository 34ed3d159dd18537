"""What the figures of the paper plot, each quantity defined once (Figs. 2, 4, 5 and 6)."""

import re
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from rollout import Rollout

# The paper's five reflection patterns (§3.2). Case does not matter: "Wait," at the start of a sentence reflects too.
REFLECTION = re.compile(r"wait,|recheck|retry|alternatively,|however,", re.IGNORECASE)
FORMAT = re.compile(r"(?:(?!<think>|</think>|<answer>|</answer>).)*</think>\s*<answer>(?:(?!</?answer>|</?think>).)*</answer>\s*", re.DOTALL)  # fmt: skip  # noqa: E501


def follows_format(text: str) -> bool:
    """Whether a response (which begins after the prompt's `<think>`) closes its thought, gives one answer in tags and
    ends there: the format of Table 1, counted in Fig. 4.

    >>> follows_format(" 2+2=4 </think> <answer> \\\\boxed{4} </answer>"), follows_format(" it is 4")
    (True, False)
    """
    return FORMAT.fullmatch(text.removesuffix("<|endoftext|>")) is not None


def reflects(text: str) -> bool:
    """Whether a response holds any of the paper's reflection patterns (Fig. 6).

    >>> reflects(" 3+4=8, Wait, 7"), reflects(" I await the answer")
    (True, False)
    """
    return REFLECTION.search(text) is not None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN for nothing, so that an absent quantity leaves a gap in a figure instead of a zero."""
    return sum(values) / len(values) if values else float("nan")


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Every per-response metric of a set of graded rollouts; each mean weighs responses equally.

    | name | meaning |
    |---|---|
    | reward | mean R, the share of correct and finished responses (Fig. 2) |
    | length | mean response tokens, EOS and stop tokens included (Fig. 2) |
    | format | share that `follows_format` (Fig. 4) |
    | reflection | share that `reflects` |
    | correct_length, correct_reflection_length | mean tokens of the correct responses, of those that also reflect (Fig. 6) |
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
        "length": mean([len(r.ids) for r in rollouts]),
        "format": mean([float(follows_format(r.text)) for r in rollouts]),
        "reflection": mean([float(reflects(r.text)) for r in rollouts]),
        "correct_length": mean([len(r.ids) for r in correct]),
        "correct_reflection_length": mean([len(r.ids) for r in correct if reflects(r.text)]),
        "truncated": mean([float(r.finish == "length") for r in rollouts]),
        "pass_at_n": mean([float(s) for s in solved.values()]),
        "timeout": mean([float(r.timeout) for r in rollouts]),
    }


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """1 − Var(target − V) / Var(target) over all response tokens: 1 is a perfect critic, 0 a constant one, below 0 worse
    than a constant. NaN when all targets are equal.

    >>> import torch
    >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    1.0
    """
    variance = targets.var(correction=0)
    return float(1 - (targets - values).var(correction=0) / variance) if variance > 0 else float("nan")
