"""Figures of a run: metrics.jsonl → the curves the paper plots, as PNG.

python report.py runs/NAME
"""

import json
import sys
from pathlib import Path

# (file, title, [(metric, label)] on the left axis, [(metric, label)] on the right axis)
FIGURES = (
    (
        "reward_length",
        "Reward and response length (as Fig. 2)",
        [("reward", "reward")],
        [("length", "response length [tokens]")],
    ),
    ("format", "Format ratio (as Fig. 4)", [("format", "share of responses in the format")], []),
    (
        "reflection",
        "Reflection (as Fig. 6)",
        [("reflection", "share of responses that reflect")],
        [("length", "length, all [tokens]"), ("correct_reflection_length", "length, correct and reflecting [tokens]")],
    ),
    (
        "health",
        "Critic and sampler",
        [("explained_variance", "explained variance of V"), ("entropy", "entropy [nats]")],
        [("logp_gap", "|Δ log-prob| sampler–trainer [nats]")],
    ),
)


def figures(folder: Path) -> list[Path]:
    """Draw every figure of FIGURES from `folder`/metrics.jsonl; returns the files written. Held-out accuracy, where the run
    evaluated, is drawn as points over the training reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _read(folder / "metrics.jsonl")
    evaluations = _read(folder / "evaluations.jsonl") if (folder / "evaluations.jsonl").exists() else []
    written = []
    for name, title, left, right in FIGURES:
        fig, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        twin = axis.twinx() if right else None
        lines = []
        styles = iter(("#1f4e9c", "#7aa6de"))
        for metric, label in left:
            lines += _curve(axis, rows, metric, label, next(styles), "-")
        for (metric, label), color, dash in zip(right, ("#c7591d", "#e8a87c"), ("--", ":"), strict=False):
            lines += _curve(twin, rows, metric, label, color, dash)
        if name == "reward_length" and evaluations:
            x, y = zip(*((e["step"], e["reward"]) for e in evaluations), strict=True)
            lines.append(axis.scatter(x, y, color="black", s=28, zorder=3, label="held-out accuracy"))
        axis.set(title=title, xlabel="step", ylabel=", ".join(label for _, label in left))
        if name != "health":
            axis.set_ylim(0, 1.02)
        if twin:
            twin.set_ylabel(right[0][1] if len(right) == 1 else "length [tokens]")
            twin.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines["top"].set_visible(False)
        axis.legend(handles=lines, loc="lower right", frameon=False, fontsize=9)
        path = folder / f"{name}.png"
        fig.savefig(path, dpi=150)
        plt.close(fig)
        written.append(path)
    return written


def _curve(axis, rows: list[dict[str, float]], metric: str, label: str, color: str, dash: str) -> list:  # noqa: ANN001
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    return axis.plot(*zip(*points, strict=True), dash, color=color, label=label, linewidth=1.8) if points else []


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python report.py runs/NAME   (a folder with metrics.jsonl)")
    for file in figures(Path(sys.argv[1])):
        print(file)
