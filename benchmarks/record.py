"""What every benchmark leaves: a table on the screen, and results/<name>.json with the command,
the machine, the versions and the revision.

    python -m benchmarks.record      write RESULTS.md from all files in results/
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reports import log

HERE = Path(__file__).parent
RESULTS = HERE / "results"
HEADING = """\
# What was measured

These are the tables that the commands printed. `ORZ_DATA=folder python -m benchmarks` runs all of
them and writes this page; `python -m benchmarks.record` writes it again from what is there.
"""
Row = dict[str, str | float | int | None]  # column → cell


def record(
    name: str, title: str, rows: Sequence[Row], notes: Sequence[str] = (), folder: Path = RESULTS
) -> None:
    """Print the table with `notes` (sentences) below it, and write <folder>/<name>.json. A cell
    that a row does not have stays empty. The recorded command is the one that is running."""
    result = {
        "name": name,
        "title": title,
        "command": command(),
        "machine": machine(),
        "versions": log.versions(),
        "revision": log.revision(),
        "rows": list(rows),
        "notes": list(notes),
    }
    print(markdown(result))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def command() -> str:
    """The command line of this process; it starts with ORZ_DATA where that is set."""
    program = f"python -m benchmarks.{Path(sys.argv[0]).stem}"
    data = ["ORZ_DATA=folder"] if "ORZ_DATA" in os.environ else []
    return " ".join([*data, program, *sys.argv[1:]])


def machine() -> str:
    """Processor, number of cores, memory, and the GPUs if there are any."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} × {processor}", f"{memory:.0f} GB", *gpus])


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown: heading, command, table, notes, machine."""
    rows = result["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    alignment = ["---" if _is_text(rows, column) else "---:" for column in columns]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"## {result['title']}", "", f"    {result['command']}", ""]
    lines += [f"| {' | '.join(line)} |" for line in (columns, alignment, *cells)]
    for note in result["notes"]:
        lines += ["", note]
    lines += ["", f"*{result['machine']}; {versions}; revision {result['revision']}*", ""]
    return "\n".join(lines)


def _is_text(rows: Sequence[Row], column: str) -> bool:
    return all(isinstance(row.get(column), str | None) for row in rows)


def _cell(value: str | float | int | None) -> str:
    """Text unchanged, whole numbers with separators, other numbers to three digits.

    >>> [_cell(x) for x in ("a", None, 12345, 1234.5, 12.345, 0.01234)]
    ['a', '', '12,345', '1,234', '12.3', '0.0123']
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def results() -> str:
    """The text of RESULTS.md."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return "\n".join([HEADING, *map(markdown, found)])


def write() -> None:
    """Write RESULTS.md."""
    (HERE / "RESULTS.md").write_text(results())


def main() -> None:
    """Command line; it takes no options."""
    import tyro  # here, because those who only import this module may be without it

    tyro.cli(write, description=__doc__, prog="python -m benchmarks.record")


if __name__ == "__main__":
    main()
