"""reward.py: the reward of a response, by comparison, by running a program or by a custom function.
reports/metrics.py: what a table of results shows."""

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from test_sandbox import needs_sandbox

import data
import reward
from data import Problem
from grading.pool import Grader
from reports.metrics import heldout_metrics, interval, majority, pass_at, summary
from rollout import Rollout


@pytest.fixture(scope="module")
def grader() -> Grader:
    with Grader(workers=1) as grader:
        yield grader


def answered(problem: Problem, text: str, finish_reason: str = "stop") -> Rollout:
    """A response to `problem` that gives `text` as its answer."""
    return Rollout(problem, [0] * 5, [], finish_reason, f"so</think> <answer>{text}</answer>")


def test_right_and_finished_earns_one(grader: Grader) -> None:
    half = Problem("set:1", "", "\\frac{1}{2}")
    rollouts = [answered(half, "0.5"), answered(half, "0.25"), answered(half, "0.5", "length")]
    assert [r.reward for r in reward.score(rollouts, grader)] == [1.0, 0.0, 0.0]
    assert [r.answer for r in rollouts] == ["0.5", "0.25", "0.5"]


def test_custom_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grader: Grader) -> None:
    (tmp_path / "mine_reward.py").write_text(
        "def brief(response, problem): return len(problem.answer) / len(response)"
    )
    monkeypatch.chdir(tmp_path)
    brief = reward.load_custom_reward("mine_reward:brief")
    problem = Problem("set:1", "", "12")
    finished, truncated = answered(problem, "12"), answered(problem, "12", "length")
    reward.score([finished, truncated], grader, brief)
    assert finished.reward == 2 / len(finished.text)
    assert truncated.reward == 0
    assert reward.load_custom_reward("") is None
    for name in ("mine_reward:long", "no_such_module:f", "mine_reward", "math:pi"):
        with pytest.raises(ValueError, match=f"--reward {name}: "):
            reward.load_custom_reward(name)


def test_a_custom_reward_that_fails_names_function_problem_and_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grader: Grader
) -> None:
    problem = Problem("set.json:7", "2+2=? " + "please " * 20, "4")

    def said(function: Callable) -> str:
        with pytest.raises(reward.RewardError) as error:
            reward.score([answered(problem, "4")], grader, function)
        assert "\n" not in str(error.value)
        for part in (f"--reward {__name__}:", "for a response to set.json:7 ('2+2=? please"):
            assert part in str(error.value)
        return str(error.value)

    def opens(response: str, problem: Problem) -> float:
        return float(Path("no such file").read_text())

    assert "opens raised FileNotFoundError: [Errno 2] No such file" in said(opens)
    assert "raised ZeroDivisionError: division by zero for" in said(lambda *_: 1 / 0)
    for value in (None, "1", [1.0], 1j, math.nan, math.inf):
        assert f"returned {type(value).__name__} {value!r} for" in said(lambda *_, v=value: v)
    for value in (True, 1, 0.5, Fraction(1, 2)):
        (rollout,) = reward.score([answered(problem, "4")], grader, lambda *_, v=value: v)
        assert rollout.reward == float(value)
        assert isinstance(rollout.reward, float)


def test_a_module_of_rewards_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "reward_syntax": "def f(:",
        "reward_name": "no_such_name",
        "reward_file": "open('no such file')",
    }
    for module, content in contents.items():
        Path(f"{module}.py").write_text(content)
        with pytest.raises(ValueError, match=f"--reward {module}:f: expected .*Error: ") as error:
            reward.load_custom_reward(f"{module}:f")
        assert "\n" not in str(error.value)
    Path("reward_takes.py").write_text("def one(response): pass\ndef any(*given): return 1")
    assert reward.load_custom_reward("reward_takes:any")
    with pytest.raises(ValueError, match=r"reward_takes:one: is no function of \(response, prob"):
        reward.load_custom_reward("reward_takes:one")


def test_heldout_metrics_have_the_reward_of_each_set(grader: Grader) -> None:
    a, b = Problem("a:1", "", "1"), Problem("b:1", "", "2")
    rollouts = [answered(a, "1"), answered(a, "1"), answered(b, "1"), answered(b, "2")]
    metrics = heldout_metrics(reward.score(rollouts, grader))
    assert metrics["reward"] == 0.75
    assert metrics["reward/a"] == 1.0
    assert metrics["reward/b"] == 0.5
    assert "reward/a" not in heldout_metrics(rollouts[:1])


@needs_sandbox
def test_programs_earn_one_for_passing_all_tests(tmp_path: Path, grader: Grader) -> None:
    """From a row of a benchmark to rewards, together with a problem that has an answer. A hostile
    program does not change the rewards of the others."""
    public = {"input": "1 2", "output": "3", "testtype": "stdin"}
    private = {"input": "5 6", "output": "11", "testtype": "stdin"}
    row = {
        "question_content": "Add.",
        "public_test_cases": json.dumps([public]),
        "private_test_cases": json.dumps([private]),
    }
    (tmp_path / "code.jsonl").write_text(json.dumps(row))
    (add,) = data.load(tmp_path / "code.jsonl")
    right, wrong = "print(sum(map(int, input().split())))", "print(3)"
    hostile = "import os\nwhile True: os.fork()"

    def fenced(program: str) -> str:
        return f"\n```python\n{program}\n```\n"

    rollouts = [answered(add, fenced(program)) for program in (right, wrong, hostile, right)]
    rollouts.append(answered(add, right))  # without the fence
    rollouts.append(answered(add, fenced(right), "length"))
    rollouts.append(answered(Problem("set:1", "", "3"), "3"))
    rewards = [r.reward for r in reward.score(rollouts, grader)]
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert rollouts[0].answer.strip() == right


# ── what a table of results shows ─────────────────────────────────────────────────────────────────


def test_pass_at_is_the_share_of_all_choices() -> None:
    """Of all choices of k among n responses, c of them right: the share with a right one."""
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 1)]:
        right = [True] * c + [False] * (n - c)
        choices = list(combinations(right, k))
        with_a_right_one = [any(choice) for choice in choices]
        assert pass_at(k, n, c) == pytest.approx(sum(with_a_right_one) / len(choices))


def test_interval_covers_the_true_mean_95_times_in_100() -> None:
    rng = random.Random(0)

    def mean_of_a_problem() -> float:
        """The mean reward of four responses, each right with a probability uniform in [0, 1]."""
        return sum(rng.random() < rng.betavariate(1, 1) for _ in range(4)) / 4

    inside = 0
    for _ in range(1000):
        low, high = interval([mean_of_a_problem() for _ in range(100)])
        inside += low <= 0.5 <= high
    assert 930 <= inside <= 970
    assert interval([1.0] * 60) == (0.95, 1.0)


def test_majority_counts_equal_answers_as_one(grader: Grader) -> None:
    problem = Problem("set:1", "", "\\frac{1}{2}")
    texts = ["0.5", "\\frac{1}{2}", "3", "1/2", "4"]
    group = reward.score([answered(problem, text) for text in texts], grader)
    assert majority([group], grader.equal) == 1.0  # three ways to write a half
    tie = reward.score([answered(problem, text) for text in ("0.5", "3")], grader)
    truncated = [answered(problem, "3"), answered(problem, "0.5", "length")]
    reward.score(truncated, grader)
    unanswered = reward.score([answered(problem, "")], grader)
    assert majority([tie], grader.equal) == 0.5
    assert majority([truncated], grader.equal) == 0.0
    assert majority([unanswered], grader.equal) == 0.0
    assert majority([group, tie], grader.equal) == 0.75


def test_summary(grader: Grader) -> None:
    a, b = Problem("set:1", "", "1"), Problem("set:2", "", "2")
    rollouts = [answered(a, text) for text in "1113"] + [answered(b, text) for text in "1123"]
    table = summary(reward.score(rollouts, grader), grader.equal)
    expected = {
        "problems": 2,
        "samples": 4,
        "reward": 0.5,
        "pass@1": 0.5,
        "pass@2": 0.75,
        "pass@4": 1.0,
        "maj@4": 0.5,
        "length": 5,
    }
    assert {name: table[name] for name in expected} == expected
    assert table["low"] < 0.5 < table["high"]
