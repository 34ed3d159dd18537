"""tools/ask.py, called from its command line."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from transformers import AutoModelForSequenceClassification

from tools.ask import main


def test_an_answer_and_its_values(
    tmp_path: Path, base_folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same text, which ends at the stop string; all of it is printed with
    values; the question can come from standard input."""
    critic = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    critic.save_pretrained(tmp_path)
    flags = ("--model", base_folder, "--response-tokens", 100, "--seed", 3)
    plain = call(main, "1+2+3=?", *flags)
    assert plain.code == 0, plain.err
    assert plain.out.startswith("<think>") and plain.out.count("</answer>") <= 1
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2+3=?"))
    valued = call(main, "-", *flags, "--critic", tmp_path)
    assert valued.code == 0, valued.err
    assert valued.out.startswith(plain.out.split("\n\n")[0])
    lines = valued.out.partition(" V(s_t)\n")[2].partition("\n\n")[0].splitlines()
    shown = "".join(line[19:] for line in lines)
    assert lines and all(float(line.split()[0]) is not None for line in lines)
    assert shown.replace("⏎", "\n").strip() in valued.out.partition("<think>")[2]


def test_a_folder_without_a_value_head_is_refused(
    base_folder: Path, call: Callable[..., Ended]
) -> None:
    done = call(main, "1+2=?", "--model", base_folder, "--critic", base_folder)
    assert done.code == 1 and "holds no value head" in done.err
    assert len(done.err.strip().splitlines()) == 1
