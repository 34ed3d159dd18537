"""data.py: what it loads, what it refuses, and an order of problems that needs no state."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import orz_data, write_orz

import data
from data import Problem


def test_three_layouts_are_loaded(tmp_path: Path) -> None:
    write_orz(tmp_path / "train.json", [("1+1?", "2")])
    (tmp_path / "eval.json").write_text(
        json.dumps([{"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2"}])
    )
    (tmp_path / "flat.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n\n{"problem": "1+2?", "answer": 3}\n'
    )
    assert data.load(tmp_path / "train.json") == [Problem("train.json:1", "1+1?", "2")]
    assert data.load(tmp_path / "eval.json") == [Problem("eval.json:1", "1+1?", "2")]
    assert data.load(tmp_path / "flat.jsonl") == [
        Problem("flat.jsonl:1", "1+1?", "2"),
        Problem("flat.jsonl:3", "1+2?", "3"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", r"a.json: expected a JSON list of problems, found '{}'"),
        ("a.json", "[", r"a.json: line 1 column 2: not valid JSON"),
        ("a.json", "[]", r"a.json: holds no problems"),
        ("a.json", "[3]", r"a.json: row 1: expected a list .* or an object, found int"),
        (
            "a.json",
            '[[{"value": "q"}]]',
            r"a.json: row 1: field \[1\].ground_truth.value is missing",
        ),
        (
            "a.json",
            '[[{"value": "q"}, {"ground_truth": {"value": " "}}]]',
            r"row 1: field .*value: expected non-empty text",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "1"}\n{"question": "q"}',
            r"a.jsonl: row 2: field answer is missing",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": null}',
            r"a.jsonl: row 1: field answer: .* found None",
        ),
        ("a.jsonl", "{oops", r"a.jsonl: row 1: not valid JSON"),
        (
            "a.json",
            '[{"final_answer": "2", "prompt": []}]',
            r"row 1: field prompt\[0\].value is missing",
        ),
        (
            "a.json",
            '[{"question": "q", "answer": "1"} 3]',
            r"a.json: line 1 column 35: not valid JSON \(expected ','",
        ),
        (
            "a.json",
            '[{"question": "q", "answer": "1"}',
            r"a.json: line 1 column 34: not valid JSON",
        ),
        (
            "a.jsonl",
            '{"id": 7, "question": "q", "answer": 1}\n{"id": 7, "question": "p", "answer": 2}',
            r"a.jsonl: row 2: field id: 7 is also the id of a.jsonl:1",
        ),
        (
            "a.json",
            '[{"question": "q", "options": ["x", "y"], "answer": "C"}]',
            r"field answer: expected a letter of AB",
        ),
        ("a.json", '[{"problem": "q", "solution": "five"}]', r"field solution: holds no \\boxed"),
        (
            "a.csv",
            "q,1,2,3,4,E\n",
            r"a.csv: row 1: field \[5\]: expected a letter of ABCD .* found 'E'",
        ),
        ("a.txt", "1", r"a.txt: unknown ending '.txt'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / name)


def test_wrong_encoding_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.json: not UTF-8 text \(byte 0\)"):
        data.load(tmp_path / "latin.json")
    with pytest.raises(FileNotFoundError, match="no such file or folder, and not a hub id"):
        data.load(tmp_path / "absent.json")


def test_template_keeps_braces_and_ends_where_the_model_begins() -> None:
    text = data.prompt(r"\boxed{x} {question} {{y}}")
    end = "This is the problem:\n" + r"\boxed{x} {question} {{y}}" + "\nAssistant: <think>"
    assert text.endswith(end)
    for template in data.TEMPLATES.values():
        assert template.count("{question}") == 1
        assert template.endswith("Assistant: <think>")


def test_take_visits_every_problem_once_an_epoch_and_depends_on_the_step_alone() -> None:
    problems = [Problem(str(i), "", "") for i in range(10)]

    def sources(step: int, seed: int) -> list[str]:
        return [p.source for p in data.take(problems, step, 4, seed)]

    taken = [source for step in range(10) for source in sources(step, seed=1)]  # four epochs
    for epoch in range(4):
        assert sorted(taken[10 * epoch : 10 * epoch + 10]) == sorted(p.source for p in problems)
    assert taken[:10] != taken[10:20]
    assert sources(7, seed=1) == taken[28:32]
    assert Counter(taken)["0"] == 4
    assert taken[:4] != sources(0, seed=2)


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        (("orz_train", "orz_math_57k_first2048_w_num_correct.json"), 2048),
        (("orz_train", "orz_math_72k_first2725.json"), 2725),
        (("orz_eval", "math500.json"), 500),
        (("orz_eval", "aime2024.json"), 30),
        (("gsm8k", "test.jsonl"), 1319),
    ],
)
def test_the_authors_files_are_loaded(parts: tuple[str, ...], rows: int) -> None:
    problems = data.load(orz_data(*parts))
    assert len(problems) == rows
    assert all(p.question.strip() and p.answer.strip() for p in problems)
