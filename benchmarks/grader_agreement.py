r"""How often the grader agrees with labelled answers, beside Math-Verify.

    ORZ_DATA=folder python -m benchmarks.grader_agreement

`ORZ_DATA` holds `answer_tests/*.jsonl` (rows {gold, pred, expected, kind, pred_form, params}) and
`responses/responses.jsonl` (rows {gold, pred, expected, set, fmt, pred_answer}). How a row reaches each grader:

| rows | the grader | Math-Verify |
|---|---|---|
| answer tests, form `answer` | gold and `<answer>pred</answer>` | each as `$…$`: bare LaTeX does not parse |
| answer tests, form `text` | the same with `final` of both texts | both texts, as its own tests do |
| responses, `orz_think_answer` | the response as it is | gold as `$…$`, the content of `<answer>` likewise |
| responses, other formats | `<answer>pred_answer</answer>`, as the source extracted it | gold and `pred_answer` as `$…$` |

Text rows test how a library finds an answer in running text, which the grader refuses to do; `final` stands in for the
tags. Math-Verify is shown with each row's own `params` (match types, rounding, strictness, set–relation comparison) and
with its defaults; the grader has one setting for all rows.
"""

import json
import logging
import os
import re
import sys
import time
from pathlib import Path

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from grading.pool import Grader

MATCH = {"latex": LatexExtractionConfig(), "expr": ExprExtractionConfig()}
BOX = r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
MATH = r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]"
NUMBER = r"(?<![\w.])\(?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*%)?(?![\w])"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def final(text: str) -> str:
    """The last box, else the last formula or number; several joined by "and", "or" or a comma are a list."""
    text = text.rpartition("Final Answer:")[2]
    if not re.search(rf"{BOX}|{MATH}|[a-z]{{3,}}[ :]", text, re.S):
        return text  # no delimiters and no sentence
    for kind in (BOX, f"{MATH}|{NUMBER}"):
        if found := list(re.finditer(kind, text, re.S)):
            run = [found.pop()]
            while found and joined(text[found[-1].end() : run[0].start()]):
                run.insert(0, found.pop())
            contents = [
                next((group for group in match.groups() if group), match.group()) for match in run
            ]
            percent = re.match(r"\$?\s*(?:\\?%|percent)", text[run[-1].end() :])
            return ", ".join(content.strip() for content in contents) + ("\\%" if percent else "")
    return text


def joined(gap: str) -> bool:
    """Whether what stands between two formulas makes them one list."""
    gap = " ".join(re.sub(r"\\q?quad|\\text|[\\{}$().]", " ", gap).split())
    return len(gap) < 16 and re.search(r",|\band\b|\bor\b", gap) is not None


def dollars(text: str) -> str:
    return text if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text) else f"${text}$"


def math_verify(gold: str, pred: str, params: dict) -> bool:
    targets = [MATCH[name] for name in params.get("match_types", MATCH)]
    options = {
        name: params[name] for name in ("strict", "allow_set_relation_comp") if name in params
    }
    if "precision" in params:
        options["float_rounding"] = params["precision"]
    try:
        return verify(parse(gold, targets), parse(pred, targets), **options)
    except TimeoutException:
        return False


def table(title: str, columns: tuple[str, ...], results: list[tuple]) -> None:
    """How many rows of each name each column gets right; `results` holds (name, right in column 1, 2, …)."""
    print(f"\n{title:<40}{'rows':>6}" + "".join(f"{column:>24}" for column in columns))
    for name in [*sorted({name for name, *_ in results}), "all"]:
        chosen = [right for row, *right in results if name in (row, "all")]
        sums = [sum(column) for column in zip(*chosen, strict=True)]
        cells = "".join(f"{right:>15} {100 * right / len(chosen):>7.2f}%" for right in sums)
        print(f"{name:<40}{len(chosen):>6}{cells}")


def answer_tests(grader: Grader, folder: Path) -> list[dict]:
    tests = [row for path in sorted(folder.glob("*.jsonl")) for row in rows(path)]
    golds, responses = [], []
    for row in tests:
        text = row["pred_form"] == "text"
        golds.append(final(row["gold"]) if text else row["gold"])
        responses.append(f"<answer>{final(row['pred']) if text else row['pred']}</answer>")
    grades = grader.grade(responses, golds)
    results, wrong = [], []
    for row, grade, gold in zip(tests, grades, golds, strict=True):
        form = str if row["pred_form"] == "text" else dollars
        theirs = [
            math_verify(form(row["gold"]), form(row["pred"]), params)
            for params in (row["params"], {})
        ]
        right = [verdict == row["expected"] for verdict in (grade.reward, *theirs)]
        results.append((f"{row['kind']} ({row['pred_form']})", *right))
        if not right[0]:
            wrong.append(row | {"gold": gold, "got": grade.answer})
    table("answer_tests", ("ours", "Math-Verify, row's own", "Math-Verify, default"), results)
    return wrong


def responses(grader: Grader, path: Path) -> list[dict]:
    answered = rows(path)
    texts = [
        r["pred"] if r["fmt"] == "orz_think_answer" else f"<answer>{r['pred_answer']}</answer>"
        for r in answered
    ]
    golds = [row["gold"] for row in answered]
    grader.check_golds(["1"])  # the workers are up before the clock starts
    start = time.perf_counter()
    grades = grader.grade(texts, golds)
    seconds = time.perf_counter() - start
    results, wrong, cache = [], [], {}
    for row, text, grade in zip(answered, texts, grades, strict=True):
        pred = (
            text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
            if "</answer>" in text
            else ""
        )
        key = (dollars(row["gold"]), dollars(pred))
        if key not in cache:
            cache[key] = bool(pred) and math_verify(*key, {})
        ours_right, theirs_right = (
            grade.reward == row["expected"],
            cache[key] == bool(row["expected"]),
        )
        results.append((f"{row['set']} ({row['fmt']})", ours_right, theirs_right))
        if not ours_right:
            wrong.append(row | {"got": grade.answer})
    table(path.name, ("ours", "Math-Verify, default"), results)
    orz = [r for r, row in zip(results, answered, strict=True) if row["fmt"] == "orz_think_answer"]
    table(
        "all sets of the paper's format",
        ("ours", "Math-Verify, default"),
        [("orz_think_answer", *r[1:]) for r in orz],
    )
    compared = len(
        {
            (gold, grade.answer)
            for gold, grade in zip(golds, grades, strict=True)
            if grade.answer != gold
        }
    )
    print(
        f"\n{len(texts) / seconds:.0f} responses/s with {len(grader._workers)} workers: {seconds:.1f} s, ",
        end="",
    )
    print(
        f"{compared} different pairs to compare, {sum(grade.timeout for grade in grades)} timeouts"
    )
    return wrong


def main() -> None:
    if "ORZ_DATA" not in os.environ:
        sys.exit("ORZ_DATA is not set: the folder that holds answer_tests/ and responses/")
    logging.disable()
    data = Path(os.environ["ORZ_DATA"])
    with Grader(workers=2) as grader:
        wrong = answer_tests(grader, data / "answer_tests")
        wrong += responses(grader, data / "responses" / "responses.jsonl")
    print("\nDisagreements of ours (expected | gold | answer)")
    for row in wrong:
        print(
            f"  {row.get('set') or row['kind']}: {row['expected']} | {row['gold']} | {row['got'][-100:]}"
        )


if __name__ == "__main__":
    main()
