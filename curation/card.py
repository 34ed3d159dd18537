"""The card of a curated data set: NAME.card.md beside NAME.jsonl.

It says what the file holds, where its rows are from, which pass removed how many, with which
command, and what its fields mean. Uploaded as the README.md of a data set, it is read by the hub.
It claims no license: none of the sources says one in a form that could be read.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FIELDS = {
    "question": "the problem, as it goes into the prompt template",
    "answer": "the gold answer, in LaTeX or plain",
    "source": "file and row that the problem was read from, or the generated task and its number",
}
OF_RATES = {"right": "right answers of a model to it", "of": "the number of its responses"}
WHAT_PASSES_REMOVE = {
    "bad row": "rows that could not be read",
    "rate": "problems that a model always or never solves, or all but the hardest",
    "choice": "multiple choice",
    "proof": "proofs",
    "language": "questions that are not in English",
    "against": "problems of the evaluation sets, and questions that share n-grams with one",
    "gold": "golds that Math-Verify cannot use",
    "exact": "the same words as an earlier row",
    "ngram": "rewordings of an earlier row",
    "embedding": "paraphrases of an earlier row",
}


class PassCount(NamedTuple):
    """How many rows entered a pass, and how many it removed for each reason."""

    name: str
    rows_in: int
    reasons: list[tuple[str, int]]
    runs: bool  # whether the settings ask for it

    @property
    def removed(self) -> int:
        """Rows that the pass removed, for whatever reason."""
        return sum(count for _, count in self.reasons)


def card_path(out: Path) -> Path:
    """Where the card of a data set is.

    >>> card_path(Path("data/problems.jsonl")).as_posix()
    'data/problems.card.md'
    """
    return out.with_name(f"{out.stem}.card.md")


def text(
    out: Path,
    argv: Sequence[str],
    against: Iterable[str],
    rows_of_file: Mapping[str, int],
    kept_of_file: Mapping[str, int],
    passes: Sequence[PassCount],
    with_rates: bool,
) -> str:
    """The card of the data set in `out`, made by the command line `argv`. `rows_of_file` and
    `kept_of_file` count the rows that were read from each file, and those of them that stayed."""
    kept = sum(kept_of_file.values())
    names = [f"`{_name(source)}`" for source in against]
    overlap = (
        f"; compared with {', '.join(names)}" if names else "; compared with no evaluation set"
    )
    fields = FIELDS | (OF_RATES if with_rates else {})
    parts = [
        "---",
        f"configs:\n- config_name: default\n  data_files: {json.dumps(out.name)}",
        "tags: [open-reasoner-zero]\n---\n",
        f"# {out.stem}\n",
        f"{kept:,} problems with answers that a program can check, for reinforcement learning "
        f"(`python train.py --data {out.name}`){overlap}.\n",
        "## Sources\n",
        _table(
            ["source", "rows", "kept"],
            ([f"`{f}`", f"{n:,}", f"{kept_of_file.get(f, 0):,}"] for f, n in rows_of_file.items()),
        ),
        "The rows are copies from these sources, whose licenses hold for them. They were not "
        "checked here.\n",
        "## How it was made\n",
        f"```sh\n{shlex.join(['python', '-m', 'curation.curate', *argv])}\n```\n",
        _table(["pass", "rows in", "removed", "of these", "what it removes"], _pass_rows(passes)),
        "`removed.jsonl`, made with it, has every removed row and the reason.\n",
        "## Format\n",
        "JSON lines in UTF-8, one problem a line:\n",
        _table(["field", "meaning"], ([f"`{n}`", meaning] for n, meaning in fields.items())),
    ]
    return "\n".join(parts)


def rows_of_files(places: Iterable[str]) -> Counter[str]:
    """The number of rows of each file, from their places (`file:row`)."""
    return Counter(place.rpartition(":")[0] for place in places)


def _pass_rows(passes: Sequence[PassCount]) -> Iterable[list[str]]:
    for item in passes:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in item.reasons)
        what = WHAT_PASSES_REMOVE[item.name]
        removed = f"{item.removed:,}" if item.runs else "not run"
        yield [item.name, f"{item.rows_in:,}", removed, reasons or "–", what]


def _name(source: str) -> str:
    """The name of a file; a hub id unchanged."""
    return Path(source).name if Path(source).exists() else source


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"
