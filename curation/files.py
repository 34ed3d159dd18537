"""Atomic writes, a reader of JSON lines that may still be written, and the progress bar.

This module imports nothing of the project, so every other module may import it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write `lines` to `path` so that a reader sees the old file or the whole new one.

    `lines` are written one after another as they are, as `file.writelines` does: each brings its
    own newline, and a generator is not held in memory. They go to a temporary file in the same
    folder, which is renamed at the end. An error, raised by `lines` too, leaves `path` unchanged.
    """
    write_all_atomically({path: lines})


def write_all_atomically(files: Mapping[Path, Iterable[str]]) -> None:
    """`write_atomically` for several files: no file is renamed before all of them are written."""
    # The process id keeps two programs that write the same file apart.
    temporary = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, lines in files.items():
            with temporary[path].open("w", encoding="utf-8") as file:
                file.writelines(lines)
        for path in files:
            temporary[path].replace(path)
    finally:
        for left_over in temporary.values():
            left_over.unlink(missing_ok=True)


class JsonLine(NamedTuple):
    """One line of a JSON-lines file: its number from 1, where it is in the file, and its value."""

    number: int
    start: int  # offset of its first byte
    length: int  # in bytes, the newline included
    value: Any


def read_jsonl(
    path: Path, parse: Callable[[bytes], Any] = json.loads, warn: bool = False
) -> Iterator[JsonLine]:
    """The lines of a JSON-lines file that a running program may still be writing.

    Yields nothing if there is no such file. Leaves out a last line that cannot be parsed, because
    its end may not be written yet; with `warn`, says so on stderr. Raises ValueError with the file
    and the line number if any other line cannot be parsed.

    `parse` turns the bytes of a line into its value, or raises ValueError.
    """
    if not path.is_file():
        return
    start = 0
    error: ValueError | None = None
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if error is not None:
                raise ValueError(f"{path}: line {number - 1}: not JSON ({error})")
            try:
                value = parse(line)
            except ValueError as caught:
                error = caught
            else:
                yield JsonLine(number, start, len(line), value)
            start += len(line)
    if error is not None and warn:
        message = f"line {number}, the last, is cut off and left out; is the run still going?"
        print(f"{path}: {message}", file=sys.stderr)


def progress_bar(console: Console, *extra: ProgressColumn) -> Progress:
    """A bar with description, m of n, elapsed and remaining time, and then the `extra` columns.

    It is disabled on a console that is quiet or not a terminal; its methods can be called anyway.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *extra,
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
