"""The run folder, and one readable line a step.

runs/<name>/  config.json      every resolved setting, versions, git revision
              metrics.jsonl    one object a step
              evaluations.jsonl  held-out metrics before, during and after the training
              heldout-<step>.jsonl  the responses behind them
              summary.json     seconds and peak memory by stage
              rollouts.jsonl   some responses of every step, a few of them token by token
              rollouts/        all of them, token ids included, with --save-rollouts
              checkpoints/     what --resume continues from
              tensorboard/     the metrics again, as events
              *.png            figures (reports/figures.py)
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
from checkpoint import Checkpoint, changed_settings
from curation.files import progress_bar
from reports.transcripts import transcripts
from rollout import Rollout, save_rollouts

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
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")  # the files that grow


def prepare_folder(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Make the run folder. Raises OSError or ValueError saying what to do, before anything is
    expensive."""
    try:
        if folder.exists() and any(folder.iterdir()):
            if not overwrite and not resume:
                raise ValueError(
                    f"{folder} is not empty; choose another --name, or pass --overwrite or "
                    "--resume auto"
                )
            if not (folder / "config.json").exists():
                raise ValueError(
                    f"{folder} holds files that are not a run's; neither --overwrite nor --resume "
                    "touches them"
                )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write the run folder ({error.strerror}); choose another --runs"
        ) from None


class RunLog:
    """Writes the run folder; use as a context manager. Lines are flushed as they are written: a run
    that dies leaves everything up to its last step. Only rank 0 writes; on the other ranks the same
    calls do nothing.

    A run that continues from a checkpoint keeps the records up to it: they are cut to the length
    they had.
    """

    def __init__(self, folder: Path, config: Any, resume_from: Checkpoint | None = None) -> None:
        self.folder = folder
        self.config = config
        self.began = time.perf_counter()
        self.first_step = resume_from.about["step"] if resume_from else 0
        self.writes = distributed.rank() == 0
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.writes)
        self.records = [folder / name for name in RECORDS]
        if self.writes:
            self.lock = lock_folder(folder)
            self._start_folder(resume_from)
        files = self.records if self.writes else [Path(os.devnull)] * len(RECORDS)
        self.metrics, self.evaluations, self.rollouts = (file.open("a") for file in files)
        self.seconds: dict[str, float] = {}  # stage → seconds in this step
        # stage → its seconds over the run, and the process's peak memory at its end
        self.stages: dict[str, dict[str, float]] = {}
        self.progress = progress_bar(self.console)
        self.task = self.progress.add_task(
            "training", total=config.steps, completed=self.first_step
        )

    def _start_folder(self, resume_from: Checkpoint | None) -> None:
        """Clear what --overwrite gave up, write config.json, and restore a checkpoint's records."""
        from torch.utils.tensorboard import SummaryWriter

        origin = resume_from.path.parent.parent if resume_from else None
        same_run = origin is not None and origin.resolve() == self.folder.resolve()
        if not same_run:
            for old in self.folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        self._write_config()
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        if self.config.save_rollouts:
            (self.folder / "rollouts").mkdir(exist_ok=True)
        for abandoned in (self.folder / "checkpoints").glob("*.tmp"):
            shutil.rmtree(abandoned)
        if resume_from:
            self._restore_records(resume_from, origin, same_run)
        self.events = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=self.first_step or None
        )

    def _write_config(self) -> None:
        described = asdict(self.config)
        described |= {"versions": versions(), "machine": platform.platform()}
        described |= {"revision": revision()}
        text = json.dumps(described, indent=1, default=str) + "\n"
        (self.folder / "config.json").write_text(text)

    def _restore_records(self, resume_from: Checkpoint, origin: Path, same_run: bool) -> None:
        """The records up to the checkpoint, of this run or of the one it branches off from. They
        are truncated and never rewritten: a kill at this moment must not lose a line."""
        for name, size in resume_from.about["records"].items():
            if not same_run:
                shutil.copy(origin / name, self.folder)
            os.truncate(self.folder / name, size)
        if not same_run:
            for file in origin.glob("heldout-*.jsonl"):
                shutil.copy(file, self.folder)
        changed = changed_settings(resume_from, self.config)
        differs = ", ".join(f"{name} {then} → {now}" for name, (then, now) in changed.items())
        suffix = f" with {differs}" if differs else ""
        self.console.print(f"going on from {resume_from.path}{suffix}")

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if not self.writes:
            return
        wall = time.perf_counter() - self.began
        summary = json.dumps({"seconds": wall, "stages": self.stages}, indent=1) + "\n"
        (self.folder / "summary.json").write_text(summary)
        stages = ", ".join(f"{name} {used['seconds']:.1f}" for name, used in self.stages.items())
        self.console.print(
            f"\n{wall:.0f} s ({stages}), peak memory {_peak_gb():.2f} GB; results in {self.folder}"
        )
        for file in (self.metrics, self.evaluations, self.rollouts, self.events):
            file.close()
        os.close(self.lock)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a stage of the step; the progress bar names it."""
        self.progress.update(self.task, description=name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until then the work is only queued
        self.seconds[name] = time.perf_counter() - start
        used = self.stages.setdefault(name, {"seconds": 0.0, "peak_gb": 0.0})
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
        """Turn a FloatingPointError inside into one that names a file with the step's rollouts,
        token ids included."""
        try:
            yield
        except FloatingPointError as error:
            path = self.folder / f"failed-step-{step}.jsonl"
            save_rollouts(path, rollouts)
            message = f"step {step}: {error}; the step's rollouts are in {path}"
            raise FloatingPointError(message) from error

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        rollouts: Sequence[Rollout],
        tokenizer: PreTrainedTokenizerBase,
        values: Tensor | None,
        advantages: Tensor,
    ) -> None:
        """Write the metrics of a step, transcripts of some of its rollouts, and its line."""
        seconds = sum(self.seconds.values())
        tokens = sum(len(r.token_ids) for r in rollouts)
        record = {"step": step, **metrics, "tokens_per_second": tokens / seconds}
        record["seconds"] = seconds
        record |= {f"seconds_{name}": s for name, s in self.seconds.items()}
        record["memory_gb"] = _peak_gb()
        self.seconds = {}
        print(json.dumps(_finite(record)), file=self.metrics, flush=True)
        self._write_events("", record, step)
        keep = (self.config.keep_rollouts, self.config.keep_tokens)
        for kept in transcripts(rollouts, *keep, tokenizer, values, advantages):
            print(json.dumps({"step": step} | kept, ensure_ascii=False), file=self.rollouts)
        self.rollouts.flush()
        if self.writes and self.config.save_rollouts:
            save_rollouts(self.folder / "rollouts" / f"step-{step}.jsonl", rollouts)
        self._print_line(step, record)

    def _print_line(self, step: int, record: dict[str, float]) -> None:
        per_step = (time.perf_counter() - self.began) / (step + 1 - self.first_step)
        left = per_step * (self.config.steps - step - 1)
        shown = record | {"left": f"{int(left // 60)}:{int(left % 60):02d}"}
        if step % 25 == 0:
            headings = (f"{title:>{width}}" for title, width, _ in COLUMNS.values())
            self.console.print(" ".join(headings), style="bold")
        cells = (
            f"{shown.get(metric, math.nan):>{width}{form}}"
            for metric, (_, width, form) in COLUMNS.items()
        )
        self.console.print(" ".join(cells))
        gap = record["logp_gap"]
        if gap > self.config.max_logp_gap:
            warning = f"WARNING: the sampler is off by {gap:.3g} nats per token"
            self.console.print(warning, style="bold red")
        self.progress.advance(self.task)
        self.console.file.flush()  # a line a step, also where the output is a file

    def evaluation(self, step: int, metrics: dict[str, float], rollouts: Sequence[Rollout]) -> None:
        """Record held-out metrics after `step` updates in evaluations.jsonl, as events and as a
        line, and keep the responses."""
        record = {"step": step, "responses": len(rollouts)} | _finite(metrics)
        print(json.dumps(record), file=self.evaluations, flush=True)
        if self.writes:
            save_rollouts(self.folder / f"heldout-{step}.jsonl", rollouts, with_ids=False)
        self._write_events("heldout/", metrics, step)
        self.console.print(
            f"held-out after {step} steps: accuracy {metrics['reward']:.3f}, "
            f"length {metrics['length']:.1f}, format {metrics['format']:.3f} "
            f"on {len(rollouts)} responses",
            style="bold",
        )
        sets = {n.partition("/")[2]: v for n, v in metrics.items() if n.startswith("reward/")}
        if sets:
            each = ", ".join(f"{name} {value:.3f}" for name, value in sets.items())
            self.console.print(f"  {each}")

    def _write_events(self, prefix: str, record: dict[str, float], step: int) -> None:
        if self.writes:
            for name, value in record.items():
                self.events.add_scalar(prefix + name, value, step)

    def print_before_after(self) -> None:
        """The closing table: held-out metrics before and after the training, and two problems
        answered twice: the first that was learned, and the first that is still wrong."""
        first, last = (self.folder / f"heldout-{step}.jsonl" for step in (0, self.config.steps))
        if not (self.writes and first.exists()):
            return
        evaluations = map(json.loads, self.records[1].read_text().splitlines())
        by_step = {record["step"]: record for record in evaluations}
        self.console.print(_before_after(by_step[0], by_step[self.config.steps]))
        with first.open() as before, last.open() as after:
            pairs = [tuple(map(json.loads, pair)) for pair in zip(before, after, strict=True)]
        learned = [p for p in pairs if p[0]["reward"] < p[1]["reward"]]
        still_wrong = [p for p in pairs if p[1]["reward"] == 0]
        for old, new in learned[:1] + still_wrong[:1]:
            question = f"\n{old['question']}   gold {old['gold']}"
            self.console.print(question, style="bold", markup=False)
            self.console.print(f"  before (R={old['reward']:.0f}){old['response']}", markup=False)
            self.console.print(f"  after  (R={new['reward']:.0f}){new['response']}", markup=False)


def lock_folder(folder: Path) -> int:
    """Lock a folder as long as this process lives; returns the open file descriptor. Raises OSError
    when another process holds the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"{folder} is in use by another process; end that, or choose another --name"
        ) from None
    except OSError:
        pass  # some cluster file systems have no locks
    return handle


def _before_after(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name in ("reward", "length", "format", "reflection", "truncated"):
        form = ".1f" if name == "length" else ".3f"
        title = "accuracy" if name == "reward" else name
        table.add_row(title, f"{before[name]:{form}}", f"{after[name]:{form}}")
    return table


def draw_run(folder: Path) -> None:
    """Draw the figures of a finished run and write its page."""
    from reports import figures, page  # matplotlib takes memory that the training may need

    figures.figures(folder)
    Console(highlight=False, soft_wrap=True).print(f"look at it in {page.write(folder)}")


def _peak_gb() -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _finite(record: dict[str, float]) -> dict[str, float]:
    """The record without NaN and infinity, which JSON does not have."""
    return {name: value for name, value in record.items() if math.isfinite(value)}


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {name: version(name) for name in ("torch", "transformers", "math-verify", "numpy")}


def revision() -> str:
    """Revision of this program: git's short hash, with -dirty where files differ from it."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
