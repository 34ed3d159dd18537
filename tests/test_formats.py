"""curation/formats.py: every layout and container; test_hub.py has the hub."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import orz_data

import data
from curation import formats

GPQA = {
    "Question": "Which?",
    "Correct Answer": "r",
    **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)},
}
LAYOUTS = [
    (
        [{"from": "human", "value": "q"}, {"from": "assistant", "ground_truth": {"value": "1"}}],
        ("q", "1"),
    ),
    (["q", "w", "x", "y", "z", "D"], ("q\n\nA. w\nB. x\nC. y\nD. z", "D")),
    ({"prompt": [{"from": "user", "value": "q"}], "final_answer": "1"}, ("q", "1")),
    (
        {"question": "q", "options": ["x", "y"], "answer": "B", "answer_index": 1},
        ("q\n\nA. x\nB. y", "B"),
    ),
    (
        {"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "s"},
        ("q\n\nA. x\nB. y", "A"),
    ),
    (
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "ground_truth": "1",
        },
        ("q", "1"),
    ),
    ({"problem": "q", "answer": "1", "solution": "s"}, ("q", "1")),
    ({"problem": "q", "expected_answer": 70}, ("q", "70")),
    ({"problem": "q", "answer": 27.0}, ("q", "27")),
    (
        {"problem": "q", "solution": "first $\\boxed{0}$, then $\\boxed{\\frac{1}{2}}$"},
        ("q", "\\frac{1}{2}"),
    ),
    ({"question": "q", "answer": "4*18=<<4*18=72>>72\n#### 72"}, ("q", "72")),
]


@pytest.mark.parametrize(("row", "wanted"), LAYOUTS)
def test_layouts(row: object, wanted: tuple[str, str]) -> None:
    assert formats.question_answer(row) == wanted


def test_gpqa_options_are_shuffled_alike_every_time_and_not_alike_for_all() -> None:
    letters = set()
    for i in range(20):
        row = GPQA | {"Question": f"Which {i}?"}
        question, letter = formats.question_answer(row)
        assert formats.question_answer(row) == (question, letter)
        assert f"\n{letter}. r" in question and all(f". w{i}" in question for i in (1, 2, 3))
        letters.add(letter)
    assert letters == set("ABCD")


def test_programming_problems_carry_their_tests_and_say_where_the_program_goes(
    tmp_path: Path,
) -> None:
    row = {
        "question_content": "Add.",
        "starter_code": "",
        "public_test_cases": "[]",
        "metadata": "{}",
    }
    (tmp_path / "code.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"starter_code": "class Solution:"})
    )
    stdin, method = data.load(tmp_path / "code.jsonl")
    assert stdin.answer == "" and stdin.tests["public_test_cases"] == "[]"
    assert "stdin" in stdin.question
    assert "class Solution:" in method.question and "```python" in method.question


def test_containers_hold_the_same_rows(tmp_path: Path) -> None:
    items = [{"question": f"q{i}", "answer": str(i)} for i in range(2500)]
    (tmp_path / "a.json").write_text(json.dumps(items, indent=1))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, items)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.json", "inside/a.json")
    (tmp_path / "folder").mkdir()
    for half, part in enumerate((items[:1000], items[1000:])):
        (tmp_path / "folder" / f"{half}.json").write_text(json.dumps(part))
    for name in ("a.json", "a.jsonl", "a.parquet", "a.zip", "folder"):
        assert [item for _, item in formats.rows(tmp_path / name)] == items, name
    assert data.load(tmp_path / "a.jsonl")[1].source == "a.jsonl:3"  # the line, blank ones counted
    assert data.load(tmp_path / "folder", "mine")[-1].source == "mine:2500"


@pytest.mark.parametrize("name", ["math500", "gpqa_diamond"])
def test_a_folder_laid_out_as_a_set_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the name is that of a folder, it is read in place of the hub, and not cached."""
    hub = formats.HUB.fullmatch(formats.BENCHMARKS[name])
    row = GPQA if name == "gpqa_diamond" else {"problem": "q", "answer": "5"}
    repository = tmp_path / hub["id"]
    repository.mkdir(parents=True)
    config = hub["config"] or "default"
    split = hub["split"] or "train"
    (repository / f"{config}.jsonl").write_text(json.dumps(row))
    (repository / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
        f"  - split: {split}\n    path: {config}.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (problem,) = data.load(formats.BENCHMARKS[name], name)
    assert problem.source == f"{name}:1" and problem.answer in "5ABCD"
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(OSError, match=r"this folder is laid out as a data set, but .*absent"):
        data.load(f"{hub['id']}@absent")


def test_offline_with_an_empty_cache_is_one_line_that_says_what_to_do() -> None:
    source = "HuggingFaceH4/MATH-500@test"
    program = (
        f"import data\ntry:\n    data.load({source!r})\nexcept OSError as error:\n    print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    folder = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=folder
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{source}: no such file here, and the hub does not give it (HF_HUB_OFF")
    assert '{"question"' in line


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        (("aime", "aime2025.jsonl"), 30),
        (("math", "math500_full.jsonl"), 500),
        (("mmlu", "test"), 14042),
        (("mmlu_pro", "model_outputs_Meta-Llama-3_1-8B_5shots.zip"), 12032),
        (("orz_eval", "gpqa_diamond.json"), 198),
    ],
)
def test_real_sets(parts: tuple[str, ...], rows: int) -> None:
    problems = data.load(orz_data(*parts))
    assert len(problems) == rows
    assert all(problem.question.strip() and problem.answer.strip() for problem in problems)


def test_placeholders_empty_answers_and_examples() -> None:
    solved = {"problem": "q", "solution": r"$\boxed{7}$"}
    for answer in ("", " ", "notfound", None):
        assert formats.question_answer(solved | {"answer": answer}) == ("q", "7")
    assert formats.question_answer({"problem": "q", "answer": "notfound"}) == ("q", "notfound")
    content = "Question: 1+1?\n\nAnswer: 2.\n\nQuestion: 2+3?\n\nAnswer:"
    row = {"messages": [{"role": "user", "content": content}], "ground_truth": "5"}
    assert formats.question_answer(row) == ("2+3?", "5")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name, text in (("a.json", '[{"question": "q", "answer": "1"}]'), ("a.csv", "q,1,2,3,4,A")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (problem,) = data.load(tmp_path / name)
        assert problem.question.startswith("q")


def test_rows_that_break_off_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Iterator[dict]:
        yield {"question": "q", "answer": "1"}
        raise RuntimeError("disk lost")

    (tmp_path / "owner" / "set" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(OSError, match=r"^owner/set: its rows break off after row 1 \(disk lost\)$"):
        data.load("owner/set")
