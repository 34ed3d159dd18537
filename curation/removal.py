"""What curation/curate.py removed and why: a table for the terminal, and removed.jsonl beside the problems."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import ProgressColumn, Task
from rich.table import Table

from curation.dedupe import Row

PASSES = "bad row, rate, choice, proof, language, against, gold, exact, ngram, embedding".split(
    ", "
)


class Removal(NamedTuple):
    """A removed row, the pass and its reason; of a repetition the place of the other row and how similar it is."""

    row: Row
    step: str
    reason: str
    other: str = ""
    similarity: float | None = None


def table(stay: int, removed: Sequence[Removal]) -> Table:
    """Rows that entered each pass, and how many it removed, by reason and by the file of the other row."""
    view = Table("pass", "rows in", "removed", "why")
    left = stay + len(removed)
    for step in PASSES:
        mine = Counter((r.reason, r.other.rpartition(":")[0]) for r in removed if r.step == step)
        for k, ((reason, file), count) in enumerate(mine.most_common()):
            view.add_row(
                "" if k else step,
                "" if k else f"{left:,}",
                f"{count:,}",
                f"{reason}{file and f': {file}'}",
            )
        left -= mine.total()
    view.add_row("stay", f"{left:,}")
    return view


def write(out: Path, rows: Sequence[Row], removed: Sequence[Removal]) -> None:
    """`out` and removed.jsonl beside it, both or neither: each is written beside and renamed at the end."""
    problems = [
        {"question": r.question, "answer": r.answer, "source": r.place} | _rate(r) for r in rows
    ]
    reasons = [
        {"place": r.row.place, "pass": r.step, "reason": r.reason, "other": r.other, "similarity": r.similarity}
        | {"question": r.row.question, "answer": r.row.answer} | _rate(r.row)
        for r in removed
    ]  # fmt: skip
    files = {out: problems, out.with_name("removed.jsonl"): reasons}
    besides = {path: path.with_name(f"{path.name}.tmp") for path in files}
    try:
        for path, items in files.items():
            with besides[path].open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        for path, beside in besides.items():
            beside.replace(path)
    finally:
        for beside in besides.values():
            beside.unlink(missing_ok=True)


def _rate(row: Row) -> dict[str, float]:
    return {} if row.right is None else {"right": row.right, "of": row.of}


class Speed(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f}/s"
