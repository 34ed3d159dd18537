"""experiments/: verdicts follow the rule, pages say what the results say, every arm can be run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, random_rollouts
from transformers import PreTrainedTokenizerBase

import train
from config import Config, parse
from data import Problem
from experiments import claims, run, variants, verdicts
from experiments.claims import ARMS, CLAIMS, Comparison
from experiments.run import Job
from packing import micro_batches
from preflight import prepare, validate_settings
from reports.metrics import mean

ROOT = Path(__file__).parent.parent


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────


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


def test_an_arm_against_itself_is_compared_with_zero() -> None:
    decided = verdicts.decide(Comparison("a", "a"), results([0.1, 0.2, 0.3], []))
    assert decided[1:4] == pytest.approx((0.2, -0.048, 0.448), abs=1e-3)
    assert decided.verdict == verdicts.NOT_VISIBLE


@pytest.mark.parametrize(
    ("paper", "low", "high", "expected"),
    [
        ("more", 0.001, 0.2, "reproduces"),
        ("more", -0.2, -0.001, "does not reproduce"),
        ("more", -0.001, 0.2, "not visible at this scale"),
        ("alike", -0.04, 0.04, "reproduces"),
        ("alike", -0.06, 0.04, "not visible at this scale"),
        ("alike", 0.051, 0.2, "does not reproduce"),
    ],
)
def test_the_rule(paper: str, low: float, high: float, expected: str) -> None:
    assert verdicts.verdict(Comparison("a", "b", paper=paper), low, high) == expected


def test_a_claim_needs_all_its_primary_comparisons() -> None:
    def decided(verdict: str, primary: bool) -> verdicts.Decided:
        return verdicts.Decided(Comparison("a", "b", primary=primary), 0, 0, 0, verdict)

    yes, no, unseen = verdicts.REPRODUCES, verdicts.DOES_NOT, verdicts.NOT_VISIBLE
    assert verdicts.claim_verdict([decided(yes, True), decided(no, False)]) == yes
    assert verdicts.claim_verdict([decided(yes, True), decided(unseen, True)]) == unseen
    assert verdicts.claim_verdict([decided(unseen, True), decided(no, True)]) == no


# ── the arms ─────────────────────────────────────────────────────────────────────────────────────


def test_every_arm_is_named_and_its_flags_are_valid() -> None:
    named = {arm for claim in CLAIMS.values() for arm in claim.arms()}
    assert named == set(ARMS)
    prepared = {*variants.SETTINGS, *variants.TRAINING}
    for arm, flags in ARMS.items():
        assert bool(flags) != (arm in {*prepared, "default"}) or arm == "per-pack", arm
        validate_settings(parse(["--model", "tiny-long", *flags.split()]))
    assert {*prepared, *run.FIRST} <= set(ARMS)


def test_equal_samples_and_updates_off_policy() -> None:
    on, off = (
        parse(["--model", "tiny-long", *ARMS[arm].split()]) for arm in ("default", "off-policy")
    )
    assert on.steps * on.prompts * on.samples == off.steps * off.prompts * off.samples
    assert on.steps * on.policy_steps == off.steps * off.policy_steps
    assert on.steps * on.critic_steps == off.steps * off.critic_steps


def test_the_format_reward_pays_a_tenth_for_the_format() -> None:
    from experiments.format_reward import answer_and_format

    problem = Problem("t:0", "2+3=?", "5", ())
    right, wrong = (f" so </think> <answer> \\boxed{{{n}}} </answer>" for n in (5, 6))
    assert answer_and_format(right, problem) == pytest.approx(1.1)
    assert answer_and_format(wrong, problem) == pytest.approx(0.1)
    assert answer_and_format(" 5", problem) == 0


# ── training with replaced stages ────────────────────────────────────────────────────────────────


def config(folder: Path, *more: str) -> Config:
    """Two steps from a model folder."""
    lengths = "--prompt-tokens 64 --response-tokens 24 --prompts 4 --samples 4 --steps 2"
    rates = "--critic-steps 3 --policy-lr 1e-3 --critic-lr 1e-3 --grader-workers 1"
    files = f"--model {folder} --data {folder / 'train.json'} --checkpoint-every 0"
    return parse([*f"{files} {lengths} {rates}".split(), *more])


def weights(folder: Path) -> list[bytes]:
    return [(folder / name / "model.safetensors").read_bytes() for name in ("policy", "critic")]


def test_without_replaced_stages_a_variant_is_the_program(
    base_folder: Path, tmp_path: Path
) -> None:
    cfg = config(base_folder, "--runs", str(tmp_path), "--name", "program")
    program = train.train(cfg, prepare(cfg))
    cfg = config(base_folder, "--runs", str(tmp_path), "--name", "variant")
    variant = variants.train_variant(cfg, prepare(cfg))
    assert weights(program) == weights(variant)
    lines = [(folder / "rollouts.jsonl").read_text() for folder in (program, variant)]
    assert lines[0] == lines[1]


def updates(
    cfg: Config,
    path: Path,
    problems: list[Problem],
    update_critic: Callable,
    update_policy: Callable,
) -> tuple[train.Models, dict[str, float]]:
    """Fresh models after one critic and one policy update on random rollouts."""
    torch.manual_seed(0)
    rollouts = random_rollouts(problems, 100, [3, 9, 14, 5, 20, 7, 2, 11])
    num_tokens = sum(len(r.token_ids) for r in rollouts)
    values, targets, advantages = torch.randn(3, num_tokens)
    models = train.load_models(cfg, str(path))
    stats = update_critic(cfg, models, rollouts, values, targets, 0)
    stats |= update_policy(cfg, models, rollouts, advantages, 0)
    return models, stats


def test_one_pack_an_update_is_the_recipe(model_folder: Path, problems: list[Problem]) -> None:
    """With everything in one pack, the mean over packs is the mean over tokens."""
    cfg = config(model_folder, "--critic-steps", "2")
    recipe = updates(cfg, model_folder, problems, train.update_critic, train.update_policy)
    variant = updates(
        cfg,
        model_folder,
        problems,
        variants.update_critic_per_pack,
        variants.update_policy_per_pack,
    )
    assert recipe[1] == pytest.approx(variant[1], abs=1e-6)
    for role in ("policy", "critic"):
        pair = (getattr(models, role).parameters() for models, _ in (recipe, variant))
        for expected, found in zip(*pair, strict=True):
            torch.testing.assert_close(found, expected)


def test_packs_weigh_alike(model_folder: Path, problems: list[Problem]) -> None:
    """The losses are means over packs of the means over their tokens. On-policy the policy's loss
    of a token is −Â."""
    cfg = config(model_folder, "--critic-steps", "1", "--micro-tokens", "100")
    rollouts = random_rollouts(problems, 100, [3, 9, 14, 5, 20, 7, 2, 11])
    packs = list(micro_batches(rollouts, range(len(rollouts)), cfg.micro_tokens))
    assert len(packs) >= 3 and len({len(pack.flat) for pack in packs}) > 1
    advantages = torch.linspace(-1, 2, sum(len(r.token_ids) for r in rollouts))
    targets = advantages
    models = train.load_models(cfg, str(model_folder))
    with torch.no_grad():
        errors = [(models.critic(pack) - targets[pack.flat]) ** 2 for pack in packs]
    value_loss = mean([float(0.5 * error.mean()) for error in errors])
    policy_loss = mean([float(-advantages[pack.flat].mean()) for pack in packs])
    assert abs(policy_loss - float(-advantages.mean())) > 0.01  # the mean over tokens is another
    values = torch.zeros_like(targets)
    stats = variants.update_critic_per_pack(cfg, models, rollouts, values, targets, 0)
    assert stats["value_loss"] == pytest.approx(value_loss, rel=1e-5)
    stats = variants.update_policy_per_pack(cfg, models, rollouts, advantages, 0)
    assert stats["policy_loss"] == pytest.approx(policy_loss, rel=1e-5)


def test_the_weights_of_two_packs() -> None:
    """Packs of 2 and 6 tokens with losses 1 and 3 a token: the mean over packs is 2, over tokens
    2.5."""

    class Pack:
        def __init__(self, tokens: int) -> None:
            self.flat = range(tokens)

    first, second = variants.weigh_packs_alike([Pack(2), Pack(6)])
    assert (first * 2 * 1 + second * 6 * 3) / 8 == pytest.approx(2.0)


def test_retokenized_responses_have_the_ids_of_their_text(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """Random tokens seldom are what their text encodes to; a text's own tokens stay."""
    rollouts = random_rollouts(problems, 250, [20] * 8)
    rollouts[0].token_ids = tokenizer.encode(" 7+4=11, so 11 </think>")
    for r in rollouts:
        r.logprobs = [-1.0] * len(r.token_ids)
        r.text = tokenizer.decode(r.token_ids)
    sampled = [r.token_ids for r in rollouts]
    changed = variants.retokenize(rollouts, tokenizer)
    assert changed == sum(r.token_ids != ids for r, ids in zip(rollouts, sampled, strict=True)) > 0
    assert rollouts[0].token_ids == sampled[0] and set(rollouts[0].logprobs) == {-1.0}
    for r, ids in zip(rollouts, sampled, strict=True):
        assert r.token_ids == tokenizer.encode(r.text)
        assert r.logprobs == [-1.0 if r.token_ids == ids else 0.0] * len(r.token_ids)


# ── running them ─────────────────────────────────────────────────────────────────────────────────


def test_what_is_stored_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    rates = [Job("lam-0.95", claims.SWEEP_SEED, rate) for rate in claims.RATES]
    assert run.open_jobs(["lam-0.95"]) == rates
    assert run.count_missing(["lam-0.95"]) == len(claims.RATES) + len(claims.SEEDS)
    for job, accuracy in zip(rates, (0.1, 0.3, 0.2), strict=True):
        entry = {"seed": job.seed, "rate": job.rate, "after": {"accuracy": accuracy}}
        run.keep("lam-0.95", entry)
    best = claims.RATES[1]
    jobs = [Job("lam-0.95", seed, best) for seed in claims.SEEDS]
    assert run.open_jobs(["lam-0.95"]) == jobs
    run.keep("lam-0.95", {"seed": 2, "rate": best, "after": {"accuracy": 0.5}})
    assert run.open_jobs(["lam-0.95"]) == [job for job in jobs if job.seed != 2]
    assert run.count_missing(["lam-0.95"]) == len(claims.SEEDS) - 1
    assert run.open_jobs(["anneal"]) == []  # it begins where the default ends, which has not run


def test_results_are_written_as_they_are_stored() -> None:
    for file in run.RESULTS.glob("*.json"):
        assert run.as_text(json.loads(file.read_text())) == file.read_text()


def test_unknown_claims_are_refused(call: Callable[..., Ended]) -> None:
    for words, found in (((), "nothing"), (("lambda", "lamda"), "lamda")):
        ended = call(run.main, *words)
        assert ended.code == 1
        assert ended.err.startswith("experiments.run: expected all, or of rise, format,")
        assert ended.err.endswith(f"; found {found}\n")


def test_help_opens_with_what_the_programs_do(call: Callable[..., Ended]) -> None:
    assert "Run the arms of the paper's claims" in call(run.main, "--help").out
    assert "Turn the results into verdicts" in call(verdicts.main, "--help").out


# ── the pages ────────────────────────────────────────────────────────────────────────────────────


def test_pages_say_what_the_results_say() -> None:
    """RESULTS.md, README.md and docs/paper.md are what experiments.verdicts would write now."""
    found = verdicts.load()
    assert (ROOT / "experiments" / "RESULTS.md").read_text() == verdicts.results_page(found)
    pages = ((verdicts.README, verdicts.filled_readme), (verdicts.PAPER, verdicts.filled_paper))
    for page, filled in pages:
        assert filled(page.read_text(), found) == page.read_text(), (
            f"python -m experiments.verdicts rewrites {page.name}"
        )


def test_readme_has_every_claim_with_its_verdict() -> None:
    found = verdicts.load()
    text = verdicts.README.read_text()
    table = text.split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [claim.text for claim in CLAIMS.values()]
    shown = {row[4]: row[2] for row in rows}
    for name, claim in CLAIMS.items():
        verdict = verdicts.claim_verdict(verdicts.decisions(claim, found))
        assert shown[f"[{name}](experiments/figures/{name}.png)"] == verdict
    counts = [list(shown.values()).count(v) for v in ("reproduces", "does not reproduce")]
    assert counts == [5, 1]
    assert "their own temperature" in text  # the caveat of the one that does not


def test_every_claims_figure_and_verdict_exist() -> None:
    found = verdicts.load()
    paper = verdicts.PAPER.read_text()
    for name, claim in CLAIMS.items():
        assert (verdicts.FIGURES / f"{name}.png").is_file()
        place = re.search(rf"<!-- verdict {name} --> (.*?) <!-- /verdict -->", paper)[1]
        verdict = verdicts.claim_verdict(verdicts.decisions(claim, found))
        assert place.startswith(f"**{verdict}**: ") and claim.caveat in place


def test_a_place_that_is_missing_or_doubled_is_refused() -> None:
    found = verdicts.load()
    place = "<!-- claims -->\n<!-- /claims -->\n"
    assert "| reproduces |" in verdicts.filled_readme(f"a\n{place}b", found)
    for text in ("", "<!-- claims -->\n", place * 2, "<!-- claims --> <!-- /claims -->"):
        with pytest.raises(ValueError, match=r"README\.md: \d places"):
            verdicts.filled_readme(text, found)
    places = [f"<!-- verdict {name} --><!-- /verdict -->" for name in CLAIMS]
    assert verdicts.filled_paper(" ".join(places), found).count("**: ") == len(CLAIMS)
    for wrong, name in (
        (places[1:], "rise"),
        ([*places, places[0]], "rise"),
        ([*places, "<!-- verdict x --><!-- /verdict -->"], "x"),
    ):
        with pytest.raises(ValueError, match=rf"docs/paper\.md: .*wrong: {name}$"):
            verdicts.filled_paper(" ".join(wrong), found)
