"""Worker processes that compare answers, so that nothing a model wrote is evaluated in the trainer's process.

    pairs ──by text──▶ cheap first ──▶ [ python -m grading.equivalence --worker ──fork──▶ child ] × n ──▶ equal, not, or late (None)

Sooner or later a model writes what no program can evaluate, and nothing inside Python can interrupt that. So a worker is two
processes: one that has imported sympy and waits, and its child that compares. A child that misses its deadline is killed by
the kernel, counted, and replaced in milliseconds; its memory is limited. Never a thread: Math-Verify's own time limits do
not work in one. Answers that look costly come last, so that they hold up none that do not.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

from grading.equivalence import by_text, cost
from grading.extract import extract

CACHE = 200_000
GRACE = 5.0  # seconds after the deadline until the whole worker is given up, in case nothing of it can speak
WORKER = Path(__file__).with_name("equivalence.py")
VERDICT = {b"1": True, b"0": False, b"late": None}

Pair = tuple[str, str]  # gold, answer


class Grade(NamedTuple):
    reward: float
    answer: str
    timeout: bool


class _Worker:
    def __init__(self, deadline: float) -> None:
        # A program of its own, not a fork: the caller holds threads and a GPU. In its own session, so that Ctrl-C
        # reaches the caller alone; it ends when its input does. -P: no file of this folder may shadow a library's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), "--worker", str(deadline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self.ready = False
        self.pair: Pair | None = None
        self.due = inf

    def send(self, pair: Pair, deadline: float) -> None:
        self.pair, self.due = pair, time.monotonic() + deadline + GRACE
        with suppress(BrokenPipeError):  # it died while idle; the end of its output will say so
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the child, too
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Grader:
    r"""Grades with `workers` processes. They start at once and import while the caller goes on.

    >>> with Grader() as grader:
    ...     grader.grade([r"two and two</think> <answer>\boxed{4}</answer>"], ["4"])
    [Grade(reward=1.0, answer='4', timeout=False)]
    """

    def __init__(
        self, workers: int = 2, deadline: float = 3.0, require_boxed: bool = False
    ) -> None:
        self.deadline, self.require_boxed = deadline, require_boxed
        self._known: OrderedDict[Pair, bool] = OrderedDict()
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        for _ in range(workers):
            self._start()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()

    def grade(self, responses: list[str], golds: list[str]) -> list[Grade]:
        """One grade per response. A comparison beyond the deadline earns 0 and is marked as a timeout."""
        answers = [extract(response, self.require_boxed) for response in responses]
        verdicts = self.equal(golds, answers)
        late = verdicts.count(None)
        if late > max(1, 0.05 * len(verdicts)):
            warnings.warn(
                f"{late} of {len(verdicts)} answers missed the grader's deadline of {self.deadline} s and earned 0. "
                "If they are ordinary answers, the machine is overloaded: use fewer workers or a longer deadline.",
                stacklevel=2,
            )
        return [
            Grade(float(v is True), a, v is None) for v, a in zip(verdicts, answers, strict=True)
        ]

    def equal(self, golds: list[str], answers: list[str]) -> list[bool | None]:
        """Whether each answer equals its gold; None where the deadline passed. Like pairs are compared once."""
        pairs = [
            (gold.strip(), answer.strip()) for gold, answer in zip(golds, answers, strict=True)
        ]
        verdicts = {
            (gold, answer): bool(answer) if not answer or answer == gold else by_text(gold, answer)
            for gold, answer in dict.fromkeys(
                pairs
            )  # the same text is the same answer, whatever it means
        }
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        verdicts |= self._compare(sorted(undecided, key=lambda pair: cost(*pair)))
        return [verdicts[pair] for pair in pairs]

    def check_golds(self, golds: list[str]) -> list[bool]:
        """False for a gold that cannot be earned: not readable, or once read not equal to itself."""
        pairs = [(gold.strip(), gold.strip()) for gold in golds]
        verdicts = self._compare(list(dict.fromkeys(pair for pair in pairs if pair[0])))
        return [bool(verdicts.get(pair)) for pair in pairs]

    def _compare(self, pairs: list[Pair]) -> dict[Pair, bool | None]:
        with self._lock:
            verdicts: dict[Pair, bool | None] = {
                pair: self._known[pair] for pair in pairs if pair in self._known
            }
            waiting = deque(pair for pair in pairs if pair not in verdicts)
            retried: set[Pair] = set()
            try:
                while len(verdicts) < len(pairs):
                    self._turn(waiting, verdicts, retried)
            finally:  # after an interruption nobody waits for these any more
                for worker in [worker for worker in self._workers if worker.pair]:
                    self._replace(worker)
            for pair, verdict in verdicts.items():
                if verdict is not None:  # a timeout is not a verdict, and not remembered
                    self._known[pair] = verdict
                    self._known.move_to_end(pair)
            while len(self._known) > CACHE:
                self._known.popitem(last=False)
            return verdicts

    def _turn(
        self, waiting: deque[Pair], verdicts: dict[Pair, bool | None], retried: set[Pair]
    ) -> None:
        """Give work to idle workers, wait for one to speak, die or miss its deadline, and act on it."""
        for worker in self._workers:
            if waiting and worker.ready and not worker.pair:
                worker.send(waiting.popleft(), self.deadline)
        due = min(worker.due for worker in self._workers)
        for key, _ in self._selector.select(
            None if due == inf else max(0.0, due - time.monotonic())
        ):
            worker, line = key.data, key.fileobj.readline().strip()
            if line == b"ready":
                worker.ready, self._failed_starts = True, 0
            elif line:
                verdicts[worker.pair] = VERDICT[line]
                worker.pair, worker.due, worker.ready = None, inf, line != b"late"
            else:  # dead: out of memory, or killed from outside. Its pair gets a second chance and no third.
                if worker.pair in retried:
                    verdicts[worker.pair] = False
                elif worker.pair:
                    retried.add(worker.pair)
                    waiting.append(worker.pair)
                self._replace(worker)
        for worker in [worker for worker in self._workers if worker.due <= time.monotonic()]:
            verdicts[worker.pair] = None
            self._replace(worker)

    def _start(self) -> None:
        worker = _Worker(self.deadline)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._stop(worker)
        self._failed_starts += not worker.ready
        if self._failed_starts > 3:
            command = f"{sys.executable} -P {WORKER} --worker {self.deadline}"
            raise RuntimeError(
                f"the grader's workers do not start; this command says why: {command}"
            )
        self._start()
