"""experiments/measure.py and critics.py: what is kept of a run, and what its critic has learned."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rollouts
from transformers import PreTrainedTokenizerBase

from config import Config, parse
from critic import Critic, load_critic
from data import Problem
from experiments import critics, draw, measure
from experiments.critics import Finished
from packing import forward_all_tokens
from rollout import Rollout
from toy import tiny

# ── a run's numbers ──────────────────────────────────────────────────────────────────────────────


def steps_of(rewards: list[float], **others: float) -> list[dict[str, float]]:
    record = {"truncated": 0.0, "format": 1.0, "length": 10.0} | others
    return [record | {"reward": reward} for reward in rewards]


def test_late_accuracy_is_that_of_the_last_quarter_of_the_policys_steps() -> None:
    """40 steps: the last ten. With 10 steps of the critic alone before them, the last ten as well,
    and with a reward for the format, without that reward."""
    rewards = [0.0] * 30 + [0.5] * 9 + [0.6]
    found = measure.over_training(steps_of(rewards), {}, Config(steps=40))
    assert found["late_accuracy"] == pytest.approx(0.51) and "memorized" not in found
    cfg = Config(steps=50, critic_only_steps=10)
    found = measure.over_training(steps_of([0.0] * 10 + rewards), {}, cfg)
    assert found["late_accuracy"] == pytest.approx(0.51)
    cfg = Config(steps=40, reward="experiments.format_reward:answer_and_format")
    found = measure.over_training(steps_of(rewards), {}, cfg)
    assert found["late_accuracy"] == pytest.approx(0.41)


def test_few_problems_are_measured_on_held_out_ones() -> None:
    """Evaluated after every second step: five evaluations in the last quarter, 32 to 40."""
    evaluations = {n: {"reward": 0.3 if n >= 32 else 0.9} for n in range(0, 41, 2)}
    cfg = Config(steps=40, eval_every=2)
    found = measure.over_training(steps_of([0.7] * 40), evaluations, cfg)
    assert found["late_accuracy"] == pytest.approx(0.3)
    assert found["memorized"] == pytest.approx(0.4)


def test_loops_are_counted_in_the_first_quarter() -> None:
    steps = steps_of([0.1] * 10, truncated=0.2) + steps_of([0.1] * 30, truncated=0.0)
    assert measure.over_training(steps, {}, Config(steps=40))["loop_share"] == pytest.approx(0.2)


# ── calibration ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(
    model_folder: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> Finished:
    """A run with random responses of 10 tokens and more."""
    cfg = parse(["--model", "tiny", "--response-tokens", "30", "--micro-tokens", "512"])
    rollouts = random_rollouts(problems, 250, [10, 12, 20, 15, 10, 11, 13, 14])
    for r in rollouts:
        r.text = tokenizer.decode(r.token_ids)
    return Finished(cfg, model_folder, tokenizer, problems, rollouts)


def random_critic(folder: Path) -> Critic:
    """A critic whose values differ from state to state."""
    critic = load_critic(str(folder))
    torch.nn.init.normal_(critic.model.score.weight)
    return critic


def test_what_v_knows_is_apart_from_its_mean() -> None:
    """A V that is off by a constant is as good as the success rate itself; a constant V knows
    nothing."""
    success = [0.0, 0.5, 0.75, 1.0]
    states = {"success": success, "group": [0.5] * 4}
    off = states | {"value": [p - 0.3 for p in success]}
    found, scores = critics.knowledge(off), critics.brier_scores(off)
    assert found["correlation"] == pytest.approx(1)
    assert found["brier_shifted"] == pytest.approx(scores["brier_best"], abs=1e-4)
    assert scores["brier_value"] == pytest.approx(scores["brier_best"] + 0.3**2)
    constant = critics.knowledge(states | {"value": [0.9] * 4})
    assert constant["correlation"] == 0
    assert constant["brier_shifted"] == pytest.approx(scores["brier_constant"], abs=1e-4)


def test_a_state_is_valued_before_its_next_token(
    run: Finished, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V(s_t) of the calibration is the critic's value after the prefix, whatever follows it; and
    the continuations start from that prefix."""
    critic = random_critic(model_folder)
    asked = []

    def sample(
        run: Finished, sampler: object, states: list[Problem], samples: int, stream: str
    ) -> list[Rollout]:
        asked.append((stream, samples, states))
        return [Rollout(state, [1], [], "stop", "") for state in states for _ in range(samples)]

    monkeypatch.setattr(critics, "open_policy", lambda run: None)
    monkeypatch.setattr(critics, "sample", sample)
    found = critics.calibration(run, critic)
    assert found["depth"] == [0.0, 0.2, 0.4, 0.6, 0.8, 0.0, 0.2, 0.4]
    (stream, samples, states), (_, group, whole) = asked
    assert (stream, samples, group) == ("continuations", 32, 8)
    for i, (r, state) in enumerate(zip(run.rollouts, states, strict=True)):
        cut = int(found["depth"][i] * len(r.token_ids))
        prefix = r.token_ids[:cut]
        assert state.prompt_ids == (*r.problem.prompt_ids, *prefix)
        other = replace(r, token_ids=[*prefix, 0])
        alone = forward_all_tokens(critic, [other], 512, "cpu")[-1]
        assert found["value"][i] == pytest.approx(float(alone), rel=1e-3)
    assert [problem.question for problem in whole] == [r.problem.question for r in run.rollouts]


def test_success_counts_right_and_finished_continuations(
    run: Finished, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The continuation's answer counts together with the prefix; too long or cut off is wrong."""
    problem = Problem("t:0", "2+3=?", "5", (1, 2))
    right = " so 5 </think> <answer> \\boxed{5} </answer>"

    def within(
        text: str, tokens: int, finish: str = "stop", prefix: str = "", cut: int = 0
    ) -> bool:
        continued = Rollout(problem, [1] * tokens, [], finish, text)
        return critics.right_within(run.cfg, prefix, cut, continued)

    assert within(right, 10) and within(right[9:], 10, prefix=right[:9], cut=20)
    assert not within(right.replace("5", "6"), 10)
    assert not within(right, 10, cut=21)  # 31 tokens, of 30
    assert not within(right, 10, finish="length")


def test_brier_scores_are_those_of_the_single_outcomes() -> None:
    """Against the mean of (q − R)² over 0/1 outcomes, one by one."""
    rng = random.Random(0)
    outcomes = [[rng.random() < p for _ in range(32)] for p in (0.1, 0.5, 0.9)]
    found = {
        "value": [0.2, 0.4, 0.7],
        "group": [0.5, 0.25, 0.875],
        "success": [sum(state) / 32 for state in outcomes],
    }
    scores = critics.brier_scores(found)
    constant = [sum(map(sum, outcomes)) / 96] * 3
    predictions = {"value": found["value"], "group": found["group"], "constant": constant}
    for name, predicted in (predictions | {"best": found["success"]}).items():
        errors = [(q - R) ** 2 for q, state in zip(predicted, outcomes, strict=True) for R in state]
        assert scores[f"brier_{name}"] == pytest.approx(sum(errors) / 96)
    assert scores["brier_best"] < min(scores[f"brier_{name}"] for name in predictions)
    gain = scores["brier_group"] - scores["brier_value"]
    assert scores["brier_gain_over_group"] == pytest.approx(gain)


def test_values_are_compared_with_the_reward_itself(
    run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A critic that knows every reward explains all; V(s_0) is that of the first token."""
    for i, r in enumerate(run.rollouts):
        r.reward = float(i % 2)

    def exact(run: Finished, critic: object, rollouts: list[Rollout]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((len(r.token_ids),), r.reward) for r in rollouts)

    monkeypatch.setattr(Finished, "values", exact)
    found = critics.values_on_heldout(run, SimpleNamespace())
    assert found == {"value_first": 0.5, "brier_first": 0.0, "explained_variance": 1.0}

    def rising(run: Finished, critic: object, rollouts: list[Rollout]) -> tuple[torch.Tensor, ...]:
        return tuple(0.25 + torch.arange(len(r.token_ids)) for r in rollouts)

    monkeypatch.setattr(Finished, "values", rising)
    found = critics.values_on_heldout(run, SimpleNamespace())
    assert found["value_first"] == 0.25
    assert found["brier_first"] == pytest.approx((0.25**2 + 0.75**2) / 2)


# ── repetition ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def looping() -> tuple[PreTrainedTokenizerBase, Rollout]:
    """The test bed's tokenizer, and a right response of nine careful steps."""
    tokenizer = tiny.tokenizer(tiny.LOOPS)
    question = "7+5+9+4+1+10+2+3+6+8=?"
    text = tiny.respond(random.Random(0), question, "careful", slip=0.0) + tiny.EOS
    problem = Problem("t:0", question, "55", tuple(tokenizer.encode(question)))
    rollout = Rollout(problem, tokenizer.encode(text), [], "stop", text, "55", 1.0)
    return tokenizer, rollout


def test_a_step_is_repeated_where_half_of_the_response_is_over(
    looping: tuple[PreTrainedTokenizerBase, Rollout],
) -> None:
    tokenizer, rollout = looping
    pair = critics.repeat_step(rollout, tokenizer, 2)
    before = tokenizer.decode(rollout.token_ids[: pair.cut])
    assert before.endswith(" 4: take 1, 25+1=26,") and before.count("take") == 4
    repeated = tokenizer.decode(pair.repeated.token_ids[: pair.cut + pair.length])
    assert repeated == before + " 4: take 1, 25+1=26," * 2
    assert pair.repeated.token_ids[: pair.cut] == rollout.token_ids[: pair.cut]
    nothing = critics.repeat_step(rollout, tokenizer, 0)
    assert nothing.length == 0 and nothing.cut == pair.cut


def test_a_critic_that_counts_repeats_loses_value_with_each(
    looping: tuple[PreTrainedTokenizerBase, Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V = 1 − 0.1 × the earlier occurrences of the last step: 4 repeats lose 0.4."""
    tokenizer, rollout = looping
    run = Finished(Config(), Path(), tokenizer, [rollout.problem], [rollout] * 3)

    def counts(run: Finished, critic: object, rollouts: list[Rollout]) -> tuple[torch.Tensor, ...]:
        found = []
        for r in rollouts:
            texts = [tokenizer.decode(r.token_ids[:t]) for t in range(len(r.token_ids))]
            repeats = [max(0, text.count("25+1=26,") - 1) for text in texts]
            found.append(1 - 0.1 * torch.tensor(repeats))
        return tuple(found)

    monkeypatch.setattr(Finished, "values", counts)
    found = critics.value_of_repetition(run, SimpleNamespace())
    assert found["along"] == pytest.approx([1, 0.9, 0.8, 0.6, 0.2])
    assert found["going_on"] == [1] * 5 and found["responses"] == 3
    assert found["value_lost_by_4_repeats"] == pytest.approx(0.4)
    assert found["value_lost_against_going_on"] == pytest.approx(0.4)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def test_what_the_critic_has_learned_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two runs: a figure of the calibration and one of the loops."""
    monkeypatch.setattr(draw, "FIGURES", tmp_path)
    depths = [critics.DEPTHS[i % 5] for i in range(10)]
    shares = [i / 10 for i in range(10)]
    states = {"depth": depths, "value": shares, "success": shares, "group": shares[::-1]}
    loops = {"along": [0.5, 0.4, 0.3, 0.2, 0.1], "going_on": [0.5] * 5}
    both = {"10": {"calibration": states, "repetition": loops}}
    both["11"] = both["10"]
    results = {arm: {"runs": both} for arm in ("default", "loops-critic", "loops")}
    draw.draw_calibration(results)
    draw.draw_repetition(results)
    assert {file.name for file in tmp_path.iterdir()} == {"calibration.png", "repetition.png"}
    assert draw.brier_at(states, "value", 0.0) == pytest.approx(0.5 * 0.5 / 2)
