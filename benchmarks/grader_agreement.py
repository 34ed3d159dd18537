r"""Count how often the grader's verdicts agree with labels, and how often Math-Verify's do.

    ORZ_DATA=folder python -m benchmarks.grader_agreement

The environment variable ORZ_DATA names the folder that holds `answer_tests/` and `responses/`:
`answer_tests/*.jsonl` has rows {gold, pred, expected, kind, pred_form, params}, and
`responses/responses.jsonl` has rows {gold, pred, expected, set, fmt, pred_answer}.

What each grader gets as gold and answer, where `final` finds the answer in a running text:

| rows | the grader | Math-Verify |
|---|---|---|
| answer tests of form `answer` | gold, `<answer>pred</answer>` | `$gold$`, `$pred$` |
| answer tests of form `text` | the same with `final` of both texts | both texts |
| responses in `orz_think_answer` | gold, the response | `$gold$`, `$…$` of the tags' content |
| responses in other formats | gold, `<answer>pred_answer</answer>` | `$gold$`, `$pred_answer$` |

Math-Verify needs the dollar signs because it does not parse bare LaTeX. Its own tests give it the
text rows as they are: they test how a library finds an answer in a text. The grader does not
search texts, so `final` replaces the tags. Math-Verify is shown with the `params` of each row
(match types, rounding, strictness, comparison of sets with relations) and with its defaults; the
grader has one setting for all rows.
"""

import json
import logging
import os
import re
import sys
import time
from functools import cache
from pathlib import Path

import tyro
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from grading.pool import Grade, Grader

MATCH_TYPES = {"latex": LatexExtractionConfig(), "expr": ExprExtractionConfig()}
BOX = r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
MATH = r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]"
NUMBER = r"(?<![\w.])\(?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*%)?(?![\w])"

Result = tuple[str, list[bool]]  # name of a line of a table; of each grader, whether it agrees


# ── the data ──────────────────────────────────────────────────────────────────────────────────────


def data_folder() -> Path:
    """The folder that ORZ_DATA names. Raises ValueError if it is not set."""
    if "ORZ_DATA" not in os.environ:
        raise ValueError("set ORZ_DATA to the folder that holds answer_tests/ and responses/")
    return Path(os.environ["ORZ_DATA"])


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_response(row: dict) -> str:
    """What the grader gets of a row of responses.jsonl."""
    if row["fmt"] == "orz_think_answer":
        return row["pred"]
    return f"<answer>{row['pred_answer']}</answer>"


def final(text: str) -> str:
    """The answer of a running text: its last box, else its last formula or number. Several that
    are joined by "and", "or" or a comma are a list."""
    text = text.rpartition("Final Answer:")[2]
    if not re.search(rf"{BOX}|{MATH}|[a-z]{{3,}}[ :]", text, re.S):
        return text  # no delimiters and no sentence
    for pattern in (BOX, f"{MATH}|{NUMBER}"):
        matches = list(re.finditer(pattern, text, re.S))
        if matches:
            return _last_list(text, matches)
    return text


def _last_list(text: str, matches: list[re.Match]) -> str:
    """The last match, with the matches before it that belong to the same list."""
    parts = [matches.pop()]
    end = parts[0].end()
    while matches and _joins(text[matches[-1].end() : parts[0].start()]):
        parts.insert(0, matches.pop())
    contents = []
    for part in parts:
        groups = [group for group in part.groups() if group]
        contents.append((groups[0] if groups else part.group()).strip())
    percent = re.match(r"\$?\s*(?:\\?%|percent)", text[end:])
    return ", ".join(contents) + ("\\%" if percent else "")


def _joins(gap: str) -> bool:
    """Whether the text between two formulas makes them one list."""
    gap = " ".join(re.sub(r"\\q?quad|\\text|[\\{}$().]", " ", gap).split())
    return len(gap) < 16 and re.search(r",|\band\b|\bor\b", gap) is not None


# ── Math-Verify ───────────────────────────────────────────────────────────────────────────────────


def as_math(text: str) -> str:
    """The text between dollar signs, unless it has math delimiters or a box."""
    return text if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text) else f"${text}$"


def math_verify(gold: str, pred: str, params: dict) -> bool:
    """Math-Verify's verdict; False if it runs out of time."""
    targets = [MATCH_TYPES[name] for name in params.get("match_types", MATCH_TYPES)]
    names = ("strict", "allow_set_relation_comp")
    options = {name: params[name] for name in names if name in params}
    if "precision" in params:
        options["float_rounding"] = params["precision"]
    try:
        return verify(parse(gold, targets), parse(pred, targets), **options)
    except TimeoutException:
        return False


@cache
def math_verify_default(gold: str, pred: str) -> bool:
    return math_verify(gold, pred, {})


# ── comparisons ───────────────────────────────────────────────────────────────────────────────────


def print_table(title: str, columns: tuple[str, ...], results: list[Result]) -> None:
    """How many rows each column's grader judges as labeled: by name, and over all names."""
    print(f"\n{title:<40}{'rows':>6}" + "".join(f"{column:>24}" for column in columns))
    for name in [*sorted({name for name, _ in results}), "all"]:
        selected = [right for other, right in results if name in (other, "all")]
        sums = [sum(column) for column in zip(*selected, strict=True)]
        cells = "".join(f"{right:>15} {100 * right / len(selected):>7.2f}%" for right in sums)
        print(f"{name:<40}{len(selected):>6}{cells}")


def compare_answer_tests(grader: Grader, folder: Path) -> list[dict]:
    """Print the table of the answer tests; returns the rows where the grader disagrees."""
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    golds, responses = [], []
    for row in rows:
        find = final if row["pred_form"] == "text" else str
        golds.append(find(row["gold"]))
        responses.append(f"<answer>{find(row['pred'])}</answer>")
    grades = grader.grade(responses, golds)
    results, wrong = [], []
    for row, grade, gold in zip(rows, grades, golds, strict=True):
        form = str if row["pred_form"] == "text" else as_math
        pair = form(row["gold"]), form(row["pred"])
        own, default = math_verify(*pair, row["params"]), math_verify_default(*pair)
        right = [verdict == row["expected"] for verdict in (grade.reward, own, default)]
        results.append((f"{row['kind']} ({row['pred_form']})", right))
        if not right[0]:
            wrong.append(row | {"gold": gold, "got": grade.answer})
    columns = ("ours", "Math-Verify, row's own", "Math-Verify, default")
    print_table("answer_tests", columns, results)
    return wrong


def compare_responses(grader: Grader, path: Path) -> list[dict]:
    """Print the tables of the responses and the grader's rate; returns the rows where the grader
    disagrees."""
    rows = read_rows(path)
    golds = [row["gold"] for row in rows]
    responses = [as_response(row) for row in rows]
    grader.are_gradable(["1"])  # returns when a worker is ready
    start = time.perf_counter()
    grades = grader.grade(responses, golds)
    seconds = time.perf_counter() - start
    results, paper_results, wrong = [], [], []
    for row, response, grade in zip(rows, responses, grades, strict=True):
        content = ""
        if "</answer>" in response:
            content = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
        theirs = bool(content) and math_verify_default(as_math(row["gold"]), as_math(content))
        right = [grade.reward == row["expected"], theirs == bool(row["expected"])]
        results.append((f"{row['set']} ({row['fmt']})", right))
        if row["fmt"] == "orz_think_answer":
            paper_results.append(("orz_think_answer", right))
        if not right[0]:
            wrong.append(row | {"got": grade.answer})
    columns = ("ours", "Math-Verify, default")
    print_table(path.name, columns, results)
    print_table("all sets of the paper's format", columns, paper_results)
    print_rate(golds, grades, seconds, len(grader.worker_pids))
    return wrong


def print_rate(golds: list[str], grades: list[Grade], seconds: float, workers: int) -> None:
    pairs = {(gold, grade.answer) for gold, grade in zip(golds, grades, strict=True)}
    compared = sum(gold != answer for gold, answer in pairs)
    timeouts = sum(grade.timeout for grade in grades)
    print(
        f"\n{len(grades) / seconds:.0f} responses/s with {workers} workers: {seconds:.1f} s, "
        f"{compared} different pairs to compare, {timeouts} timeouts"
    )


def run() -> None:
    try:
        folder = data_folder()
    except ValueError as error:
        sys.exit(f"benchmarks.grader_agreement: {error}")
    logging.disable()
    with Grader(workers=2) as grader:
        wrong = compare_answer_tests(grader, folder / "answer_tests")
        wrong += compare_responses(grader, folder / "responses" / "responses.jsonl")
    print("\nDisagreements of ours (expected | gold | answer)")
    for row in wrong:
        name = row.get("set") or row["kind"]
        print(f"  {name}: {row['expected']} | {row['gold']} | {row['got'][-100:]}")


def main() -> None:
    tyro.cli(run, description=__doc__, prog="python -m benchmarks.grader_agreement")


if __name__ == "__main__":
    main()
