r"""Problems for training, as the paper makes them (§2.1.1): from many sources to one file, and why each row was left out.

    python -m curation.curate aime.json math.json AI-MO/NuminaMath-1.5 --against math500.json aime2024.json --out problems.jsonl

    inputs ──read──▶ rate ▶ choice ▶ proof ▶ language ▶ against ▶ gold ▶ exact ▶ ngram ▶ embedding ──▶ problems.jsonl
                       └────────┴───────┴────────┴─────────┴───────┴──────┴───────┴────────┴───────▶ removed.jsonl

| pass | removes | the paper |
|---|---|---|
| bad row | rows that cannot be read (`--drop-bad-rows`; else they are errors) | |
| rate | problems that a model always or never solves; with `--hard`, all but the hardest | pass-rate filter; 13k hard set |
| choice | lettered options below the question, or a gold such as (C) | "exclude multiple choice" |
| proof | "Prove that …" with nothing to find | "and proof-based problems" |
| language | questions that are not in English, formulas aside | English only (Fig. 11) |
| against | what overlaps an evaluation set: as below, or by its n-grams (`dedupe.Overlap`) | |
| gold | golds that cannot be parsed, or do not equal themselves | the rule-based reward (§2.1.2) |
| exact, ngram, embedding | repetitions of an earlier row (curation/dedupe.py) | first version: n-gram and embedding similarity |

The earlier row stays: give the sources you trust most first. The same inputs, flags and seed give the same bytes. Rows
that pass the rules are held in memory with a sketch of half a kilobyte; of files only JSON lists are read whole.

`--rollouts` takes what `train.py --save-rollouts` keeps, or the responses file of any evaluation (`heldout-0.jsonl`): JSON
lines with question and reward. For the rates of a model, evaluate it on the problems first, and curate with its responses.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from curation import dedupe, filters, formats, synthetic
from curation.dedupe import Overlap, Row, Sketch
from curation.removal import Removal, Speed, table, write
from grading.pool import Grader

REASONS = {"exact": "same words", "ngram": "reworded", "embedding": "paraphrased"}


@dataclass(frozen=True)
class Recipe:
    """Curate problems (§2.1.1). Every pass that removes has a flag; `removed.jsonl` beside the output says what and why."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders or hub ids, in order of trust: of two copies the earlier stays."""
    out: str = "problems.jsonl"
    """JSON lines of question, answer and source; train.py's --data reads them."""
    against: tuple[str, ...] = ()
    """Evaluation sets, in the same forms: what overlaps them is removed."""
    drop_bad_rows: bool = False
    """Remove rows that cannot be read, instead of stopping at the first."""

    choice: bool = True
    """Remove multiple choice (§2.1.1)."""
    proof: bool = True
    """Remove proofs (§2.1.1)."""
    language: bool = True
    """Remove what is not English (§3.3, Fig. 11: English only is better)."""
    gold: bool = True
    """Remove golds that Math-Verify cannot parse or that do not equal themselves."""
    exact: bool = True
    """Remove questions with the same words in the same order, and equal golds."""
    ngram: bool = True
    """Remove rewordings: the same numbers, equal golds, and alike by n-grams (curation/dedupe.py)."""
    embeddings: str = ""
    """Folder of a sentence-transformers model: remove paraphrases, too, by cosine similarity; none: no such pass."""
    cosine: float = 0.75
    """Least cosine similarity of paraphrases."""

    count_field: str = ""
    """Field with a number of right answers, e.g. num_correct, or ground_truth.pass_at_n of the authors' rows."""
    count_of: float = 1.0
    """Responses that count_field counts among; 1 where it is a share."""
    rollouts: tuple[str, ...] = ()
    """Folders or files of graded responses to count right answers in: JSON lines of a run's rollouts or an evaluation."""
    min_rate: float = 0.0
    """Remove problems with a pass rate at or below it: never right (§2.1.1; thresholds not given)."""
    max_rate: float = 1.0
    """Remove problems with a pass rate at or above it: always right (§2.1.1; thresholds not given)."""
    hard: int = 0
    """Keep only problems with fewer than so many right of --hard-of, never right included (§2.1.1: 4); 0: off."""
    hard_of: int = 64
    """Responses that --hard reckons by; a problem with fewer recorded is removed, one with more is judged by its share."""

    synthesize: tuple[str, ...] = ()
    """Reasoning tasks to generate with reasoning-gym, as name:count (§2.1.1; curation/synthetic.py)."""
    seed: int = 0
    """Seed of the generated tasks."""
    workers: int = 2
    """Processes that read rules and hash, and processes that check golds."""


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(source: str, cfg: Recipe, drop: Callable[[Removal], None] | None = None) -> Iterator[Row]:
    """Rows of a source one by one. A row that cannot be read, or repeats another's `id`, raises ValueError naming file, row
    and field, or is given to `drop`; so does a source without rows."""
    places: dict[str, str] = {}
    place = ""
    for place, item in formats.rows(source):
        try:
            question, answer = formats.question_answer(item)
            formats.refuse_twice(item, place, places)
            right, of = (
                filters.count(item, cfg.count_field, cfg.count_of)
                if cfg.count_field
                else (None, 0.0)
            )
            yield Row(place, question, answer, right, of)
        except ValueError as error:
            if drop is None:
                raise ValueError(
                    f"{place}: {error}; mend the row (of an input, --drop-bad-rows removes it)"
                ) from None
            drop(Removal(Row(place, "", ""), "bad row", str(error)))
    if not place:
        raise ValueError(f"{source}: holds no rows")


def _read_all(cfg: Recipe, drop: Callable[[Removal], None]) -> Iterator[Row]:
    counts, files = filters.recorded(cfg.rollouts), {}
    for source in cfg.inputs:
        for row in read(source, cfg, drop if cfg.drop_bad_rows else None):
            file = row.place.rpartition(":")[0]
            if files.setdefault(file, source) != source:
                raise ValueError(f"{source}: {files[file]} has a file {file}, too; rename one")
            if (question := row.question.strip()) in counts:
                row = row._replace(right=counts[question][0], of=counts[question][1])
            yield row


# ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


_overlap = Overlap([])


def _begin(evaluation: Sequence[Row]) -> None:
    global _overlap
    _overlap = Overlap(evaluation)


def examine(cfg: Recipe, row: Row) -> tuple[Row, Removal | None, Sketch | None]:
    """A row with what is against it, or else with its sketch. Runs in workers, which `_begin` told the evaluation set."""
    question, answer, right, of = row[1:]
    rules = {
        "rate": (True, partial(filters.rated, right, of, cfg.min_rate, cfg.max_rate)),
        "choice": (cfg.choice, partial(filters.choice, question, answer)),
        "proof": (cfg.proof, partial(filters.proof, question, answer)),
        "language": (cfg.language, partial(filters.foreign, question)),
    }
    if cfg.hard:
        rules["rate"] = True, partial(filters.not_hard, right, of, cfg.hard, cfg.hard_of)
    for step, (wanted, rule) in rules.items():
        if wanted and (reason := rule()):
            return row, Removal(row, step, reason), None
    if overlap := _overlap.find(question):
        return row, Removal(row, "against", "shares n-grams", *overlap), None
    return row, None, dedupe.sketch(question)


def curate(cfg: Recipe, progress: Progress) -> tuple[list[Row], list[Removal]]:
    """The rows that stay and the removed ones. Raises ValueError or OSError, in one line, for inputs that cannot be used."""
    evaluation = [
        row for source in cfg.against for row in read(source, replace(cfg, count_field=""))
    ]
    made = [Row(*task) for spec in cfg.synthesize for task in synthetic.tasks(spec, cfg.seed)]
    kept: list[tuple[Row, Sketch]] = []
    bad: list[Removal] = []
    removed: list[Removal] = []
    with ExitStack() as stack:
        _begin(evaluation)
        run: Callable[..., Iterator] = map
        if cfg.workers > 1:
            pool = stack.enter_context(
                get_context("spawn").Pool(cfg.workers, _begin, (evaluation,))
            )
            run = partial(pool.imap, chunksize=100)
        for row, removal, sketch in progress.track(
            run(partial(examine, cfg), _read_all(cfg, bad.append)), description="rules"
        ):
            if removal:
                removed.append(removal)
            else:
                kept.append((row, sketch))
        grader = stack.enter_context(Grader(cfg.workers))
        if cfg.gold:
            unfit = _unfit([row for row, _ in kept] + made, grader, progress)
            removed += [Removal(row, "gold", "not parsed, or not equal to itself") for row in unfit]
            gone = {row.place for row in unfit}
            kept = [(row, sketch) for row, sketch in kept if row.place not in gone]
            made = [row for row in made if row.place not in gone]
        rows, repeats = _unrepeated(cfg, evaluation, kept, grader, progress)
    return rows + made, bad + removed + repeats


def _unfit(rows: Sequence[Row], grader: Grader, progress: Progress) -> list[Row]:
    parts = [rows[start : start + 100] for start in range(0, len(rows), 100)]
    verdicts = (
        zip(part, grader.check_golds([row.answer for row in part]), strict=True)
        for part in progress.track(parts, description="golds, hundreds")
    )
    return [row for part in verdicts for row, good in part if not good]


def _unrepeated(
    cfg: Recipe,
    evaluation: list[Row],
    kept: list[tuple[Row, Sketch]],
    grader: Grader,
    progress: Progress,
) -> tuple[list[Row], list[Removal]]:
    """The rows that repeat neither an earlier one nor an evaluation problem, and the others."""
    first, removed = len(evaluation), []
    rows = evaluation + [row for row, _ in kept]
    sketches = [dedupe.sketch(row.question) for row in evaluation] + [sketch for _, sketch in kept]
    passes = {"exact": (cfg.exact, dedupe.exact), "ngram": (cfg.ngram, dedupe.near)}
    if cfg.embeddings:
        passes["embedding"] = (
            True,
            partial(dedupe.embedded, folder=Path(cfg.embeddings), least=cfg.cosine),
        )
    for step, (wanted, search) in passes.items():
        gone = set()
        for m in search(rows, sketches, grader, partial(progress.track, description=step)):
            if m.row >= first and (wanted or m.other < first):
                name = step if m.other >= first else "against"
                removed.append(
                    Removal(rows[m.row], name, REASONS[step], rows[m.other].place, m.similarity)
                )
                gone.add(m.row)
        rows = [row for k, row in enumerate(rows) if k not in gone]
        sketches = [sketch for k, sketch in enumerate(sketches) if k not in gone]
    return rows[first:], removed


# ── command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(cfg: Recipe) -> None:
    """Refuse settings that cannot work, before anything is read: ValueError with the flag, its value and what to change."""
    out = Path(cfg.out)
    taken = {Path(source).resolve() for source in (*cfg.inputs, *cfg.against, *cfg.rollouts)}
    if not (cfg.inputs or cfg.synthesize):
        raise ValueError("no inputs: name files, folders or hub ids, or pass --synthesize")
    if (
        out.name == "removed.jsonl"
        or {out.resolve(), out.with_name("removed.jsonl").resolve()} & taken
    ):
        raise ValueError(
            f"--out {out}: it, or removed.jsonl beside it, is an input; choose another name or folder"
        )
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: not a file in a folder that exists and can be written to")
    if cfg.embeddings and not Path(cfg.embeddings).is_dir():
        raise ValueError(f"--embeddings {cfg.embeddings}: no such folder")
    names = [spec.partition(":")[0] for spec in cfg.synthesize]
    if len(set(names)) < len(names):
        raise ValueError(f"--synthesize {' '.join(cfg.synthesize)}: name each task once")
    if cfg.workers < 1 or cfg.count_of <= 0 or cfg.hard < 0 or cfg.hard_of < 1:
        raise ValueError("--workers, --count-of and --hard-of must be above 0, --hard not below")


def main(argv: Sequence[str]) -> None:
    cfg = tyro.cli(Recipe, args=list(argv), description=__doc__, prog="python -m curation.curate")
    console, start = Console(), time.monotonic()
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    try:
        check(cfg)
        with Progress(*bars, console=console) as progress:
            rows, removed = curate(cfg, progress)
        console.print(table(len(rows), removed))
        if not rows:
            raise ValueError(f"{' '.join(cfg.inputs)}: no problem stays; nothing is written")
        write(Path(cfg.out), rows, removed)
    except (ValueError, OSError) as error:
        sys.exit(f"curation.curate: {error}")
    seconds = time.monotonic() - start
    console.print(
        f"{len(rows):,} problems in {cfg.out}, {len(removed):,} rows in removed.jsonl beside it; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
