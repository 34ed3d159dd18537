"""evaluate.py as its user calls it: tables, files, resuming, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, orz_data, write_orz
from safetensors.torch import load_file, save_file

import evaluate
from config import STOP
from evaluate import main

QUICK = """
    --response-tokens 48 --prompt-tokens 64 --engine transformers --threads 1 --samples 4
""".split()


@pytest.fixture(scope="module")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(f"{a}+{b}+1+1+1+1+1=?", str(a + b + 5)) for a in range(2, 6) for b in range(2, 6)]
    return write_orz(tmp_path_factory.mktemp("sets") / "sums.json", rows)


def test_two_models_on_two_sets_and_resuming(
    tmp_path: Path,
    base_folder: Path,
    model_folder: Path,
    sums_file: Path,
    call: Callable[..., Ended],
) -> None:
    """With --max-num-seqs 4 and 4 samples, four problems are sampled at a time. A file that ends in
    the middle of a line, as after an interruption, is continued, and the results are those of a
    call that was not interrupted. Other settings are refused."""
    models = ["--model", base_folder, model_folder]
    sets = ["--benchmarks", sums_file, f"again={sums_file}"]
    flags = [*models, *sets, *QUICK, "--max-num-seqs", 4, "--out", tmp_path]
    done = call(main, *flags)
    assert done.code == 0, done.err
    assert "T = 1, top-p 1, at most 48 tokens" in done.out
    assert done.out.count("  again ") == 2
    base, random = sorted(tmp_path.iterdir(), key=lambda p: "tied" in p.name)
    results = json.loads((base / "results.json").read_text())
    assert results["sums"]["problems"] == 16
    assert results["sums"]["samples"] == 4
    random_results = json.loads((random / "results.json").read_text())
    assert random_results["sums"]["format"] == 0
    file = base / "sums.jsonl"
    # The same problems under another name have other random streams.
    again = (base / "again.jsonl").read_text()
    assert file.read_text() != again.replace("again:", "sums:")
    complete = file.read_bytes()
    lines = [json.loads(line) for line in complete.splitlines()]
    assert len(lines) == 64
    assert all(line["response"] for line in lines)
    assert results["sums"]["reward"] == sum(line["reward"] for line in lines) / 64

    end_of_a_line = complete.index(b"\n", int(0.55 * len(complete)))
    file.write_bytes(complete[: end_of_a_line + 20])
    assert call(main, *flags).code == 0
    assert file.read_bytes() == complete
    assert json.loads((base / "results.json").read_text()) == results

    other = call(main, *flags, "--temperature", "0.5")
    assert other.code == 1
    assert "results under other settings (temperature 1.0 → 0.5)" in other.err
    assert file.read_bytes() == complete


def test_vllm_evaluates_two_models_in_one_process(
    tmp_path: Path, model_folder: Path, untied_folder: Path, sums_file: Path
) -> None:
    """The process is one of its own: vLLM changes settings of the process that it runs in."""
    pytest.importorskip("vllm")
    flags = ["--model", model_folder, untied_folder, "--benchmarks", sums_file, *QUICK]
    flags += ["--engine", "vllm", "--out", tmp_path]
    command = [sys.executable, evaluate.__file__, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/results.json"))) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "pass --model and --benchmarks"),
        ("--model MODEL --benchmarks absent.jsonl", "absent.jsonl: no such file or folder"),
        (
            "--model MODEL --benchmarks SETS SETS.json a=SETS a=other.json",
            "two sets are called a",
        ),
        ("--model MODEL --benchmarks SETS --samples 0", "--samples 0: must be above 0"),
        (
            "--model MODEL --benchmarks SETS --prompt-tokens 3 --response-tokens 9",
            "s:1: prompt of",
        ),
        ("--model MODEL --benchmarks SETS --response-tokens 9999", "over the 1024 positions"),
        ("--model SETS --benchmarks SETS", "not a folder or hub id with a readable model"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path,
    model_folder: Path,
    sums_file: Path,
    flags: str,
    message: str,
    call: Callable[..., Ended],
) -> None:
    """In `flags` MODEL and SETS stand for paths."""
    names = {"MODEL": str(model_folder), "SETS": str(sums_file)}
    words = []
    for word in flags.split():
        for name, path in names.items():
            word = word.replace(name, path)
        words.append(word)
    done = call(main, *words, "--out", tmp_path / "out")
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert line.startswith("evaluate.py: ")
    assert message in line
    assert not list(tmp_path.rglob("*.jsonl"))


def test_recorded_responses(tmp_path: Path, call: Callable[..., Ended]) -> None:
    rows = [
        {"gold": "4", "pred": "x</think> <answer>\\boxed{4}</answer>", "set": "a", "expected": 1},
        {"gold": "4", "pred": "x</think> <answer>5</answer>", "set": "a", "expected": 1},
        {"answer": "4", "response": "<answer>4</answer>", "set": "b"},
    ]
    file = tmp_path / "recorded.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    done = call(main, "--responses", file)
    assert done.code == 0, done.err
    cells = [line.split() for line in done.out.splitlines() if line.split()]
    by_set = {row[0]: row for row in cells}
    assert by_set["a"][1:5] == ["2", "50.00", "100.00", "50.00"]
    assert by_set["b"][1:3] == ["1", "100.00"]
    file.write_text('{"gold": "4"}')
    done = call(main, "--responses", file)
    assert done.code == 1
    assert "recorded.jsonl:1: field response or pred: expected text, found None" in done.err


def test_real_recorded_responses_reproduce_their_labels(
    tmp_path: Path, call: Callable[..., Ended]
) -> None:
    """On each set of responses to the paper's prompt the accuracy is within one point of that of
    the labels. (The labels of the train log are another grader's, so it is left out.)"""
    lines = orz_data("responses", "responses.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        row
        for row in map(json.loads, lines)
        if row["fmt"] == "orz_think_answer" and row["set"] != "orz_fork_train_log"
    ]
    file = tmp_path / "orz.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    done = call(main, "--responses", file)
    assert done.code == 0, done.err
    table = [line.split() for line in done.out.splitlines() if "orz_think_answer" in line]
    assert len(table) == 3
    for cells in table:
        responses, accuracy, labelled = map(float, cells[2:5])
        assert responses > 50
        assert abs(accuracy - labelled) <= 1, cells[0]


def test_a_corrected_gold_is_graded_again_and_nothing_is_sampled(
    tmp_path: Path, base_folder: Path, call: Callable[..., Ended]
) -> None:
    """The stored texts get the grades that the corrected set gives them."""
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "2+3+1+1+1+1+1=?", "answer": "10"}\n')
    flags = ["--model", base_folder, "--benchmarks", sums, *QUICK, "--out", tmp_path / "out"]
    assert call(main, *flags).code == 0
    (file,) = (tmp_path / "out").glob("*/sums.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    right = r"so 11 </think> <answer> \boxed{11} </answer>"
    records = [record | {"response": right, "finish": "stop"} for record in records]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    sums.write_text('{"question": "2+3+1+1+1+1+1=?", "answer": "11"}\n')
    assert call(main, *flags).code == 0
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["gold"], r["reward"], r["response"]) for r in after] == [("11", 1.0, right)] * 4
    assert json.loads(file.with_name("results.json").read_text())["sums"]["reward"] == 1


def test_another_model_under_the_same_name_is_not_continued(
    tmp_path: Path, model_folder: Path, sums_file: Path, call: Callable[..., Ended]
) -> None:
    """Also where the files keep their sizes and times."""
    model = Path(shutil.copytree(model_folder, tmp_path / "a" / "model"))
    flags = ["--model", model, "--benchmarks", sums_file, *QUICK, "--limit", "1"]
    flags += ["--out", tmp_path / "out"]
    assert call(main, *flags).code == 0
    before = evaluate.fingerprint(str(model))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        file = model / name
        content, time = file.read_bytes(), file.stat().st_mtime_ns
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(time, time))
        after = evaluate.fingerprint(str(model))
        assert [n for n in before if before[n] != after[n]] == [name]
        if name != "model.safetensors":
            file.write_bytes(content)
    done = call(main, *flags)
    assert done.code == 1 and "(the model's model.safetensors changed)" in done.err


def test_results_without_the_models_files_are_not_continued(
    tmp_path: Path, model_folder: Path, sums_file: Path, call: Callable[..., Ended]
) -> None:
    """Whether they are of this model is unknown."""
    flags = ["--model", model_folder, "--benchmarks", sums_file, *QUICK, "--limit", "1"]
    flags += ["--out", tmp_path]
    assert call(main, *flags).code == 0
    (file,) = tmp_path.glob("*/settings.json")
    settings = json.loads(file.read_text())
    assert settings.pop("stop") == list(STOP)  # early versions had no others, and kept none
    file.write_text(json.dumps(settings))
    assert call(main, *flags).code == 0
    assert "results under other settings (stop [" in call(main, *flags, "--stop", "x").err
    del settings["files"]
    file.write_text(json.dumps(settings))
    done = call(main, *flags)
    assert done.code == 1 and "the model's files were not recorded" in done.err
    assert call(main, *flags, "--overwrite").code == 0


def test_numbers_that_overflow_between_the_layers_are_named(
    tmp_path: Path, model_folder: Path, sums_file: Path, call: Callable[..., Ended]
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    flags = ["--model", model, "--benchmarks", sums_file, *QUICK, "--out", tmp_path / "out"]
    done = call(main, *flags)
    assert done.code == 1 and "its log-probabilities are NaN, though its weights" in done.err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", "{", "settings.json: damaged"),
        ("results.json", "[]", "results.json: damaged"),
        ("results.json", '{"sums": {}}', "sums is not a result of evaluate.py"),
        ("sums.jsonl", "{}\n" * 4, "sums.jsonl: line 1: damaged, not a graded response"),
    ],
)
def test_damaged_results_are_one_line_and_stay(
    tmp_path: Path,
    model_folder: Path,
    sums_file: Path,
    file: str,
    content: str,
    message: str,
    call: Callable[..., Ended],
) -> None:
    flags = ["--model", model_folder, "--benchmarks", sums_file, *QUICK, "--limit", "1"]
    flags += ["--out", tmp_path]
    assert call(main, *flags).code == 0
    (damaged,) = tmp_path.glob(f"*/{file}")
    damaged.write_text(content)
    done = call(main, *flags)
    (line,) = done.err.splitlines()
    assert done.code == 1 and message in line
    assert damaged.read_text() == content


def test_files_that_are_no_evaluation_are_left_alone(
    tmp_path: Path, model_folder: Path, sums_file: Path, call: Callable[..., Ended]
) -> None:
    folder = tmp_path / "-".join(model_folder.parts[-2:])
    folder.mkdir()
    (folder / "mine.jsonl").write_text("mine")
    flags = ["--model", model_folder, "--benchmarks", sums_file, *QUICK, "--out", tmp_path]
    done = call(main, *flags, "--overwrite")
    assert done.code == 1 and "holds files that are not an evaluation's" in done.err
    assert (folder / "mine.jsonl").read_text() == "mine"


def test_a_set_called_all_is_counted_once(tmp_path: Path, call: Callable[..., Ended]) -> None:
    row = {"gold": "4", "pred": "<answer>4</answer>"}
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row | more) + "\n" for more in ({}, {"set": "b"})))
    table = [line.split() for line in call(main, "--responses", file).out.splitlines()]
    counts = [cells[:-5] for cells in table if cells and cells[0] in ("all", "b")]
    assert counts == [["all", "1"], ["b", "1"], ["all", "sets", "2"]]
