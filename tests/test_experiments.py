"""The experiments: the rule decides as it is written, the pages say what the results say, and every arm can be run."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

from data import Problem
from experiments import claims, run, verdicts
from experiments.claims import ARMS, CLAIMS, Comparison
from preflight import parse, validate_settings


def results(first: list[float], second: list[float], metric: str = "accuracy") -> dict[str, dict]:
    """Two arms with these held-out numbers, seed by seed."""
    arms = {"a": first, "b": second}
    return {
        arm: {"runs": {f"{s}": {"after": {metric: v}} for s, v in enumerate(values)}}
        for arm, values in arms.items()
    }


def test_a_difference_is_paired_over_seeds() -> None:
    """A constant gain on bases of very different quality is certain; unpaired it would drown."""
    first, second = [0.31, 0.52, 0.70, 0.91, 0.11], [0.30, 0.50, 0.69, 0.90, 0.10]
    decided = verdicts.decide(Comparison("a", "b"), results(first, second))
    assert decided.mean == pytest.approx(0.012)
    assert decided.low == pytest.approx(0.012 - 2.776 * 0.004472 / 5**0.5, abs=1e-5)
    assert decided.verdict == verdicts.REPRODUCES


@pytest.mark.parametrize(
    ("paper", "low", "high", "expected"),
    [
        ("more", 0.001, 0.2, "reproduces"), ("more", -0.2, -0.001, "does not"), ("more", -0.001, 0.2, "not visible"),
        ("alike", -0.04, 0.04, "reproduces"), ("alike", -0.06, 0.04, "not visible"), ("alike", 0.051, 0.2, "does not"),
    ],
)  # fmt: skip
def test_the_rule(paper: str, low: float, high: float, expected: str) -> None:
    assert verdicts.verdict(Comparison("a", "b", paper=paper), low, high).startswith(expected)


def test_a_claim_needs_all_its_primary_comparisons() -> None:
    def decided(verdict: str, primary: bool) -> verdicts.Decided:
        return verdicts.Decided(Comparison("a", "b", primary=primary), 0, 0, 0, verdict)

    yes, no, unseen = verdicts.REPRODUCES, verdicts.DOES_NOT, verdicts.NOT_VISIBLE
    assert verdicts.of_claim([decided(yes, True), decided(no, False)]) == yes
    assert verdicts.of_claim([decided(yes, True), decided(unseen, True)]) == unseen
    assert verdicts.of_claim([decided(unseen, True), decided(no, True)]) == no


def test_every_arm_is_named_and_its_flags_are_valid() -> None:
    named = {arm for claim in CLAIMS.values() for arm in claim.arms()}
    assert named == set(ARMS)
    prepared = set(run.PREPARATIONS) | set(run.CHANGES) | {"default"}
    for arm, flags in ARMS.items():
        assert bool(flags) != (arm in prepared) or arm == "per-pack", arm
        validate_settings(parse(["--model", "tiny-long", *flags.split()]))
    assert set(run.PREPARATIONS) | set(run.CHANGES) | set(run.FIRST) <= set(ARMS)


def test_equal_samples_and_updates_off_policy() -> None:
    on, off = (
        parse(["--model", "tiny-long", *ARMS[arm].split()]) for arm in ("default", "off-policy")
    )
    assert on.steps * on.prompts * on.samples == off.steps * off.prompts * off.samples
    assert on.steps * on.policy_steps == off.steps * off.policy_steps
    assert on.steps * on.critic_steps == off.steps * off.critic_steps


def test_packs_weigh_alike() -> None:
    """Two packs of 2 and 6 tokens with losses 1 and 3 a token: the mean over packs is 2, over tokens 2.5."""
    import ppo
    import train

    class Pack:
        def __init__(self, tokens: int) -> None:
            self.flat = range(tokens)

    original, loss = train.micro_batches, ppo.value_loss
    try:
        train.micro_batches = lambda *args: iter([Pack(2), Pack(6)])
        ppo.value_loss = lambda tokens, each: torch.tensor(float(tokens * each))
        with run.means_per_pack():
            sums = [
                ppo.value_loss(len(p.flat), each)
                for p, each in zip(train.micro_batches(), (1, 3), strict=True)
            ]
        assert sum(sums) / 8 == pytest.approx(2.0)
    finally:
        train.micro_batches, ppo.value_loss = original, loss
    assert train.micro_batches is original


def test_the_format_reward_pays_a_tenth_for_the_format() -> None:
    from experiments.format_reward import answer_and_format

    problem = Problem("t:0", "2+3=?", "5", ())
    right, wrong = (f" so </think> <answer> \\boxed{{{n}}} </answer>" for n in (5, 6))
    assert answer_and_format(right, problem) == pytest.approx(1.1)
    assert answer_and_format(wrong, problem) == pytest.approx(0.1)
    assert answer_and_format(" 5", problem) == 0


def test_what_is_stored_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.open_jobs(["lam-0.95"]) == [
        ("lam-0.95", claims.SWEEP_SEED, rate) for rate in claims.RATES
    ]
    for rate, accuracy in zip(claims.RATES, (0.1, 0.3, 0.2), strict=True):
        run.keep(
            "lam-0.95", {"seed": claims.SWEEP_SEED, "rate": rate, "after": {"accuracy": accuracy}}
        )
    best = claims.RATES[1]
    assert run.open_jobs(["lam-0.95"]) == [("lam-0.95", seed, best) for seed in claims.SEEDS]
    run.keep("lam-0.95", {"seed": 2, "rate": best, "after": {"accuracy": 0.5}})
    assert ("lam-0.95", 2, best) not in run.open_jobs(["lam-0.95"])
    assert run.open_jobs(["anneal"]) == []  # it goes on from the default, which has not been run


def test_pages_say_what_the_results_say() -> None:
    """RESULTS.md, README.md and docs/paper.md are what experiments/verdicts.py would write now."""
    found = verdicts.load()
    assert (ROOT / "experiments" / "RESULTS.md").read_text() == verdicts.results_page(found)
    for page, filled in (
        (verdicts.README, verdicts.filled_readme),
        (verdicts.PAPER, verdicts.filled_paper),
    ):
        assert filled(page.read_text(), found) == page.read_text(), (
            f"python -m experiments.verdicts rewrites {page.name}"
        )
