r"""Make one file of training problems from many sources, as the paper does (§2.1.1).

    python -m curation.curate aime.json math.json AI-MO/NuminaMath-1.5 \
        --against math500.json aime2024.json --out problems.jsonl

    inputs ▶ rate ▶ choice ▶ proof ▶ language ▶ against ▶ gold ▶ exact ▶ ngram ▶ embedding ▶ out
             └──────┴────────┴───────┴──────────┴─────────┴──────┴───────┴───────┴▶ removed.jsonl

| pass | removes | the paper |
|---|---|---|
| bad row | with `--drop-bad-rows`: rows that cannot be read (without it they are errors) | |
| rate | problems that a model always or never solves | pass-rate filter |
| rate, with `--hard` | all but the hardest problems | 13k hard problems |
| choice | questions with lettered options, golds such as (C) | "exclude multiple choice" |
| proof | "Prove that …" with nothing to find | "and proof-based problems" |
| language | questions that are not in English; formulas do not count | English only (Fig. 11) |
| against | problems of an evaluation set, and questions that share n-grams with one | |
| gold | golds that cannot be parsed or do not equal themselves; `notfound` | the reward (§2.1.2) |
| exact, ngram, embedding | repetitions of an earlier row (curation/dedupe.py) | first version |

`removed.jsonl`, beside the output, holds every removed row with its pass, the reason, and the row
that it repeats; the card `problems.card.md` says what the file holds and how it was made. Of two
copies the earlier stays, so give the most trusted sources first. The same inputs, flags and seed
give the same bytes. The memory holds all rows that pass the rules, each with a sketch of half a
kilobyte; a JSON list is read as a whole, any other file row by row.

`--rollouts` takes what `train.py --save-rollouts` keeps, or the responses file of an evaluation
(`heldout-0.jsonl`): JSON lines with question and reward. To get the pass rates of a model, evaluate
it on the problems first, then curate with its responses.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Table

from config import (
    Count,
    CountOrNone,
    Positive,
    PositiveShare,
    Processes,
    Seed,
    Share,
    validate_ranges,
)
from curation import card, dedupe, filters, formats, synthetic
from curation.dedupe import Overlap, Row, Sketch
from curation.files import progress_bar, write_all_atomically
from grading.pool import Grader

REPEAT_REASONS = {"exact": "same words", "ngram": "reworded", "embedding": "paraphrased"}


class Removal(NamedTuple):
    """A removed row, the pass that removed it and the reason.

    If it repeats another row: the place of that row, and the similarity of the two.
    """

    row: Row
    pass_name: str
    reason: str
    other: str = ""
    similarity: float | None = None


class Kept(NamedTuple):
    """A row that passed the rules, and its sketch for finding repetitions."""

    row: Row
    sketch: Sketch


@dataclass(frozen=True)
class Recipe:
    """Settings of a curation. Each pass that removes rows has a flag."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders or hub ids, the most trusted first: of two copies the earlier stays."""
    out: str = "problems.jsonl"
    """Output: JSON lines of question, answer and source, for train.py's --data."""
    against: tuple[str, ...] = ()
    """Evaluation sets: files, folders or hub ids. Problems that overlap with them are removed."""
    drop_bad_rows: bool = False
    """Remove input rows that cannot be read, instead of stopping at the first."""

    choice: bool = True
    """Remove multiple-choice problems (§2.1.1)."""
    proof: bool = True
    """Remove proofs (§2.1.1)."""
    language: bool = True
    """Remove questions that are not in English (§3.3, Fig. 11: English only is better)."""
    gold: bool = True
    """Remove problems whose gold Math-Verify cannot parse or does not find equal to itself."""
    exact: bool = True
    """Remove questions with the same words in the same order as an earlier one, and equal golds."""
    ngram: bool = True
    """Remove rewordings: the same numbers, equal golds and similar n-grams (curation/dedupe.py)."""
    embeddings: str = ""
    """Folder of a sentence-transformers model. With it, paraphrases are removed by the cosine
    similarity of their embeddings; empty: no such pass."""
    cosine: PositiveShare = 0.75
    """Smallest cosine similarity of paraphrases."""

    count_field: str = ""
    """Field with the number of right answers, e.g. num_correct, or ground_truth.pass_at_n in the
    authors' rows."""
    count_of: Positive = 1.0
    """Number of responses that count_field counts among; 1 if the field is a share."""
    rollouts: tuple[str, ...] = ()
    """Files or folders of graded responses, to count right answers in: JSON lines of a run's
    rollouts or of an evaluation. Where a problem has responses, its count_field is not used."""
    min_rate: Share = 0.0
    """Remove problems with a pass rate at or below this; 0: never solved (§2.1.1, which does not
    give its thresholds)."""
    max_rate: Share = 1.0
    """Remove problems with a pass rate at or above this; 1: always solved (§2.1.1, as above)."""
    hard: CountOrNone = 0
    """Keep only problems with fewer than this many right of --hard-of responses, never solved ones
    included (§2.1.1: 4); 0: off."""
    hard_of: Count = 64
    """Number of responses that --hard refers to. A problem with fewer recorded responses is
    removed; one with more is judged by its share of right ones."""

    synthesize: tuple[str, ...] = ()
    """Reasoning tasks to generate with reasoning-gym, as name:count (§2.1.1;
    curation/synthetic.py)."""
    seed: Seed = 0
    """Seed of the generated tasks."""
    workers: Processes = 2
    """Number of processes that apply the rules, and of processes that check golds."""


def check(cfg: Recipe) -> None:
    """Raise ValueError for settings that cannot work, before anything is read."""
    validate_ranges(cfg)
    if not (cfg.inputs or cfg.synthesize):
        raise ValueError("no inputs: name files, folders or hub ids, or pass --synthesize")
    for name in ("inputs", "against", "rollouts"):
        sources = getattr(cfg, name)
        twice = [source for k, source in enumerate(sources) if source in sources[:k]]
        if twice:
            raise ValueError(f"{name}: {twice[0]} is named twice")
    tasks = [spec.partition(":")[0] for spec in cfg.synthesize]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--synthesize {' '.join(cfg.synthesize)}: name each task once")
    if not cfg.inputs:
        _refuse_filters(cfg)
    if not cfg.synthesize and cfg.seed != Recipe.seed:
        raise ValueError(f"--seed {cfg.seed}: has no effect without --synthesize")
    if cfg.embeddings and not Path(cfg.embeddings).is_dir():
        raise ValueError(f"--embeddings {cfg.embeddings}: no such folder")
    _check_rates(cfg)
    _check_out(cfg)


def _refuse_filters(cfg: Recipe) -> None:
    """Raise ValueError for settings that look at inputs; generated problems are only graded."""
    of_generated = ("inputs", "out", "gold", "synthesize", "seed", "workers")
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in of_generated and value != field.default:
            flag = f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
            raise ValueError(f"{flag}: has no effect without inputs")


def _check_rates(cfg: Recipe) -> None:
    """Raise ValueError for settings of pass rates that have no effect or remove everything."""
    rated = cfg.count_field or cfg.rollouts
    needs = {
        "cosine": (cfg.embeddings, "--embeddings"),
        "count_of": (cfg.count_field, "--count-field"),
        "hard": (rated, "--count-field or --rollouts"),
        "hard_of": (cfg.hard, "--hard"),
        "min_rate": (rated and not cfg.hard, "--count-field or --rollouts, or with --hard"),
        "max_rate": (rated and not cfg.hard, "--count-field or --rollouts, or with --hard"),
    }
    default = Recipe()
    for name, (given, needed) in needs.items():
        if getattr(cfg, name) != getattr(default, name) and not given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(cfg, name)}: has no effect without {needed}")
    if cfg.min_rate >= cfg.max_rate:
        raise ValueError(
            f"--min-rate {cfg.min_rate} and --max-rate {cfg.max_rate} leave no rate between them"
        )


def _check_out(cfg: Recipe) -> None:
    """Raise ValueError for an output that cannot be written or that is an input."""
    out = Path(cfg.out)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: not a file in a folder that exists and can be written to")
    sources = {Path(source).resolve() for source in (*cfg.inputs, *cfg.against, *cfg.rollouts)}
    overwritten = {path.resolve() for path in (out, _removed_path(out), card.card_path(out))}
    if out == _removed_path(out) or overwritten & sources:
        raise ValueError(
            f"--out {out}: it, or removed.jsonl or the card beside it, is an input; "
            "choose another name or folder"
        )


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def read_rows(
    source: str,
    count_field: str = "",
    count_of: float = 1.0,
    on_bad_row: Callable[[Removal], None] | None = None,
) -> Iterator[Row]:
    """The rows of a source, one by one.

    A row that cannot be read, or that has the `id` of an earlier one, raises ValueError naming
    file, row and field; with `on_bad_row` it is passed there and left out. A source without rows
    raises ValueError.
    """
    place = ""
    place_of_id: dict[str, str] = {}
    for place, item in formats.rows(source):
        try:
            question, answer = formats.question_answer(item)
            formats.refuse_twice(item, place, place_of_id)
            row = Row(place, question, answer)
            if count_field:
                right = filters.read_count(item, count_field, count_of)
                row = row._replace(right=right, out_of=count_of)
        except ValueError as error:
            if on_bad_row is None:
                raise ValueError(
                    f"{place}: {error}; fix the row (in an input, --drop-bad-rows removes it)"
                ) from None
            on_bad_row(Removal(Row(place, "", ""), "bad row", str(error)))
        else:
            yield row
    if not place:
        raise ValueError(f"{source}: holds no rows")


def read_inputs(cfg: Recipe, on_bad_row: Callable[[Removal], None]) -> Iterator[Row]:
    """The rows of all inputs, with the pass rates that `--rollouts` gives.

    Raises ValueError as `read_rows` does, for two inputs with files of one name, since the source
    of a problem must be unique, and for rollouts that answer none of the inputs' questions.
    """
    counts = filters.count_rollouts(cfg.rollouts)
    matched = False
    source_of_file: dict[str, str] = {}
    for source in cfg.inputs:
        bad_rows = on_bad_row if cfg.drop_bad_rows else None
        for row in read_rows(source, cfg.count_field, cfg.count_of, bad_rows):
            file = _file_of(row.place)
            first = source_of_file.setdefault(file, source)
            if first != source:
                raise ValueError(f"{source}: {first} has a file {file}, too; rename one")
            count = counts.get(row.question.strip())
            if count is not None:
                matched = True
                row = row._replace(right=count[0], out_of=count[1])
            yield row
    if counts and not matched:
        raise ValueError(
            f"--rollouts {' '.join(cfg.rollouts)}: no response is to a question of the inputs"
        )


def _file_of(place: str) -> str:
    return place.rpartition(":")[0]


# ── passes ────────────────────────────────────────────────────────────────────────────────────────

_overlap = Overlap([])  # with the evaluation sets; set in each worker process


def _start_worker(evaluation: Sequence[Row]) -> None:
    global _overlap
    _overlap = Overlap(evaluation)


def _rules(cfg: Recipe, row: Row) -> Iterator[tuple[str, str]]:
    """(pass, reason to remove the row or "") of each rule about a row on its own."""
    if cfg.hard:
        yield "rate", filters.not_hard(row.right, row.out_of, cfg.hard, cfg.hard_of)
    else:
        yield "rate", filters.extreme_rate(row.right, row.out_of, cfg.min_rate, cfg.max_rate)
    if cfg.choice:
        yield "choice", filters.multiple_choice(row.question, row.answer)
    if cfg.proof:
        yield "proof", filters.proof(row.question, row.answer)
    if cfg.language:
        yield "language", filters.not_english(row.question)


def examine(cfg: Recipe, row: Row) -> Kept | Removal:
    """Apply the rules and the n-gram overlap to one row, in a process that `_start_worker` set up.

    Rules after the first that removes the row are not evaluated.
    """
    for pass_name, reason in _rules(cfg, row):
        if reason:
            return Removal(row, pass_name, reason)
    overlap = _overlap.find(row.question)
    if overlap is not None:
        return Removal(row, "against", "shares n-grams", *overlap)
    return Kept(row, dedupe.sketch(row.question))


def apply_rules(
    cfg: Recipe, evaluation: Sequence[Row], progress: Progress
) -> tuple[list[Kept], list[Removal]]:
    """Read the inputs and examine each row, with several workers in parallel."""
    kept: list[Kept] = []
    bad_rows: list[Removal] = []
    removed: list[Removal] = []
    rows = read_inputs(cfg, bad_rows.append)
    with ExitStack() as stack:
        results: Iterable[Kept | Removal]
        if cfg.workers > 1:
            context = get_context("spawn")
            pool = stack.enter_context(context.Pool(cfg.workers, _start_worker, (evaluation,)))
            results = pool.imap(partial(examine, cfg), rows, chunksize=100)
        else:
            _start_worker(evaluation)
            results = map(partial(examine, cfg), rows)
        for result in progress.track(results, description="rules"):
            if isinstance(result, Kept):
                kept.append(result)
            else:
                removed.append(result)
    return kept, bad_rows + removed


def find_bad_golds(rows: Sequence[Row], grader: Grader, progress: Progress) -> list[Removal]:
    """Removals of the rows whose gold is a placeholder, or whose gold the grader cannot parse or
    does not find equal to itself."""
    removed = []
    chunks = [rows[start : start + 100] for start in range(0, len(rows), 100)]
    for chunk in progress.track(chunks, description="golds, hundreds"):
        usable = grader.are_gradable([row.answer for row in chunk])
        for row, is_usable in zip(chunk, usable, strict=True):
            reason = filters.no_gold(row.answer)
            if not is_usable:
                reason = reason or "not parsed, or not equal to itself"
            if reason:
                removed.append(Removal(row, "gold", reason))
    return removed


def remove_repeats(
    cfg: Recipe, evaluation: Sequence[Row], kept: list[Kept], grader: Grader, progress: Progress
) -> tuple[list[Row], list[Removal]]:
    """The rows that repeat neither an evaluation problem nor an earlier row, and the removals.

    A pass that is switched off still removes what repeats an evaluation problem.
    """
    searches = {"exact": dedupe.exact_duplicates, "ngram": dedupe.ngram_duplicates}
    if cfg.embeddings:
        searches["embedding"] = partial(
            dedupe.embedding_duplicates, folder=Path(cfg.embeddings), min_cosine=cfg.cosine
        )
    enabled = {"exact": cfg.exact, "ngram": cfg.ngram, "embedding": True}
    num_eval = len(evaluation)
    remaining = [Kept(row, dedupe.sketch(row.question)) for row in evaluation] + kept
    removed = []
    for pass_name, search in searches.items():
        rows = [item.row for item in remaining]
        sketches = [item.sketch for item in remaining]
        track = partial(progress.track, description=pass_name)
        repeats = set()
        for match in search(rows, sketches, grader, track):
            of_evaluation = match.other < num_eval
            if match.row < num_eval or not (of_evaluation or enabled[pass_name]):
                continue
            repeats.add(match.row)
            name = "against" if of_evaluation else pass_name
            other = rows[match.other].place
            reason = REPEAT_REASONS[pass_name]
            removed.append(Removal(rows[match.row], name, reason, other, match.similarity))
        remaining = [item for index, item in enumerate(remaining) if index not in repeats]
    return [item.row for item in remaining[num_eval:]], removed


def curate(cfg: Recipe, progress: Progress) -> tuple[list[Row], list[Removal]]:
    """The rows that stay, and the removed ones.

    Raises ValueError or OSError, with a message of one line, for inputs that cannot be used.
    """
    evaluation = [row for source in cfg.against for row in read_rows(source)]
    generated = [Row(*task) for spec in cfg.synthesize for task in synthetic.tasks(spec, cfg.seed)]
    kept, removed = apply_rules(cfg, evaluation, progress)
    with Grader(cfg.workers) as grader:
        if cfg.gold:
            candidates = [item.row for item in kept] + generated
            bad_golds = find_bad_golds(candidates, grader, progress)
            bad_places = {removal.row.place for removal in bad_golds}
            kept = [item for item in kept if item.row.place not in bad_places]
            generated = [row for row in generated if row.place not in bad_places]
            removed += bad_golds
        rows, repeats = remove_repeats(cfg, evaluation, kept, grader, progress)
    return rows + generated, removed + repeats


# ── results ───────────────────────────────────────────────────────────────────────────────────────


def is_run(cfg: Recipe) -> dict[str, bool]:
    """All passes in their order, and whether these settings run them."""
    return {
        "bad row": cfg.drop_bad_rows,
        "rate": bool(cfg.count_field or cfg.rollouts),
        "choice": cfg.choice,
        "proof": cfg.proof,
        "language": cfg.language,
        "against": bool(cfg.against),
        "gold": cfg.gold,
        "exact": cfg.exact or bool(cfg.against),
        "ngram": cfg.ngram or bool(cfg.against),
        "embedding": bool(cfg.embeddings),
    }


def count_passes(cfg: Recipe, num_kept: int, removed: Sequence[Removal]) -> list[card.PassCount]:
    """How many rows entered each pass, and how many it removed, by reason and by other file."""
    counts = []
    num_left = num_kept + len(removed)
    for pass_name, runs in is_run(cfg).items():
        reasons = Counter(
            (removal.reason, _file_of(removal.other))
            for removal in removed
            if removal.pass_name == pass_name
        )
        named = [(f"{r}: {f}" if f else r, n) for (r, f), n in reasons.most_common()]
        counts.append(card.PassCount(pass_name, num_left, named, runs))
        num_left -= reasons.total()
    return counts


def table(num_kept: int, passes: Sequence[card.PassCount]) -> Table:
    """The counts of the passes, for a terminal."""
    view = Table("pass", "rows in", "removed", "why")
    for item in passes:
        first_cells = (item.name, f"{item.rows_in:,}")
        for reason, count in item.reasons:
            view.add_row(*first_cells, f"{count:,}", reason)
            first_cells = ("", "")
    view.add_row("stay", f"{num_kept:,}")
    return view


def describe(
    cfg: Recipe,
    argv: Sequence[str],
    rows: Sequence[Row],
    removed: Sequence[Removal],
    passes: Sequence[card.PassCount],
) -> str:
    """The card of the result."""
    kept = card.rows_of_files(row.place for row in rows)
    dropped = card.rows_of_files(removal.row.place for removal in removed)
    with_rates = any(row.right is not None for row in rows)
    rows_read = kept + dropped
    return card.text(Path(cfg.out), argv, cfg.against, rows_read, kept, passes, with_rates)


def save(out: Path, rows: Sequence[Row], removed: Sequence[Removal], described: str) -> None:
    """Write the rows to `out`, and the removals and the card beside it: all files or none."""
    problems = map(_problem, rows)
    removals = map(_removal, removed)
    write_all_atomically(
        {
            out: _json_lines(problems),
            _removed_path(out): _json_lines(removals),
            card.card_path(out): [described],
        }
    )


def _removed_path(out: Path) -> Path:
    return out.with_name("removed.jsonl")


def _json_lines(items: Iterable[dict[str, Any]]) -> Iterator[str]:
    for item in items:
        yield json.dumps(item, ensure_ascii=False) + "\n"


def _problem(row: Row) -> dict[str, Any]:
    problem = {"question": row.question, "answer": row.answer, "source": row.place}
    return problem | _rate(row)


def _removal(removal: Removal) -> dict[str, Any]:
    described = {
        "place": removal.row.place,
        "pass": removal.pass_name,
        "reason": removal.reason,
        "other": removal.other,
        "similarity": removal.similarity,
        "question": removal.row.question,
        "answer": removal.row.answer,
    }
    return described | _rate(removal.row)


def _rate(row: Row) -> dict[str, float]:
    return {} if row.right is None else {"right": row.right, "of": row.out_of}


class RowsPerSecond(ProgressColumn):
    """The column of the progress bar that shows the speed."""

    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f}/s"


def main(argv: Sequence[str]) -> None:
    """Curate as the command line says; exit with a message of one line if that is impossible."""
    cfg = tyro.cli(Recipe, args=list(argv), description=__doc__, prog="python -m curation.curate")
    console = Console()
    start = time.monotonic()
    try:
        check(cfg)
        with progress_bar(console, RowsPerSecond()) as progress:
            rows, removed = curate(cfg, progress)
        passes = count_passes(cfg, len(rows), removed)
        console.print(table(len(rows), passes))
        if not rows:
            raise ValueError(f"{' '.join(cfg.inputs)}: no problem stays; nothing is written")
        save(Path(cfg.out), rows, removed, describe(cfg, argv, rows, removed, passes))
    except (ValueError, OSError) as error:
        sys.exit(f"curation.curate: {error}")
    seconds = time.monotonic() - start
    console.print(
        f"{len(rows):,} problems in {cfg.out}, {len(removed):,} rows in removed.jsonl beside it, "
        f"and the card {card.card_path(Path(cfg.out)).name}; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
