r"""Rows of problems from files and from the hub, and where a row keeps its question and its answer.

| source | what is read |
|---|---|
| `file.json`, `file.jsonl`, `file.parquet`, `file.csv` | a list of rows; a row a line; columns; lines without a heading |
| `file.zip`, a folder | the file in it; its files, in order of name |
| `owner/name`, `owner/name:config@split` | a dataset of the hub (default split: train), streamed and cached by `datasets` |
| `owner/name/file.jsonl` | one file of a dataset of the hub, downloaded and cached |

Known layouts of a row; the first that fits is taken, and every field must hold text (or a number):

| row | question | answer | used by |
|---|---|---|---|
| a list of two messages | `[0].value` | `[1].ground_truth.value` | the authors' training data |
| six texts | the first, with options | the letter in the last | MMLU's csv files |
| `final_answer`, `prompt` | `prompt[0].value` | `final_answer` | the authors' evaluation sets |
| `Correct Answer`, `Incorrect Answer 1…3` | `Question` with options in a fixed random order | the letter | GPQA |
| `options` or `choices` (a list) | `question` with options | `answer`, a letter or an index | MMLU-Pro, MMLU |
| `messages`, `ground_truth` | the last `messages[…].content` of the user | `ground_truth` | Tulu 3's RLVR-MATH |
| `question_content`, `public_test_cases` | the first with `starter_code` | tests, see `tests` | LiveCodeBench |
| anything else | `question`, `problem` | `answer`, `expected_answer`, `final_answer` | AIME, MATH-500, NuminaMath, OpenR1 |
| the same without an answer | `question`, `problem` | the last box of `solution` | MATH |

Of an answer with a last line `#### 72`, that number is the answer (GSM8K). Options are written below the question as `A. …`
lines, as the authors' GPQA file has them.
"""

import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grading.extract import extract

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".zip")
HUB = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.\w+)|(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?)"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What `--benchmarks NAME` reads: the paper's sets by their public ids. MATH-500 and the AIMEs are Table 2, MMLU and MMLU-Pro
# Table 3. Of LiveCodeBench it is the newest part of the set, January to April 2025.
BENCHMARKS = {
    "aime2024": "HuggingFaceH4/aime_2024",
    "aime2025": "yentinglin/aime_2025",
    "math500": "HuggingFaceH4/MATH-500@test",
    "gpqa_diamond": "Idavidrein/gpqa:gpqa_diamond",
    "mmlu": "cais/mmlu:all@test",
    "mmlu_pro": "TIGER-Lab/MMLU-Pro@test",
    "livecodebench": "livecodebench/code_generation_lite/test6.jsonl",
}


def named(sets: Sequence[str]) -> dict[str, str]:
    """Name → source of the evaluation sets on a command line; ValueError when two have one name.

    >>> named(["aime2024", "mine/hard.jsonl", "math500=copy.json"])
    {'aime2024': 'HuggingFaceH4/aime_2024', 'hard': 'mine/hard.jsonl', 'math500': 'copy.json'}
    """
    found: dict[str, str] = {}
    for given in sets:
        name, _, source = given.partition("=")
        name, source = (name, source) if source else (Path(name).stem, BENCHMARKS.get(name, name))
        if found.setdefault(name, source) != source:
            raise ValueError(
                f"two sets are called {name}: {found[name]} and {source}; name one of them with NAME=FILE"
            )
    return found


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, row) one by one, where place is `file:number`, from 1, for messages. Raises FileNotFoundError for what is
    neither a file nor a hub id, ValueError naming file and line for what cannot be decoded, OSError when the hub fails."""
    path, hub = Path(source), HUB.fullmatch(str(source))
    if path.is_dir() and not (hub and _is_dataset(path)):
        files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: holds no file with one of the endings {', '.join(SUFFIXES)}")
        for file in files:
            yield from _file(file)
    elif path.is_file():
        yield from _file(path)
    elif hub and not (path.suffix in SUFFIXES and not hub["file"]):
        yield from _hub(str(source), hub)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder, and not a hub id (owner/name)")


def _is_dataset(path: Path) -> bool:
    """Whether a local folder is laid out as a dataset of the hub, which `datasets` then reads from there."""
    return any(file.name == "README.md" or file.is_dir() for file in path.iterdir())


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: unknown ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            inside = [
                name
                for name in archive.namelist()
                if Path(name).suffix in (".json", ".jsonl", ".csv")
            ]
            if len(inside) != 1:
                raise ValueError(
                    f"{path}: expected one .json, .jsonl or .csv file in it, found {len(inside)}"
                )
            yield from _text(inside[0], path, archive.open(inside[0]))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        yield from _numbered(path, (item for batch in batches for item in batch.to_pylist()))
    else:
        yield from _text(path.name, path, path.open("rb"))


def _text(name: str, path: Path, binary: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a .json, .jsonl or .csv file; of these only .json is held as a whole, as text."""
    with io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
        try:
            if name.endswith(".jsonl"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path.name}:{number}", json.loads(line)
            elif name.endswith(".csv"):
                yield from _numbered(path, csv.reader(file))
            else:
                yield from _numbered(path, _json_list(path, file.read()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except json.JSONDecodeError as error:
            where = (
                f"row {number}"
                if name.endswith(".jsonl")
                else f"line {error.lineno} column {error.colno}"
            )
            raise ValueError(f"{path}: {where}: not valid JSON ({error.msg})") from None


def _json_list(path: Path, text: str) -> Iterator[Any]:
    """The items of a JSON list, decoded one at a time."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at = blank.match(text).end()
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}: expected a JSON list of problems, found {text[at : at + 20]!r}")
    at = blank.match(text, at + 1).end()
    while text[at : at + 1] != "]":
        item, at = decoder.raw_decode(text, at)
        yield item
        at = blank.match(text, at).end()
        if text[at : at + 1] == ",":
            at = blank.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, at)


def _numbered(path: Path, items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path.name}:{number}", item) for number, item in enumerate(items, 1))


def _hub(source: str, hub: re.Match) -> Iterator[tuple[str, Any]]:
    try:
        if hub["file"]:
            from huggingface_hub import hf_hub_download

            yield from _file(Path(hf_hub_download(hub["id"], hub["file"], repo_type="dataset")))
            return
        from datasets import load_dataset

        items = iter(
            load_dataset(hub["id"], hub["config"], split=hub["split"] or "train", streaming=True)
        )
        first = next(items, None)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise OSError(
            f"{source}: no such file here, and the hub does not give it ({why}); a local copy does as well: JSON lines of "
            '{"question": …, "answer": …}, or any layout that `python -m pydoc curation.formats` lists'
        ) from None
    if first is not None:
        yield from _numbered(Path(hub["id"]), (item for part in ([first], items) for item in part))


# ── question and answer ──────────────────────────────────────────────────────────────────────────────────────────────


def question_answer(item: Any) -> tuple[str, str]:
    r"""Question and gold answer of a row in any of the layouts above. Raises ValueError that names the field.

    >>> question_answer({"question": "2+2?", "choices": ["3", "4"], "answer": 1})
    ('2+2?\n\nA. 3\nB. 4', 'B')
    >>> question_answer({"problem": "1+1?", "solution": r"It is $\boxed{2}$."})
    ('1+1?', '2')
    """
    if isinstance(item, list) and len(item) == 6 and all(isinstance(cell, str) for cell in item):
        return with_options(item[0], item[1:5]), _one_of(item[5].strip(), 4, "[5]")
    if isinstance(item, list):
        return _text_at(item, 0, "value"), _text_at(item, 1, "ground_truth", "value")
    if not isinstance(item, dict):
        raise ValueError(
            f"expected a list (the authors' form) or an object, found {type(item).__name__}"
        )
    if isinstance(item.get("prompt"), list):
        return _text_at(item, "prompt", 0, "value"), _text_at(item, "final_answer")
    if "Correct Answer" in item:
        question, right = _text_at(item, "Question"), _text_at(item, "Correct Answer")
        options = [right, *(_text_at(item, f"Incorrect Answer {i}") for i in (1, 2, 3))]
        random.Random(hashlib.blake2b(question.encode()).digest()).shuffle(options)
        return with_options(question, options), LETTERS[options.index(right)]
    if isinstance(options := item.get("options") or item.get("choices"), list):
        answer = item.get("answer")
        letter = (
            LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 26 else str(answer).strip()
        )
        return with_options(_text_at(item, "question"), options), _one_of(
            letter, len(options), "answer"
        )
    if "messages" in item:
        asked = [i for i, m in enumerate(item["messages"]) if m.get("role") == "user"]
        return _text_at(item, "messages", asked[-1] if asked else 0, "content"), _text_at(
            item, "ground_truth"
        )
    if "question_content" in item:
        starter = item.get("starter_code") or ""
        return _text_at(item, "question_content") + CODE[bool(starter)].format(starter=starter), ""
    question = _text_at(
        item, next((name for name in ("question", "problem") if name in item), "problem")
    )
    name = next(
        (
            name
            for name in ("answer", "expected_answer", "final_answer")
            if item.get(name) is not None
        ),
        "answer",
    )
    if name not in item and "solution" in item:
        if box := extract(f"<answer>{_text_at(item, 'solution')}</answer>", require_boxed=True):
            return question, box
        raise ValueError("field solution: holds no \\boxed{} answer, and there is no field answer")
    answer = _text_at(item, name)
    return question, answer.rpartition("\n#### ")[2].strip() if "\n#### " in answer else answer


CODE = {
    False: "\n\nWrite a Python program that reads the input from stdin and writes the answer to stdout. Put the whole of it "
    "inside the answer tags, in a ```python block.",
    True: "\n\nComplete this Python code. Put the whole of it inside the answer tags, in a ```python block.\n"
    "```python\n{starter}\n```",
}


def refuse_twice(item: Any, place: str, places: dict[str, str]) -> None:
    """Note in `places` where the row's `id`, if it has one, was seen; ValueError when that was elsewhere."""
    name = item.get("id") if isinstance(item, dict) else None
    if name is not None and places.setdefault(str(name), place) != place:
        raise ValueError(f"field id: {name!r} is also the id of {places[str(name)]}")


def tests(item: Any) -> dict[str, str]:
    """The fields of a programming problem that hold its tests, as in the file; {} for any other problem."""
    if not (isinstance(item, dict) and "public_test_cases" in item):
        return {}
    return {
        name: item.get(name) or ""
        for name in ("public_test_cases", "private_test_cases", "metadata", "starter_code")
    }


def with_options(question: str, options: list[Any]) -> str:
    """The question with its options below it, one a line, as the authors' GPQA file has them."""
    return f"{question}\n\n" + "\n".join(
        f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


def _one_of(letter: str, options: int, field: str) -> str:
    if len(letter) != 1 or letter not in LETTERS[:options]:
        raise ValueError(
            f"field {field}: expected a letter of {LETTERS[:options]} or an index, found {letter!r:.60}"
        )
    return letter


def _text_at(item: Any, *steps: str | int) -> str:
    name = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps
    ).removeprefix(".")
    try:
        for step in steps:
            item = item[step]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"field {name} is missing") from None
    if isinstance(item, int | float) and not isinstance(item, bool):
        item = str(int(item)) if isinstance(item, float) and item.is_integer() else str(item)
    if not isinstance(item, str) or not item.strip():
        raise ValueError(f"field {name}: expected non-empty text, found {item!r:.60}")
    return item
