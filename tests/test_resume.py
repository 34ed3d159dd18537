"""A run that is killed and goes on is the run that was never killed: the same metrics and weights, to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch
from conftest import write_orz
from safetensors.torch import load_file
from test_checkpoint import metrics, run, weights

from checkpoint import by_step
from toy import tiny

T = TypeVar("T")
TRAIN = Path(__file__).parent.parent / "train.py"
STEPS = 12  # of one process
FEW = 5  # of two ranks: everything there takes five times as long
KILLS = int(os.environ.get("KILLS", "50"))


class Job(NamedTuple):
    """train.py in processes of its own, alone or under torchrun; what it prints is in a file."""

    process: subprocess.Popen[bytes]
    folder: Path
    output: Path

    def ends(self) -> Path:
        """Wait for it to end well; returns its run folder."""
        assert self.process.wait() == 0, self.output.read_text()
        return self.folder

    def until(self, condition: Callable[[], T]) -> T:
        """Wait for the condition; a job that ends before is a failure that shows its output."""
        while not (seen := condition()):
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.001)
        return seen

    def children(self) -> list[int]:
        """Process ids of torchrun's ranks, in order (Linux)."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def kill(self) -> None:
        """SIGKILL to all of it at once. Under torchrun every rank has a session of its own, so there is no group to kill."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.children()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def steps(self) -> int:
        """Lines that its metrics have by now."""
        file = self.folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def complete(self) -> list[int]:
        """Steps of its complete checkpoints."""
        return [number(path) for path in by_step(self.folder / "checkpoints")]

    def unfinished(self) -> list[int]:
        """Steps of the checkpoint folders that are being written or removed."""
        return [number(path) for path in (self.folder / "checkpoints").glob("*.tmp")]


STARTED: list[Job] = []


def number(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".tmp"))


def on(ranks: int, *options: str) -> list[str]:
    """What starts a program in one process, or under torchrun."""
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *options,
    ]
    return [sys.executable, *(several if ranks > 1 else [])]


def start(launcher: list[str], flags: list[str], name: str, *more: str) -> Job:
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
def nothing_stays() -> Iterator[None]:
    """A test that fails leaves no processes behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def small(folder: Path, model: Path) -> list[str]:
    """Flags of a run of tenths of a second a step that leaves a bit of everything: 24 problems, four of them held out too,
    all rollouts, and a checkpoint a step."""
    rows = [(question, str(sum(tiny.numbers(question)))) for question in tiny.problems(0)[0][:24]]
    return [
        "--runs", str(folder), "--model", str(model), "--data", str(write_orz(folder / "train.json", rows)),
        "--eval-data", str(write_orz(folder / "heldout.json", rows[:4])), "--eval-every", "2", "--engine", "transformers",
        "--steps", str(STEPS), "--prompts", "4", "--samples", "4", "--prompt-tokens", "64", "--response-tokens", "24",
        "--critic-steps", "3", "--policy-lr", "1e-3", "--critic-lr", "1e-3", "--grader-workers", "1", "--save-rollouts",
        "--checkpoint-every", "1", "--keep-checkpoints", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[str]:
    return small(tmp_path_factory.mktemp("runs"), model_folder)


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """One process, never interrupted; all checkpoints are kept, so that others can branch off."""
    return run(flags, "--name", "whole", "--keep-checkpoints", str(STEPS))


@pytest.fixture(scope="module")
def whole_on_two(flags: list[str]) -> Path:
    """Two ranks, never interrupted."""
    return start(
        on(2), flags, "whole-on-two", "--steps", str(FEW), "--keep-checkpoints", str(FEW)
    ).ends()


def same(a: Path, b: Path) -> None:
    """Every line of every record but the times, and every bit of the weights."""
    assert metrics(a) == metrics(b)
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    assert weights(a) == weights(b)


def close(a: Path, b: Path) -> None:
    """Another number of ranks adds in another order: the same responses, and weights to 1e-5."""
    for mine, theirs in zip(metrics(a), metrics(b), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for role in ("policy", "critic"):
        mine, theirs = (load_file(folder / role / "model.safetensors") for folder in (a, b))
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(
                mine[name], theirs[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_killed_while_a_checkpoint_is_written(
    flags: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The half-written one is never read: the run goes on from the one before it."""
    more = ("--resume", "auto", "--keep-checkpoints", str(STEPS))
    left: list[int] = []
    while not left:  # a kill may come too late, when the folder has got its name; the run then goes on to the next one
        job = start(on(1), flags, "half-written", *more)
        job.until(lambda job=job: max(job.unfinished(), default=0) > 1)
        job.kill()
        left = job.unfinished()
    assert job.complete() == list(range(1, left[0]))
    capsys.readouterr()
    same(run(flags, "--name", "half-written", *more), whole)
    assert f"going on from {job.folder}/checkpoints/step-{left[0] - 1}\n" in capsys.readouterr().out
    assert job.complete() == list(range(1, STEPS + 1))
    assert not job.unfinished()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(
    flags: list[str], whole: Path, sent: signal.Signals
) -> None:
    """SIGTERM, as from a scheduler, or Ctrl-C: the iteration is finished and saved though no checkpoint was due."""
    job = start(on(1), flags, sent.name, "--checkpoint-every", "0")
    job.until(job.steps)
    job.process.send_signal(sent)
    assert job.process.wait() == 128 + sent, job.output.read_text()
    done, said = job.steps(), job.output.read_text()
    assert 1 <= done < STEPS
    assert job.complete() == [done]
    assert (
        f"stopped by signal {int(sent)} after {done} iterations; --resume auto goes on from there"
        in said
    )
    assert "Traceback" not in said
    same(run(flags, "--name", sent.name, "--resume", "auto"), whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_torchrun_restarts_a_run_that_lost_a_rank(flags: list[str], whole_on_two: Path) -> None:
    """Nobody has to do anything: the other rank stops, both come back, and go on from the newest checkpoint."""
    job = start(
        on(2, "--max-restarts", "2"), flags, "lost-a-rank", "--steps", str(FEW), "--resume", "auto"
    )
    job.until(job.complete)
    os.kill(job.children()[1], signal.SIGKILL)
    same(job.ends(), whole_on_two)
    assert job.output.read_text().count("going on from") == 1


def test_another_number_of_ranks_goes_on(flags: list[str], whole: Path, whole_on_two: Path) -> None:
    """From one process to two ranks, and from two ranks to one process: weights, moments and steps of AdamW."""
    job = start(
        on(2),
        flags,
        "from-one-to-two",
        "--resume",
        str(whole / "checkpoints" / f"step-{STEPS - 3}"),
    )
    step = str(whole_on_two / "checkpoints" / "step-2")
    close(
        run(flags, "--name", "from-two-to-one", "--steps", str(FEW), "--resume", step), whole_on_two
    )
    close(job.ends(), whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(("ranks", "steps"), [(1, 120), (2, 120)])
def test_kills_at_random_instants(flags: list[str], ranks: int, steps: int) -> None:
    """KILLS (50) times SIGKILL to all processes at once, at any instant from the first sign of life to four steps later:
    while they sample, grade, update, evaluate, write or remove a checkpoint, or open the records that they go on with."""
    more, rng = ("--steps", str(steps)), random.Random(ranks)
    whole = start(on(ranks), flags, f"whole-{ranks}", *more).ends()
    seconds = sum(json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").open()) / steps
    kills: list[str] = []
    for chain in count():
        while True:
            job = start(on(ranks), flags, f"killed-{ranks}-{chain}", *more, "--resume", "auto")
            if len(kills) == KILLS or job.steps() == steps:
                break  # enough of it; this run may end, and another begins
            job.until(
                lambda job=job: any(
                    sign in job.output.read_text() for sign in ("going on from", "held-out after 0")
                )
            )
            try:
                job.process.wait(rng.uniform(0, 4 * seconds))
                break  # the run has ended
            except subprocess.TimeoutExpired:
                job.kill()
            assert "is damaged" not in job.output.read_text()  # what has its name is whole
            newest = max(job.complete(), default=0)
            states = {"writing" if n > newest else "removing" for n in job.unfinished()}
            kills.append(" ".join([f"{job.steps()}/{newest}", *states]))
        same(job.ends(), whole)
        if len(kills) == KILLS:
            break
    writing, removing = (sum(state in kill for kill in kills) for state in ("writing", "removing"))
    print(
        f"\n{len(kills)} kills of {ranks} ranks in {chain + 1} runs of {steps} steps, random.Random({ranks})"
    )
    print(f"{writing} of them left a checkpoint half written, {removing} one half removed")
    print(f"steps done/newest checkpoint at each kill: {', '.join(kills)}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", [1, 2])
def test_four_ranks_train_as_one_process(flags: list[str], whole: Path, replicas: int) -> None:
    """On the rollouts of one process, sharded four ways or two ways twice."""
    two = ("--steps", "2", "--replay", str(whole / "rollouts"))
    job = start(on(4), flags, f"four-{replicas}", *two, "--replicas", str(replicas))
    one = run(flags, "--name", f"one-{replicas}", *two)
    close(job.ends(), one)
