"""Write a run as one HTML page: curves, rollouts, and V(s_t), Â_t and log-prob of each token.

    python -m reports.page runs/NAME ...      writes runs/NAME/report.html

The page is one file: reports/page.html with the run's data in it. It opens in a browser without a
server or a network. It can be written while the run goes on or after the run died.

What a model wrote is data in the page and never markup: it stands in a JSON block that no text can
close, and the script shows it as text only. The page's Content-Security-Policy allows the page's
own script and style and nothing else.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from checkpoint import is_run_config
from curation.files import JsonLine, read_jsonl, write_atomically
from reports.metrics import follows_format, reflects, significant

TEMPLATE = Path(__file__).with_name("page.html")
ROLLOUTS = 400  # rollouts in a page, and their bytes: what a browser loads at once
BYTES = 8_000_000


def write(folder: Path, rollouts: int = ROLLOUTS, size: int = BYTES) -> Path:
    """Write `folder`/report.html, with at most `rollouts` rollouts of about `size` bytes.

    Returns its path. Raises ValueError if the folder is not a run folder or one of its files cannot
    be parsed.
    """
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    for tag in ("style", "script"):
        code = f"{head}{tail}".split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        head = head.replace(f"{{{{{tag}}}}}", f"'sha256-{digest}'")
    path = folder / "report.html"
    write_atomically(path, [head, embedded(collect(folder, rollouts, size)), tail])
    return path


def embedded(data: Any) -> str:
    """JSON that can stand in a <script> element: it has no tag and no JavaScript line separator.

    >>> embedded({"text": "</script>&"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Half a surrogate pair cannot be UTF-8; it is written as a JSON escape.
    text = text.encode("utf-8", "backslashreplace").decode()
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def collect(folder: Path, rollouts: int, size: int) -> dict[str, Any]:
    """What the page shows: settings, metrics by name, evaluations, time, and some of the rollouts.

    Raises ValueError if the folder is not a run folder or one of its files cannot be parsed.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.json; expected runs/NAME")
    config = load_json(folder / "config.json")
    if not is_run_config(config):
        raise ValueError(
            f"{folder}: not a run folder, its config.json is not a run's; expected runs/NAME"
        )
    steps = [line.value for line in read_jsonl(folder / "metrics.jsonl", parse_json)]
    names = dict.fromkeys(name for record in steps for name in record)
    evaluations = [line.value for line in read_jsonl(folder / "evaluations.jsonl", parse_json)]
    summary = folder / "summary.json"
    chosen, counted = choose(folder / "rollouts.jsonl", rollouts, size)
    return {
        "run": folder.resolve().name,
        "config": config,
        "summary": load_json(summary) if summary.exists() else None,
        "metrics": {name: [shortened(record.get(name)) for record in steps] for name in names},
        "evaluations": [
            {name: shortened(value) for name, value in record.items()} for record in evaluations
        ],
        "rollouts": chosen,
        "counted": counted,
    }


def choose(path: Path, count: int, size: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """At most `count` rollouts of a rollouts.jsonl, of about `size` bytes, and how many there are.

    The chosen rollouts are spread evenly over the file and so over the steps. Those with numbers
    for each token come first and may take three quarters of the bytes; those without fill the rest.
    """
    detailed: list[JsonLine] = []
    plain: list[JsonLine] = []
    for line in read_jsonl(path, parse_json):
        kind = detailed if "pieces" in line.value else plain
        kind.append(line._replace(value=None))  # the file may not fit into memory
    counted = {"all": len(detailed) + len(plain), "detailed": len(detailed)}
    chosen = spread(detailed, count, size * 3 // 4)
    left = size - sum(line.length for line in chosen)
    chosen += spread(plain, count - len(chosen), left)
    rollouts = []
    for line in sorted(chosen):
        with path.open("rb") as file:
            file.seek(line.start)
            rollout = parse_json(file.read(line.length))
        rollouts.append(described(rollout, line.number))
    return rollouts, counted


def described(rollout: dict[str, Any], number: int) -> dict[str, Any]:
    """A rollout with what the page's table filters by; its response once, whole or in pieces."""
    facts = {
        "line": number,
        "reflects": reflects(rollout["response"]),
        "format": follows_format(rollout["response"]),
    }
    if "pieces" in rollout:
        rollout = {name: value for name, value in rollout.items() if name != "response"}
    return rollout | facts


def spread(lines: Sequence[JsonLine], count: int, size: int) -> list[JsonLine]:
    """At most `count` lines of at most `size` bytes, evenly spaced from the first to the last.

    >>> lines = [JsonLine(number, start=0, length=10, value=None) for number in range(9)]
    >>> [line.number for line in spread(lines, 5, 1000)]
    [0, 2, 4, 6, 8]
    >>> [line.number for line in spread(lines, 5, 30)]
    [0, 4, 8]
    """
    for k in range(min(count, len(lines)), 0, -1):
        chosen = [lines[round(i * (len(lines) - 1) / max(1, k - 1))] for i in range(k)]
        if sum(line.length for line in chosen) <= size:
            return chosen
    return []


def parse_json(text: bytes) -> Any:
    """JSON with None for NaN and infinity: standard JSON, which a browser parses, has neither."""
    return json.loads(text, parse_constant=lambda _: None)


def load_json(path: Path) -> Any:
    """The value of a JSON file; ValueError if it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def shortened(value: Any) -> Any:
    """A float to five significant digits; anything else as it is."""
    return significant(value, 5) if isinstance(value, float) else value


@dataclass(frozen=True)
class Options:
    """The command line."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="runs/NAME ...")]
    """Run folders."""


def main() -> None:
    """Write the page of each run."""
    options = tyro.cli(Options, description=__doc__, prog="python -m reports.page")
    if not options.runs:
        sys.exit("reports.page: expected at least one run folder, such as runs/NAME")
    try:
        for folder in options.runs:
            print(write(folder))
    except (ValueError, OSError) as error:
        sys.exit(f"reports.page: {error}")


if __name__ == "__main__":
    main()
