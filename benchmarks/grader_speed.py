"""How many real responses a second the grader grades, with one worker and with two.

    ORZ_DATA=folder python -m benchmarks.grader_speed [--rounds 3]

Rows and the form in which they are graded are those of benchmarks/grader_agreement.py. Every round starts each number of workers anew,
since a grader remembers what it has compared, and the clock starts when the workers have imported. Medians of the rounds.

| column | meaning |
|---|---|
| responses/s | all responses / seconds of `Grader.grade` |
| pairs | different pairs of gold and answer that their texts alone do not decide: what the workers compare |
| pairs/s | those / the same seconds |
| pairs/s per core | those / seconds of processor of the workers |
| workers' CPU | seconds of processor of all workers and their children |
| caller's CPU | seconds of processor of the calling process: finding answers, and all that `equivalence.by_text` decides |
| timeouts | answers that missed the deadline |
| right | share of responses with reward 1 |
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import record
from benchmarks.grader_agreement import rows
from grading.pool import Grader


def processes(session: int) -> list[float]:
    """Seconds of processor of each process of a worker's session, with its children that have ended."""
    used = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = (
                file.read_text().rpartition(")")[2].split()
            )  # from the third: state, parent, group, session …
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since it was listed
        if int(fields[3]) == session:
            used.append(sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    return used


def measure(workers: int, texts: list[str], golds: list[str]) -> dict[str, float]:
    """Grade all responses once with a new grader."""
    with Grader(workers) as grader:
        sessions = [worker.process.pid for worker in grader._workers]
        while any(
            len(processes(session)) < 2 for session in sessions
        ):  # the child is forked after the imports
            time.sleep(0.1)
        before, own = sum(sum(processes(session)) for session in sessions), time.process_time()
        start = time.perf_counter()
        grades = grader.grade(texts, golds)
        seconds = time.perf_counter() - start
        pids = [worker.process.pid for worker in grader._workers]
        if pids != sessions:
            raise RuntimeError("a worker was replaced: its seconds of processor are lost")
        cpu, own = (
            sum(sum(processes(session)) for session in sessions) - before,
            time.process_time() - own,
        )
        compared = len(grader._known)  # what workers gave a verdict on
    return {
        "seconds": seconds,
        "responses/s": len(texts) / seconds,
        "pairs": compared,
        "pairs/s": compared / seconds,
        "pairs/s per core": compared / cpu,
        "workers' CPU": cpu,
        "caller's CPU": own,
        "timeouts": sum(grade.timeout for grade in grades),
        "right": sum(grade.reward for grade in grades) / len(grades),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if "ORZ_DATA" not in os.environ:
        sys.exit("ORZ_DATA is not set: the folder that holds responses/")
    answered = rows(Path(os.environ["ORZ_DATA"]) / "responses" / "responses.jsonl")
    texts = [
        r["pred"] if r["fmt"] == "orz_think_answer" else f"<answer>{r['pred_answer']}</answer>"
        for r in answered
    ]
    golds = [r["gold"] for r in answered]
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, found in measured.items():
            found.append(measure(workers, texts, golds))
    table = [
        {"workers": workers} | {column: median(one[column] for one in found) for column in found[0]}
        for workers, found in measured.items()
    ]
    note = f"{len(texts):,} responses, {rounds} rounds, one and two workers in turn."
    record.record("grader_speed", "Grading real responses", table, [note])


if __name__ == "__main__":
    main()
