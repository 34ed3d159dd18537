"""curation/formats.py: every layout and container, and the paper's benchmarks by their hub ids."""

import json
import os
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize("name", sorted(set(formats.BENCHMARKS) - {"livecodebench"}))
def test_benchmarks_by_their_public_ids(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub id, configuration and split are read by `datasets`, without a network: it takes a folder
    that has the name and the layout of the hub's repository for the repository."""
    hub = formats.HUB.fullmatch(formats.BENCHMARKS[name])
    rows = {
        "gpqa_diamond": GPQA,
        "mmlu": {"question": "q", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 3},
        "mmlu_pro": {
            "question_id": 1,
            "question": "q",
            "options": list("abcdefghij"),
            "answer": "J",
            "answer_index": 9,
        },
    }
    repository = tmp_path / hub["id"]
    repository.mkdir(parents=True)
    config = hub["config"] or "default"
    split = hub["split"] or "train"
    (repository / f"{config}.jsonl").write_text(
        json.dumps(rows.get(name, {"problem": "q", "answer": "5"}))
    )
    (repository / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
        f"  - split: {split}\n    path: {config}.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (problem,) = data.load(formats.BENCHMARKS[name], name)
    assert problem.source == f"{name}:1" and problem.answer in "5ABCDJ"


@pytest.mark.parametrize(
    "source", ["HuggingFaceH4/MATH-500@test", "livecodebench/code_generation_lite/test6.jsonl"]
)
def test_an_unreachable_hub_is_one_line_that_says_what_to_do(source: str) -> None:
    program = (
        f"import data\ntry:\n    data.load({source!r})\nexcept OSError as error:\n    print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    folder = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=folder
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{source}: no such file here, and the hub does not give it")
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


def test_a_repository_with_a_script_and_a_broken_stream_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_script(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found a.py")

    def broken(*_: object, **__: object) -> list[dict]:
        def items() -> object:
            yield {"question": "q", "answer": "1"}
            raise RuntimeError("connection lost")

        return items()

    monkeypatch.setattr("datasets.load_dataset", with_script)
    with pytest.raises(OSError, match=r"the hub does not give it \(Dataset scripts are no longer"):
        data.load("owner/set")
    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(OSError, match=r"broke off after row 1 \(connection lost\)"):
        data.load("owner/set")
