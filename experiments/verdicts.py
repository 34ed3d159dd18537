"""Results → verdicts, by the rule of experiments/claims.py: RESULTS.md, the figures, and what README.md and docs/paper.md say of each claim.

python -m experiments.verdicts
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

HERE = Path(__file__).parent

from experiments.claims import ARMS, CLAIMS, MARGIN, SEEDS, Claim, Comparison
from reports import figures

RESULTS, FIGURES = HERE / "results", HERE / "figures"
README, PAPER = HERE.parent / "README.md", HERE.parent / "docs" / "paper.md"
T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # 97.5 % quantiles of t
REPRODUCES, DOES_NOT, NOT_VISIBLE = "reproduces", "does not", "not visible at this scale"


class Decided(NamedTuple):
    """A comparison with its numbers: mean and 95 % interval of the paired differences."""

    comparison: Comparison
    mean: float
    low: float
    high: float
    verdict: str


def decide(comparison: Comparison, results: dict[str, dict]) -> Decided:
    """Compare two arms seed by seed.

    With "ARM" against itself the metric is a difference already, and is compared with 0.
    """
    first, second = (metric_by_seed(results, arm, comparison.metric) for arm in comparison[:2])
    if comparison.first == comparison.second:
        second = dict.fromkeys(first, 0.0)
    seeds = sorted(first.keys() & second.keys())
    mean, low, high = interval([first[s] - second[s] for s in seeds])
    return Decided(comparison, mean, low, high, verdict(comparison, low, high))


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval, mean ± t s/√n.

    >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    n, mean = len(differences), fmean(differences)
    half = T[n - 1] * stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def verdict(comparison: Comparison, low: float, high: float) -> str:
    """The rule, see experiments/claims.py.

    >>> verdict(Comparison("a", "b"), 0.01, 0.2), verdict(Comparison("a", "b", paper="alike"), 0.01, 0.2)
    ('reproduces', 'not visible at this scale')
    """
    if comparison.paper == "more":
        return REPRODUCES if low > 0 else DOES_NOT if high < 0 else NOT_VISIBLE
    return (
        REPRODUCES
        if low > -MARGIN and high < MARGIN
        else DOES_NOT
        if low > MARGIN or high < -MARGIN
        else NOT_VISIBLE
    )


def of_claim(decided: Sequence[Decided]) -> str:
    """The verdict of a claim, from its primary comparisons."""
    verdicts = {d.verdict for d in decided if d.comparison.primary}
    return (
        DOES_NOT if DOES_NOT in verdicts else NOT_VISIBLE if NOT_VISIBLE in verdicts else REPRODUCES
    )


def metric_by_seed(results: dict[str, dict], arm: str, metric: str) -> dict[str, float]:
    """seed → the metric of the arm's held-out responses, after its training or (ARM@0) before it."""
    name, at, _ = arm.partition("@")
    held_out = {
        seed: run["before" if at else "after"] for seed, run in results[name]["runs"].items()
    }
    return {seed: found[metric] for seed, found in held_out.items() if metric in found}


def step_moments(curves: dict[str, list[float]], width: int = 4, share: float = 1 / 3) -> list[int]:
    """Fig. 5's "step moments": steps before and after which, in windows of `width` steps, reward and length both rise by
    at least `share` of their whole rise from the first window to the last.

    >>> step_moments({"reward": [0.1] * 8 + [0.8] * 8, "length": [30] * 8 + [90] * 8})
    [6, 7, 8, 9, 10]
    >>> step_moments({"reward": [s / 40 for s in range(40)], "length": list(range(40))})
    []
    """

    def mean(curve: list[float], first: int) -> float:
        return fmean(curve[first : first + width])

    both = [curves["reward"], curves["length"]]
    last = len(both[0]) - width
    return [
        s
        for s in range(width, last + 1)
        if all(
            mean(c, s) - mean(c, s - width) >= share * (mean(c, last) - mean(c, 0)) > 0
            for c in both
        )
    ]


# ── tables, figures, and the pages that speak of them ────────────────────────────────────────────────────────────────

RULE = "The rule stands in experiments/claims.py and is older than the runs; differences are paired over seeds, with 95 % t-intervals."
REWARD, LENGTH = ("reward", "reward"), ("length", "response length [tokens]")
EXPLAINED = ("explained_variance", "explained variance of V")
PANELS = {
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


def load() -> dict[str, dict]:
    """arm → its results, of the arms that have any."""
    return {f.stem: json.loads(f.read_text()) for f in sorted(RESULTS.glob("*.json"))}


def run_on_all_seeds(arm: str, results: dict[str, dict]) -> bool:
    """Whether there is a result for every seed."""
    return arm in results and len(results[arm]["runs"]) == len(SEEDS)


def finished(claim: Claim, results: dict[str, dict]) -> bool:
    """Whether the arms of the claim's primary comparisons have been run."""
    return all(run_on_all_seeds(arm, results) for arm in claim.arms(primary=True))


def decisions(claim: Claim, results: dict[str, dict]) -> list[Decided]:
    """The comparisons whose arms have been run."""
    arms = [arm for arm in claim.arms() if run_on_all_seeds(arm, results)]
    return [
        decide(c, results)
        for c in claim.comparisons
        if {c.first, c.second.removesuffix("@0")} <= set(arms)
    ]


def numbers(d: Decided) -> str:
    """`+0.031 [+0.010, +0.052]`, in the metric's digits."""
    digits = 1 if "length" in d.comparison.metric or "excess" in d.comparison.metric else 3
    return f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]".replace("-", "−")


def minutes(claim: Claim, results: dict[str, dict]) -> int:
    """Of one core that the runs of the claim's arms take; by the median, since a run may have been paused."""
    runs = [
        list(results[arm]["runs"].values())
        for arm in claim.arms()
        if run_on_all_seeds(arm, results)
    ]
    return round(sum(len(arm) * median(run["seconds"] for run in arm) for arm in runs) / 60)


def one_line(name: str, results: dict[str, dict]) -> str:
    """What docs/paper.md says of a claim: the verdict, and the numbers of its primary comparisons."""
    decided = decisions(CLAIMS[name], results)
    primary = "; ".join(
        f"{title(d.comparison)} {numbers(d)}" for d in decided if d.comparison.primary
    )
    links = f"[figure](experiments/figures/{name}.png), `python -m experiments.run {name}`"
    return f"**{of_claim(decided)}**: {primary} ({links})"


def title(c: Comparison) -> str:
    """`accuracy, default − lam-0.95`."""
    arms = {
        c.first: "",
        f"{c.first}@0": ", after − before",
    }  # against itself the metric is a difference already
    return c.metric.replace("_", " ") + arms.get(c.second, f", {c.first} − {c.second}")


def claims_table(results: dict[str, dict]) -> str:
    """README's table: claim, command, figure, verdict with interval, minutes."""
    lines = [
        "| claim | paper | command and figure | verdict | mean difference [95 %] | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, claim in CLAIMS.items():
        if not finished(claim, results):
            lines.append(
                f"| {claim.text} | {claim.place} | `python -m experiments.run {name}` | not run | | |"
            )
            continue
        decided = decisions(claim, results)
        primary = "<br>".join(
            f"{title(d.comparison)} {numbers(d)}" for d in decided if d.comparison.primary
        )
        figure = f"[`python -m experiments.run {name}`](experiments/figures/{name}.png)"
        lines.append(
            f"| {claim.text} | {claim.place} | {figure} | {of_claim(decided)} | {primary} | {minutes(claim, results)} |"
        )
    return "\n".join(lines)


def arms_table(results: dict[str, dict]) -> str:
    """Every arm: rate, held-out accuracy of each seed and mean, length, format, reflection, truncated."""
    lines = [
        "| arm | flags | policy rate | accuracy by seed | mean | length | format | reflection | truncated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in [a for a in ARMS if a in results and results[a]["runs"]]:
        runs = [run for _, run in sorted(results[arm]["runs"].items())]
        means = [
            fmean(run["after"][k] for run in runs)
            for k in ("accuracy", "length", "format", "reflection", "truncated")
        ]
        by_seed = " ".join(f"{run['after']['accuracy']:.3f}".removeprefix("0") for run in runs)
        flags = f"`{ARMS[arm]}`" if ARMS[arm] else ""
        cells = (
            f"{means[0]:.3f} | {means[1]:.1f} | {means[2]:.3f} | {means[3]:.3f} | {means[4]:.3f}"
        )
        lines.append(f"| {arm} | {flags} | {runs[0]['rate']} | {by_seed} | {cells} |")
    return "\n".join(lines)


def draw(results: dict[str, dict]) -> None:
    """The curves of every claim's arms, and one figure of all differences in accuracy."""
    FIGURES.mkdir(exist_ok=True)
    rows = []
    for name, claim in CLAIMS.items():
        if finished(claim, results):
            done = [arm for arm in claim.arms() if run_on_all_seeds(arm, results)]
            arms = {label(arm): list(results[arm]["runs"].values()) for arm in done}
            curves = {label: [records(run) for run in runs] for label, runs in arms.items()}
            ends = (
                {label: [evaluations(run) for run in runs] for label, runs in arms.items()}
                if len(arms) > 1
                else None
            )
            figures.compare(
                curves,
                FIGURES / name,
                f"{claim.text} ({claim.place})",
                PANELS.get(name, PANELS["rise"]),
                ends,
            )
            compared = [d for d in decisions(claim, results) if d.comparison.metric == "accuracy"]
            rows += [
                (title(d.comparison).partition(", ")[2], *(round(x, 3) for x in d[1:4]))
                for d in compared
                if name != "rise"
            ]
    if rows:
        what = "difference in held-out accuracy: mean and 95 % interval over seeds"
        figures.intervals(
            rows, FIGURES / "differences", "Arms against their reference", what, MARGIN
        )


def label(arm: str) -> str:
    """What a figure calls an arm: its flags, or its name."""
    return ARMS[arm].replace("--", "") or arm


def records(run: dict) -> list[dict[str, float]]:
    """The curves of a run as one record a step."""
    curves, scale = (
        run["curves"],
        8 if len(run["curves"]["reward"]) == 5 else 1,
    )  # eight on-policy steps' samples
    return [
        {"step": s * scale} | {k: c[s] for k, c in curves.items() if c[s] is not None}
        for s in range(len(curves["reward"]))
    ]


def evaluations(run: dict) -> list[dict[str, float]]:
    """The held-out accuracy before and after, as reports/figures.py's evaluations."""
    last = len(run["curves"]["reward"])
    return [
        {"step": step, "reward": run[when]["accuracy"]}
        for step, when in ((0, "before"), (last, "after"))
    ]


def write_pages(results: dict[str, dict]) -> None:
    """RESULTS.md, the table in README.md and the verdicts in docs/paper.md."""
    (HERE / "RESULTS.md").write_text(results_page(results))
    for page, filled in ((README, filled_readme), (PAPER, filled_paper)):
        page.write_text(filled(page.read_text(), results))


def results_page(results: dict[str, dict]) -> str:
    """RESULTS.md: every claim with all its comparisons, then every arm."""
    lines = [
        "# The paper in miniature",
        "",
        f"Made by `python -m experiments.verdicts` from {len(results)} arms. {RULE}",
        "",
    ]
    for name, claim in CLAIMS.items():
        if not finished(claim, results):
            continue
        decided = decisions(claim, results)
        lines += [f"## {claim.text} ({claim.place}): {of_claim(decided)}", ""]
        lines += [f"`python -m experiments.run {name}`, {minutes(claim, results)} core minutes", ""]
        lines += ["| comparison | mean difference [95 %] | verdict |", "|---|---|---|"]
        for d in decided:
            primary = "" if d.comparison.primary else " (not primary)"
            lines.append(f"| {title(d.comparison)}{primary} | {numbers(d)} | {d.verdict} |")
        if name == "rise":
            moments = {
                seed: step_moments(run["curves"])
                for seed, run in sorted(results["default"]["runs"].items())
            }
            found = "; ".join(
                f"seed {seed}: {', '.join(map(str, steps)) or 'none'}"
                for seed, steps in moments.items()
            )
            lines += [
                "",
                f"Step moments (`verdicts.step_moments`; no part of the verdict): {found}.",
            ]
        lines += ["", f"![{claim.text}](figures/{name}.png)", ""]
    return "\n".join([*lines, "## Arms", "", arms_table(results), ""])


def filled_readme(text: str, results: dict[str, dict]) -> str:
    """README.md with the table of claims between its markers."""
    return re.sub(
        r"(<!-- claims -->\n).*?(\n<!-- /claims -->)",
        lambda m: m[1] + claims_table(results) + m[2],
        text,
        flags=re.S,
    )


def filled_paper(text: str, results: dict[str, dict]) -> str:
    """docs/paper.md with each claim's verdict between its markers."""

    def filled(m: re.Match) -> str:
        done = finished(CLAIMS[m[2]], results)
        return f"{m[1]} {one_line(m[2], results) if done else 'not run'} {m[3]}"

    return re.sub(r"(<!-- verdict (\w+) -->).*?(<!-- /verdict -->)", filled, text, flags=re.S)


def main() -> None:
    """Redraw and rewrite everything that is made of the results."""
    results = load()
    draw(results)
    write_pages(results)
    print(claims_table(results))


if __name__ == "__main__":
    main()
