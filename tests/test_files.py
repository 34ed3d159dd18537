"""curation/files.py: atomic writes, JSON lines of a running program, and the progress bar."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import TextColumn

from curation.files import progress_bar, read_jsonl, write_all_atomically, write_atomically


def fails_after(*lines: str) -> Iterator[str]:
    yield from lines
    raise RuntimeError("stopped")


def test_write_atomically_replaces_the_file_when_all_lines_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    seen = []

    def lines() -> Iterator[str]:
        yield "é\n"
        seen.append(path.read_text())  # the old file is still there
        yield "2\n"

    write_atomically(path, lines())
    assert seen == ["old"]
    assert path.read_bytes() == "é\n2\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(path, fails_after("1\n"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with pytest.raises(RuntimeError, match="stopped"):
        write_all_atomically({first: ["1\n"], second: fails_after("2\n")})
    assert list(tmp_path.iterdir()) == []
    write_all_atomically({first: ["1\n"], second: ["2\n"]})
    assert first.read_text() == "1\n" and second.read_text() == "2\n"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_the_temporary_file_is_beside_and_names_the_process(tmp_path: Path) -> None:
    names = []

    def lines() -> Iterator[str]:
        names.extend(path.name for path in tmp_path.iterdir())
        yield "1\n"

    write_atomically(tmp_path / "a.jsonl", lines())
    assert names == [f"a.jsonl.{os.getpid()}.tmp"]


def test_read_jsonl_says_where_each_line_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"é": 1}\n[2]\n{"text": "\u2028"}', encoding="utf-8")
    found = list(read_jsonl(path))
    assert [line.number for line in found] == [1, 2, 3]
    assert [line.value for line in found] == [{"é": 1}, [2], {"text": "\u2028"}]
    content = path.read_bytes()
    for line in found:
        assert json.loads(content[line.start : line.start + line.length]) == line.value


def test_read_jsonl_of_no_file_and_of_an_empty_file_is_empty(tmp_path: Path) -> None:
    assert list(read_jsonl(tmp_path / "absent.jsonl")) == []
    (tmp_path / "empty.jsonl").touch()
    assert list(read_jsonl(tmp_path / "empty.jsonl", warn=True)) == []


@pytest.mark.parametrize("end", [b'{"b": ', b'{"b": "\xc3', b'{"b": \n', b"\n", b"\x00\x00"])
def test_a_last_line_that_is_cut_off_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, end: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + end)
    assert [line.value for line in read_jsonl(path)] == [{"a": 1}]
    assert capsys.readouterr().err == ""
    assert [line.value for line in read_jsonl(path, warn=True)] == [{"a": 1}]
    assert capsys.readouterr().err == (
        f"{path}: line 2, the last, is cut off and left out; is the run still going?\n"
    )


@pytest.mark.parametrize("broken", [b"oops\n", b"\n", b"\xff\n", b'{"a": 1}{"a": 1}\n'])
def test_a_broken_line_before_the_last_is_an_error(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + broken + b'{"a": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: not JSON \(.*\)$"):
        list(read_jsonl(path, warn=True))


def test_parse_decides_what_a_line_means(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": NaN}\n')

    def parse(line: bytes) -> Any:
        return json.loads(line, parse_constant=lambda _: None)

    assert [line.value for line in read_jsonl(path, parse)] == [{"a": None}]


def shown(terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, quiet=quiet, width=120, color_system=None)
    with progress_bar(console, TextColumn("{task.fields[rate]}")) as progress:
        task = progress.add_task("training", total=4, rate="7/s")
        progress.update(task, completed=1)
        assert list(progress.track([1, 2], task_id=task)) == [1, 2]
    return out.getvalue()


def test_the_progress_bar_is_for_terminals() -> None:
    text = shown(terminal=True)
    assert "training" in text and "2/2" in text and "7/s" in text and "0:00:00" in text
    assert shown(terminal=False) == "" and shown(terminal=True, quiet=True) == ""
