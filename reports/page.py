"""One page of a run: its curves, its rollouts, and every token with V(s_t), Â_t and log-probability.

    python -m reports.page runs/NAME …      writes runs/NAME/report.html

The page is one file: reports/page.html with the run's data in it. It opens by a double click, without a server or a network, and can
be written while the run goes on or after it died. What a model wrote is data there and never markup: it stands in a JSON
block that no text can close, and is shown as text only. The page's Content-Security-Policy allows its own script and nothing
else.
"""

import base64
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.metrics import follows_format, reflects

TEMPLATE = Path(__file__).with_name("page.html")
ROLLOUTS = 400  # in a page, and their bytes: what a browser loads at once
BYTES = 8_000_000


def write(folder: Path, rollouts: int = ROLLOUTS, size: int = BYTES) -> Path:
    """Write `folder`/report.html with at most `rollouts` rollouts of about `size` bytes; returns it.

    Raises ValueError where the folder is no run's, or a line in the middle of a record cannot be read."""
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    for tag in ("style", "script"):
        code = f"{head}{tail}".split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        head = head.replace(f"{{{{{tag}}}}}", f"'sha256-{digest}'")
    path = folder / "report.html"
    beside = path.with_name(f"report.html.{os.getpid()}.tmp")
    beside.write_text(head + embedded(collect(folder, rollouts, size)) + tail, encoding="utf-8")
    beside.replace(path)
    return path


def embedded(data: Any) -> str:
    """JSON that can stand inside a <script> element: neither a tag nor a line separator of JavaScript is left in it.

    >>> embedded({"text": "</script>&"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode(
        "utf-8", "backslashreplace"
    ).decode()  # half a surrogate pair is no UTF-8; JSON may escape it
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def collect(folder: Path, rollouts: int, size: int) -> dict[str, Any]:
    """What the page shows: settings, metrics by column, evaluations, time, and some of the rollouts.

    Raises ValueError where the folder is no run's or a file of it cannot be read."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.json; expected runs/NAME")
    config, summary = _read(folder / "config.json"), folder / "summary.json"
    steps = [row for _, _, row in lines(folder / "metrics.jsonl")]
    chosen, counted = choose(folder / "rollouts.jsonl", rollouts, size)
    return {
        "run": folder.resolve().name,
        "config": config,
        "summary": _read(summary) if summary.exists() else None,
        "metrics": {
            name: [_short(row.get(name)) for row in steps]
            for name in dict.fromkeys(k for r in steps for k in r)
        },
        "evaluations": [
            {k: _short(v) for k, v in row.items()}
            for _, _, row in lines(folder / "evaluations.jsonl")
        ],
        "rollouts": chosen,
        "counted": counted,
    }


def choose(path: Path, count: int, size: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """At most `count` rollouts of a rollouts.jsonl and `size` bytes, spread evenly over its lines and so over the steps, and
    how many there were of each kind. Those with numbers for every token come first and may take three quarters of the
    bytes; texts without numbers fill up the rest."""
    kinds: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    number = 0
    for number, (start, length, row) in enumerate(lines(path), 1):
        kinds["pieces" in row].append((number, start, length))
    detailed = spread(kinds[True], count, size * 3 // 4)
    plain = spread(
        kinds[False], count - len(detailed), size - sum(length for *_, length in detailed)
    )
    chosen = []
    for number_, start, length in sorted(detailed + plain):
        with path.open("rb") as file:
            file.seek(start)
            row = _json(file.read(length))
        facts = {
            "line": number_,
            "reflects": reflects(row["response"]),
            "format": follows_format(row["response"]),
        }
        chosen.append(
            {k: v for k, v in row.items() if k != "response" or "pieces" not in row} | facts
        )
    return chosen, {"all": number, "detailed": len(kinds[True])}


def spread(items: list[tuple[int, int, int]], count: int, size: int) -> list[tuple[int, int, int]]:
    """At most `count` items, evenly spaced from the first to the last, of at most `size` bytes (each item's last number).

    >>> [line for line, *_ in spread([(i, 0, 10) for i in range(9)], 5, 1000)]
    [0, 2, 4, 6, 8]
    >>> [line for line, *_ in spread([(i, 0, 10) for i in range(9)], 5, 30)]
    [0, 4, 8]
    """
    for k in range(min(count, len(items)), 0, -1):
        chosen = [items[round(i * (len(items) - 1) / max(1, k - 1))] for i in range(k)]
        if sum(length for *_, length in chosen) <= size:
            return chosen
    return []


def lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, bytes, object) of every line; nothing where there is no file. A last line that was cut is left out; one
    in the middle raises ValueError with its number."""
    start, broken = 0, ""
    for number, line in enumerate(path.open("rb") if path.exists() else (), 1):
        if broken:
            raise ValueError(broken)
        try:
            yield start, len(line), _json(line)
        except ValueError as error:
            broken = f"{path}: line {number}: not JSON ({error})"
        start += len(line)


def _json(text: bytes | str) -> Any:
    return json.loads(
        text, parse_constant=lambda _: None
    )  # NaN and infinity are no JSON, and nothing to draw


def _read(path: Path) -> Any:
    try:
        return _json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Write the page of each run named."""
    folders = [Path(a) for a in sys.argv[1:]]
    if not folders or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m reports.page runs/NAME …")
    try:
        for folder in folders:
            print(write(folder))
    except (ValueError, OSError) as error:
        sys.exit(f"reports.page: {error}")


if __name__ == "__main__":
    main()
