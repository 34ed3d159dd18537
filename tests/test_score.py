"""reward.py: what one response earns, by comparison, by running it, or by a function of one's own."""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import pytest

import data
import reward
from data import Problem
from grading import sandbox
from grading.pool import Grader
from reports.metrics import heldout_metrics, interval, majority, pass_at, summary
from rollout import Rollout


@pytest.fixture(scope="module")
def grader() -> Grader:
    with Grader(workers=1) as grader:
        yield grader


def answered(problem: Problem, text: str, finish: str = "stop") -> Rollout:
    return Rollout(problem, [0] * 5, [], finish, f"so</think> <answer>{text}</answer>")


def test_right_and_finished_earns_one(grader: Grader) -> None:
    half = Problem("set:1", "", "\\frac{1}{2}")
    rollouts = [answered(half, "0.5"), answered(half, "0.25"), answered(half, "0.5", "length")]
    assert [r.reward for r in reward.score(rollouts, grader)] == [1.0, 0.0, 0.0]
    assert [r.answer for r in rollouts] == ["0.5", "0.25", "0.5"]


def test_a_reward_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grader: Grader
) -> None:
    (tmp_path / "mine_reward.py").write_text(
        "def brief(response, problem): return len(problem.answer) / len(response)"
    )
    monkeypatch.chdir(tmp_path)
    own = reward.load_custom_reward("mine_reward:brief")
    problem = Problem("set:1", "", "12")
    whole, cut = reward.score(
        [answered(problem, "12"), answered(problem, "12", "length")], grader, own
    )
    assert whole.reward == 2 / len(whole.text) and cut.reward == 0
    assert reward.load_custom_reward("") is None
    for wrong in ("mine_reward:long", "no_such_module:f", "mine_reward", "math:pi"):
        with pytest.raises(ValueError, match=f"--reward {wrong}: "):
            reward.load_custom_reward(wrong)
    with pytest.raises(ValueError, match="gave nan for a response to set:1"):
        reward.score([answered(problem, "12")], grader, lambda response, problem: math.nan)


def test_sets_are_told_apart(grader: Grader) -> None:
    a, b = Problem("a:1", "", "1"), Problem("b:1", "", "2")
    rollouts = [answered(a, "1"), answered(a, "1"), answered(b, "1"), answered(b, "2")]
    metrics = heldout_metrics(reward.score(rollouts, grader))
    assert (metrics["reward"], metrics["reward/a"], metrics["reward/b"]) == (0.75, 1.0, 0.5)
    assert "reward/a" not in heldout_metrics(rollouts[:1])


@pytest.mark.skipif(bool(sandbox.unavailable()), reason="no sandbox here")
def test_programs_earn_one_for_passing_all_tests(tmp_path: Path, grader: Grader) -> None:
    """From a benchmark's row to rewards, beside a problem with an answer; a hostile program costs its neighbours nothing."""
    cases = [
        {"input": given, "output": wanted, "testtype": "stdin"}
        for given, wanted in (("1 2", "3"), ("5 6", "11"))
    ]
    shown, hidden = (json.dumps([case]) for case in cases)
    row = {"question_content": "Add.", "public_test_cases": shown, "private_test_cases": hidden}
    (tmp_path / "code.jsonl").write_text(json.dumps(row))
    (add,) = data.load(tmp_path / "code.jsonl")
    right, wrong = "print(sum(map(int, input().split())))", "print(3)"
    hostile = "import os\nwhile True: os.fork()"
    written = [
        answered(add, f"\n```python\n{program}\n```\n")
        for program in (right, wrong, hostile, right)
    ]
    bare, cut = answered(add, right), answered(add, f"\n```python\n{right}\n```\n", "length")
    compared = answered(Problem("set:1", "", "3"), "3")
    rewards = [r.reward for r in reward.score([*written, bare, cut, compared], grader)]
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert written[0].answer.strip() == right


# ── figures of a table ───────────────────────────────────────────────────────────────────────────────────────────────


def test_pass_at_is_the_share_of_all_choices() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 1)]:
        chosen = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at(k, n, c) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    inside = 0
    for _ in range(1000):
        means = [
            sum(rng.random() < rng.betavariate(1, 1) for _ in range(4)) / 4 for _ in range(100)
        ]
        low, high = interval(means)
        inside += low <= 0.5 <= high
    assert 930 <= inside <= 970
    assert interval([1.0] * 60) == (0.95, 1.0)


def test_majority_counts_equal_answers_as_one(grader: Grader) -> None:
    problem = Problem("set:1", "", "\\frac{1}{2}")
    texts = ["0.5", "\\frac{1}{2}", "3", "1/2", "4"]
    group = reward.score([answered(problem, text) for text in texts], grader)
    assert majority([group], grader.equal) == 1.0  # three ways to say a half
    tie = reward.score([answered(problem, text) for text in ("0.5", "3")], grader)
    cut = reward.score([answered(problem, "3"), answered(problem, "0.5", "length")], grader)
    none = reward.score([answered(problem, "")], grader)
    assert [majority([g], grader.equal) for g in (tie, cut, none)] == [0.5, 0.0, 0.0]
    assert majority([group, tie], grader.equal) == 0.75


def test_summary(grader: Grader) -> None:
    a, b = Problem("set:1", "", "1"), Problem("set:2", "", "2")
    rollouts = reward.score(
        [*(answered(a, t) for t in "1113"), *(answered(b, t) for t in "1123")], grader
    )
    s = summary(rollouts, grader.equal)
    assert (s["problems"], s["samples"], s["reward"]) == (2, 4, 0.5)
    assert (s["pass@1"], s["pass@2"], s["pass@4"], s["maj@4"]) == (0.5, 0.75, 1.0, 0.5)
    assert s["low"] < 0.5 < s["high"] and s["length"] == 5
