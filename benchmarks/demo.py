"""Measure how long `make demo` takes and what it reaches, over seeds and against another checkout.

    python -m benchmarks.demo [--seeds 5] [--against FOLDER]

Each run is `python train.py` with the demo's settings, in a process of its own, without the
installation and with the base model made beforehand. With --against, a folder with another version
of this program, the two versions take turns: the table pairs their runs by seed, and the last lines
are 95 % t-intervals of the differences. Times need an otherwise idle machine; CPU seconds, which
count all processes of a run, stand a busy one better.

| column | meaning |
|---|---|
| first line s | from the start of the command to the line of step 0 |
| all s, CPU s | to its end |
| accuracy, length | on the held-out problems after the training; in brackets before it |
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import flags
from benchmarks.record import Row, record
from config import Count
from reports.figures import t_interval

HERE = Path(__file__).parent.parent
FIRST_LINE = re.compile(r" +0 +\d\.\d{3} ")


@dataclass(frozen=True)
class Settings:
    """What to run."""

    seeds: Count = 5
    """Runs of each version, with seeds 0, 1, 2 …"""
    against: str = ""
    """Checkout of another version; none: this one alone."""


class Run(NamedTuple):
    """One run of the demo."""

    first_line: float  # seconds
    seconds: float
    cpu: float
    before: dict[str, Any]  # held-out metrics
    after: dict[str, Any]


def run_demo(checkout: Path, seed: int, runs: Path) -> Run:
    """Run the demo of a checkout. Raises ValueError with the end of its output if it fails."""
    command = [sys.executable, "train.py", "--seed", f"{seed}", "--runs", f"{runs}", "--overwrite"]
    command += ["--name", "demo"]
    first_line, lines = 0.0, []
    cpu_before = _cpu_of_children()
    began = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=checkout, text=True, **pipes) as process:
        for line in process.stdout:
            lines.append(line)
            if FIRST_LINE.match(line):
                first_line = time.perf_counter() - began
    seconds = time.perf_counter() - began
    if process.returncode:
        raise ValueError(
            f"{checkout}: the run of seed {seed} failed: {''.join(lines[-3:]).strip()}"
        )
    evaluations = (runs / "demo" / "evaluations.jsonl").read_text().splitlines()
    before, after = json.loads(evaluations[0]), json.loads(evaluations[-1])
    return Run(first_line, seconds, _cpu_of_children() - cpu_before, before, after)


def make_base_model(checkout: Path, seed: int) -> None:
    """Make the base model of a seed, if it is not there."""
    command = [sys.executable, "-m", "toy.tiny", "--seed", f"{seed}"]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(version: str, seed: int, run: Run) -> Row:
    """A run in the table."""
    before, after = run.before, run.after
    return {
        "seed": seed,
        "version": version,
        "first line s": round(run.first_line, 1),
        "all s": round(run.seconds, 1),
        "CPU s": round(run.cpu, 1),
        "accuracy": f"{after['reward']:.3f} ({before['reward']:.3f})",
        "length": f"{after['length']:.1f} ({before['length']:.1f})",
    }


def differences(ours: list[Run], theirs: list[Run]) -> list[str]:
    """Sentences: this version minus the other, mean and 95 % interval over seeds."""
    quantities = {
        "first line s": lambda run: run.first_line,
        "all s": lambda run: run.seconds,
        "CPU s": lambda run: run.cpu,
        "accuracy": lambda run: run.after["reward"],
        "length": lambda run: run.after["length"],
    }
    sentences = []
    for name, of in quantities.items():
        paired = [of(one) - of(other) for one, other in zip(ours, theirs, strict=True)]
        mean, low, high = t_interval(paired)
        sentences.append(
            f"{name}, this version − the other: {mean:+.3f} [{low:+.3f}, {high:+.3f}]."
        )
    return sentences


def measure(settings: Settings) -> None:
    """Run all and record the table."""
    versions = {"this": HERE}
    if settings.against:
        versions["other"] = Path(settings.against)
    done: dict[str, list[Run]] = {name: [] for name in versions}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(settings.seeds):
            for name, checkout in versions.items():
                make_base_model(checkout, seed)
                done[name].append(run_demo(checkout, seed, Path(folder)))
                rows.append(row(name, seed, done[name][-1]))
                print(rows[-1], file=sys.stderr, flush=True)
    notes = []
    if settings.against and settings.seeds > 1:
        notes = differences(done["this"], done["other"])
    record("demo", "The demo", rows, notes)


def main() -> None:
    """Command line."""
    settings = flags.parse(Settings, "demo", __doc__)
    if settings.against and not Path(settings.against, "train.py").is_file():
        sys.exit(f"benchmarks.demo: --against {settings.against}: has no train.py; name a checkout")
    try:
        measure(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.demo: {error}")


if __name__ == "__main__":
    main()
