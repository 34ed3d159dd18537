"""experiments/: verdicts follow the rule, pages say what the results say, every arm can be run."""

import json
import math
import random
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
from experiments import claims, draw, measure, rule, run, variants, verdicts
from experiments.claims import ARMS, CLAIMS, Comparison
from experiments.run import Job
from packing import micro_batches
from preflight import prepare, validate_settings
from reports.figures import t_interval
from reports.metrics import mean

ROOT = Path(__file__).parent.parent


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────


def results(first: list[float], second: list[float], metric: str = "late_accuracy") -> rule.Results:
    """Two arms with these numbers, seed by seed."""
    arms = {"a": first, "b": second}
    return {
        arm: {
            "runs": {
                f"{seed}": {"after": {metric: value}}
                for seed, value in zip(claims.SEEDS, values, strict=False)
            }
        }
        for arm, values in arms.items()
    }


def test_a_difference_is_paired_over_seeds() -> None:
    """A constant gain on bases of very different quality is certain; unpaired it would drown."""
    first, second = [0.31, 0.52, 0.70, 0.91, 0.11], [0.30, 0.50, 0.69, 0.90, 0.10]
    decided = rule.decide(Comparison("a", "b"), results(first, second))
    assert decided.mean == pytest.approx(0.012)
    assert decided.low == pytest.approx(0.012 - 4.3147 * 0.004472 / 5**0.5, abs=1e-5)
    assert (decided.verdict, decided.seeds) == (rule.REPRODUCES, 5)


def test_an_arm_against_itself_is_compared_with_zero() -> None:
    decided = rule.decide(Comparison("a", "a"), results([0.1, 0.2, 0.3, 0.2, 0.2], []))
    assert decided[1:4] == pytest.approx((0.2, 0.0636, 0.3364), abs=1e-3)
    assert decided.verdict == rule.REPRODUCES


@pytest.mark.parametrize(
    ("paper", "low", "high", "expected"),
    [
        ("more", 0.001, 0.2, "reproduces"),
        ("more", 0.001, 0.002, "reproduces"),
        ("more", -0.2, -0.001, "contradicts"),
        ("more", -0.001, 0.049, "no difference"),
        ("more", -0.001, 0.051, "undecided"),
        ("alike", -0.04, 0.04, "reproduces"),
        ("alike", 0.01, 0.04, "reproduces"),
        ("alike", -0.06, 0.04, "undecided"),
        ("alike", 0.049, 0.2, "undecided"),
        ("alike", 0.051, 0.2, "contradicts"),
        ("alike", -0.2, -0.051, "contradicts"),
    ],
)
def test_the_rule(paper: str, low: float, high: float, expected: str) -> None:
    assert rule.verdict(Comparison("a", "b", paper=paper), low, high) == expected


def test_every_metric_has_its_margin() -> None:
    assert rule.verdict(Comparison("a", "b", "length"), -4.0, 4.9) == rule.NO_DIFFERENCE
    assert rule.verdict(Comparison("a", "b", "loop_share"), -0.01, 0.03) == rule.UNDECIDED


def test_a_claim_needs_all_its_primary_comparisons() -> None:
    """The worst of contradicts, undecided, no difference; and no verdict before the first look."""
    arms = {"zero": [0.0] * 5}
    arms |= {"up": [0.5, 0.6, 0.5, 0.6, 0.5], "down": [-0.5, -0.6, -0.5, -0.6, -0.5]}
    arms |= {"same": [0.01, -0.01, 0.0, 0.01, -0.01], "wide": [0.5, -0.5, 0.1, 0.4, -0.3]}
    found = {arm: results(values, [])["a"] for arm, values in arms.items()}

    def verdict(*first: str, beside: str = "up") -> str | None:
        comparisons = [Comparison(arm, "zero") for arm in first]
        comparisons.append(Comparison(beside, "zero", primary=False))
        return rule.claim_verdict(claims.Claim("", "", tuple(comparisons)), found)

    assert verdict("up", beside="down") == verdict("up", "up") == rule.REPRODUCES
    assert verdict("up", "same") == rule.NO_DIFFERENCE
    assert verdict("up", "same", "wide") == rule.UNDECIDED
    assert verdict("wide", "down", "up") == rule.CONTRADICTS
    assert verdict("up", "unknown") is None


def test_the_table_shows_the_comparison_that_decides() -> None:
    """README has one row for a claim: the first primary comparison with the claim's verdict."""
    arms = {"zero": [0.0] * 5, "up": [0.5, 0.6, 0.5, 0.6, 0.5], "same": [0.01, -0.01, 0, 0, 0.0]}
    found = {arm: results(values, [])["a"] for arm, values in arms.items()}
    comparisons = (
        Comparison("same", "zero", primary=False),
        Comparison("up", "zero"),
        Comparison("same", "zero"),
        Comparison("up", "zero", primary=False),
    )
    claim = claims.Claim("", "", comparisons)
    assert verdicts.deciding(claim, found).comparison == comparisons[2]


def test_a_comparison_ends_at_its_first_look_that_decides() -> None:
    """Later seeds do not reopen it, and a block that is not whole is not looked at."""
    sure = [0.2, 0.21, 0.19, 0.2, 0.22]
    unsure = [0.2, -0.2, 0.1, -0.1, 0.3]
    zeros = [0.0] * 20
    decided = rule.decide(Comparison("a", "b"), results(sure + [-5.0] * 15, zeros))
    assert (decided.seeds, decided.verdict) == (5, rule.REPRODUCES)
    decided = rule.decide(Comparison("a", "b"), results(unsure + sure + sure[:4], zeros))
    assert (decided.seeds, decided.verdict) == (10, rule.UNDECIDED)
    decided = rule.decide(Comparison("a", "b"), results(unsure + sure + sure, zeros))
    assert (decided.seeds, decided.verdict) == (15, rule.REPRODUCES)
    decided = rule.decide(Comparison("a", "b"), results(unsure * 4, zeros))
    assert (decided.seeds, decided.verdict) == (20, rule.UNDECIDED)
    assert rule.decide(Comparison("a", "b"), results(sure[:4], zeros)) is None


def test_a_claim_asks_for_the_next_look_until_it_is_decided() -> None:
    claim = claims.Claim("", "", (Comparison("a", "b"), Comparison("a", "c", primary=False)))
    sure, unsure, zeros = [0.2, 0.21, 0.19, 0.2, 0.22], [0.2, -0.2, 0.1, -0.1, 0.3], [0.0] * 20
    undecided = [0.2, 0.9, -0.5, 0.7, -0.9]
    for first, seeds in (([], 5), (sure[:3], 5), (sure, 5), (unsure, 10), (unsure * 4, 20)):
        found = results(first, zeros) | {"c": results(undecided * 4, [])["a"]}
        assert rule.seeds_wanted(claim, found) == {"a": seeds, "b": seeds, "c": 5}


def test_quantiles_of_students_t() -> None:
    """P(T ≤ t) = 1 − 0.05/4/2 at each look, by integrating the density."""
    for seeds, quantile in rule.T_QUANTILES.items():
        n = seeds - 1
        x = torch.linspace(0, quantile, 20_001, dtype=torch.float64)
        density = (1 + x**2 / n) ** (-(n + 1) / 2)
        scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        below = 0.5 + scale * float(torch.trapezoid(density, x))
        assert below == pytest.approx(1 - claims.ERROR_RATE / len(claims.LOOKS) / 2, abs=2e-6)


@pytest.mark.parametrize("paper", ["more", "alike"])
def test_looking_several_times_keeps_the_error_rate(paper: str) -> None:
    """4,000 experiments without the effect: "more" of equal arms, and "alike" of arms that differ
    by exactly the margin, are claimed in at most 5 % of cases over all looks; with a 95 % interval
    at each look "more" would be in over 10 %."""
    rng = random.Random(0)
    truth = 0.0 if paper == "more" else claims.MARGIN
    comparison = Comparison("a", "a", paper=paper)
    wrong, wrong_at_95 = 0, 0
    repeats = 4_000
    for _ in range(repeats):
        values = [rng.gauss(truth, 0.025) for _ in claims.SEEDS]
        found = rule.decide(comparison, results(values, []))
        mistakes = {"more": (rule.REPRODUCES, rule.CONTRADICTS), "alike": (rule.REPRODUCES,)}
        wrong += found.verdict in mistakes[paper]
        looks = [values[:seeds] for seeds in claims.LOOKS]
        wrong_at_95 += any(t_interval(look)[1] > 0 or t_interval(look)[2] < 0 for look in looks)
    assert 0 < wrong / repeats < claims.ERROR_RATE
    if paper == "more":
        assert wrong_at_95 / repeats > 2 * claims.ERROR_RATE


def test_seeds_that_would_decide() -> None:
    """At 20 seeds a half-width of .04 around .03: for "alike" .02 to the margin, four times the
    seeds; for "more" .03 to zero, 16/9 of them."""
    for paper, seeds in (("alike", 80), ("more", 36)):
        comparison = Comparison("a", "b", paper=paper)
        decided = rule.Decided(comparison, 0.03, -0.01, 0.07, 20, rule.UNDECIDED)
        assert rule.seeds_to_decide(decided) == seeds


# ── the arms ─────────────────────────────────────────────────────────────────────────────────────


def test_every_arm_is_named_and_its_flags_are_valid() -> None:
    named = {arm for claim in CLAIMS.values() for arm in claim.arms()}
    assert named == set(ARMS)
    prepared = {*variants.SETTINGS, *variants.TRAINING}
    both = {"per-pack", "problems-16", "problems-64"}
    for arm, flags in ARMS.items():
        assert bool(flags) != (arm in {*prepared, "default"}) or arm in both, arm
        validate_settings(parse(["--model", "tiny-long", *flags.split()]))
    named_elsewhere = {*prepared, *claims.SAME_RATE, *claims.SAME_RATE.values(), *claims.PRESET}
    named_elsewhere |= {*measure.CALIBRATED, *measure.LOOPING, *measure.AT_ONE}
    assert named_elsewhere <= set(ARMS)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if re.search(r"\dx\d", arm)])
def test_groups_differ_at_equal_numbers_of_responses(arm: str) -> None:
    """`ppo-64x2` has 64 prompts and 2 responses to each, as many responses as the default."""
    default, cfg = (parse(["--model", "tiny-long", *flags.split()]) for flags in ("", ARMS[arm]))
    method, prompts, samples = re.fullmatch(r"(\w+)-(\d+)x(\d+)", arm).groups()
    assert cfg.advantage == {"ppo": "gae", "grpo": "grpo"}[method]
    assert (cfg.prompts, cfg.samples) == (int(prompts), int(samples))
    assert cfg.prompts * cfg.samples == default.prompts * default.samples
    assert cfg.steps == default.steps


def test_critic_only_steps_come_before_as_many_policy_steps() -> None:
    default = parse(["--model", "tiny-long"])
    for arm, alone in (("critic-only-10", 10), ("critic-only-20", 20)):
        cfg = parse(["--model", "tiny-long", *ARMS[arm].split()])
        assert cfg.critic_only_steps == alone and cfg.steps - alone == default.steps


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


def stored(arm: str, seed: int, rate: str, **after: float) -> None:
    run.keep(arm, {"seed": seed, "rate": rate, "after": after, "before": after})


def test_what_is_stored_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "RESULTS", tmp_path)
    rates = [Job("grpo", claims.SWEEP_SEED, rate) for rate in claims.RATES]
    assert run.missing_rates(["grpo", "loops-grpo", "demo"]) == rates  # loops-grpo takes grpo's
    assert run.rate_of("grpo") is None
    for job, accuracy in zip(rates, (0.1, 0.3, 0.2), strict=True):
        stored("grpo", job.seed, job.rate, accuracy=accuracy)
    best = claims.RATES[1]
    assert run.missing_rates(["grpo"]) == []
    assert run.rate_of("grpo") == run.rate_of("loops-grpo") == best
    assert run.rate_of("demo") == "0.0005"  # its preset's
    for rate, accuracy in zip(claims.RATES, (0.3, 0.1, 0.1), strict=True):
        stored("default", claims.SWEEP_SEED, rate, accuracy=accuracy)
    block = claims.SEEDS[:5]
    both = [("default", claims.RATES[0]), ("grpo", best)]
    jobs = [Job(arm, seed, rate) for arm, rate in both for seed in block]
    assert run.missing_seeds(["grpo"], 20) == jobs
    stored("grpo", 12, best, late_accuracy=0.5)
    assert run.missing_seeds(["grpo"], 5) == [job for job in jobs if job[:2] != ("grpo", 12)]


def test_seeds_come_in_blocks_until_the_claim_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grpo claim is open after five seeds and asks for five more; the lambda claim is decided
    and asks for none."""
    monkeypatch.setattr(rule, "RESULTS", tmp_path)
    for arm in ("default", "grpo", "lam-0.95"):
        for rate in claims.RATES:
            stored(arm, claims.SWEEP_SEED, rate, accuracy=0.5)
    for i, seed in enumerate(claims.SEEDS[:5]):
        stored("default", seed, "2.5e-4", late_accuracy=0.7 + 0.1 * (i % 2))
        stored("grpo", seed, "2.5e-4", late_accuracy=0.7)
        stored("lam-0.95", seed, "2.5e-4", late_accuracy=0.2)
    names = ["grpo", "lambda"]
    assert run.missing_seeds(names, 5) == []
    wanted = [Job(arm, s, "2.5e-4") for arm in ("default", "grpo") for s in claims.SEEDS[5:10]]
    assert run.missing_seeds(names, 10) == run.missing_seeds(names, 20) == wanted
    assert all(entry["revision"] for entry in rule.load()["grpo"]["runs"].values())


def test_base_models_that_a_run_needs() -> None:
    assert run.bases_of(Job("grpo", 10, "1e-3")) == [("tiny-long", 10)]
    assert run.bases_of(Job("loops", 11, "1e-3")) == [("tiny-loops", 11)]
    assert run.bases_of(Job("half-critic", 12, "1e-3")) == [
        ("tiny-long", 12),
        ("tiny-long-half", 12),
    ]


def test_results_are_written_as_they_are_stored() -> None:
    for file in rule.RESULTS.glob("*.json"):
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
    """RESULTS.md, README.md and the pages in docs are what experiments.verdicts would write now."""
    found = rule.load()
    assert verdicts.RESULTS_PAGE.read_text() == verdicts.results_page(found)
    texts = [page.read_text() for page in (verdicts.README, *verdicts.PAGES)]
    filled = [verdicts.filled_readme(texts[0], found), *verdicts.filled_pages(texts[1:], found)]
    assert filled == texts, "python -m experiments.verdicts rewrites README.md or pages in docs/"


def test_readme_has_every_claim_with_its_verdict() -> None:
    found = rule.load()
    text = verdicts.README.read_text()
    table = text.split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[4:]]
    assert len(rows) == len(CLAIMS)
    for row, claim in zip(rows, CLAIMS.values(), strict=True):
        assert row[0] == f"{claim.text} ({claim.place})"
        verdict = rule.claim_verdict(claim, found)
        assert verdict, f"{claim.text}: not run"
        assert row[1:3] == [verdict, f"{verdicts.deciding(claim, found).seeds}"]


def test_readme_says_of_critics_what_was_found() -> None:
    """The sentence of its section on critics, and the claims that it is about."""
    text = " ".join(verdicts.README.read_text().split())
    assert "In miniature PPO beats GRPO with two responses a prompt and not with more" in text
    found = {
        name: rule.claim_verdict(CLAIMS[name], rule.load()) for name in ("grpo2", "grpo4", "grpo")
    }
    more = {rule.NO_DIFFERENCE, rule.CONTRADICTS}
    assert found["grpo2"] == rule.REPRODUCES and {found["grpo4"], found["grpo"]} <= more


def test_every_claims_figure_and_verdict_exist() -> None:
    found = rule.load()
    text = "".join(page.read_text() for page in verdicts.PAGES)
    drawn = {"differences"}
    for name, claim in CLAIMS.items():
        place = re.search(rf"<!-- verdict {name} --> (.*?) <!-- /verdict -->", text)[1]
        verdict = rule.claim_verdict(claim, found)
        drawn.add(name)
        assert place.startswith(f"**{verdict}**: ") and claim.caveat in place
        assert claim.five_seeds in place
    assert {file.stem for file in draw.FIGURES.glob("*.png")} == drawn


def test_all_results_are_of_this_round() -> None:
    """Every run has a seed of this round, its arm's rate and a revision."""
    for arm, found in rule.load().items():
        for seed, entry in found["runs"].items():
            assert entry["seed"] == int(seed) and int(seed) in claims.SEEDS
            assert entry["rate"] == run.rate_of(arm) and entry["revision"]


def test_a_place_that_is_missing_or_doubled_is_refused() -> None:
    found = rule.load()
    place = "<!-- claims -->\n<!-- /claims -->\n"
    assert "| reproduces |" in verdicts.filled_readme(f"a\n{place}b", found)
    for text in ("", "<!-- claims -->\n", place * 2, "<!-- claims --> <!-- /claims -->"):
        with pytest.raises(ValueError, match=r"README\.md: \d places"):
            verdicts.filled_readme(text, found)
    places = [f"<!-- verdict {name} --><!-- /verdict -->" for name in CLAIMS]
    halves = [" ".join(places[:9]), " ".join(places[9:])]
    assert "".join(verdicts.filled_pages(halves, found)).count(" <!-- /verdict -->") == len(CLAIMS)
    for wrong, name in (
        (places[1:], "rise"),
        ([*places, places[0]], "rise"),
        ([*places, "<!-- verdict x --><!-- /verdict -->"], "x"),
    ):
        with pytest.raises(ValueError, match=rf"docs/critics\.md: .*wrong: {name}$"):
            verdicts.filled_pages([" ".join(wrong), ""], found)
