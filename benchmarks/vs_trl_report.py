"""The tables and the figure of benchmarks/vs_trl.py."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.record import Row
from benchmarks.vs_trl_worker import BATCH, Figures
from reports.figures import ARM_STYLES, LOOK, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "ours-ppo": "this, PPO",
    "trl-ppo": "TRL PPO",
    "ours-grpo": "this, GRPO",
    "trl-grpo": "TRL GRPO",
}
PEERS = {"ours-ppo": "trl-ppo", "ours-grpo": "trl-grpo"}
METHODS = {"ours-ppo": "PPO", "ours-grpo": "GRPO"}
SPEED, GAP = "speed ×", "reward − TRL's"  # columns, each with its "low" and "high"
POINTS = 10  # of a learning curve

Runs = dict[tuple[str, int], list[Figures]]  # (program, length) → its runs, seed by seed


# ── rows of the table ─────────────────────────────────────────────────────────────────────────────


def rows(runs: Runs) -> list[Row]:
    """One row for each program and length: means over its runs, and comparisons with its peer."""
    return [
        cells(program, length, found) | comparison(program, length, runs)
        for (program, length), found in runs.items()
    ]


def cells(program: str, length: int, found: Sequence[Figures]) -> Row:
    """Means over the runs of a program at a length."""

    def mean(figure: Callable[[Figures], float]) -> float:
        return fmean(map(figure, found))

    row: Row = {
        "length": length,
        "tokens": mean(lambda f: f["tokens"]),
        "program": TITLES[program],
        "episodes/s": mean(episodes_per_second),
        "loop s": mean(lambda f: f["seconds"]),
        "CPU s": mean(lambda f: f["cpu"]),
        "process s": mean(lambda f: f["process"]),
        "peak GB": mean(lambda f: f["gb"]),
        "reward": mean(end_reward),
    }
    if program in PEERS:
        row["sampling %"] = mean(lambda f: 100 * f["sampling"] / f["seconds"])
        row["forward %"] = mean(lambda f: 100 * f["forward"] / f["sampling"])
    return row


def comparison(program: str, length: int, runs: Runs) -> Row:
    """Ratios and differences of pairs of the same seed: means and 95 % intervals; nothing for
    TRL's programs."""
    if program not in PEERS:
        return {}
    pairs = list(zip(runs[program, length], runs[PEERS[program], length], strict=True))
    speeds = [episodes_per_second(ours) / episodes_per_second(trl) for ours, trl in pairs]
    gaps = [end_reward(ours) - end_reward(trl) for ours, trl in pairs]
    speed, speed_low, speed_high = band(speeds)
    gap, gap_low, gap_high = band(gaps)
    return {
        SPEED: speed,
        f"{SPEED} low": speed_low,
        f"{SPEED} high": speed_high,
        "memory ×": fmean(ours["gb"] / trl["gb"] for ours, trl in pairs),
        GAP: gap,
        f"{GAP} low": gap_low,
        f"{GAP} high": gap_high,
    }


def episodes_per_second(run: Figures) -> float:
    """Speed of the training loop."""
    return BATCH * len(run["rewards"]) / run["seconds"]


def end_reward(run: Figures) -> float:
    """Mean reward of the last quarter of the steps.

    >>> end_reward({"rewards": [0, 0, 0, 0, 0, 0, 1, 0]})
    0.5
    """
    rewards = run["rewards"]
    return fmean(rewards[-max(1, len(rewards) // 4) :])


# ── what the pages show ───────────────────────────────────────────────────────────────────────────


def pages(result: dict[str, Any]) -> str:
    """What the pages quote of a recorded result: the table of docs/performance.md and the sentences
    of README.md."""
    pairs = [(row, peer(row, result["rows"])) for row in result["rows"] if SPEED in row]
    columns = (
        "response tokens, at most",
        "",
        "episodes/s",
        "TRL's",
        "×",
        "peak GB",
        "TRL's",
        "reward in the last quarter",
        "TRL's",
        "difference",
        "sampling, share of the loop",
        "transformers' forward pass, share of sampling",
    )
    lines = [columns, ("---",) * len(columns), *(page_row(*pair) for pair in pairs)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{sentences([ours for ours, _ in pairs])}"


def page_row(ours: Row, trl: Row) -> tuple[str, ...]:
    """The cells of a program and its peer at a length."""
    return (
        f"{ours['length']}",
        ours["program"].split()[-1],
        f"{ours['episodes/s']:,.0f}",
        f"{trl['episodes/s']:,.0f}",
        with_interval(ours, SPEED, ".1f"),
        f"{ours['peak GB']:.2f}",
        f"{trl['peak GB']:.2f}",
        f"{ours['reward']:.2f}",
        f"{trl['reward']:.2f}",
        with_interval(ours, GAP, "+.3f"),
        f"{ours['sampling %']:.0f} %",
        f"{ours['forward %']:.0f} %",
    )


def peer(row: Row, others: Sequence[Row]) -> Row:
    """The row of TRL's program for the same method and length."""
    program = f"TRL {row['program'].split()[-1]}"
    (found,) = (o for o in others if (o["program"], o["length"]) == (program, row["length"]))
    return found


def with_interval(row: Row, column: str, form: str) -> str:
    """A cell with its interval.

    >>> with_interval({SPEED: 2.5, f"{SPEED} low": 2.42, f"{SPEED} high": 2.6}, SPEED, ".1f")
    '2.5 [2.4, 2.6]'
    """
    mean, low, high = (format(row[column + end], form) for end in ("", " low", " high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def sentences(rows: Sequence[Row]) -> str:
    """Speed at each length, and each length at which the rewards at the end differ: those whose
    interval leaves out 0."""
    speeds = []
    for program, method in METHODS.items():
        mine = [row for row in rows if row["program"] == TITLES[program]]
        cells = [f"{with_interval(row, SPEED, '.1f')} at {row['length']}" for row in mine]
        speeds.append(f"{method} {', '.join(cells)}")
    gaps = [
        f"{row['program'].split()[-1]} at {row['length']} {with_interval(row, GAP, '+.3f')}"
        for row in rows
        if row[f"{GAP} low"] > 0 or row[f"{GAP} high"] < 0
    ]
    learning = f"{'; '.join(gaps)}" if gaps else f"in none of {len(rows)} comparisons"
    return (
        f"Times the episodes per second of TRL's, by response tokens: {'; '.join(speeds)}.\n"
        f"Where the rewards of the last quarter differ from TRL's: {learning}."
    )


# ── the figure ────────────────────────────────────────────────────────────────────────────────────


def draw(runs: Runs, out: Path) -> None:
    """Speed and learning, PPO above and GRPO below: episodes per second at each length, and for
    each length the mean reward over the steps."""
    import matplotlib
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(length for _, length in runs))
    with matplotlib.rc_context(LOOK):
        figure = Figure((2.4 * (1 + len(lengths)), 4.6), layout="constrained")
        panels = figure.subplots(2, 1 + len(lengths), squeeze=False)
        for line, (ours, trl) in zip(panels, PEERS.items(), strict=True):
            draw_speeds(line[0], runs, (ours, trl), lengths)
            for axes, length in zip(line[1:], lengths, strict=True):
                draw_rewards(axes, runs, (ours, trl), length)
        handles, labels = panels[0][1].get_legend_handles_labels()
        count = len(next(iter(runs.values())))
        title = f"mean over {count} seeds and its 95 % t-interval"
        figure.legend(handles, labels, title=title, bbox_to_anchor=(0.5, 0), ncols=2)
        figure.savefig(out)


def draw_speeds(
    axes: "Axes", runs: Runs, programs: tuple[str, str], lengths: Sequence[int]
) -> None:
    """Episodes per second, a point for each seed, and the mean ratio of pairs above."""
    for program, style in zip(programs, ARM_STYLES, strict=False):
        for i, length in enumerate(lengths):
            speeds = [episodes_per_second(run) for run in runs[program, length]]
            axes.plot([i] * len(speeds), speeds, style.marker, color=style.color, fillstyle="none")
    for i, length in enumerate(lengths):
        ratio = comparison(programs[0], length, runs)
        top = max(episodes_per_second(run) for run in runs[programs[0], length])
        text = f"×{with_interval(ratio, SPEED, '.1f')}".replace(" [", "\n[")
        above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        axes.annotate(text, (i, top), **above)
    axes.set(yscale="log", xlim=(-0.5, len(lengths) - 0.5), xlabel="response tokens, at most")
    axes.set(ylabel=f"{METHODS[programs[0]]}: episodes/s")
    axes.set_xticks(range(len(lengths)), map(str, lengths))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.25)


def draw_rewards(axes: "Axes", runs: Runs, programs: tuple[str, str], length: int) -> None:
    """Mean reward over the episodes, with its interval over the seeds."""
    names = ("this program", "TRL")
    for program, name, style in zip(programs, names, ARM_STYLES, strict=False):
        curves = [smoothed(run["rewards"]) for run in runs[program, length]]
        points = [band(rewards) for rewards in zip(*curves, strict=True)]
        steps = len(runs[program, length][0]["rewards"])
        episodes = [BATCH * steps * (i + 0.5) / len(points) for i in range(len(points))]
        means, lows, highs = zip(*points, strict=True)
        axes.plot(
            episodes, means, label=name, color=style.color, ls=style.dash, marker=style.marker
        )
        axes.fill_between(episodes, lows, highs, color=style.color, alpha=0.15, linewidth=0)
    axes.set(xlabel="episodes", ylabel=f"reward, {length} tokens", ylim=(0, 1))


def smoothed(rewards: Sequence[float]) -> list[float]:
    """Means of POINTS stretches, or the rewards themselves if there are no more of them.

    >>> smoothed([0, 1] * 10)
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    count = min(POINTS, len(rewards))
    bounds = [i * len(rewards) // count for i in range(count + 1)]
    return [fmean(rewards[start:end]) for start, end in pairwise(bounds)]
