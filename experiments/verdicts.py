"""Turn the results into verdicts, by the rule in experiments/claims.py.

    python -m experiments.verdicts

Reads experiments/results and rewrites everything that is made from it: experiments/RESULTS.md, the
figures, the table of claims in README.md, and the verdict of each claim in docs/paper.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import tyro

from experiments.claims import ARMS, CLAIMS, MARGIN, SEEDS, Claim, Comparison
from reports import figures
from reports.figures import LENGTH, REWARD, Record, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIGURES = HERE / "figures"
README = HERE.parent / "README.md"
PAPER = HERE.parent / "docs" / "paper.md"

REPRODUCES = "reproduces"
DOES_NOT = "does not reproduce"
NOT_VISIBLE = "not visible at this scale"

Results = Mapping[str, dict[str, Any]]  # arm → its results/ARM.json


class Decided(NamedTuple):
    """A comparison with its numbers: mean and 95 % interval of the paired differences."""

    comparison: Comparison
    mean: float
    low: float
    high: float
    verdict: str


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────


def decide(comparison: Comparison, results: Results) -> Decided:
    """Compare two arms seed by seed. The metric of an arm against itself is a difference already,
    and is compared with 0."""
    first = metric_by_seed(results, comparison.first, comparison.metric)
    if comparison.first == comparison.second:
        differences = list(first.values())
    else:
        second = metric_by_seed(results, comparison.second, comparison.metric)
        differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    mean, low, high = t_interval(differences)
    return Decided(comparison, mean, low, high, verdict(comparison, low, high))


def metric_by_seed(results: Results, arm: str, metric: str) -> dict[str, float]:
    """seed → the metric of an arm's held-out responses after its training, or before it (ARM@0)."""
    name, at, _ = arm.partition("@")
    when = "before" if at else "after"
    runs = sorted(results[name]["runs"].items())
    return {seed: run[when][metric] for seed, run in runs if metric in run[when]}


def verdict(comparison: Comparison, low: float, high: float) -> str:
    """The verdict of a comparison from its interval, see experiments/claims.py.

    >>> verdict(Comparison("a", "b"), 0.01, 0.2)
    'reproduces'
    >>> verdict(Comparison("a", "b", paper="alike"), 0.01, 0.2)
    'not visible at this scale'
    """
    if comparison.paper == "more":
        reproduces, opposed = low > 0, high < 0
    else:
        reproduces, opposed = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    if reproduces:
        return REPRODUCES
    return DOES_NOT if opposed else NOT_VISIBLE


def claim_verdict(decided: Sequence[Decided]) -> str:
    """The verdict of a claim, from its primary comparisons."""
    verdicts = {d.verdict for d in decided if d.comparison.primary}
    for worst in (DOES_NOT, NOT_VISIBLE):
        if worst in verdicts:
            return worst
    return REPRODUCES


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


# ── which arms have been run ─────────────────────────────────────────────────────────────────────


def load() -> dict[str, dict[str, Any]]:
    """arm → its results, for the arms that have any."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def run_on_all_seeds(arm: str, results: Results) -> bool:
    """Whether there is a result for every seed."""
    return arm in results and len(results[arm]["runs"]) == len(SEEDS)


def finished(claim: Claim, results: Results) -> bool:
    """Whether the arms of the claim's primary comparisons have been run."""
    return all(run_on_all_seeds(arm, results) for arm in claim.arms(primary=True))


def finished_arms(claim: Claim, results: Results) -> list[str]:
    """The arms of the claim that have been run, the reference first."""
    return [arm for arm in claim.arms() if run_on_all_seeds(arm, results)]


def decisions(claim: Claim, results: Results) -> list[Decided]:
    """The claim's comparisons whose arms have been run, decided."""
    arms = finished_arms(claim, results)
    return [
        decide(c, results)
        for c in claim.comparisons
        if c.first in arms and c.second.removesuffix("@0") in arms
    ]


# ── texts and tables ─────────────────────────────────────────────────────────────────────────────


def title(c: Comparison) -> str:
    """What is compared, such as `accuracy, default − lam-0.95`."""
    metric = c.metric.replace("_", " ")
    if c.second == c.first:
        return metric
    if c.second == f"{c.first}@0":
        return f"{metric}, after − before"
    return f"{metric}, {c.first} − {c.second}"


def numbers(d: Decided) -> str:
    """Mean and interval of a difference, such as `+0.031 [+0.010, +0.052]`."""
    in_tokens = "length" in d.comparison.metric or "excess" in d.comparison.metric
    form = "+.1f" if in_tokens else "+.3f"
    return f"{d.mean:{form}} [{d.low:{form}}, {d.high:{form}}]".replace("-", "−")


def primary_differences(decided: Sequence[Decided]) -> list[str]:
    """Title and numbers of each primary comparison."""
    return [f"{title(d.comparison)} {numbers(d)}" for d in decided if d.comparison.primary]


def claims_table(results: Results) -> str:
    """README's table: claim, place in the paper, verdict, primary differences, figure."""
    lines = [
        "| claim | paper | verdict | difference, in accuracy unless named [95 %] | figure |",
        "|---|---|---|---|---|",
    ]
    for name, claim in CLAIMS.items():
        verdict, differences, figure = "not run", [], name
        if finished(claim, results):
            decided = decisions(claim, results)
            verdict = claim_verdict(decided)
            differences = [d.removeprefix("accuracy, ") for d in primary_differences(decided)]
            figure = f"[{name}](experiments/figures/{name}.png)"
        cells = [claim.text, claim.place, verdict, "; ".join(differences), figure]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_verdict(name: str, results: Results) -> str:
    """What docs/paper.md says of a claim: its verdict, and its primary differences."""
    claim = CLAIMS[name]
    if not finished(claim, results):
        return "not run"
    decided = decisions(claim, results)
    links = f"[figure](../experiments/figures/{name}.png), `python -m experiments.run {name}`"
    caveat = f"; {claim.caveat}" if claim.caveat else ""
    differences = "; ".join(primary_differences(decided))
    return f"**{claim_verdict(decided)}**: {differences} ({links}){caveat}"


def results_page(results: Results) -> str:
    """RESULTS.md: every claim with all its comparisons, then every arm."""
    lines = [
        "# The paper in miniature",
        "",
        f"Made by `python -m experiments.verdicts` from {len(results)} arms. The rule is in "
        "experiments/claims.py and is older than the runs. Differences are paired over seeds, with "
        "95 % t-intervals.",
        "",
    ]
    for name, claim in CLAIMS.items():
        if finished(claim, results):
            lines += claim_section(name, results)
    return "\n".join([*lines, "## Arms", "", arms_table(results), ""])


def claim_section(name: str, results: Results) -> list[str]:
    """The lines of RESULTS.md on one claim."""
    claim = CLAIMS[name]
    decided = decisions(claim, results)
    lines = [
        f"## {claim.text} ({claim.place}): {claim_verdict(decided)}",
        "",
        f"`python -m experiments.run {name}`, {core_minutes(claim, results)} core minutes",
        "",
        "| comparison | mean difference [95 %] | verdict |",
        "|---|---|---|",
    ]
    for d in decided:
        primary = "" if d.comparison.primary else " (not primary)"
        lines.append(f"| {title(d.comparison)}{primary} | {numbers(d)} | {d.verdict} |")
    if claim.caveat:
        lines += ["", f"Caveat: {claim.caveat}."]
    if name == "rise":
        found = []
        for seed, run in sorted(results["default"]["runs"].items()):
            steps = ", ".join(map(str, step_moments(run["curves"]))) or "none"
            found.append(f"seed {seed}: {steps}")
        moments = "; ".join(found)
        lines += ["", f"Step moments (`verdicts.step_moments`; no part of the verdict): {moments}."]
    return [*lines, "", f"![{claim.text}](figures/{name}.png)", ""]


def core_minutes(claim: Claim, results: Results) -> int:
    """Minutes that the runs of the claim's arms take on one core: from the median of an arm's runs,
    since a run may have been paused."""
    seconds = 0.0
    for arm in finished_arms(claim, results):
        runs = results[arm]["runs"].values()
        seconds += len(runs) * median(run["seconds"] for run in runs)
    return round(seconds / 60)


def arms_table(results: Results) -> str:
    """Every arm: flags, learning rate, accuracy of each seed, and means over the seeds."""
    columns = ["arm", "flags", "policy rate", "accuracy by seed", "mean"]
    columns += ["length", "format", "reflection", "truncated"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in ARMS:
        if arm not in results or not results[arm]["runs"]:
            continue
        runs = [run for _, run in sorted(results[arm]["runs"].items())]
        accuracies = [f"{run['after']['accuracy']:.3f}".removeprefix("0") for run in runs]
        flags = f"`{ARMS[arm]}`" if ARMS[arm] else ""
        cells = [arm, flags, runs[0]["rate"], " ".join(accuracies)]
        for metric in ("accuracy", "length", "format", "reflection", "truncated"):
            digits = 1 if metric == "length" else 3
            cells.append(f"{fmean(run['after'][metric] for run in runs):.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def filled_paper(text: str, results: Results) -> str:
    """docs/paper.md with each claim's verdict between its markers. Raises ValueError unless every
    claim has exactly one place, and every place a claim."""
    pattern = r"(<!-- verdict (\w+) -->).*?(<!-- /verdict -->)"
    names = [m[2] for m in re.finditer(pattern, text, flags=re.DOTALL)]
    if sorted(names) != sorted(CLAIMS):
        wrong = [n for n in {*names, *CLAIMS} if names.count(n) != 1 or n not in CLAIMS]
        raise ValueError(
            f"docs/paper.md: expected one place <!-- verdict NAME --> … <!-- /verdict --> for each "
            f"claim; wrong: {', '.join(sorted(wrong))}"
        )
    return re.sub(
        pattern, lambda m: f"{m[1]} {paper_verdict(m[2], results)} {m[3]}", text, flags=re.DOTALL
    )


# ── figures ──────────────────────────────────────────────────────────────────────────────────────

EXPLAINED = ("explained_variance", "explained variance of V")
PANELS = {  # claim → the metrics of its figure, where they are not those of "rise"
    "rise": (REWARD, LENGTH),
    "format": (("format", "share in the format"), REWARD),
    "reflection": (
        ("reflection", "share that reflects"),
        ("correct_reflection_length", "correct and reflecting [tokens]"),
        LENGTH,
    ),
    "repetition": (EXPLAINED, ("truncated", "share cut off")),
    "valuehead": (REWARD, EXPLAINED),
    "criticwarmup": (REWARD, EXPLAINED),
}


def draw(results: Results) -> None:
    """A figure of the curves of each claim's arms, and one of all differences in accuracy."""
    rows = []
    for name, claim in CLAIMS.items():
        if not finished(claim, results):
            continue
        draw_claim(name, results)
        if name != "rise":
            rows += [
                (title(d.comparison).partition(", ")[2], *(round(x, 3) for x in d[1:4]))
                for d in decisions(claim, results)
                if d.comparison.metric == "accuracy"
            ]
    if rows:
        label = "difference in held-out accuracy: mean and 95 % interval over seeds"
        out = FIGURES / "differences.png"
        figures.intervals(rows, out, "Arms against their reference", label, MARGIN)


def draw_claim(name: str, results: Results) -> None:
    """The curves of a claim's arms."""
    claim = CLAIMS[name]
    curves, held_out = {}, {}
    for arm in finished_arms(claim, results):
        runs = results[arm]["runs"].values()
        label = ARMS[arm].replace("--", "") or arm
        curves[label] = [records(run) for run in runs]
        held_out[label] = [evaluations(run) for run in runs]
    figures.compare(
        curves,
        FIGURES / f"{name}.png",
        f"{claim.text} ({claim.place})",
        PANELS.get(name, PANELS["rise"]),
        held_out if len(curves) > 1 else None,
    )


def records(run: dict[str, Any]) -> list[Record]:
    """The curves of a run as one record a step. The off-policy arm has five steps; each stands for
    the samples and updates of eight."""
    curves = run["curves"]
    steps = len(curves["reward"])
    scale = 8 if steps == 5 else 1
    found = []
    for step in range(steps):
        values = {name: curve[step] for name, curve in curves.items() if curve[step] is not None}
        found.append({"step": step * scale} | values)
    return found


def evaluations(run: dict[str, Any]) -> list[Record]:
    """The held-out accuracy before and after the training, as in evaluations.jsonl."""
    steps = len(run["curves"]["reward"])
    return [
        {"step": 0, "reward": run["before"]["accuracy"]},
        {"step": steps, "reward": run["after"]["accuracy"]},
    ]


def rewrite() -> None:
    """Draw the figures, and write RESULTS.md, README's table and the verdicts in docs/paper.md."""
    results = load()
    draw(results)
    (HERE / "RESULTS.md").write_text(results_page(results))
    README.write_text(filled_readme(README.read_text(), results))
    PAPER.write_text(filled_paper(PAPER.read_text(), results))
    print(claims_table(results))


def main() -> None:
    """Rewrite everything that is made from the results."""
    tyro.cli(rewrite, description=__doc__, prog="python -m experiments.verdicts")


if __name__ == "__main__":
    main()
