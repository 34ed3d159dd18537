"""Turn the results into verdicts, by the rule in experiments/claims.py.

    python -m experiments.verdicts

Reads experiments/results and rewrites everything that is made from it: experiments/RESULTS.md, the
figures, the table of claims in README.md, and the verdict of each claim in docs/paper.md or
docs/critics.md.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import tyro

from experiments import critics, draw, rule
from experiments.claims import ARMS, CLAIMS, LOOKS, Claim, Comparison
from experiments.rule import Decided, Results

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (ROOT / "docs" / "paper.md", ROOT / "docs" / "critics.md")  # with places for verdicts
RESULTS_PAGE = ROOT / "experiments" / "RESULTS.md"
NOT_RUN = "not run"
IN_TOKENS = ("length", "reflection_excess")

# ── words ────────────────────────────────────────────────────────────────────────────────────────


def title(c: Comparison) -> str:
    """What is compared, such as `late accuracy, default − lam-0.95`."""
    metric = c.metric.replace("_", " ")
    if c.second == c.first:
        return f"{metric}, {c.first}"
    if c.second == f"{c.first}@0":
        return f"{metric}, {c.first}, after − before"
    return f"{metric}, {c.first} − {c.second}"


def numbers(d: Decided) -> str:
    """Mean and interval of a difference, such as `+0.031 [+0.010, +0.052]`."""
    form = "+.1f" if d.comparison.metric in IN_TOKENS else "+.3f"
    return f"{d.mean:{form}} [{d.low:{form}}, {d.high:{form}}]".replace("-", "−")


def deciding(claim: Claim, results: Results) -> Decided:
    """The first primary comparison whose verdict is the claim's."""
    verdict = rule.claim_verdict(claim, results)
    found = rule.decisions(claim, results)
    return next(d for d in found if d.comparison.primary and d.verdict == verdict)


def still_undecided(d: Decided) -> str:
    """Half-width and number of seeds that would decide an undecided comparison."""
    form = ".1f" if d.comparison.metric in IN_TOKENS else ".3f"
    return f"half-width {d.half_width:{form}}, about {rule.seeds_to_decide(d)} seeds would decide"


def counted(results: Results) -> str:
    """How many claims have which verdict: `Of 28 claims 9 reproduce, …`."""
    found = [rule.claim_verdict(claim, results) or NOT_RUN for claim in CLAIMS.values()]
    counts = Counter(found)
    parts = [
        f"{counts[rule.REPRODUCES]} reproduce",
        f"{counts[rule.CONTRADICTS]} are contradicted",
        f"{counts[rule.NO_DIFFERENCE]} show no difference",
        f"{counts[rule.UNDECIDED]} are undecided",
    ]
    if counts[NOT_RUN]:
        parts.append(f"{counts[NOT_RUN]} have not been run")
    return f"Of {len(CLAIMS)} claims {', '.join(parts[:-1])} and {parts[-1]}."


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def claims_table(results: Results) -> str:
    """README's table: each claim, its verdict, and the comparison that decides it."""
    lines = [
        counted(results),
        "",
        "| claim | verdict | seeds | difference [98.75 %] |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS.values():
        verdict = rule.claim_verdict(claim, results)
        cells = [f"{claim.text} ({claim.place})", NOT_RUN, "", ""]
        if verdict:
            d = deciding(claim, results)
            cells[1:] = [verdict, f"{d.seeds}", numbers(d)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_verdict(name: str, results: Results) -> str:
    """What a page says of a claim: its verdict, its primary differences, and what five seeds said
    before."""
    claim = CLAIMS[name]
    verdict = rule.claim_verdict(claim, results)
    if not verdict:
        return NOT_RUN
    primary = [d for d in rule.decisions(claim, results) if d.comparison.primary]
    differences = "; ".join(f"{title(d.comparison)} {numbers(d)}, n = {d.seeds}" for d in primary)
    links = f"[figure](../experiments/figures/{name}.png), `python -m experiments.run {name}`"
    if claim.five_seeds:
        links += f"; [five seeds](../experiments/FIVE_SEEDS.md): {claim.five_seeds}"
    caveat = f"; {claim.caveat}" if claim.caveat else ""
    return f"**{verdict}**: {differences} ({links}){caveat}"


def results_page(results: Results) -> str:
    """RESULTS.md: every claim with all its comparisons, then every arm."""
    arms = [arm for arm in ARMS if results.get(arm, {}).get("runs")]
    runs = sum(len(results[arm]["runs"]) for arm in arms)
    lines = [
        "# The paper in miniature",
        "",
        f"Made by `python -m experiments.verdicts` from {runs} runs of {len(arms)} arms. The rule "
        "is in experiments/claims.py and is older than the runs. Differences are paired over "
        f"seeds, with 98.75 % t-intervals at looks after {', '.join(map(str, LOOKS))} seeds. An "
        "earlier round, with other seeds and a noisier measure: [FIVE_SEEDS.md](FIVE_SEEDS.md).",
        "",
        counted(results),
        "",
        "![All differences in accuracy](figures/differences.png)",
        "",
    ]
    for name, claim in CLAIMS.items():
        if rule.claim_verdict(claim, results):
            lines += claim_section(name, results)
    lines += ["## Arms", "", arms_table(results), "", "## Critics", "", critics_table(results), ""]
    return "\n".join(lines)


def claim_section(name: str, results: Results) -> list[str]:
    """The lines of RESULTS.md on one claim."""
    claim = CLAIMS[name]
    lines = [
        f"## {claim.text} ({claim.place}): {rule.claim_verdict(claim, results)}",
        "",
        f"`python -m experiments.run {name}`, {core_minutes(claim, results)} core minutes",
        "",
        "| comparison | seeds | mean difference [98.75 %] | verdict |",
        "|---|---|---|---|",
    ]
    for d in rule.decisions(claim, results):
        primary = "" if d.comparison.primary else " (not primary)"
        verdict = d.verdict
        if verdict == rule.UNDECIDED and d.comparison.primary:
            verdict = f"{verdict}: {still_undecided(d)}"
        cells = [title(d.comparison) + primary, f"{d.seeds}", numbers(d), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    if claim.five_seeds:
        lines += ["", f"What five other seeds said before: {claim.five_seeds}."]
    if claim.caveat:
        lines += ["", f"Caveat: {claim.caveat}."]
    if name == "rise":
        lines += ["", moments(results)]
    return [*lines, "", f"![{claim.text}](figures/{name}.png)", ""]


def moments(results: Results) -> str:
    """A sentence on the step moments of each seed."""
    found = []
    for seed, run in sorted(results["default"]["runs"].items()):
        steps = ", ".join(map(str, step_moments(run["curves"]))) or "none"
        found.append(f"seed {seed}: {steps}")
    listed = "; ".join(found)
    return f"Step moments (`verdicts.step_moments`; no part of the verdict): {listed}."


def step_moments(curves: dict[str, list[float]], width: int = 4, share: float = 1 / 3) -> list[int]:
    """Fig. 5's "step moments": the steps at which reward and length both rise, from the mean of
    `width` steps before to that of `width` steps after, by at least `share` of their whole rise
    from the first `width` steps to the last.

    >>> step_moments({"reward": [0.1] * 8 + [0.8] * 8, "length": [30] * 8 + [90] * 8})
    [6, 7, 8, 9, 10]
    >>> step_moments({"reward": [s / 40 for s in range(40)], "length": list(range(40))})
    []
    """

    def rises(curve: list[float], step: int) -> bool:
        def mean(first: int) -> float:
            return fmean(curve[first : first + width])

        return mean(step) - mean(step - width) >= share * (mean(last) - mean(0)) > 0

    last = len(curves["reward"]) - width
    both = (curves["reward"], curves["length"])
    return [step for step in range(width, last + 1) if all(rises(curve, step) for curve in both)]


def core_minutes(claim: Claim, results: Results) -> int:
    """Minutes that the runs of the claim's arms took on one core: from the median of an arm's runs,
    since a run may have been paused."""
    return round(sum(arm_minutes(arm, results) for arm in claim.arms()))


def arm_minutes(arm: str, results: Results) -> float:
    """Minutes that an arm's runs took on one core."""
    runs = results.get(arm, {}).get("runs", {}).values()
    return len(runs) * median(run["seconds"] for run in runs) / 60 if runs else 0.0


def arms_table(results: Results) -> str:
    """Every arm: flags, learning rate, late accuracy of each seed, and means over the seeds."""
    columns = ["arm", "flags", "policy rate", "late accuracy by seed", "late accuracy"]
    columns += ["accuracy", "length", "format", "reflection", "truncated", "core minutes"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in ARMS:
        runs = runs_of(arm, results)
        if not runs:
            continue
        accuracies = [f"{run['after']['late_accuracy']:.3f}".removeprefix("0") for run in runs]
        flags = f"`{ARMS[arm]}`" if ARMS[arm] else ""
        cells = [arm, flags, runs[0]["rate"], " ".join(accuracies)]
        for metric in ("late_accuracy", *columns[5:10]):
            digits = 1 if metric == "length" else 3
            cells.append(f"{fmean(run['after'][metric] for run in runs):.{digits}f}")
        cells.append(f"{arm_minutes(arm, results):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def critics_table(results: Results) -> str:
    """What each arm's critic predicts on held-out responses after the training, over the seeds."""
    metrics = ["accuracy", "value_first", "brier_first", "explained_variance", "correlation"]
    metrics += ["brier_value", "brier_shifted", "brier_group", "brier_constant", "brier_best"]
    heads = ["arm", "accuracy", "V(s_0)", "Brier of V(s_0)", "explained variance of R"]
    heads += ["correlation of V(s_t) with the success rate", "Brier of V(s_t)"]
    heads += ["with its mean set right", "of the group's mean", "of a constant"]
    heads += ["of the success rate"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in ARMS:
        runs = runs_of(arm, results)
        if not runs or "value_first" not in runs[0]["after"]:
            continue
        cells = [arm]
        measured = [run["after"] | _knowledge(run) for run in runs]
        for metric in metrics:
            found = [of_run[metric] for of_run in measured if metric in of_run]
            cells.append(f"{fmean(found):.3f}".replace("-", "−") if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _knowledge(run: dict[str, Any]) -> dict[str, float]:
    """What the critic of a run knows, where its calibration was measured."""
    return critics.knowledge(run["calibration"]) if "calibration" in run else {}


def runs_of(arm: str, results: Results) -> Sequence[dict[str, Any]]:
    """The runs of an arm in the order of their seeds."""
    return [run for _, run in sorted(results.get(arm, {}).get("runs", {}).items())]


# ── pages ────────────────────────────────────────────────────────────────────────────────────────


def filled_readme(text: str, results: Results) -> str:
    """README.md with the table of claims between its markers. Raises ValueError unless the markers
    are there exactly once."""
    pattern = r"(<!-- claims -->\n).*?(<!-- /claims -->)"
    table = claims_table(results)
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"README.md: {count} places <!-- claims --> … <!-- /claims -->, expected 1"
        )
    return filled


def filled_pages(texts: Sequence[str], results: Results) -> list[str]:
    """The pages with each claim's verdict between its markers. Raises ValueError unless every claim
    has exactly one place in them, and every place a claim."""
    pattern = r"(<!-- verdict (\w+) -->).*?(<!-- /verdict -->)"
    names = [m[2] for text in texts for m in re.finditer(pattern, text, flags=re.DOTALL)]
    if sorted(names) != sorted(CLAIMS):
        wrong = [n for n in {*names, *CLAIMS} if names.count(n) != 1 or n not in CLAIMS]
        pages = " and ".join(f"docs/{page.name}" for page in PAGES)
        raise ValueError(
            f"{pages}: expected one place <!-- verdict NAME --> … <!-- /verdict --> for each "
            f"claim; wrong: {', '.join(sorted(wrong))}"
        )

    def filled(place: re.Match) -> str:
        return f"{place[1]} {page_verdict(place[2], results)} {place[3]}"

    return [re.sub(pattern, filled, text, flags=re.DOTALL) for text in texts]


def rewrite() -> None:
    """Draw the figures, and write RESULTS.md, README's table and the verdicts in docs/."""
    results = rule.load()
    draw.draw_all(results)
    RESULTS_PAGE.write_text(results_page(results))
    README.write_text(filled_readme(README.read_text(), results))
    texts = filled_pages([page.read_text() for page in PAGES], results)
    for page, text in zip(PAGES, texts, strict=True):
        page.write_text(text)
    print(claims_table(results))


def main() -> None:
    """Rewrite everything that is made from the results."""
    tyro.cli(rewrite, description=__doc__, prog="python -m experiments.verdicts")


if __name__ == "__main__":
    main()
