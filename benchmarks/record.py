"""What a benchmark leaves: a table on the screen, and results/<name>.json with the command, machine, versions and revision.

python -m benchmarks.record      RESULTS.md anew, from all of results/
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

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
Row = dict[str, str | float | int | None]  # column → cell


def record(
    name: str, title: str, rows: Sequence[Row], notes: Sequence[str] = (), folder: Path = RESULTS
) -> None:
    """Print the table, with `notes` (sentences) below it, and write <folder>/<name>.json.

    A row without some column has an empty cell there. The command is the one that runs now; where the environment has
    ORZ_DATA, it begins with that.
    """
    data = "ORZ_DATA=folder " if "ORZ_DATA" in os.environ else ""
    result = {
        "name": name,
        "title": title,
        "command": f"{data}python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        "versions": log.versions(),
        "revision": log.revision(),
        "rows": list(rows),
        "notes": list(notes),
    }
    print(markdown(result))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def machine() -> str:
    """Processor, cores, memory, and GPUs if there are some."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [f"{os.cpu_count()} × {names[0] if names else platform.machine()}", f"{memory:.0f} GB"]
    return ", ".join(
        parts + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    )


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown: heading, command, table, notes, machine."""
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in result["rows"]]
    table = [columns, ["---" if all(_texts(result, c)) else "---:" for c in columns], *cells]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"## {result['title']}", "", f"    {result['command']}", ""]
    lines += [f"| {' | '.join(row)} |" for row in table]
    for note in result["notes"]:
        lines += ["", note]
    return "\n".join(
        [*lines, "", f"*{result['machine']}; {versions}; revision {result['revision']}*", ""]
    )


def _texts(result: dict[str, Any], column: str) -> list[bool]:
    return [isinstance(row.get(column), str | None) for row in result["rows"]]


def _cell(value: str | float | int | None) -> str:
    """Text as it is, whole numbers with separators, others to three digits.

    >>> [_cell(x) for x in ("a", None, 12345, 1234.5, 12.345, 0.01234)]
    ['a', '', '12,345', '1,234', '12.3', '0.0123']
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def results() -> str:
    """All of RESULTS.md."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    head = "# What was measured\n\nTables as their commands printed them, put together by `python -m benchmarks.record`.\n"
    return "\n".join([head, *map(markdown, found)])


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(results())
