"""The run folder, and one readable line a step.

runs/<name>/  config.json      every resolved setting, versions, git revision
              metrics.jsonl    one object a step
              evaluations.jsonl  held-out metrics before, during and after
              heldout-<step>.jsonl  the responses behind them
              summary.json     seconds and peak memory by stage
              rollouts.jsonl   some sampled responses of every step, a few of them token by token
              rollouts/        all of them, ids included, with --save-rollouts
              checkpoints/     what --resume goes on from
              tensorboard/     the metrics again, as events
              *.png            figures drawn at the end (reports/figures.py)
              report.html      everything to look at, in one page (reports/page.py)
              policy/ critic/  Hugging Face folders
"""

import fcntl
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
import rollout
from checkpoint import Checkpoint, changed
from reports import page
from rollout import Rollout

COLUMNS = {  # metric → (heading, width, format)
    "step": ("step", 5, "d"),
    "reward": ("reward", 6, ".3f"),
    "length": ("length", 7, ".1f"),
    "format": ("format", 6, ".3f"),
    "reflection": ("reflect", 7, ".3f"),
    "entropy": ("entropy", 7, ".3f"),
    "explained_variance": ("expl.var", 8, ".3f"),
    "logp_gap": ("|Δlogp|", 7, ".0e"),
    "tokens_per_second": ("tok/s", 6, ".0f"),
    "seconds": ("sec", 5, ".1f"),
    "left": ("left", 6, "s"),
}


Evaluated = tuple[dict[str, float], list[Rollout]]


def prepare_folder(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Make the run folder, or raise an OSError or ValueError that says what to do, before anything expensive."""
    try:
        if folder.exists() and any(folder.iterdir()):
            if not overwrite and not resume:
                raise ValueError(
                    f"{folder} is not empty; choose another --name, or pass --overwrite or --resume auto"
                )
            if not (folder / "config.json").exists():
                raise ValueError(
                    f"{folder} holds files that are not a run's; neither --overwrite nor --resume touches them"
                )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write the run folder ({error.strerror}); choose another --runs"
        ) from None


class RunLog:
    """Where a run writes; use as a context manager. Lines are flushed as they are written, so a run that dies leaves
    everything up to its last step. Only rank 0 writes; elsewhere the same calls go nowhere.

    A run that goes on from a checkpoint keeps the records up to it: they are cut to the length they had.
    """

    def __init__(self, folder: Path, config: Any, found: Checkpoint | None = None) -> None:
        self.folder, self.steps, self.keep = (
            folder,
            config.steps,
            (config.keep_rollouts, config.keep_tokens),
        )
        self.gap_limit, self.began, self.first = config.max_logp_gap, time.perf_counter(), 0
        self.writes, self.saves_all = distributed.rank() == 0, config.save_rollouts
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.writes)
        self.records = [
            folder / name for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
        ]
        if self.writes:
            self._open(config, found)
        self.metrics, self.evaluations, self.rollouts = (
            (r if self.writes else Path(os.devnull)).open("a") for r in self.records
        )
        self.seconds: dict[str, float] = {}
        self.total: dict[
            str, dict[str, float]
        ] = {}  # stage → seconds over the run, and the process's peak memory then
        bar = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
            *bar, console=self.console, disable=not (self.writes and self.console.is_terminal)
        )
        self.task = self.progress.add_task("training", total=self.steps, completed=self.first)

    def _open(self, config: Any, found: Checkpoint | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        origin = found.path.parent.parent if found else None
        same = found is not None and origin.resolve() == self.folder.resolve()
        self.lock = os.open(self.folder, os.O_RDONLY)  # held as long as this process lives
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{self.folder} is in use by another process; end that, or choose another --name"
            ) from None
        except OSError:
            pass  # some cluster file systems have no locks
        for old in (
            self.folder.iterdir() if not same else ()
        ):  # a run that --overwrite gave up (prepare_folder)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        described = asdict(config) | {
            "versions": versions(),
            "machine": platform.platform(),
            "revision": revision(),
        }
        (self.folder / "config.json").write_text(
            json.dumps(described, indent=1, default=str) + "\n"
        )
        for name in ("checkpoints", *(["rollouts"] if self.saves_all else [])):
            (self.folder / name).mkdir(exist_ok=True)
        for abandoned in (self.folder / "checkpoints").glob("*.tmp"):
            shutil.rmtree(abandoned)
        for name, size in found.about["records"].items() if found else ():
            if not same:
                shutil.copy(origin / name, self.folder)
            os.truncate(
                self.folder / name, size
            )  # never rewritten: a kill at this moment must not lose a line
        for file in origin.glob("heldout-*.jsonl") if found and not same else ():
            shutil.copy(file, self.folder)
        self.first = found.about["step"] if found else 0
        self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first or None)
        if found:
            differs = [
                f"{name} {then} → {now}" for name, (then, now) in changed(found, config).items()
            ]
            self.console.print(
                f"going on from {found.path}" + (f" with {', '.join(differs)}" if differs else "")
            )

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if not self.writes:
            return
        wall = time.perf_counter() - self.began
        (self.folder / "summary.json").write_text(
            json.dumps({"seconds": wall, "stages": self.total}, indent=1) + "\n"
        )
        stages = ", ".join(f"{name} {used['seconds']:.1f}" for name, used in self.total.items())
        self.console.print(
            f"\n{wall:.0f} s ({stages}), peak memory {_peak_gb():.2f} GB; results in {self.folder}"
        )
        for file in (self.metrics, self.evaluations, self.rollouts, self.events):
            file.close()
        os.close(self.lock)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a stage of the step; the bar says which one is running."""
        self.progress.update(self.task, description=name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until then the work is only queued
        self.seconds[name] = time.perf_counter() - start
        used = self.total.setdefault(name, {"seconds": 0.0, "peak_gb": 0.0})
        used["seconds"] += self.seconds[name]
        used["peak_gb"] = _peak_gb()

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time a stage that is not part of a step."""
        with self.phase(name):
            yield
        del self.seconds[name]

    @contextmanager
    def dump_rollouts_on_nan(self, step: int, rollouts: Sequence[Rollout]) -> Iterator[None]:
        """Turn a FloatingPointError inside into one that names a file with the step's rollouts, ids and all."""
        try:
            yield
        except FloatingPointError as error:
            path = self.folder / f"failed-step-{step}.jsonl"
            rollout.save_rollouts(path, rollouts)
            raise FloatingPointError(
                f"step {step}: {error}; the step's rollouts are in {path}"
            ) from error

    def step(
        self, step: int, record: dict[str, float], rollouts: Sequence[Rollout],
        tokenizer: PreTrainedTokenizerBase, values: Tensor | None, advantages: Tensor,
    ) -> None:  # fmt: skip
        """Write the metrics of a step, some of its rollouts (`rollout.transcripts`), and its line."""
        seconds = sum(self.seconds.values())
        tokens = sum(len(r.token_ids) for r in rollouts)
        record = {"step": step, **record, "tokens_per_second": tokens / seconds, "seconds": seconds}
        record |= {f"seconds_{name}": s for name, s in self.seconds.items()}
        record["memory_gb"] = _peak_gb()
        self.seconds = {}
        print(json.dumps(_finite(record)), file=self.metrics, flush=True)
        self._events("", record, step)
        for kept in rollout.transcripts(rollouts, *self.keep, tokenizer, values, advantages):
            print(json.dumps({"step": step} | kept, ensure_ascii=False), file=self.rollouts)
        self.rollouts.flush()
        if self.writes and self.saves_all:
            rollout.save_rollouts(self.folder / "rollouts" / f"step-{step}.jsonl", rollouts)

        per_step = (time.perf_counter() - self.began) / (step + 1 - self.first)
        left = per_step * (self.steps - step - 1)
        shown = record | {"left": f"{int(left // 60)}:{int(left % 60):02d}"}
        if step % 25 == 0:
            self.console.print(
                " ".join(f"{title:>{width}}" for title, width, _ in COLUMNS.values()), style="bold"
            )
        self.console.print(
            " ".join(
                f"{shown.get(k, math.nan):>{width}{form}}"
                for k, (_, width, form) in COLUMNS.items()
            )
        )
        if record["logp_gap"] > self.gap_limit:
            self.console.print(
                f"WARNING: the sampler is off by {record['logp_gap']:.3g} nats per token",
                style="bold red",
            )
        self.progress.advance(self.task)
        self.console.file.flush()  # into a file, too, a line a step

    def evaluation(self, step: int, held_out: Callable[[int], Evaluated]) -> None:
        """Evaluate after `step` updates; record it in evaluations.jsonl, as events and as a line, and keep the responses."""
        with self.aside("evaluate"):
            record, rollouts = held_out(step)
        print(
            json.dumps({"step": step, "responses": len(rollouts)} | _finite(record)),
            file=self.evaluations,
            flush=True,
        )
        if self.writes:
            rollout.save_rollouts(self.folder / f"heldout-{step}.jsonl", rollouts, ids=False)
        self._events("heldout/", record, step)
        self.console.print(
            f"held-out after {step} steps: accuracy {record['reward']:.3f}, length {record['length']:.1f}, format "
            f"{record['format']:.3f} on {len(rollouts)} responses", style="bold"
        )  # fmt: skip
        if sets := [
            f"{name.partition('/')[2]} {value:.3f}"
            for name, value in record.items()
            if name.startswith("reward/")
        ]:
            self.console.print(f"  {', '.join(sets)}")

    def draw(self) -> None:
        """The figures of the run, and its page."""
        from reports import figures  # matplotlib takes memory that the training may want

        if self.writes:
            figures.figures(self.folder)
            self.console.print(f"look at it in {page.write(self.folder)}")

    def _events(self, prefix: str, record: dict[str, float], step: int) -> None:
        for name, value in record.items() if self.writes else ():
            self.events.add_scalar(prefix + name, value, step)

    def before_after(self) -> None:
        """The closing table: held-out metrics before and after training, and two problems answered twice: the first that
        was learned, and the first that is still wrong."""
        first, last = (self.folder / f"heldout-{step}.jsonl" for step in (0, self.steps))
        if not (self.writes and first.exists()):
            return
        records = {r["step"]: r for r in map(json.loads, self.records[1].read_text().splitlines())}
        before, after = records[0], records[self.steps]
        pairs = [tuple(map(json.loads, p)) for p in zip(first.open(), last.open(), strict=True)]
        learned = next((p for p in pairs if p[0]["reward"] < p[1]["reward"]), None)
        wrong = next((p for p in pairs if p[1]["reward"] == 0), None)
        table = Table(title="held-out problems", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="right" if heading else "left")
        for name in ("reward", "length", "format", "reflection", "truncated"):
            form = ".1f" if name == "length" else ".3f"
            table.add_row(
                "accuracy" if name == "reward" else name,
                f"{before[name]:{form}}",
                f"{after[name]:{form}}",
            )
        self.console.print(table)
        for old, new in filter(None, (learned, wrong)):
            self.console.print(
                f"\n{old['question']}   gold {old['gold']}", style="bold", markup=False
            )
            self.console.print(f"  before (R={old['reward']:.0f}){old['response']}", markup=False)
            self.console.print(f"  after  (R={new['reward']:.0f}){new['response']}", markup=False)


def _peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _finite(record: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN: a quantity that a step does not have is left out."""
    return {name: value for name, value in record.items() if math.isfinite(value)}


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: version(name) for name in ("torch", "transformers", "math-verify", "numpy")}


def revision() -> str:
    """Of this program: git's short hash, with -dirty where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
