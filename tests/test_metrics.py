"""reports/metrics.py: every quantity of the figures, on responses that can be counted by hand."""

import math

import pytest
import torch

from data import Problem
from reports import metrics
from rollout import Rollout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r" 2+2=4 </think> <answer> \boxed{4} </answer>", True),
        (" a\nb </think>\n<answer>\n4\n</answer>\n", True),
        ("</think><answer></answer>", True),
        (" 4 <answer> 4 </answer>", False),  # the thought has no closing tag
        (" 4 </think> 4", False),  # no answer
        (" 4 </think> <answer> 4", False),  # the answer has no closing tag
        (" 4 </think> so <answer> 4 </answer>", False),  # text between thought and answer
        (" </think> <answer> 1 </answer> <answer> 2 </answer>", False),  # two answers
        (" <think> 4 </think> <answer> 4 </answer>", False),  # a second opening tag
    ],
)
def test_format(text: str, expected: bool) -> None:
    assert metrics.follows_format(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, no", True),
        ("wait no", False),
        ("let me recheck", True),
        ("I retry", True),
        ("However, x", True),
        ("Alternatively, y", True),
        ("however it is", False),
    ],
)
def test_reflection(text: str, expected: bool) -> None:
    assert metrics.reflects(text) is expected


def test_rollout_metrics() -> None:
    a, b = Problem("a", "", ""), Problem("b", "", "")
    good = " </think> <answer> 1 </answer>"
    rollouts = [
        Rollout(a, [1] * 10, [], "stop", good, reward=1.0),
        Rollout(a, [1] * 30, [], "stop", " wait," + good, reward=1.0),
        Rollout(b, [1] * 20, [], "length", " however,", reward=0.0),
        Rollout(b, [1] * 4, [], "stop", good, reward=0.0, timeout=True),
    ]
    assert metrics.rollout_metrics(rollouts) == {
        "reward": 0.5,
        "length": 16.0,
        "format": 0.75,
        "reflection": 0.5,
        "correct_length": 20.0,
        "correct_reflection_length": 30.0,
        "truncated": 0.25,
        "pass_at_n": 0.5,
        "timeout": 0.25,
    }
    assert math.isnan(metrics.rollout_metrics(rollouts[2:])["correct_length"])


def test_explained_variance() -> None:
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert metrics.explained_variance(target, target) == 1
    assert metrics.explained_variance(torch.full((4,), 0.3), target) == pytest.approx(0)
    assert metrics.explained_variance(-target, target) < 0
    assert math.isnan(metrics.explained_variance(target, torch.ones(4)))
