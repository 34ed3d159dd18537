"""The paper's figures, from any run or set of runs, as PNG and SVG that can be read in grey, and a table of the runs.

python -m reports.figures runs/NAME             reward_length (Fig. 2), format (4), heldout (5), reflection (6), health
python -m reports.figures runs/one-* runs/two-* the same of each, and comparison (as Fig. 7): runs that differ in seed are one arm
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, float]
Arms = dict[str, list[list[Record]]]  # label → the records of each run
Row = tuple[str, float, float, float]  # label, mean, low, high
REWARD, LENGTH = ("reward", "reward"), ("length", "response length [tokens]")
FIGURES = (  # file, title, panels: (label of the axis, its limits, curves: (metric, label))
    ("reward_length", "Reward and response length (as Fig. 2)", (
        ("reward", (0, 1.02), (("reward", "training problems"),)), (LENGTH[1], (0, None), (("length", ""),)))),
    ("format", "Format ratio (as Fig. 4)", (("share in the format", (0, 1.02), (("format", ""),)),)),
    ("reflection", "Reflection (as Fig. 6)", (
        ("share that reflects", (0, None), (("reflection", ""),)),
        (LENGTH[1], (0, None), (("length", "all responses"), ("correct_reflection_length", "correct ones that reflect"))))),
    ("health", "Critic, policy and sampler", (
        ("explained variance, ≥ −1", (-1, 1), (("explained_variance", ""),)),
        ("entropy [nats/token]", (0, None), (("entropy", ""),)), ("|Δ log-prob| [nats]", (0, None), (("logp_gap", ""),)))),
)  # fmt: skip
ASIDE = """seed name run runs overwrite resume versions machine revision grader_workers eval_every micro_tokens rows
    threads vllm_memory max_logp_gap keep_rollouts activation_checkpointing compile offload replicas tensor_parallel plan
    gpus gpu_memory timeout_minutes checkpoint_every keep_checkpoints save_rollouts""".split()  # what is learned is the same
ARMS = (("#000000", "-", "o", 2.2), ("#1f4e9c", "--", "s", 1.4), ("#b5491c", ":", "^", 1.6), ("#2f968a", "-.", "D", 1.4),
        ("#d9a032", (0, (3, 1)), "v", 1.4), ("#9cc3e6", "-", "X", 1.4))  # fmt: skip  # colour, dash, marker, width
RUN = (("#1f4e9c", "-", "", 1.6), ("#d9822b", (0, (4, 1.5)), "", 1.6), ("#1f4e9c", "-", "o", 1.6))
LOOK = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8.5, "legend.title_fontsize": 8, "legend.loc": "upper center", "legend.handlelength": 3.2,
    "legend.frameon": False, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "lines.markersize": 4, "text.parse_math": False,
    "savefig.dpi": 160, "savefig.bbox": "tight", "svg.fonttype": "none", "svg.hashsalt": "report",
}  # fmt: skip


def read(path: Path) -> list[Record]:
    """The records of metrics.jsonl or evaluations.jsonl; none where there is no such file. A last line that is cut off, as
    while a run goes on, is left out, and stderr says so; any other line that is no JSON is a ValueError."""
    lines, records = path.read_text().splitlines() if path.is_file() else [], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is no JSON: {line!r:.60}") from None
            print(
                f"{path}: line {number}, the last, is cut off and left out; is the run still going?",
                file=sys.stderr,
            )
    return records


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of a quantity over runs. From three runs on low and high are the 95 % t-interval of the mean,
    mean ± t·s/√n; of two the smaller and the larger; of one the value itself."""
    n, m = len(values), fmean(values)
    if n < 3:
        return m, min(values), max(values)
    few = (
        4.303,
        3.182,
        2.776,
        2.571,
        2.447,
        2.365,
        2.306,
        2.262,
        2.228,
    )  # t of 2 to 10 degrees of freedom
    t = (
        few[n - 3] if n < 12 else 1.96 + 2.372 / (n - 1) + 2.822 / (n - 1) ** 2
    )  # Cornish–Fisher, within 0.1 %
    half = t * stdev(values) / math.sqrt(n)
    return m, m - half, m + half


def curve(
    seeds: Sequence[Sequence[Record]], metric: str
) -> list[tuple[float, float, float, float]]:
    """Step and `band` of a metric. Where one of the runs has no value there is a gap (NaN), not the mean of the others: it
    would jump where a run ends."""
    runs = [{r["step"]: r[metric] for r in records if metric in r} for records in seeds]
    steps = sorted({r["step"] for records in seeds for r in records})
    return [
        (s, *(band([run[s] for run in runs]) if all(s in run for run in runs) else [math.nan] * 3))
        for s in steps
    ]


def group(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs by arm: those whose settings are equal save for ASIDE, named by the settings in which arms differ ("lam 0.95").
    What an older run does not know is off. ValueError for a seed twice in an arm: it would narrow the band."""
    configs, arms = {f: json.loads((f / "config.json").read_text()) for f in folders}, {}
    kept = {
        f: {k: str(v) for k, v in config.items() if v and k not in ASIDE}
        for f, config in configs.items()
    }
    names = [
        n
        for n in dict.fromkeys(n for s in kept.values() for n in s)
        if len({s.get(n) for s in kept.values()}) > 1
    ]
    for f in folders:
        arms.setdefault(
            ", ".join(f"{n} {kept[f].get(n, 'off')}" for n in names) or "same settings", []
        ).append(f)
    for arm in arms.values():
        if len({configs[f]["seed"] for f in arm}) < len(arm):
            raise ValueError(
                f"{', '.join(map(str, arm))}: two have the same settings and seed; name only one of them"
            )
    return arms


def figures(folder: Path) -> list[Path]:
    """Draw FIGURES from `folder`/metrics.jsonl, and held-out accuracy where evaluations.jsonl has several sets or more than
    a first and a last record; returns the files. A panel of which a run has no value is left out (GRPO has no critic)."""
    records, held_out = read(folder / "metrics.jsonl"), read(folder / "evaluations.jsonl")
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no such file, or no whole step in it yet")
    sets = dict.fromkeys(name for e in held_out for name in e if name.startswith("reward/"))
    accuracy = [
        (f"accuracy, {m.partition('/')[2] or 'all problems'}", (0, None), [(m, "")])
        for m in [*sets, "reward"]
    ]
    drawn = [(records, RUN, *figure) for figure in FIGURES]
    drawn += [(held_out, RUN[2:], "heldout", "Held-out accuracy (as Fig. 5)", accuracy)] * (
        bool(sets) or len(held_out) > 2
    )
    written = []
    for rows, looks, name, title, contents in drawn:
        panels = []
        for ylabel, limits, metrics in contents:
            lines = [
                (curve([rows], m), label, look)
                for (m, label), look in zip(metrics, looks, strict=False)
            ]
            if any(m in r for m, _ in metrics for r in rows):
                panels.append(
                    (_curves, ylabel, lines, limits, held_out if ylabel == "reward" else ())
                )
        written += _draw(folder / name, f"{title}: {folder.name}", panels) if panels else []
    return written


def compare(
    arms: Arms,
    out: Path,
    title: str,
    metrics: Sequence[tuple[str, str]] = (REWARD, LENGTH),
    held_out: Arms | None = None,
) -> list[Path]:
    """One panel a metric, one line an arm: the mean over its runs, not smoothed, and their `band` (Figs. 7 to 9, 11 to 14).

    A record has "step" and what was measured then; the first arm is the reference. `metrics`: (name, label of the axis).
    `held_out`: evaluations; one more panel has "reward" of the last step at which all runs of an arm were evaluated. Writes
    `out`.png and .svg. ValueError for more arms than can be told apart, one without runs, and a metric that no run has."""
    n = [len(seeds) for seeds in arms.values()]
    if not 0 < len(n) <= len(ARMS) or not all(n):
        raise ValueError(f"{len(n)} arms of {n} runs: expected 1 to {len(ARMS)} arms, none empty")
    known = {name for seeds in arms.values() for records in seeds for r in records for name in r}
    if missing := [name for name, _ in metrics if name not in known]:
        raise ValueError(f"metric {missing[0]} is in no run; there are {', '.join(sorted(known))}")
    names = [f"{label} (n={k})" if max(n) > 1 else label for label, k in zip(arms, n, strict=True)]
    lines = [[curve(seeds, metric) for seeds in arms.values()] for metric, _ in metrics]
    panels = [
        (_curves, y, [*zip(each, names, ARMS, strict=False)])
        for (_, y), each in zip(metrics, lines, strict=True)
    ]
    if shows := held_out and any(map(any, held_out.values())):
        panels.append((_last, [held_out.get(label, []) for label in arms]))
    bands = " or ".join(["its 95 % t-interval"] * (max(n) > 2) + ["min–max where n=2"] * (2 in n))
    return _draw(
        out,
        title,
        panels,
        bands and f"mean over n seeds, and {bands}{'; hollow: each seed' if shows else ''}",
    )


def intervals(
    rows: Sequence[Row], out: Path, title: str, xlabel: str, margin: float = 0.0
) -> list[Path]:
    """A forest plot: a line a row, from the top, against 0 and, with a margin, the shaded range ±margin in which differences
    do not matter. Writes `out`.png and .svg; returns both."""
    if wrong := [row for row in rows if not row[2] <= row[1] <= row[3]]:
        raise ValueError(f"row {wrong[0]}: expected label, mean, low, high with low ≤ mean ≤ high")
    return _draw(out, title, [(_forest, rows, xlabel, margin)], size=(6.8, 0.8 + 0.28 * len(rows)))


def _curves(
    axis: Any, ylabel: str, lines: list, limits: tuple = (None, None), points: Sequence[Record] = ()
) -> None:
    for i, (rows, label, (color, dash, marker, width)) in enumerate(lines):
        x, y, low, high = zip(*rows, strict=True)
        every = max(1, len(x) // 6) if len(lines) > 1 else 1
        axis.plot(
            x,
            y,
            label=label,
            color=color,
            ls=dash,
            lw=width,
            marker=marker,
            markevery=(i * every // 6, every),
        )
        alone = [
            j
            for j in range(len(y))
            if all(map(math.isnan, y[max(0, j - 1) : j] + y[j + 1 : j + 2]))
        ]
        axis.plot(
            x, y, marker or "o", color=color, markevery=alone
        )  # a line of one point would not be seen
        if low != high:
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if points:
        axis.plot(
            [e["step"] for e in points],
            [e["reward"] for e in points],
            "ko",
            label="held-out problems",
        )
    axis.set(xlabel="step", ylabel=ylabel, ylim=limits)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _last(axis: Any, arms: list[list[list[Record]]]) -> None:
    ticks = ["–"] * len(arms)
    for i, (seeds, (color, _, marker, _)) in enumerate(zip(arms, ARMS, strict=False)):
        for s, m, low, high in [row for row in curve(seeds, "reward") if not math.isnan(row[1])][
            -1:
        ]:
            ticks[i] = f"{s:g}"
            axis.errorbar(
                i,
                m,
                [[m - low], [high - m]],
                color=color,
                marker=marker,
                markersize=6,
                capsize=3 * (low < high),
            )
            each = [e["reward"] for records in seeds for e in records if e["step"] == s]
            axis.plot(
                [i + 0.22] * len(each),
                each,
                marker if len(each) > 1 else "",
                color=color,
                fillstyle="none",
            )
    axis.set_xticks(range(len(arms)), ticks)
    axis.set(
        ylabel="held-out accuracy", xlabel="arm, evaluated after step", xlim=(-0.6, len(arms) - 0.4)
    )


def _forest(axis: Any, rows: Sequence[Row], xlabel: str, margin: float) -> None:
    axis.axvspan(
        -margin, margin, color="#e4e4e4", linewidth=0, label=f"margin ±{margin:g}" if margin else ""
    )
    axis.axvline(0, color="black", linewidth=0.8)
    for i, (_, m, low, high) in enumerate(rows):
        axis.errorbar(m, i, xerr=[[m - low], [high - m]], color="#1f4e9c", marker="s", capsize=3)
        said = f"{m:+.3g} [{low:+.3g}, {high:+.3g}]".replace("-", "−")
        axis.text(1.03, i, said, transform=axis.get_yaxis_transform(), va="center", size=8)
    axis.set_yticks(range(len(rows)), [textwrap.fill(row[0], 36) for row in rows])
    axis.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axis.locator_params(axis="x", nbins=6)


def _draw(
    out: Path, title: str, panels: Sequence[tuple], caption: str = "", size: tuple = ()
) -> list[Path]:
    import matplotlib  # here: it takes memory that a training run may want
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(LOOK):
        fig = Figure(size or (3.6 if columns == 1 else 7.2, 0.3 + 2.2 * rows), layout="constrained")
        for i, (panel, *content) in enumerate(panels, 1):
            panel(fig.add_subplot(rows, columns, i), *content)
        fig.suptitle(title, x=0.01, ha="left")
        named = {
            label: handle
            for a in fig.axes
            for handle, label in zip(*a.get_legend_handles_labels(), strict=True)
        }
        if labels := [textwrap.fill(label, 96) for label in named]:
            across = max(1, int(17 * fig.get_figwidth()) // (12 + max(map(len, labels))))
            fig.legend(named.values(), labels, title=caption, bbox_to_anchor=(0.5, 0), ncols=across)
        out.parent.mkdir(parents=True, exist_ok=True)
        paths = [out.with_name(f"{out.name}.{kind}") for kind in ("png", "svg")]
        for path in paths:
            fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def table(folders: list[Path]) -> str:
    """One line a run: held-out metrics before and after training, and its seconds."""
    lines = [
        f"{'run':24s} {'accuracy':>16s} {'length':>14s} {'format':>16s} {'reflection':>16s} {'seconds':>8s}"
    ]
    for folder in folders:
        held_out, summary = (
            read(folder / "evaluations.jsonl"),
            json.loads((folder / "summary.json").read_text()),
        )
        shown = (("reward", 3, 16), ("length", 1, 14), ("format", 3, 16), ("reflection", 3, 16))
        cells = [
            f"{f'{held_out[0][k]:.{n}f} → {held_out[-1][k]:.{n}f}':>{width}}"
            for k, n, width in shown
        ]
        lines.append(f"{folder.name:24s} {' '.join(cells)} {summary['seconds']:8.0f}")
    return "\n".join(lines)


def main() -> None:
    """Draw the figures of each run named, compare them, and print the table of those that were evaluated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders: metrics.jsonl, and config.json to compare"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the comparison; default: the first run's"
    )
    runs, out = vars(parser.parse_args()).values()
    try:
        arms = group(runs) if len(runs) > 1 else {}  # refused before anything is drawn
        for folder in runs:
            print(folder, *(path.name for path in figures(folder)))
        if arms:
            names = ("metrics.jsonl", "evaluations.jsonl")
            records, held_out = (
                {a: [read(f / name) for f in fs] for a, fs in arms.items()} for name in names
            )
            print(
                *compare(
                    records,
                    (out or runs[0]) / "comparison",
                    f"Comparison of {len(runs)} runs",
                    held_out=held_out,
                )
            )
    except (ValueError, OSError) as error:
        sys.exit(f"reports.figures: {error}")
    if evaluated := [
        f for f in runs if read(f / "evaluations.jsonl") and (f / "summary.json").is_file()
    ]:
        print(table(evaluated))


if __name__ == "__main__":
    main()
