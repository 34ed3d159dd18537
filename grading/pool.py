"""Compare answers in worker processes: the trainer never evaluates what a model wrote.

    pairs ──by_text──▶ undecided, cheap first ──▶ [ parent ──fork──▶ child ] × n ──▶ verdicts

Sooner or later a model writes a formula that no program can evaluate, and nothing inside Python
can interrupt that evaluation. So each worker is two processes, running grading/equivalence.py:

| process | what it does |
|---|---|
| parent | imports sympy once and forks a child; forks the next one when a child is killed |
| child | compares one pair at a time, with limited memory and an alarm of `deadline` seconds |

The kernel kills a late child, whatever it is doing. Its answer earns 0, and the next child starts
in milliseconds because the import is done. An answer whose worker dies twice, or runs out of
memory, is not known to be wrong: it counts as late, and a warning says how to see why. Workers are
not threads because Math-Verify's time limits do not work in threads. Answers that look costly are
compared last, so they delay no others.
"""

import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

from grading.equivalence import by_text, cost
from grading.extract import extract

CACHE = 200_000  # verdicts to remember
GRACE = 5.0  # seconds after the deadline until the parent is killed too, if it does not respond
MAX_FAILED_STARTS = 3  # in a row
WORKER = Path(__file__).with_name("equivalence.py")
VERDICT = {b"1": True, b"0": False, b"late": None, b"memory": None}

Pair = tuple[str, str]  # gold, answer


class Grade(NamedTuple):
    """1 if the answers are equal, else 0; the extracted answer; whether its comparison gave no
    verdict: it missed the deadline, or its worker died twice or ran out of memory."""

    reward: float
    answer: str
    timeout: bool


class _Worker:
    """A parent process with its child, and the pair that it compares now."""

    def __init__(self, deadline: float) -> None:
        # A new program, not a fork: the caller has threads and a GPU. A new session, so that
        # Ctrl-C reaches the caller alone. The worker ends when its stdin is closed.
        # -P: no file of this folder can shadow a library's module.
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
        self.pair = pair
        self.due = time.monotonic() + deadline + GRACE
        with suppress(BrokenPipeError):  # it died while idle; then its stdout is at its end
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")

    def close(self, kill: bool) -> None:
        if kill:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # parent and child
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class _Batch:
    """The pairs of one call: those that wait for a worker, and the verdicts so far."""

    waiting: deque[Pair]
    verdicts: dict[Pair, bool | None]
    retried: set[Pair] = field(default_factory=set)  # pairs whose worker died once
    failed: list[Pair] = field(default_factory=list)  # whose worker died twice or had no memory


class Grader:
    r"""Grades responses with `workers` worker processes, which import while the caller goes on.

    `deadline` is the time for one comparison in seconds. `on_verdict`, if set, is called with the
    pair (gold, answer) and its verdict as soon as a worker has decided it; pairs that are decided
    without a worker are not reported. Several threads may use one grader.

    >>> with Grader() as grader:
    ...     grader.grade([r"two and two</think> <answer>\boxed{4}</answer>"], ["4"])
    [Grade(reward=1.0, answer='4', timeout=False)]
    """

    def __init__(
        self, workers: int = 2, deadline: float = 3.0, require_boxed: bool = False
    ) -> None:
        self.deadline = deadline
        self.require_boxed = require_boxed
        self.on_verdict: Callable[[Pair, bool | None], None] | None = None
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

    @property
    def worker_pids(self) -> list[int]:
        """Process id of each worker's parent, which is also the session id of parent and child."""
        return [worker.process.pid for worker in self._workers]

    def close(self, kill: bool = True) -> None:
        """Ends the workers. With `kill=False` they exit by themselves; only then does the use of
        memory and processor of their children count in `resource.getrusage(RUSAGE_CHILDREN)`."""
        for worker in list(self._workers):
            self._stop(worker, kill)
        self._selector.close()

    def grade(self, responses: list[str], golds: list[str]) -> list[Grade]:
        """One grade per response. An answer whose comparison misses the deadline earns 0."""
        answers = [extract(response, self.require_boxed) for response in responses]
        verdicts = self.equal(golds, answers)
        late = verdicts.count(None)
        if late > max(1, 0.05 * len(verdicts)):
            warnings.warn(
                f"{late} of {len(verdicts)} answers missed the grader's deadline of "
                f"{self.deadline} s and earned 0. If they are ordinary answers, the machine is "
                "overloaded: use fewer workers or a longer deadline.",
                stacklevel=2,
            )
        return [
            Grade(float(verdict is True), answer, verdict is None)
            for verdict, answer in zip(verdicts, answers, strict=True)
        ]

    def equal(self, golds: list[str], answers: list[str]) -> list[bool | None]:
        """Whether each answer equals its gold; None if the deadline passed or the worker failed.
        Equal pairs of texts are compared once."""
        pairs = _stripped(golds, answers)
        verdicts = {pair: _without_worker(*pair) for pair in dict.fromkeys(pairs)}
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        verdicts |= self._compare(sorted(undecided, key=lambda pair: cost(*pair)))
        return [verdicts[pair] for pair in pairs]

    def are_gradable(self, golds: list[str]) -> list[bool]:
        """False for each gold that no answer can match: it cannot be parsed, or its formula does
        not equal itself."""
        pairs = _stripped(golds, golds)
        verdicts = self._compare(list(dict.fromkeys(pair for pair in pairs if pair[0])))
        return [bool(verdicts.get(pair)) for pair in pairs]

    def _compare(self, pairs: list[Pair]) -> dict[Pair, bool | None]:
        """The verdict on each of these different pairs, from memory or from a worker."""
        with self._lock:
            known = {pair: self._known[pair] for pair in pairs if pair in self._known}
            batch = _Batch(deque(pair for pair in pairs if pair not in known), known)
            try:
                while len(batch.verdicts) < len(pairs):
                    self._step(batch)
            finally:
                # After an exception nobody waits for the pairs that are being compared.
                for worker in [worker for worker in self._workers if worker.pair]:
                    self._replace(worker)
            self._remember(batch.verdicts)
        if batch.failed:
            self._warn_of_failures(batch.failed)
        return batch.verdicts

    def _step(self, batch: _Batch) -> None:
        """Send pairs to idle workers, wait for a worker's message or a deadline, and handle it."""
        for worker in self._workers:
            if batch.waiting and worker.ready and not worker.pair:
                worker.send(batch.waiting.popleft(), self.deadline)
        due = min(worker.due for worker in self._workers)
        timeout = None if due == inf else max(0.0, due - time.monotonic())
        for key, _ in self._selector.select(timeout):
            self._receive(key.data, batch)
        for worker in [worker for worker in self._workers if worker.due <= time.monotonic()]:
            self._decide(batch, worker.pair, None)
            self._replace(worker)

    def _receive(self, worker: _Worker, batch: _Batch) -> None:
        """Handle one line of a worker's stdout, or its end."""
        line = worker.process.stdout.readline().strip()
        if line == b"ready":
            worker.ready = True
            self._failed_starts = 0
        elif line:
            if line == b"memory":
                batch.failed.append(worker.pair)
            self._decide(batch, worker.pair, VERDICT[line])
            worker.pair = None
            worker.due = inf
            worker.ready = line != b"late"
        else:  # dead: out of memory, or killed from outside; its pair is tried once more
            if worker.pair in batch.retried:
                batch.failed.append(worker.pair)
                self._decide(batch, worker.pair, None)
            elif worker.pair:
                batch.retried.add(worker.pair)
                batch.waiting.append(worker.pair)
            self._replace(worker)

    def _decide(self, batch: _Batch, pair: Pair, verdict: bool | None) -> None:
        batch.verdicts[pair] = verdict
        if self.on_verdict:
            self.on_verdict(pair, verdict)

    def _remember(self, verdicts: dict[Pair, bool | None]) -> None:
        """Keep the last `CACHE` verdicts; a timeout may not repeat itself and is not kept."""
        for pair, verdict in verdicts.items():
            if verdict is not None:
                self._known[pair] = verdict
                self._known.move_to_end(pair)
        while len(self._known) > CACHE:
            self._known.popitem(last=False)

    def _warn_of_failures(self, pairs: list[Pair]) -> None:
        """Name the pairs without a verdict: something is wrong here, not with the answers."""
        line = shlex.quote(json.dumps(pairs[0]))
        warnings.warn(
            f"the grader's worker died twice or ran out of memory on {len(pairs)} answers; they "
            "count as late, not as wrong, and earned 0. To see why, run this command: "
            f"echo {line} | {self._worker_command()}",
            stacklevel=4,
        )

    def _worker_command(self) -> str:
        return f"{sys.executable} -P {WORKER} --worker {self.deadline}"

    def _start(self) -> None:
        worker = _Worker(self.deadline)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: _Worker, kill: bool = True) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.close(kill)

    def _replace(self, worker: _Worker) -> None:
        self._stop(worker)
        if not worker.ready:
            self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS:
            raise RuntimeError(
                "the grader's workers do not start; to see why, run this command: "
                f"{self._worker_command()}"
            )
        self._start()


def _stripped(golds: list[str], answers: list[str]) -> list[Pair]:
    return [(gold.strip(), answer.strip()) for gold, answer in zip(golds, answers, strict=True)]


def _without_worker(gold: str, answer: str) -> bool | None:
    """The verdict if no worker is needed, else None. An empty answer is wrong, and the same text
    is the same answer, whatever it means."""
    if not answer or answer == gold:
        return bool(answer)
    return by_text(gold, answer)
