"""Measure how many real responses per second the grader grades, with one worker and with two.

    ORZ_DATA=folder python -m benchmarks.grader_speed [--rounds 3]

The environment variable ORZ_DATA names the folder that holds `responses/`. The responses and their
form are those of benchmarks/grader_agreement.py. Each round starts new workers, because a grader
remembers its verdicts; the clock starts when the workers have imported. Prints medians of the
rounds.

| column | meaning |
|---|---|
| responses/s | responses / seconds of `Grader.grade` |
| pairs | different pairs of gold and answer that the workers decide, because the texts do not |
| pairs/s | pairs / the same seconds |
| pairs/s per core | pairs / processor seconds of the workers |
| workers' CPU | processor seconds of all workers and their children |
| caller's CPU | processor seconds of the calling process: extraction and `equivalence.by_text` |
| timeouts | answers that missed the deadline |
| right | share of responses with reward 1 |
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import flags, record
from benchmarks.grader_agreement import as_response, data_folder, read_rows
from config import Count
from grading.pool import Grader, Pair


@dataclass(frozen=True)
class Settings:
    rounds: Count = 3
    """Number of rounds; each measures one worker, then two."""


def cpu_seconds(session: int) -> list[float]:
    """Processor seconds of each process of a session, including its children that have ended."""
    used = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended since it was listed
        fields = text.rpartition(")")[2].split()  # state, parent, group, session …
        if int(fields[3]) == session:
            used.append(sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    return used


def total_cpu_seconds(sessions: list[int]) -> float:
    return sum(sum(cpu_seconds(session)) for session in sessions)


def measure(workers: int, responses: list[str], golds: list[str]) -> dict[str, float]:
    """Grade all responses once with a new grader; returns the columns of the table."""
    decided: list[Pair] = []

    def note(pair: Pair, verdict: bool | None) -> None:
        if verdict is not None:
            decided.append(pair)

    with Grader(workers) as grader:
        grader.on_verdict = note
        sessions = grader.worker_pids
        while any(len(cpu_seconds(session)) < 2 for session in sessions):
            time.sleep(0.1)  # a worker forks its child when it has imported
        workers_before = total_cpu_seconds(sessions)
        caller_before = time.process_time()
        start = time.perf_counter()
        grades = grader.grade(responses, golds)
        seconds = time.perf_counter() - start
        if grader.worker_pids != sessions:
            raise RuntimeError("a worker was replaced: its processor seconds are not known")
        workers_cpu = total_cpu_seconds(sessions) - workers_before
        caller_cpu = time.process_time() - caller_before
    return {
        "seconds": seconds,
        "responses/s": len(responses) / seconds,
        "pairs": len(decided),
        "pairs/s": len(decided) / seconds,
        "pairs/s per core": len(decided) / workers_cpu,
        "workers' CPU": workers_cpu,
        "caller's CPU": caller_cpu,
        "timeouts": sum(grade.timeout for grade in grades),
        "right": sum(grade.reward for grade in grades) / len(grades),
    }


def main() -> None:
    cfg = flags.parse(Settings, "grader_speed", __doc__)
    try:
        rows = read_rows(data_folder() / "responses" / "responses.jsonl")
    except ValueError as error:
        sys.exit(f"benchmarks.grader_speed: {error}")
    responses = [as_response(row) for row in rows]
    golds = [row["gold"] for row in rows]
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(cfg.rounds):
        for workers, results in measured.items():
            results.append(measure(workers, responses, golds))
    table = []
    for workers, results in measured.items():
        medians = {column: median(result[column] for result in results) for column in results[0]}
        table.append({"workers": workers} | medians)
    note = f"{len(responses):,} responses, {cfg.rounds} rounds, one and two workers in turn."
    record.record("grader_speed", "Grading real responses", table, [note])


if __name__ == "__main__":
    main()
