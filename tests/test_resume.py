"""A killed and resumed run equals one that was never killed: the same metrics and weights, bit for
bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL_RUN, load_records, untimed_metrics, write_orz
from safetensors.torch import load_file
from test_checkpoint import run, weights

from checkpoint import by_step
from tools import export
from toy import tiny

TRAIN = Path(__file__).parent.parent / "train.py"
STEPS = 12  # of runs in one process
FEW = 5  # of runs on two ranks, where everything takes five times as long
KILLS = int(os.environ.get("KILLS", "50"))

# ── runs in processes of their own ────────────────────────────────────────────────────────────────


class Job(NamedTuple):
    """train.py in a process of its own or under torchrun. The file `output` has what it prints."""

    process: subprocess.Popen[bytes]
    folder: Path
    output: Path

    def finish(self) -> Path:
        """Wait until it ends, which must be without an error; returns the run folder."""
        assert self.process.wait() == 0, self.output.read_text()
        return self.folder

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds. Fails with the job's output when the job ends before."""
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.001)

    def children(self) -> list[int]:
        """Process ids of torchrun's ranks, in order (Linux)."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def kill(self) -> None:
        """SIGKILL to all its processes at once. Under torchrun every rank has a session of its own,
        so there is no process group to kill."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.children()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def steps(self) -> int:
        """Number of steps in its metrics."""
        file = self.folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def complete(self) -> list[int]:
        """Steps of its complete checkpoints."""
        return [saved_step(path) for path in by_step(self.folder / "checkpoints")]

    def unfinished(self) -> list[int]:
        """Steps of the checkpoint folders that are being written or removed."""
        return [saved_step(path) for path in (self.folder / "checkpoints").glob("*.tmp")]


STARTED: list[Job] = []


def saved_step(path: Path) -> int:
    """The step of a checkpoint folder."""
    return int(path.name.removeprefix("step-").removesuffix(".tmp"))


def on(ranks: int, *options: str) -> list[str]:
    """The command that starts a program in one process, or on several ranks under torchrun."""
    if ranks == 1:
        return [sys.executable]
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    return [sys.executable, *torchrun, *options]


def start(launcher: list[str], flags: list[str], name: str, *more: str) -> Job:
    """Start train.py as a run of this name."""
    folder = Path(flags[1]) / name
    output = folder.with_suffix(".txt")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [*launcher, str(TRAIN), *flags, "--name", name, *more]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=file, start_new_session=True
        )
    STARTED.append(Job(process, folder, output))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def kill_started_jobs() -> Iterator[None]:
    """A test that fails leaves no processes running."""
    yield
    while STARTED:
        STARTED.pop().kill()


def small_run(folder: Path, model: Path) -> list[str]:
    """Flags of a short run that writes all kinds of files: evaluations on four of its 24 problems,
    all rollouts, and a checkpoint at every step."""
    questions, _ = tiny.problems(0)
    rows = [(question, str(sum(tiny.numbers(question)))) for question in questions[:24]]
    training = write_orz(folder / "train.json", rows)
    heldout = write_orz(folder / "heldout.json", rows[:4])
    files = ["--runs", str(folder), "--model", str(model)]
    files += ["--data", str(training), "--eval-data", str(heldout)]
    settings = f"""
        --steps {STEPS} --eval-every 2 --engine transformers --save-rollouts
        --checkpoint-every 1 --keep-checkpoints 2
    """.split()
    return [*files, *settings, *SMALL_RUN]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[str]:
    return small_run(tmp_path_factory.mktemp("runs"), model_folder)


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """A run of one process that was not interrupted. It keeps all checkpoints, so that other runs
    can resume from them."""
    return run(flags, "--name", "whole", "--keep-checkpoints", str(STEPS))


@pytest.fixture(scope="module")
def whole_on_two(flags: list[str]) -> Path:
    """A run of two ranks that was not interrupted."""
    more = ("--steps", str(FEW), "--keep-checkpoints", str(FEW))
    return start(on(2), flags, "whole-on-two", *more).finish()


def same(a: Path, b: Path) -> None:
    """Two runs have the same records, times excepted, and the same weights to the last bit."""
    assert untimed_metrics(a) == untimed_metrics(b)
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    assert weights(a) == weights(b)


def close(a: Path, b: Path) -> None:
    """Two runs have the same metrics to 1e-4 and the same weights to 1e-5: another number of ranks
    adds in another order."""
    for step_a, step_b in zip(untimed_metrics(a), untimed_metrics(b), strict=True):
        assert step_a == pytest.approx(step_b, rel=1e-4, abs=1e-5)
    for role in ("policy", "critic"):
        weights_a, weights_b = (load_file(run / role / "model.safetensors") for run in (a, b))
        torch.testing.assert_close(weights_a, weights_b, atol=1e-5, rtol=0)


# ── tests ─────────────────────────────────────────────────────────────────────────────────────────


def test_killed_while_a_checkpoint_is_written(
    flags: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The unfinished checkpoint is never loaded: the run resumes from the one before it."""
    more = ("--resume", "auto", "--keep-checkpoints", str(STEPS))
    unfinished: list[int] = []
    # A kill may come too late, when the checkpoint is finished. Then the run is resumed and killed
    # again.
    while not unfinished:
        job = start(on(1), flags, "half-written", *more)
        job.wait_until(lambda job=job: max(job.unfinished(), default=0) > 1)
        job.kill()
        unfinished = job.unfinished()
    assert job.complete() == list(range(1, unfinished[0]))
    capsys.readouterr()
    same(run(flags, "--name", "half-written", *more), whole)
    resumed_from = job.folder / "checkpoints" / f"step-{unfinished[0] - 1}"
    assert f"going on from {resumed_from}\n" in capsys.readouterr().out
    assert job.complete() == list(range(1, STEPS + 1))
    assert not job.unfinished()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(
    flags: list[str], whole: Path, sent: signal.Signals
) -> None:
    """After SIGTERM, as a scheduler sends it, or Ctrl-C, the iteration is finished and saved, even
    though no checkpoint is due. It comes twice, as when torchrun passes it on."""
    job = start(on(1), flags, sent.name, "--checkpoint-every", "0")
    job.wait_until(job.steps)
    job.process.send_signal(sent)
    time.sleep(0.05)
    job.process.send_signal(sent)
    assert job.process.wait() == 128 + sent, job.output.read_text()
    done, output = job.steps(), job.output.read_text()
    assert 1 <= done < STEPS
    assert job.complete() == [done]
    stopped = f"stopped by signal {int(sent)} after {done} iterations"
    assert f"{stopped}; --resume auto goes on from there" in output
    assert "Traceback" not in output
    same(run(flags, "--name", sent.name, "--resume", "auto"), whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_torchrun_restarts_a_run_that_lost_a_rank(flags: list[str], whole_on_two: Path) -> None:
    """The other rank stops, torchrun starts both again, and they resume from the newest
    checkpoint."""
    more = ("--steps", str(FEW), "--resume", "auto")
    job = start(on(2, "--max-restarts", "2"), flags, "lost-a-rank", *more)
    job.wait_until(job.complete)
    os.kill(job.children()[1], signal.SIGKILL)
    same(job.finish(), whole_on_two)
    assert job.output.read_text().count("going on from") == 1


def test_another_number_of_ranks_resumes(flags: list[str], whole: Path, whole_on_two: Path) -> None:
    """Two ranks resume a run of one process, and one process a run of two ranks: both load weights
    and AdamW's moments and steps."""
    of_one = str(whole / "checkpoints" / f"step-{STEPS - 3}")
    job = start(on(2), flags, "from-one-to-two", "--resume", of_one)
    of_two = str(whole_on_two / "checkpoints" / "step-2")
    more = ("--steps", str(FEW), "--resume", of_two)
    close(run(flags, "--name", "from-two-to-one", *more), whole_on_two)
    close(job.finish(), whole)


def test_one_process_exports_what_two_ranks_saved(whole_on_two: Path, tmp_path: Path) -> None:
    export.export(export.Settings(run=str(whole_on_two), out=str(tmp_path / "out")))
    for role in ("policy", "critic"):
        file = Path(role) / "model.safetensors"
        assert (tmp_path / "out" / file).read_bytes() == (whole_on_two / file).read_bytes()


def killed_after(job: Job, seconds: float) -> bool:
    """Kill the job so many seconds after its first output; False when it ends before."""

    def running() -> bool:
        output = job.output.read_text()
        return "going on from" in output or "held-out after 0" in output

    job.wait_until(running)
    try:
        job.process.wait(seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        return True
    return False


def state_of_killed(job: Job) -> str:
    """Steps done / newest checkpoint, and whether one is half written ("writing") or half removed
    ("removing")."""
    newest = max(job.complete(), default=0)
    unfinished = {"writing" if step > newest else "removing" for step in job.unfinished()}
    return " ".join([f"{job.steps()}/{newest}", *unfinished])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(("ranks", "steps"), [(1, 120), (2, 120)])
def test_kills_at_random_instants(flags: list[str], ranks: int, steps: int) -> None:
    """SIGKILL to all processes at once, KILLS (50) times, at random instants between a run's first
    output and four steps later: during sampling, grading, updates and evaluations, and while a
    checkpoint is written or removed or a resumed run opens its records."""
    more = ("--steps", str(steps), "--resume", "auto")
    rng = random.Random(ranks)
    whole = start(on(ranks), flags, f"whole-{ranks}", "--steps", str(steps)).finish()
    seconds = sum(step["seconds"] for step in load_records(whole / "metrics.jsonl")) / steps
    kills: list[str] = []
    runs = 0
    while len(kills) < KILLS:
        runs += 1
        while True:
            job = start(on(ranks), flags, f"killed-{ranks}-{runs}", *more)
            if len(kills) == KILLS or job.steps() == steps:
                break
            if not killed_after(job, rng.uniform(0, 4 * seconds)):
                break
            # A checkpoint under its final name is complete.
            assert "is damaged" not in job.output.read_text()
            kills.append(state_of_killed(job))
        same(job.finish(), whole)
    writing = sum("writing" in kill for kill in kills)
    removing = sum("removing" in kill for kill in kills)
    print(f"\n{KILLS} kills of {ranks} ranks in {runs} runs of {steps} steps, seed {ranks}")
    print(f"{writing} of them left a checkpoint half written, {removing} one half removed")
    print(f"steps done/newest checkpoint at each kill: {', '.join(kills)}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", [1, 2])
def test_four_ranks_train_as_one_process(flags: list[str], whole: Path, replicas: int) -> None:
    """On the rollouts of one process, with one copy over four ranks or a copy on each two."""
    two = ("--steps", "2", "--replay", str(whole / "rollouts"))
    job = start(on(4), flags, f"four-{replicas}", *two, "--replicas", str(replicas))
    one = run(flags, "--name", f"one-{replicas}", *two)
    close(job.finish(), one)
