"""The figures of the claims: curves of their arms, all differences in accuracy, V(s_t) against the
success rate, and V along loops."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments import rule
from experiments.claims import ARMS, CLAIMS, MARGIN, Comparison
from experiments.critics import DEPTHS, REPEATS
from experiments.rule import Results
from reports import figures
from reports.figures import LENGTH, REWARD, Record, band, save_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = Path(__file__).parent / "figures"
EXPLAINED = ("explained_variance", "explained variance of V")
TRUNCATED = ("truncated", "share cut off")
PANELS = {  # claim → the metrics of its figure, where they are not reward and length
    "format": (("format", "share in the format"), REWARD),
    "reflection": (
        ("reflection", "share that reflects"),
        ("correct_reflection_length", "correct and reflecting [tokens]"),
        LENGTH,
    ),
    "loops": (TRUNCATED, REWARD),
    "valuehead": (REWARD, EXPLAINED),
    "criticonly": (REWARD, EXPLAINED),
    "decoupled": (REWARD, EXPLAINED),
    "adaptive": (REWARD, EXPLAINED),
    "smallcritic": (REWARD, EXPLAINED),
}
ACCURACIES = ("late_accuracy", "accuracy_at_1")


def draw_all(results: Results) -> None:
    """A figure for each claim that has been looked at, and one of all differences in accuracy."""
    special = {"calibration": draw_calibration, "repetition": draw_repetition}
    rows = []
    for name, claim in CLAIMS.items():
        if not rule.claim_verdict(claim, results):
            continue
        special.get(name, partial(draw_curves, name))(results)
        rows += [
            (_difference(d.comparison), *(round(x, 3) for x in d[1:4]))
            for d in rule.decisions(claim, results)
            if d.comparison.metric in ACCURACIES
        ]
    if rows:
        label = "difference in accuracy: mean and 98.75 % interval over seeds"
        out = FIGURES / "differences.png"
        figures.intervals(rows, out, "Arms against their reference", label, MARGIN)


def _difference(c: Comparison) -> str:
    """The arms of a comparison."""
    at_1 = ", at T = 1" if c.metric == "accuracy_at_1" else ""
    return f"{c.first} − {c.second}{at_1}"


# ── curves ───────────────────────────────────────────────────────────────────────────────────────


def draw_curves(name: str, results: Results) -> None:
    """The curves of a claim's arms."""
    claim = CLAIMS[name]
    arms = [arm for arm in claim.arms() if results.get(arm, {}).get("runs")]
    curves = {arm: [records(arm, run) for run in results[arm]["runs"].values()] for arm in arms}
    panels = PANELS.get(name, (REWARD, LENGTH))
    figures.compare(curves, FIGURES / f"{name}.png", f"{claim.text} ({claim.place})", panels)


def records(arm: str, run: dict[str, Any]) -> list[Record]:
    """The curves of a run as one record for each step of the policy. The off-policy arm has five
    steps; each stands for the samples and updates of eight. Steps of the critic alone are before
    step 0."""
    curves = run["curves"]
    steps = len(curves["reward"])
    scale = 8 if steps == 5 else 1
    alone = re.search(r"--critic-only-steps (\d+)", ARMS[arm])
    start = int(alone[1]) if alone else 0
    found = []
    for step in range(steps):
        values = {name: curve[step] for name, curve in curves.items() if curve[step] is not None}
        found.append({"step": (step - start) * scale} | values)
    return found


# ── what the critic has learned ──────────────────────────────────────────────────────────────────


def draw_calibration(results: Results) -> None:
    """V(s_t) against the success rate from s_t; the same for GRPO's baseline; Brier scores by
    depth. Above after the training; below for a policy that is still the base, with loops."""
    draws = []
    for arm in ("default", "loops-critic"):
        runs = results.get(arm, {}).get("runs", {})
        found = [run["calibration"] for run in runs.values() if "calibration" in run]
        if found:
            draws += [
                partial(_draw_reliability, found, "value", f"V(s_t), {arm}"),
                partial(_draw_reliability, found, "group", "mean reward of the group"),
                partial(_draw_brier_by_depth, found),
            ]
    save_panels(FIGURES / "calibration.png", CLAIMS["calibration"].text, draws)


def _draw_reliability(found: Sequence[Record], key: str, label: str, axes: "Axes") -> None:
    """One point for each state, and the diagonal on which predictions are right."""
    predicted = [q for run in found for q in run[key]]
    success = [p for run in found for p in run["success"]]
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.plot(predicted, success, ".", color="#1f4e9c", alpha=0.35, markersize=3)
    axes.set(xlabel=label, ylabel="success rate from s_t", xlim=(-0.1, 1.1), ylim=(-0.05, 1.05))


def _draw_brier_by_depth(found: Sequence[Record], axes: "Axes") -> None:
    """Brier scores of the predictions by the share of the response that the state holds."""
    labels = {"value": "V(s_t)", "group": "mean of the group", "success": "success rate itself"}
    for (key, label), style in zip(labels.items(), figures.ARM_STYLES, strict=False):
        scores = [fmean(brier_at(run, key, depth) for run in found) for depth in DEPTHS]
        axes.plot(DEPTHS, scores, color=style.color, linestyle=style.dash, label=label)
    axes.set(xlabel="depth: share of the response", ylabel="Brier score", ylim=(0, None))


def brier_at(run: Record, key: str, depth: float) -> float:
    """Brier score of a prediction over the states of one depth."""
    states = [i for i, d in enumerate(run["depth"]) if d == depth]
    pairs = [(run[key][i], run["success"][i]) for i in states]
    return fmean((q - p) ** 2 + p * (1 - p) for q, p in pairs)


def draw_repetition(results: Results) -> None:
    """V after a step was repeated, and as many tokens on in the response itself."""
    draws = []
    for arm in ("loops-critic", "loops"):
        found = [run["repetition"] for run in results.get(arm, {}).get("runs", {}).values()]
        if found:
            draws.append(partial(_draw_along, found, arm))
    claim = CLAIMS["repetition"]
    save_panels(FIGURES / "repetition.png", f"{claim.text} ({claim.place})", draws)


def _draw_along(found: Sequence[Record], arm: str, axes: "Axes") -> None:
    """Mean and interval over runs of V along a loop and along the response."""
    labels = {"along": "after repeating the step", "going_on": "as many tokens on, without"}
    repeats = (0, *REPEATS)
    for (key, label), style in zip(labels.items(), figures.ARM_STYLES, strict=False):
        bands = [band([run[key][i] for run in found]) for i in range(len(repeats))]
        means, lows, highs = zip(*bands, strict=True)
        axes.plot(repeats, means, color=style.color, linestyle=style.dash, label=label)
        axes.fill_between(repeats, lows, highs, color=style.color, alpha=0.15, linewidth=0)
    axes.set(xlabel=f"repeats ({arm}, n={len(found)})", ylabel="mean V(s_t)")
