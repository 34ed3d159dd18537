"""Draw the paper's figures of one run or several runs as PNG files, and print a table of the runs.

    python -m reports.figures runs/NAME               figures of one run, into its folder
    python -m reports.figures runs/one-* runs/two-*   the same of each, and a comparison (Fig. 7)

Figures of a run: reward_length (Fig. 2), format (Fig. 4), heldout (Fig. 5), reflection (Fig. 6) and
health (critic, policy and sampler). In the comparison, runs that differ only in the seed form one
arm. Lines also differ in dash and marker, so that the figures can be read in gray.
"""

import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from curation.files import read_jsonl
from reports.metrics import SETTINGS, comparable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, float]  # "step" and what was measured then
Arms = dict[str, list[list[Record]]]  # label → the records of each run


class Style(NamedTuple):
    """How a line is drawn."""

    color: str
    dash: str | tuple
    marker: str
    width: float


class Panel(NamedTuple):
    """One panel of a run's figure: the label and limits of its y axis, and its curves."""

    label: str
    limits: tuple[float | None, float | None]
    curves: tuple[tuple[str, str], ...]  # (metric, label in the legend)


class Point(NamedTuple):
    """A metric at a step: its mean over runs and its `band`."""

    step: float
    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """One line of a panel."""

    points: list[Point]
    label: str
    style: Style


Draw = Callable[["Axes"], None]  # draws one panel
Row = tuple[str, float, float, float]  # a line of a forest plot: label, mean, low, high

SHARE = (0, 1.02)
FROM_ZERO = (0, None)
REWARD = ("reward", "reward")  # metric, label of its axis
LENGTH = ("length", "response length [tokens]")
FIGURES = {  # file name → title, panels
    "reward_length": (
        "Reward and response length (as Fig. 2)",
        (
            Panel("reward", SHARE, (("reward", "training problems"),)),
            Panel(LENGTH[1], FROM_ZERO, (("length", ""),)),
        ),
    ),
    "format": (
        "Format ratio (as Fig. 4)",
        (Panel("share in the format", SHARE, (("format", ""),)),),
    ),
    "reflection": (
        "Reflection (as Fig. 6)",
        (
            Panel("share that reflects", FROM_ZERO, (("reflection", ""),)),
            Panel(
                LENGTH[1],
                FROM_ZERO,
                (
                    ("length", "all responses"),
                    ("correct_reflection_length", "correct ones that reflect"),
                ),
            ),
        ),
    ),
    "health": (
        "Critic, policy and sampler",
        (
            Panel("explained variance, ≥ −1", (-1, 1), (("explained_variance", ""),)),
            Panel("entropy [nats/token]", FROM_ZERO, (("entropy", ""),)),
            Panel("|Δ log-prob| [nats]", FROM_ZERO, (("logp_gap", ""),)),
        ),
    ),
}
# Settings that do not change what a run learns: runs that differ only in these are one arm.
ASIDE = """seed name runs overwrite resume versions machine revision grader_workers eval_every
    micro_tokens max_num_seqs threads vllm_memory max_logp_gap keep_rollouts
    activation_checkpointing compile offload replicas tensor_parallel plan gpus gpu_memory
    timeout_minutes checkpoint_every keep_checkpoints save_rollouts""".split()
ARM_STYLES = (
    Style("#000000", "-", "o", 2.2),
    Style("#1f4e9c", "--", "s", 1.4),
    Style("#b5491c", ":", "^", 1.6),
    Style("#2f968a", "-.", "D", 1.4),
    Style("#d9a032", (0, (3, 1)), "v", 1.4),
    Style("#9cc3e6", "-", "X", 1.4),
)
RUN_STYLES = (Style("#1f4e9c", "-", "", 1.6), Style("#d9822b", (0, (4, 1.5)), "", 1.6))
HELDOUT_STYLES = (Style("#1f4e9c", "-", "o", 1.6),)
LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
    "legend.loc": "upper center",
    "legend.handlelength": 3.2,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.markersize": 4,
    "text.parse_math": False,  # a run's name may hold a $
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}
# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high: the 95 % t-interval of the mean of two or more values, mean ± t·s/√n.

    >>> [round(x, 3) for x in t_interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    freedom = len(values) - 1
    if freedom <= len(T_QUANTILES):
        t = T_QUANTILES[freedom - 1]
    else:  # the Cornish–Fisher expansion, within 0.1 %
        t = 1.96 + 2.372 / freedom + 2.822 / freedom**2
    mean = fmean(values)
    half = t * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of a quantity over runs: the `t_interval` from three runs on, the smaller
    and the larger value of two, the value itself of one."""
    if len(values) < 3:
        return fmean(values), min(values), max(values)
    return t_interval(values)


def curve(runs: Sequence[Sequence[Record]], metric: str) -> list[Point]:
    """A metric at every step, over the runs of an arm.

    A step at which one of the runs has no value is a gap (NaN): a mean over the other runs would
    jump where a run ends.
    """
    values = [{r["step"]: r[metric] for r in records if metric in r} for records in runs]
    points = []
    for step in sorted({r["step"] for records in runs for r in records}):
        if all(step in of_run for of_run in values):
            points.append(Point(step, *band([of_run[step] for of_run in values])))
        else:
            points.append(Point(step, math.nan, math.nan, math.nan))
    return points


def group(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs by arm: those whose settings are equal except for ASIDE are one arm.

    An arm is named by the settings in which the arms differ ("lam 0.95"). A setting that the config
    of a run does not have is off. Raises ValueError if an arm has a seed twice: counting one run as
    two would narrow the band.
    """
    configs = {folder: _settings(folder) for folder in folders}
    settings = {folder: learning_settings(config) for folder, config in configs.items()}
    known = dict.fromkeys(name for of_run in settings.values() for name in of_run)
    differing = [
        name for name in known if len({of_run.get(name) for of_run in settings.values()}) > 1
    ]
    arms: dict[str, list[Path]] = {}
    for folder in folders:
        parts = [f"{name} {settings[folder].get(name, 'off')}" for name in differing]
        arms.setdefault(", ".join(parts) or "same settings", []).append(folder)
    for arm in arms.values():
        if len({configs[folder]["seed"] for folder in arm}) < len(arm):
            names = ", ".join(map(str, arm))
            raise ValueError(f"{names}: two have the same settings and seed; name only one of them")
    return arms


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of a run. Raises ValueError when its folder does not have them."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.json; expected runs/NAME")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or "seed" not in config:
        raise ValueError(f"{folder}: not a run folder, its config.json is not a run's")
    return config


def learning_settings(config: dict) -> dict[str, str]:
    """The settings of a run's config.json that decide what it learns and are not off."""
    return {name: str(value) for name, value in config.items() if value and name not in ASIDE}


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def figures(folder: Path) -> list[Path]:
    """Draw the figures of a run into its folder; returns the files.

    They are FIGURES, from metrics.jsonl, and held-out accuracy, from evaluations.jsonl if it has
    several sets or more than a first and a last record. Raises ValueError if no step is recorded.
    """
    records = load_records(folder / "metrics.jsonl")
    evaluations = load_records(folder / "evaluations.jsonl")
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no such file, or no whole step in it yet")
    written = []
    for name, (title, panels) in FIGURES.items():
        draws = _draws(panels, records, RUN_STYLES, evaluations)
        if draws:
            written.append(save_panels(folder / f"{name}.png", f"{title}: {folder.name}", draws))
    panels = heldout_panels(evaluations)
    if panels:
        draws = _draws(panels, evaluations, HELDOUT_STYLES)
        title = f"Held-out accuracy (as Fig. 5): {folder.name}"
        written.append(save_panels(folder / "heldout.png", title, draws))
    return written


def load_records(path: Path) -> list[Record]:
    """The records of metrics.jsonl or evaluations.jsonl, see `read_jsonl`. Raises ValueError, with
    the line, for a record without a step and for a metric that is no number."""
    records = []
    for line in read_jsonl(path, warn=True):
        if not isinstance(line.value, dict) or "step" not in line.value:
            raise ValueError(f'{path}: line {line.number}: expected an object with "step"')
        for name, value in line.value.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number and name != SETTINGS:
                found = f"{name}: expected a number, found {value!r:.60}"
                raise ValueError(f"{path}: line {line.number}: {found}")
        records.append(line.value)
    return records


def heldout_panels(evaluations: Sequence[Record]) -> list[Panel]:
    """A panel for the accuracy on each held-out set and one for all problems; none if there is only
    one set and only a first and a last evaluation."""
    metrics = dict.fromkeys(
        name for record in evaluations for name in record if name.startswith("reward/")
    )
    if not metrics and len(evaluations) <= 2:
        return []
    panels = []
    for metric in [*metrics, "reward"]:
        problems = metric.partition("/")[2] or "all problems"
        panels.append(Panel(f"accuracy, {problems}", FROM_ZERO, ((metric, ""),)))
    return panels


def compare(
    arms: Arms,
    out: Path,
    title: str,
    metrics: Sequence[tuple[str, str]] = (REWARD, LENGTH),
    held_out: Arms | None = None,
) -> Path:
    """Compare arms in one figure, as Figs. 7 to 9 and 11 to 14 do; returns the PNG file `out`.

    One panel for each of `metrics` (metric, label of its axis), one line for each arm: the mean
    over its runs, not smoothed, and their `band`. The first arm is the reference. `held_out` holds
    the evaluations of the arms; one more panel shows their "reward" at the last step at which all
    runs of an arm were evaluated. Raises ValueError for more arms than can be told apart, an arm
    without runs, and a metric that no run has.
    """
    counts = [len(runs) for runs in arms.values()]
    if not 0 < len(counts) <= len(ARM_STYLES) or not all(counts):
        raise ValueError(
            f"{len(counts)} arms of {counts} runs: expected 1 to {len(ARM_STYLES)} arms, none empty"
        )
    known = {name for runs in arms.values() for records in runs for r in records for name in r}
    for metric, _ in metrics:
        if metric not in known:
            raise ValueError(f"metric {metric} is in no run; there are {', '.join(sorted(known))}")
    labels = list(arms)
    if max(counts) > 1:
        labels = [f"{label} (n={n})" for label, n in zip(arms, counts, strict=True)]
    draws: list[Draw] = []
    for metric, axis_label in metrics:
        curves = [
            Curve(curve(runs, metric), label, style)
            for runs, label, style in zip(arms.values(), labels, ARM_STYLES, strict=False)
        ]
        draws.append(partial(_draw_curves, label=axis_label, curves=curves))
    evaluated = held_out is not None and any(map(any, held_out.values()))
    if evaluated:
        draws.append(partial(_draw_last, arms=[held_out.get(label, []) for label in arms]))
    return save_panels(out, title, draws, _caption(counts, evaluated))


def intervals(rows: Sequence[Row], out: Path, title: str, xlabel: str, margin: float = 0.0) -> Path:
    """A forest plot, one line for each of `rows` from the top; returns the PNG file `out`.

    The differences stand against 0 and, with a margin, against the shaded range ±margin in which
    they do not matter. Raises ValueError unless low ≤ mean ≤ high in each row.
    """
    for row in rows:
        _, mean, low, high = row
        if not low <= mean <= high:
            raise ValueError(f"row {row}: expected label, mean, low, high with low ≤ mean ≤ high")
    draw = partial(_draw_forest, rows=rows, xlabel=xlabel, margin=margin)
    return save_panels(out, title, [draw], size=(6.8, 0.8 + 0.28 * len(rows)))


def _draws(
    panels: Sequence[Panel],
    records: Sequence[Record],
    styles: Sequence[Style],
    evaluations: Sequence[Record] = (),
) -> list[Draw]:
    """What draws the panels of a run, without those of which it has no metric (GRPO: no critic)."""
    draws: list[Draw] = []
    for panel in panels:
        if not any(metric in record for metric, _ in panel.curves for record in records):
            continue
        curves = [
            Curve(curve([records], metric), label, style)
            for (metric, label), style in zip(panel.curves, styles, strict=False)
        ]
        points = evaluations if panel.label == "reward" else ()
        draws.append(
            partial(
                _draw_curves,
                label=panel.label,
                limits=panel.limits,
                curves=curves,
                evaluations=points,
            )
        )
    return draws


def _caption(counts: Sequence[int], evaluated: bool) -> str:
    """What the lines and bands of a comparison are; nothing for one run an arm."""
    bands = []
    if max(counts) > 2:
        bands.append("its 95 % t-interval")
    if 2 in counts:
        bands.append("min–max where n=2")
    if not bands:
        return ""
    hollow = "; hollow: each seed" if evaluated else ""
    return f"mean over n seeds, and {' or '.join(bands)}{hollow}"


def _draw_curves(
    axes: "Axes",
    label: str,
    curves: Sequence[Curve],
    limits: tuple[float | None, float | None] = (None, None),
    evaluations: Sequence[Record] = (),
) -> None:
    """Lines over the steps with their bands, and a dot for each evaluation's reward."""
    for i, (points, name, style) in enumerate(curves):
        steps = [point.step for point in points]
        means = [point.mean for point in points]
        every = max(1, len(steps) // 6) if len(curves) > 1 else 1
        axes.plot(
            steps,
            means,
            label=name,
            color=style.color,
            linestyle=style.dash,
            linewidth=style.width,
            marker=style.marker,
            markevery=(i * every // 6, every),
        )
        # a line through a single point would not be seen
        axes.plot(
            steps,
            means,
            style.marker or "o",
            color=style.color,
            markevery=_without_neighbor(means),
        )
        low = [point.low for point in points]
        high = [point.high for point in points]
        if any(point.low < point.high for point in points):
            axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0)
    rewards = {record["step"]: record["reward"] for record in evaluations if "reward" in record}
    if rewards:
        axes.plot(list(rewards), list(rewards.values()), "ko", label="held-out problems")
    axes.set(xlabel="step", ylabel=label, ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _without_neighbor(values: Sequence[float]) -> list[int]:
    """The indices whose neighbors are gaps (NaN) or missing."""
    found = []
    for i in range(len(values)):
        neighbors = [*values[max(0, i - 1) : i], *values[i + 1 : i + 2]]
        if all(math.isnan(value) for value in neighbors):
            found.append(i)
    return found


def _draw_last(axes: "Axes", arms: Sequence[list[list[Record]]]) -> None:
    """Held-out accuracy of each arm at its last common evaluation, and of its runs beside it."""
    ticks = []
    for i, (runs, style) in enumerate(zip(arms, ARM_STYLES, strict=False)):
        evaluated = [point for point in curve(runs, "reward") if not math.isnan(point.mean)]
        if not evaluated:
            ticks.append("–")
            continue
        last = evaluated[-1]
        ticks.append(f"{last.step:g}")
        axes.errorbar(
            i,
            last.mean,
            [[last.mean - last.low], [last.high - last.mean]],
            color=style.color,
            marker=style.marker,
            markersize=6,
            capsize=3 if last.low < last.high else 0,
        )
        rewards = [r["reward"] for records in runs for r in records if r["step"] == last.step]
        axes.plot(
            [i + 0.22] * len(rewards),
            rewards,
            style.marker if len(rewards) > 1 else "",
            color=style.color,
            fillstyle="none",
        )
    axes.set_xticks(range(len(arms)), ticks)
    axes.set(ylabel="held-out accuracy", xlabel="arm, evaluated after step")
    axes.set_xlim(-0.6, len(arms) - 0.4)


def _draw_forest(axes: "Axes", rows: Sequence[Row], xlabel: str, margin: float) -> None:
    """One difference a row with its interval, and both as numbers on the right."""
    name = f"margin ±{margin:g}" if margin else ""
    axes.axvspan(-margin, margin, color="#e4e4e4", linewidth=0, label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    for i, (_, mean, low, high) in enumerate(rows):
        error = [[mean - low], [high - mean]]
        axes.errorbar(mean, i, xerr=error, color="#1f4e9c", marker="s", capsize=3)
        numbers = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
        axes.text(1.03, i, numbers, transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, 36) for label, *_ in rows])
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.locator_params(axis="x", nbins=6)


def save_panels(
    out: Path,
    title: str,
    draws: Sequence[Draw],
    caption: str = "",
    size: tuple[float, float] | None = None,
) -> Path:
    """Write a figure, one panel for each of `draws` and one legend below them; returns `out`."""
    # Imported here because matplotlib takes memory that a training run may need.
    import matplotlib
    from matplotlib.figure import Figure

    columns = 2 if len(draws) == 4 else min(len(draws), 3)
    rows = math.ceil(len(draws) / columns)
    if size is None:
        size = (3.6 if columns == 1 else 7.2, 0.3 + 2.2 * rows)
    with matplotlib.rc_context(LOOK):
        figure = Figure(size, layout="constrained")
        for i, draw in enumerate(draws, 1):
            draw(figure.add_subplot(rows, columns, i))
        figure.suptitle(title, x=0.01, ha="left")
        _add_legend(figure, caption)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    return out


def _add_legend(figure: "Figure", caption: str) -> None:
    """One legend for all panels, in as many columns as fit; none if nothing has a label."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if not handles:
        return
    labels = [textwrap.fill(label, 96) for label in handles]
    characters = int(17 * figure.get_figwidth())
    columns = max(1, characters // (12 + max(map(len, labels))))
    figure.legend(handles.values(), labels, title=caption, bbox_to_anchor=(0.5, 0), ncols=columns)


# ── the program ──────────────────────────────────────────────────────────────────────────────────


def is_finished(folder: Path) -> bool:
    """Whether a run was evaluated after its last step and has ended. A run writes summary.json also
    when it ends with an error."""
    if not ((folder / "config.json").is_file() and (folder / "summary.json").is_file()):
        return False
    steps = _settings(folder).get("steps")
    return load_records(folder / "evaluations.jsonl")[-1]["step"] == steps


def table(folders: Sequence[Path]) -> str:
    """One row for each finished run: held-out metrics before and after training, and seconds. Of a
    run that changed how it evaluates, only what can be compared, and a line that says so."""
    columns = {"reward": ("accuracy", 16, ".3f"), "length": ("length", 14, ".1f")}
    columns |= {name: (name, 16, ".3f") for name in ("format", "reflection")}
    headings = [f"{heading:>{width}}" for heading, width, _ in columns.values()]
    lines = [" ".join([f"{'run':24s}", *headings, " seconds"])]
    notes = []
    for folder in folders:
        evaluations = load_records(folder / "evaluations.jsonl")
        *before, after = comparable(evaluations)
        if before[:1] != evaluations[:1]:
            what = f"before is after {before[0]['step']} steps" if before else "nothing to compare"
            notes.append(f"{folder.name}: {what}; earlier it had other settings or problems")
        cells = [f"{folder.name:24s}"]
        for metric, (_, width, form) in columns.items():
            first = f"{before[0].get(metric, math.nan):{form}}" if before else "–"
            change = f"{first} → {after.get(metric, math.nan):{form}}"
            cells.append(f"{change:>{width}}")
        lines.append(" ".join([*cells, f"{_seconds(folder):8.0f}"]))
    return "\n".join([*lines, *notes])


def _seconds(folder: Path) -> float:
    """How long a finished run took. Raises ValueError when its summary.json does not say so."""
    file = folder / "summary.json"
    try:
        return float(json.loads(file.read_bytes())["seconds"])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f'{file}: expected an object with "seconds" ({error})') from None


@dataclass(frozen=True)
class Options:
    """The command line."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="runs/NAME ...")]
    """Run folders. Each has metrics.jsonl, and config.json if runs are compared."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of the comparison. Default: the first run's."""


def main() -> None:
    """Draw each run's figures, compare the runs, and print a table of those that are finished."""
    options = tyro.cli(Options, description=__doc__, prog="python -m reports.figures")
    folders = options.runs
    if not folders:
        sys.exit("reports.figures: expected at least one run folder, such as runs/NAME")
    if options.out and len(folders) == 1:
        sys.exit(f"reports.figures: --out {options.out}: has no effect without a second run")
    try:
        arms = group(folders) if len(folders) > 1 else {}  # raises before anything is drawn
        for folder in folders:
            print(folder, *(path.name for path in figures(folder)))
        if arms:
            print(_compare_runs(arms, options.out or folders[0]))
        evaluated = [folder for folder in folders if load_records(folder / "evaluations.jsonl")]
        finished = [folder for folder in evaluated if is_finished(folder)]
        rows = table(finished)
    except (ValueError, OSError) as error:
        sys.exit(f"reports.figures: {error}")
    for folder in evaluated:
        if folder not in finished:
            print(f"{folder}: not finished, so not in the table")
    if finished:
        print(rows)


def _compare_runs(arms: dict[str, list[Path]], out: Path) -> Path:
    """Draw comparison.png in the folder `out`."""
    records: Arms = {}
    held_out: Arms = {}
    for arm, folders in arms.items():
        records[arm] = [load_records(folder / "metrics.jsonl") for folder in folders]
        held_out[arm] = [load_records(folder / "evaluations.jsonl") for folder in folders]
    count = sum(map(len, arms.values()))
    return compare(
        records, out / "comparison.png", f"Comparison of {count} runs", held_out=held_out
    )


if __name__ == "__main__":
    main()
