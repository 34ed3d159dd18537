"""Figures of runs, and a table of them: metrics.jsonl → the curves the paper plots, as PNG.

python report.py runs/NAME [runs/OTHER …]
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
        fig, axis = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
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
        fig.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
        path = folder / f"{name}.png"
        fig.savefig(path, dpi=150)
        plt.close(fig)
        written.append(path)
    return written


def _curve(axis, rows: list[dict[str, float]], metric: str, label: str, color: str, dash: str) -> list:  # noqa: ANN001
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    name = label.split(" [")[0]  # the axis says the unit
    return axis.plot(*zip(*points, strict=True), dash, color=color, label=name, linewidth=1.8) if points else []


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(folders: list[Path]) -> str:
    """One line a run: held-out metrics before and after training, and its seconds."""
    lines = [f"{'run':24s} {'accuracy':>16s} {'length':>14s} {'format':>16s} {'reflection':>16s} {'seconds':>8s}"]
    for folder in folders:
        evaluations, summary = _read(folder / "evaluations.jsonl"), json.loads((folder / "summary.json").read_text())
        first, last = evaluations[0], evaluations[-1]
        cells = [
            f"{first[k]:.{n}f} → {last[k]:.{n}f}"
            for k, n in (("reward", 3), ("length", 1), ("format", 3), ("reflection", 3))
        ]
        lines.append(
            f"{folder.name:24s} {cells[0]:>16s} {cells[1]:>14s} {cells[2]:>16s} {cells[3]:>16s} {summary['seconds']:8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Draw the figures of each run named, and print the table where they were evaluated."""
    folders = [Path(a) for a in sys.argv[1:]]
    if not folders or not all((f / "metrics.jsonl").is_file() for f in folders):
        sys.exit("usage: python report.py runs/NAME …   (folders with metrics.jsonl)")
    for folder in folders:
        print(*figures(folder), sep="\n")
    evaluated = [f for f in folders if (f / "evaluations.jsonl").is_file() and (f / "summary.json").is_file()]
    if evaluated:
        print(table(evaluated))


if __name__ == "__main__":
    main()
