"""How long curation/curate.py takes for as many rows as the paper's set has, and how much memory.

    ORZ_DATA=folder python -m benchmarks.curate_scale [rows]

Makes `rows` (default 129,000) problems from those of `ORZ_DATA` (the authors' rows, MATH, GSM8K): after the first round each
is used again with its numbers changed, as another problem with another gold; one in twenty is a copy instead, its sentences
in another order, which should be found. Prints the table, seconds, seconds of processor (all processes), rows per second,
peak memory of the main process and of the largest worker, and the share of copies found.
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
from pathlib import Path

from curation import curate, formats

FILES = [
    "orz_train/orz_math_57k_first2048_w_num_correct.json",
    "orz_train/orz_math_72k_first2725.json",
]
FILES += ["math/math_train_7474.json", "gsm8k/train.jsonl"]


def problems(folder: Path, count: int, rng: random.Random) -> Iterator[dict[str, str | bool]]:
    """`count` rows; `copy` marks the planted copies."""
    originals = []
    for file in FILES:
        for _, item in formats.rows(folder / file):
            try:
                question, answer = formats.question_answer(item)
            except ValueError:
                continue
            originals.append(
                (re.sub(r"^\s*\d+\.\s", "", question), answer)
            )  # a copy would move the problem's number
    for k in range(count):
        question, answer = originals[k % len(originals)]
        if k < len(originals):
            yield {"question": question, "answer": answer, "copy": False}
        elif rng.random() < 0.05:
            sentences = re.split(r"(?<=[a-z$][.?]) (?=[A-Z])", question)
            yield {
                "question": " ".join(sentences[1:] + sentences[:1]),
                "answer": answer,
                "copy": True,
            }
        else:
            other = re.sub(
                r"\d+", lambda number: str(int(number[0][:9]) + rng.randint(1, 10**6)), question
            )
            yield {"question": other, "answer": str(rng.randint(0, 10**6)), "copy": False}


def main() -> None:
    if "ORZ_DATA" not in os.environ:
        sys.exit("ORZ_DATA is not set: the folder that holds orz_train/, math/ and gsm8k/")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 129_000
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "rows.jsonl"), Path(folder, "problems.jsonl")
        rows = list(problems(Path(os.environ["ORZ_DATA"]), count, random.Random(0)))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        copies = {f"rows.jsonl:{k}" for k, row in enumerate(rows, 1) if row["copy"]}
        del rows
        start = time.monotonic()
        curate.main([str(source), "--out", str(out), "--drop-bad-rows"])
        seconds = time.monotonic() - start
        kept = {json.loads(line)["source"] for line in out.open()}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    memory = [u.ru_maxrss / 2**20 for u in used]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    print(
        f"{count:,} rows in {seconds:.0f} s ({cpu:.0f} s of processor), {count / seconds:,.0f} rows/s"
    )
    print(f"peak memory {memory[0]:.2f} GB, largest worker {memory[1]:.2f} GB")
    print(f"{1 - len(copies & kept) / len(copies):.4f} of {len(copies):,} copies removed")


if __name__ == "__main__":
    main()
