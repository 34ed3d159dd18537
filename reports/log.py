"""The run folder, and one readable line a step.

runs/<name>/  config.json      every resolved setting, versions, git revision
              metrics.jsonl    one object a step
              evaluations.jsonl  held-out metrics before, during and after the training
              heldout-<step>.jsonl  the responses behind them
              summary.json     seconds and peak memory by stage
              rollouts.jsonl   some responses of every step, a few of them token by token
              rollouts/        all of them, token ids included, with --save-rollouts
              checkpoints/     what --resume continues from
              tensorboard/     the metrics again, as events; see reports/trackers.py
              track-*.json     what W&B and Trackio have got of the run; wandb/  W&B's own files
              *.png            figures (reports/figures.py)
              report.html      everything to look at, in one page (reports/page.py)
              policy/ critic/  Hugging Face folders; *.earlier: of a training that goes on
              exports/         such folders of checkpoints (tools/export.py)

The process that trains holds a lock on the folder, from before the first check to its end.
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
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
from checkpoint import (
    Checkpoint,
    changed_settings,
    is_run_config,
    move_export_aside,
    newest_complete,
    remove_tree,
    set_aside_newer,
    step_of,
    without_effect,
)
from config import STOP
from curation.files import progress_bar, write_atomically
from reports.metrics import PROBLEMS, SETTINGS, comparable, heldout_metrics
from reports.trackers import Tracked, Trackers
from reports.transcripts import transcripts
from rollout import Rollout, load_rollouts, save_rollouts

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
# Settings that decide what an evaluation measures; a resumed run may change them.
EVALUATED_WITH = """reward require_boxed grader_seconds temperature top_p response_tokens
    template""".split()
UNFINISHED = ("config.json.*.tmp", "track-*.json.*.tmp")  # of a process that was killed
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")  # the files that grow

BESIDE_METRICS = {"step", "responses", SETTINGS, PROBLEMS}  # in a line of evaluations.jsonl


# What a run leaves in its folder beside config.json. Only this is removed when it starts afresh.
OUTPUTS = """
    checkpoints policy policy.earlier policy.partial critic critic.earlier critic.partial
    metrics.jsonl evaluations.jsonl rollouts.jsonl heldout-*.jsonl failed-step-*.jsonl rollouts
    tensorboard track-*.json* wandb summary.json report.html *.png *.svg exports
""".split()
REMOVED = ".removed"  # what is being deleted is moved into this folder first
_locks: dict[Path, int] = {}  # run folder → open file descriptor that locks it


# ── the folder ────────────────────────────────────────────────────────────────────────────────────


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of this program."""
    try:
        return is_run_config(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError):
        return False


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Make the run folder and lock it until this process ends. An error inside gives the folder
    back, and removes it if it was made here. Raises OSError when another process has it."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write the run folder ({error.strerror}); choose another --runs"
        ) from None
    lock = lock_folder(folder)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()
        os.close(lock)
        raise
    _locks[folder.resolve()] = lock


def lock_folder(folder: Path) -> int:
    """Lock a folder; returns the open file descriptor that holds the lock, perhaps one that
    `claim_folder` left. Raises OSError when another process or another RunLog holds it."""
    handle = _locks.pop(folder.resolve(), None)
    if handle is not None and _is_open_folder(handle, folder):
        return handle
    if handle is not None:
        os.close(handle)  # of a folder that has been removed since
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise _in_use(folder) from None
    except OSError:
        pass  # some cluster file systems have no locks
    if not _is_open_folder(handle, folder):  # its owner removed it before we had the lock
        os.close(handle)
        raise _in_use(folder)
    return handle


def _is_open_folder(handle: int, folder: Path) -> bool:
    return folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder))


def _in_use(folder: Path) -> OSError:
    return OSError(f"{folder} is in use by another process; end that, or choose another --name")


def check_folder(folder: Path, overwrite: bool, resume: bool, same_run: bool) -> None:
    """Raise ValueError, saying what to do, when a run may not begin or go on in `folder`. A
    checkpoint to go on from (`same_run`) proves that the folder is a run's."""
    # A start that was killed may leave no more than its unfinished config.json.
    left = [p for p in folder.iterdir() if not p.match("config.json.*.tmp") and p.name != REMOVED]
    if not left or same_run:
        return
    if not overwrite and not resume:
        raise ValueError(
            f"{folder} is not empty; choose another --name, or pass --overwrite or --resume auto"
        )
    if not is_run(folder):
        raise ValueError(
            f"{folder} holds files that are not a run's; neither --overwrite nor --resume touches "
            "them"
        )


def clear_folder(folder: Path) -> None:
    """Remove what an earlier run left, links but not what they point to. Everything is moved out of
    the way before anything is deleted, checkpoints first: when this is interrupted, nothing that is
    left looks whole. config.json stays until it is replaced; other people's files stay."""
    removed = folder / REMOVED
    remove_tree(removed)
    entries = list(folder.iterdir())
    found = [p for pattern in OUTPUTS for p in entries if fnmatch(p.name, pattern)]
    if found:
        removed.mkdir()
    for path in found:
        path.rename(removed / path.name)
    remove_tree(removed)


# ── the log ───────────────────────────────────────────────────────────────────────────────────────


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
        self.began = self.steps_began = time.perf_counter()
        self.first_step = resume_from.about["step"] if resume_from else 0
        self.writes = distributed.rank() == 0
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.writes)
        self.records = [folder / name for name in RECORDS]
        # Seconds of the run before this process, and by stage; see `spent`.
        self.earlier_seconds = 0.0
        self.stages: dict[str, dict[str, float]] = {}
        if self.writes:
            self.lock = lock_folder(folder)
            try:
                self._start_folder(resume_from)
            except BaseException:
                self._unlock()
                raise
        files = self.records if self.writes else [Path(os.devnull)] * len(RECORDS)
        self.metrics, self.evaluations, self.rollouts = (file.open("a") for file in files)
        self.seconds: dict[str, float] = {}  # stage → seconds in this step
        self.progress = progress_bar(self.console)
        self.task = self.progress.add_task(
            "training", total=config.steps, completed=self.first_step
        )

    def _start_folder(self, resume_from: Checkpoint | None) -> None:
        """Clear what --overwrite gave up, write config.json, and restore a checkpoint's records."""
        origin = resume_from.path.parent.parent if resume_from else None
        same_run = origin is not None and origin.resolve() == self.folder.resolve()
        if not same_run:
            clear_folder(self.folder)
        unfinished = [p for pattern in UNFINISHED for p in self.folder.glob(pattern)]
        for leftover in (*unfinished, self.folder / REMOVED):
            remove_tree(leftover)
        settings = self._write_config()
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        if self.config.save_rollouts:
            (self.folder / "rollouts").mkdir(exist_ok=True)
        for path in (self.folder / "checkpoints").glob("*.tmp"):
            if step_of(path.with_suffix("")) is not None:
                remove_tree(path)  # unfinished or half removed
        if resume_from:
            self._restore_records(resume_from, origin, same_run)
            self._restore_spent(resume_from)
        if same_run:
            self._pass_over_later_results(resume_from)
        run = Tracked(self.folder, self.config.name, settings, self.first_step)
        self.trackers = Trackers(self.config.track, run, self._warn)
        if resume_from:
            self._track_evaluation_at_checkpoint()

    def _write_config(self) -> dict[str, Any]:
        """Write config.json; returns what it says."""
        described = asdict(self.config)
        described |= {"versions": versions(), "machine": platform.platform()}
        described |= {"revision": revision()}
        path = self.folder / "config.json"
        with self._writing(path):
            text = json.dumps(described, indent=1, default=str)
            write_atomically(path, [text + "\n"])
        return json.loads(text)

    def _restore_records(self, resume_from: Checkpoint, origin: Path, same_run: bool) -> None:
        """The records up to the checkpoint, of this run or of the one it branches off from. They
        are truncated and never rewritten: a kill at this moment must not lose a line."""
        for name, size in resume_from.about["records"].items():
            path = self.folder / name
            if not same_run:
                with self._writing(path):
                    shutil.copyfile(origin / name, path)
            if path.stat().st_size < size:  # truncating would fill it up with zeros
                raise OSError(f"{path} is shorter than at {resume_from.path}")
            os.truncate(path, size)
        if not same_run:
            for file in origin.glob("heldout-*.jsonl"):
                with self._writing(self.folder / file.name):
                    shutil.copyfile(file, self.folder / file.name)
        reasons = without_effect(resume_from, self.config)
        differs = []
        for name, (then, now) in changed_settings(resume_from, self.config).items():
            reason = f" (no effect: {reasons[name]})" if name in reasons else ""
            differs.append(f"{name} {in_one_line(then)} → {in_one_line(now)}{reason}")
        suffix = f" with {', '.join(differs)}" if differs else ""
        self.console.print(f"going on from {resume_from.path}{suffix}", markup=False)

    def _track_evaluation_at_checkpoint(self) -> None:
        """The evaluation after the checkpoint's last step has the number of the step that comes
        next: TensorBoard has purged it, and a tracker that is new begins with it."""
        lines = self.records[1].read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {"step": None}
        if last["step"] == self.first_step:
            metrics = {name: last[name] for name in last.keys() - BESIDE_METRICS}
            self.trackers.evaluation(self.first_step, dict(sorted(metrics.items())))

    def _restore_spent(self, resume_from: Checkpoint) -> None:
        """The time that the run had taken at the checkpoint. Early versions did not record it: then
        it is that of the steps."""
        spent = resume_from.about.get("spent")
        if spent is None:
            lines = self.records[0].read_text().splitlines()
            spent = {"seconds": sum(json.loads(line)["seconds"] for line in lines), "stages": {}}
        self.earlier_seconds = spent["seconds"]
        self.stages = {name: dict(used) for name, used in spent["stages"].items()}

    def _pass_over_later_results(self, resume_from: Checkpoint) -> None:
        """Set aside the damaged checkpoints that this run will write again. When training goes on
        past the results of an earlier attempt, they must not look like those of this one."""
        for aside in set_aside_newer(self.folder / "checkpoints", resume_from):
            self.console.print(f"set aside as {aside}")
        if self.first_step < self.config.steps:
            for role in ("policy", "critic"):
                move_export_aside(self.folder / role)
            (self.folder / "summary.json").unlink(missing_ok=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Let an OSError of a write say which file could not be written, and what is complete."""
        try:
            yield
        except OSError as error:
            left = newest_complete(self.folder / "checkpoints")
            why = error.strerror or error
            raise OSError(f"{path} could not be written ({why}); {left}") from error

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        self.progress.stop()
        if not self.writes:
            return
        try:
            self._finish(failed=failure is not None)
        except OSError:
            if failure is None:  # otherwise the error that ends the run is the one to report
                raise
        finally:
            self._unlock()

    def _finish(self, failed: bool) -> None:
        for file in (self.metrics, self.evaluations, self.rollouts):
            with self._writing(Path(file.name)):
                file.close()
        spent = self.spent()
        path = self.folder / "summary.json"
        with self._writing(path):
            write_atomically(path, [json.dumps(spent, indent=1) + "\n"])
        self.trackers.close(failed)
        stages = ", ".join(f"{name} {used['seconds']:.1f}" for name, used in self.stages.items())
        self.console.print(
            f"\n{spent['seconds']:.0f} s ({stages}), peak memory {_peak_gb():.2f} GB; results in "
            f"{self.folder}"
        )

    def _unlock(self) -> None:
        """Leave the lock to the process, which holds it until it ends."""
        _locks[self.folder.resolve()] = self.lock

    def _warn(self, line: str) -> None:
        self.console.print(line, style="bold red", markup=False)

    def spent(self) -> dict[str, Any]:
        """Seconds of the run so far, the time before it was resumed included; by stage the seconds
        and the peak memory at its end."""
        seconds = self.earlier_seconds + time.perf_counter() - self.began
        # Copies: a checkpoint's thread writes them while the next step goes on.
        return {"seconds": seconds, "stages": {k: dict(used) for k, used in self.stages.items()}}

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
        used["peak_gb"] = max(used["peak_gb"], _peak_gb())

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
            with self._writing(path):
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
        with self._writing(self.records[0]):
            print(json.dumps(_finite(record)), file=self.metrics, flush=True)
        keep = (self.config.keep_rollouts, self.config.keep_tokens)
        kept = list(transcripts(rollouts, *keep, tokenizer, values, advantages))
        with self._writing(self.records[2]):
            for response in kept:
                print(json.dumps({"step": step} | response, ensure_ascii=False), file=self.rollouts)
            self.rollouts.flush()
        if self.writes and self.config.save_rollouts:
            path = self.folder / "rollouts" / f"step-{step}.jsonl"
            with self._writing(path):
                save_rollouts(path, rollouts)
        if self.writes:
            self.trackers.step(step, record, kept)
        self._print_line(step, record)

    def _print_line(self, step: int, record: dict[str, float]) -> None:
        per_step = (time.perf_counter() - self.steps_began) / (step + 1 - self.first_step)
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
            self._warn(warning)
        self.progress.advance(self.task)
        self.console.file.flush()  # a line a step, also where the output is a file

    def evaluation(self, step: int, metrics: dict[str, float], rollouts: Sequence[Rollout]) -> None:
        """Record held-out metrics after `step` updates in evaluations.jsonl, as events and as a
        line, and keep the responses."""
        record = {"step": step, "responses": len(rollouts)} | _finite(metrics)
        record[SETTINGS] = {name: getattr(self.config, name) for name in EVALUATED_WITH}
        if self.config.stop != STOP:  # early versions had no others, and did not record them
            record[SETTINGS]["stop"] = self.config.stop
        record[PROBLEMS] = zlib.crc32(json.dumps(sorted(set(map(_asked, rollouts)))).encode())
        with self._writing(self.records[1]):
            print(json.dumps(record), file=self.evaluations, flush=True)
        if step == self.first_step:  # the time that is left counts from here
            self.steps_began = time.perf_counter()
        if self.writes:
            path = self.folder / f"heldout-{step}.jsonl"
            with self._writing(path):
                save_rollouts(path, rollouts, with_ids=False)
            self.trackers.evaluation(step, metrics)
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

    def print_before_after(self) -> None:
        """The closing table: held-out metrics before and after the training, and two problems
        answered twice: the first that was learned, and the first that is still wrong.

        A run that was resumed may have other held-out problems than it began with: then only those
        that it had at both times are compared. It may sample or grade in another way: then "before"
        is the first evaluation that was made like the last one.
        """
        if not self.writes:
            return
        evaluations = map(json.loads, self.records[1].read_text().splitlines())
        by_step = {record["step"]: record for record in evaluations}
        last = self.config.steps
        if not {0, last} <= by_step.keys():
            return
        first = self._first_comparable(by_step)
        if first == last:
            return
        try:
            before, after = (
                load_rollouts(self.folder / f"heldout-{step}.jsonl", with_ids=False)
                for step in (first, last)
            )
        except (OSError, ValueError) as error:
            self.console.print(f"no comparison of before and after: {error}", markup=False)
            return
        metrics = [by_step[first], by_step[last]]
        if list(map(_asked, before)) != list(map(_asked, after)):
            both = set(map(_asked, before)) & set(map(_asked, after))
            since = "at the start" if first == 0 else f"after {first} steps"
            self.console.print(f"other held-out problems than {since}; {len(both)} in both")
            if not both:
                return
            before, after = ([r for r in rs if _asked(r) in both] for rs in (before, after))
            metrics = [heldout_metrics(before), heldout_metrics(after)]
            after = _in_order_of(before, after)
        self.console.print(_before_after(*metrics))
        self._print_examples(before, after)

    def _first_comparable(self, by_step: dict[int, dict[str, Any]]) -> int:
        """The first evaluation that was made like the last one; says why when it is not that of the
        start."""
        last = self.config.steps
        first = comparable([*by_step.values()], problems=False)[0]["step"]
        if first > 0:
            then, now = by_step[0][SETTINGS], by_step[last][SETTINGS]
            names = [n for n in then | now if then.get(n) != now.get(n)]
            changed = (f"{n} {then.get(n)!r:.60} → {now.get(n)!r:.60}" for n in names)
            what = f"before is after {first} steps" if first < last else "nothing to compare with"
            self.console.print(f"since the start {', '.join(changed)}: {what}", markup=False)
        return first

    def _print_examples(self, before: list[Rollout], after: list[Rollout]) -> None:
        pairs = list(zip(before, after, strict=True))
        learned = [pair for pair in pairs if pair[0].reward < pair[1].reward]
        still_wrong = [pair for pair in pairs if pair[1].reward == 0]
        for old, new in learned[:1] + still_wrong[:1]:
            question = f"\n{old.problem.question}   gold {old.problem.answer}"
            self.console.print(question, style="bold", markup=False)
            self.console.print(f"  before (R={old.reward:.0f}){old.text}", markup=False)
            self.console.print(f"  after  (R={new.reward:.0f}){new.text}", markup=False)


def in_one_line(value: Any) -> Any:
    """The value of a setting as it is; a text of several lines, such as a template, in one line.

    >>> in_one_line("paper"), in_one_line("Q: {question}\\nA:")
    ('paper', "'Q: {question}\\\\nA:'")
    """
    if isinstance(value, str) and len(value.splitlines()) > 1:
        return f"{value!r:.60}"
    return value


def _asked(r: Rollout) -> tuple[str, str]:
    """What makes two held-out problems the same, whatever file they come from."""
    return r.problem.question, r.problem.answer


def _in_order_of(before: list[Rollout], after: list[Rollout]) -> list[Rollout]:
    """For each response in `before` the first one in `after` to the same problem."""
    first = {_asked(r): r for r in reversed(after)}
    return [first[_asked(r)] for r in before]


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
    """Draw the figures of a finished run and write its page. The models are exported by now: what
    fails here is a warning."""
    from reports import figures, page  # matplotlib takes memory that the training may need

    console = Console(highlight=False, soft_wrap=True)
    try:
        figures.figures(folder)
        console.print(f"look at it in {page.write(folder)}")
    except (OSError, ValueError) as error:
        why = f"WARNING: the run is complete, but not its figures and page ({error})"
        console.print(
            f"{why}; make them with python -m reports.figures, reports.page", markup=False
        )


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
    """Versions of the libraries that results depend on, of those that are installed."""
    found = {}
    for name in ("torch", "transformers", "math-verify", "numpy"):
        with suppress(PackageNotFoundError):  # a benchmark of the GPU needs no grader
            found[name] = version(name)
    return found


def revision(aside: str = "") -> str:
    """Revision of this program: git's short hash, with -dirty where files differ from it, those in
    the folder `aside` left out."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    others = [":/", f":(top,exclude){aside}"] if aside else []
    try:
        described = subprocess.run(
            [*git, "describe", "--always"], capture_output=True, text=True, check=True
        )
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *others]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip() + ("" if same else "-dirty")
