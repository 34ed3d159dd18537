"""Time and memory of curation/curate.py for as many rows as the paper's set has.

    ORZ_DATA=folder python -m benchmarks.curate_scale 129000

Makes rows from the problems in `ORZ_DATA` (the authors' rows, MATH, GSM8K). First each problem is
used as it is. Then each is used again with its numbers changed and another gold, as a new problem;
one in twenty is a copy instead, which should be found: only its first sentence is moved to the end.
The heading stays in front, since a number in the middle of a text is a number of the problem.

Prints the table of the passes, the seconds, the CPU seconds of all processes, rows per second, the
peak memory of the main process and of the largest worker, and the share of copies removed, by the
file that they copy.
"""

import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import flags
from config import Count
from curation import curate, formats

FILES = (
    "orz_train/orz_math_57k_first2048_w_num_correct.json",
    "orz_train/orz_math_72k_first2725.json",
    "math/math_train_7474.json",
    "gsm8k/train.jsonl",
)
COPY_SHARE = 0.05
# What contests put in front of a problem: a headline, "Problem 5.", "5.3.", "[18]", "(7 points)".
HEADING = re.compile(
    r"\s*(?:#+[^\n]*\n\s*|(?:#\s*)?(?:problem|task|example|exercise|question) [\w.-]*\d\.?\s+"
    r"|(?:#\s*)?\d+(?:\.\d+)*[.)]\s+|\[\d+\]\s+|\(\d+ points?\)\s*)*",
    re.I,
)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    rows: tyro.conf.Positional[Count] = 129_000
    """Number of rows to curate (§2.1.1: 129k)."""


def read_originals(folder: Path) -> list[tuple[str, str, str]]:
    """(question, answer, file) of all readable rows of FILES."""
    originals = []
    for file in FILES:
        for _, item in formats.rows(folder / file):
            try:
                question, answer = formats.question_answer(item)
            except ValueError:
                continue
            originals.append((question, answer, file))
    return originals


def make_rows(
    originals: list[tuple[str, str, str]], count: int, rng: random.Random
) -> Iterator[dict[str, str]]:
    """`count` rows; `copy_of` is the file of the original that a row repeats, else ""."""
    for k in range(count):
        question, answer, file = originals[k % len(originals)]
        is_copy = False
        if k >= len(originals):
            is_copy = rng.random() < COPY_SHARE
            if is_copy:
                question = first_sentence_last(question)
            else:
                question = with_other_numbers(question, rng)
                answer = str(rng.randint(0, 10**6))
        copy_of = file if is_copy else ""
        yield {"question": question, "answer": answer, "copy_of": copy_of}


def first_sentence_last(question: str) -> str:
    heading = HEADING.match(question)[0]
    sentences = re.split(r"(?<=[a-z$][.?]) (?=[A-Z])", question[len(heading) :])
    return heading + " ".join(sentences[1:] + sentences[:1])


def with_other_numbers(question: str, rng: random.Random) -> str:
    def larger(number: re.Match) -> str:
        return str(int(number[0][:9]) + rng.randint(1, 10**6))

    return re.sub(r"\d+", larger, question)


def main() -> None:
    """Make the rows in a temporary folder, curate them, and print what that took."""
    cfg = flags.parse(Settings, "curate_scale", __doc__)
    data = os.environ.get("ORZ_DATA")
    if data is None:
        sys.exit(
            "benchmarks.curate_scale: ORZ_DATA is not set; it names the folder that holds "
            "orz_train/, math/ and gsm8k/"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        out = Path(folder, "problems.jsonl")
        copies = {}  # place of each row that should be removed → the file that it copies
        with source.open("w") as file:
            rows = make_rows(read_originals(Path(data)), cfg.rows, random.Random(0))
            for number, row in enumerate(rows, 1):
                file.write(json.dumps(row) + "\n")
                if row["copy_of"]:
                    copies[f"rows.jsonl:{number}"] = row["copy_of"]
        start = time.monotonic()
        curate.main([str(source), "--out", str(out), "--drop-bad-rows"])
        seconds = time.monotonic() - start
        with out.open() as file:
            kept = {json.loads(line)["source"] for line in file}
    print_usage(cfg.rows, seconds)
    print_recall(copies, kept)


def print_recall(copies: dict[str, str], kept: set[str]) -> None:
    """The share of copies removed: of those of each file, and of all."""
    for file in [*FILES, "all files"]:
        places = [place for place, name in copies.items() if file in (name, "all files")]
        if places:
            removed = sum(place not in kept for place in places)
            print(f"{removed / len(places):.4f} of {len(places):,} copies removed: {file}")


def print_usage(num_rows: int, seconds: float) -> None:
    main_process = resource.getrusage(resource.RUSAGE_SELF)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = sum(used.ru_utime + used.ru_stime for used in (main_process, workers))
    speed = num_rows / seconds
    print(f"{num_rows:,} rows in {seconds:.0f} s ({cpu_seconds:.0f} CPU s), {speed:,.0f} rows/s")
    kib_per_gib = 2**20
    print(
        f"peak memory {main_process.ru_maxrss / kib_per_gib:.2f} GB, "
        f"largest worker {workers.ru_maxrss / kib_per_gib:.2f} GB"
    )


if __name__ == "__main__":
    main()
