r"""Rows of problems from files and from the hub, and where a row holds its question and answer.

| source | what is read |
|---|---|
| `file.json` | a list of rows |
| `file.jsonl`, `file.parquet`, `file.csv` | one row a line; `file.csv` has no header line |
| `file.zip` | the one .json, .jsonl or .csv file in it |
| a folder | its files, in the order of their names |
| `owner/name`, `owner/name:config@split` | a dataset of the hub, cached (default split: train) |
| `owner/name/file.jsonl` | one file of a dataset of the hub, downloaded and cached |

Layouts of a row; the first that fits is used, and each field must hold text or a number:

| row | question | answer | used by |
|---|---|---|---|
| list of two messages | `[0].value` | `[1].ground_truth.value` | the authors' training data |
| list of six texts | the first, with options | the letter in the last | MMLU's csv files |
| `prompt`, `final_answer` | `prompt[0].value` | `final_answer` | the authors' evaluation sets |
| `Correct Answer` | `Question` with shuffled options | the letter | GPQA |
| `options` or `choices` | `question` with options | `answer` (letter, index) | MMLU-Pro, MMLU |
| `messages` | `content` of the last user message | `ground_truth` | Tulu 3's RLVR-MATH |
| `question_content` | it, with `starter_code` | none, but `tests` | LiveCodeBench |
| with an answer | `question`, `problem` | see below | AIME, MATH-500, NuminaMath, OpenR1 |
| with `solution` only | `question`, `problem` | the last box of `solution` | MATH |

A list of options must be a JSON list. GPQA's options are `Correct Answer` and `Incorrect Answer
1…3`; their order is random but always the same for a question. Options are written below the
question as lines `A. …`, as in the authors' GPQA file. The answer of any other row is `answer`,
`expected_answer` or `final_answer`; if its last line is `#### 72`, the number there (GSM8K).
"""

import csv
import hashlib
import io
import json
import math
import random
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from curation.hub import dataset_file, dataset_rows
from grading.extract import extract

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".zip")
TEXT_SUFFIXES = (".json", ".jsonl", ".csv")
HUB = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<file>[\w./-]+\.\w+)|(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?)"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What `--benchmarks NAME` reads: the paper's sets by their public ids. MATH-500 and the AIMEs are
# in Table 2, MMLU and MMLU-Pro in Table 3. LiveCodeBench is the newest part of that set, January to
# April 2025.
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
    """Name → source of the evaluation sets on a command line; ValueError if two have one name.

    >>> named(["aime2024", "mine/hard.jsonl", "math500=copy.json"])
    {'aime2024': 'HuggingFaceH4/aime_2024', 'hard': 'mine/hard.jsonl', 'math500': 'copy.json'}
    """
    found: dict[str, str] = {}
    for given in sets:
        name, _, source = given.partition("=")
        if not source:
            source = BENCHMARKS.get(name, name)
            name = Path(name).stem
        if not name.strip(".") or "/" in name:
            raise ValueError(f"{given!r}: the name of a set is empty or has a /; use NAME=FILE")
        if found.setdefault(name, source) != source:
            raise ValueError(
                f"two sets are called {name}: {found[name]} and {source}; "
                "name one of them with NAME=FILE"
            )
    return found


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────

Place = str  # `file:number`, from 1; of a .jsonl file the number of the line


def rows(source: str | Path) -> Iterator[tuple[Place, Any]]:
    """The rows of a source one by one, each with its place for messages.

    Raises FileNotFoundError for what is neither a file nor a hub id, ValueError naming file and
    line for what cannot be decoded, and OSError if the hub cannot be reached.
    """
    if not str(source).strip():
        raise ValueError("the name of a file or dataset is empty")
    path = Path(source)
    hub = HUB.fullmatch(str(source))
    # `folder/file.json` has the form of a hub id, but such an id is not likely.
    is_file_name = path.suffix in SUFFIXES and not (hub and hub["file"])
    if path.is_dir() and not (hub and _is_dataset(path)):
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: holds no file with one of the endings {', '.join(SUFFIXES)}")
        for file in files:
            yield from _file_rows(file)
    elif path.is_file():
        yield from _file_rows(path)
    elif hub and not is_file_name:
        yield from _hub_rows(str(source), hub)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder, and not a hub id (owner/name)")


def _is_dataset(folder: Path) -> bool:
    """Whether a folder is laid out as a dataset of the hub; `datasets` then reads it."""
    return any(file.name == "README.md" or file.is_dir() for file in folder.iterdir())


def _file_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: unknown ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".zip":
        yield from _zip_rows(path)
    elif path.suffix == ".parquet":
        yield from _numbered(path, _parquet_items(path))
    else:
        yield from _text_rows(path.name, path, path.open("rb"))


def _parquet_items(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)})") from None


def _zip_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix in TEXT_SUFFIXES]
            if len(names) != 1:
                raise ValueError(
                    f"{path}: expected one .json, .jsonl or .csv file in it, found {len(names)}"
                )
            yield from _text_rows(names[0], path, archive.open(names[0]))
    # RuntimeError: it has a password; NotImplementedError: an unknown compression
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable zip file ({_first_line(error)})") from None


def _text_rows(name: str, path: Path, binary: IO[bytes]) -> Iterator[tuple[Place, Any]]:
    """Rows of a .json, .jsonl or .csv file; the text of a .json file is read as a whole."""
    # utf-8-sig: some programs begin a file with a byte order mark, which is no part of its text.
    with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        try:
            if name.endswith(".jsonl"):
                yield from _jsonl_rows(path, file)
            elif name.endswith(".csv"):
                numbered = _numbered(path, csv.reader(file))
                yield from ((place, row) for place, row in numbered if row)
            else:
                yield from _numbered(path, _json_list(path, file.read()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except csv.Error as error:
            raise ValueError(f"{path}: not a readable csv file ({error})") from None


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[Place, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: row {number}: not valid JSON ({_why(error)})") from None
        yield f"{path.name}:{number}", row


def _json_list(path: Path, text: str) -> Iterator[Any]:
    """The items of a JSON list, decoded one at a time, so that they are not all in memory."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}: expected a JSON list of problems, found {text[at : at + 20]!r}")
    at = _skip_space(text, at + 1)
    try:
        while text[at : at + 1] != "]":
            item, at = decoder.raw_decode(text, at)
            yield item
            at = _skip_space(text, at)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        at = _skip_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("expected nothing after the list", text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        at = error.pos if isinstance(error, json.JSONDecodeError) else at
        where = json.JSONDecodeError("", text, at)
        place = f"line {where.lineno} column {where.colno}"
        raise ValueError(f"{path}: {place}: not valid JSON ({_why(error)})") from None


def _why(error: Exception) -> str:
    """What is wrong with a JSON text, without a place."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_SPACE = re.compile(r"\s*")


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _numbered(path: Path, items: Iterable[Any]) -> Iterator[tuple[Place, Any]]:
    return ((f"{path.name}:{number}", item) for number, item in enumerate(items, 1))


def _hub_rows(source: str, hub: re.Match) -> Iterator[tuple[Place, Any]]:
    try:
        if hub["file"]:
            rows_found = _file_rows(dataset_file(hub["id"], hub["file"]))
        else:
            items = dataset_rows(hub["id"], hub["config"], hub["split"] or "train")
            rows_found = _numbered(Path(hub["id"]), _unbroken(source, items))
    except OSError as error:
        if Path(hub["id"]).is_dir():
            raise OSError(f"{source}: this folder is laid out as a data set, but {error}") from None
        raise OSError(
            f"{source}: no such file here, and the hub does not give it ({error}); or use a local "
            'copy: JSON lines of {"question": …, "answer": …}, or any layout that '
            "`python -m pydoc curation.formats` lists"
        ) from None
    yield from rows_found


def _unbroken(source: str, items: Iterator[Any]) -> Iterator[Any]:
    """The rows of a data set that can break off; its end is never taken for the end of the set."""
    number = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise OSError(
                f"{source}: its rows break off after row {number} ({_first_line(error)})"
            ) from None
        number += 1
        yield item


# ── question and answer ───────────────────────────────────────────────────────────────────────────


def question_answer(item: Any) -> tuple[str, str]:
    r"""Question and gold answer of a row in any of the layouts above.

    Raises ValueError that names the field.

    >>> question_answer({"question": "2+2?", "choices": ["3", "4"], "answer": 1})
    ('2+2?\n\nA. 3\nB. 4', 'B')
    >>> question_answer({"problem": "1+1?", "solution": r"It is $\boxed{2}$."})
    ('1+1?', '2')
    """
    if isinstance(item, list):
        if len(item) == 6 and all(isinstance(cell, str) for cell in item):
            question, *options = (_text_at(item, i) for i in range(5))
            return with_options(question, options), _option_letter(item[5].strip(), 4, "[5]")
        return _text_at(item, 0, "value"), _text_at(item, 1, "ground_truth", "value")
    if not isinstance(item, dict):
        raise ValueError(
            f"expected a list (the authors' form) or an object, found {type(item).__name__}"
        )
    if isinstance(item.get("prompt"), list):
        return _text_at(item, "prompt", 0, "value"), _text_at(item, "final_answer")
    if "Correct Answer" in item:
        return _gpqa(item)
    options = item.get("options") or item.get("choices")
    if options:
        return _multiple_choice(item, options)
    if "messages" in item:
        return _last_user_message(item)
    if "question_content" in item:
        return _programming_problem(item), ""
    return _text_at(item, "question" if "question" in item else "problem"), _answer(item)


def _gpqa(item: Mapping[str, Any]) -> tuple[str, str]:
    question = _text_at(item, "Question")
    right = _text_at(item, "Correct Answer")
    options = [right, *(_text_at(item, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    random.Random(hashlib.blake2b(question.encode()).digest()).shuffle(options)
    return with_options(question, options), LETTERS[options.index(right)]


def _multiple_choice(item: Mapping[str, Any], options: Any) -> tuple[str, str]:
    name = "options" if item.get("options") else "choices"
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise ValueError(f"field {name}: expected a list of options, found {options!r:.60}")
    options = [_text_at(item, name, i) for i in range(len(options))]
    answer = item.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        letter = LETTERS[answer]
    else:
        letter = str(answer).strip()
    question = with_options(_text_at(item, "question"), options)
    return question, _option_letter(letter, len(options), "answer")


def _last_user_message(item: Mapping[str, Any]) -> tuple[str, str]:
    messages = item["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"field messages: expected a list of objects, found {messages!r:.60}")
    by_user = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    last = by_user[-1] if by_user else 0
    question = without_examples(_text_at(item, "messages", last, "content"))
    return question, _text_at(item, "ground_truth")


_QUESTION = re.compile(r"^Question:[ \t]*", re.M)
_NO_ANSWER = re.compile(r"\s*^Answer:\s*\Z", re.M)


def without_examples(text: str) -> str:
    """The question of a prompt with solved examples, each from "Question:" on: the last one. A text
    that does not begin with "Question:" stays as it is.

    >>> without_examples("Question: 1+1?\\n\\nAnswer: 2.\\n\\nQuestion: 2+3?\\n\\nAnswer:")
    '2+3?'
    >>> without_examples("Simplify.\\nQuestion: what is left?")
    'Simplify.\\nQuestion: what is left?'
    """
    if not _QUESTION.match(text.lstrip()):
        return text
    *_, last = _QUESTION.finditer(text.lstrip())
    question = _NO_ANSWER.sub("", text.lstrip()[last.end() :]).strip()
    if not question:
        raise ValueError("field messages: the question is empty")
    return question


STDIN_PROGRAM = (
    "\n\nWrite a Python program that reads the input from stdin and writes the answer to stdout. "
    "Put the whole of it inside the answer tags, in a ```python block."
)
STARTER_PROGRAM = (
    "\n\nComplete this Python code. Put the whole of it inside the answer tags, in a ```python "
    "block.\n```python\n{starter}\n```"
)


def _programming_problem(item: Mapping[str, Any]) -> str:
    question = _text_at(item, "question_content")
    starter = item.get("starter_code")
    if starter:
        return question + STARTER_PROGRAM.format(starter=starter)
    return question + STDIN_PROGRAM


def _answer(item: Mapping[str, Any]) -> str:
    """The answer of a row with no special layout."""
    names = ("answer", "expected_answer", "final_answer")
    filled = [name for name in names if item.get(name) is not None]
    usable = [name for name in filled if not is_placeholder(str(item[name]))]
    if not usable and item.get("solution") is not None:
        solution = _text_at(item, "solution")
        boxed = extract(f"<answer>{solution}</answer>", require_boxed=True)
        if boxed:
            return boxed
        if not filled:
            raise ValueError(
                "field solution: holds no \\boxed{} answer, and there is no field answer"
            )
    name = [*usable, *filled, "answer"][0]
    answer = _text_at(item, name)
    _, marker, last_line = answer.rpartition("\n#### ")
    return last_line.strip() if marker else answer


_PLACEHOLDER = re.compile(r"\s*|not[\s_-]?found|n/a|nan|null", re.I)


def is_placeholder(answer: str) -> bool:
    """Whether a gold says that there is none, such as NuminaMath's `notfound`.

    >>> [is_placeholder(gold) for gold in ("notfound", " ", "NaN", "0", "no solution")]
    [True, True, True, False, False]
    """
    return _PLACEHOLDER.fullmatch(answer.strip()) is not None


def refuse_twice(item: Any, place: Place, place_of_id: dict[str, Place]) -> None:
    """Raise ValueError if the `id` of a row, if it has one, is in `place_of_id`; else add it."""
    name = item.get("id") if isinstance(item, dict) else None
    if name is not None and place_of_id.setdefault(str(name), place) != place:
        raise ValueError(f"field id: {name!r} is also the id of {place_of_id[str(name)]}")


def tests(item: Any) -> dict[str, str]:
    """The fields of a programming problem that hold its tests; {} for any other problem. Raises
    ValueError for a field that is not text."""
    if not (isinstance(item, dict) and "public_test_cases" in item):
        return {}
    names = ("public_test_cases", "private_test_cases", "metadata", "starter_code")
    found = {name: item.get(name) or "" for name in names}
    for name, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f"field {name}: expected text, found {text!r:.60}")
    return found


def with_options(question: str, options: Sequence[Any]) -> str:
    """The question with its options below it, one a line, as in the authors' GPQA file."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return f"{question}\n\n" + "\n".join(lines)


def _option_letter(letter: str, num_options: int, field: str) -> str:
    letters = LETTERS[:num_options]
    if len(letter) != 1 or letter not in letters:
        raise ValueError(
            f"field {field}: expected a letter of {letters} or an index, found {letter!r:.60}"
        )
    return letter


def _text_at(item: Any, *steps: str | int) -> str:
    """The text, or the number as text, that is reached by the keys and indices `steps`."""
    try:
        for step in steps:
            item = item[step]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"field {_field_name(steps)} is missing") from None
    text = item
    if isinstance(item, float) and math.isfinite(item):
        text = str(int(item) if item.is_integer() else item)
    elif isinstance(item, int) and not isinstance(item, bool):
        text = str(item)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"field {_field_name(steps)}: expected non-empty text, found {item!r:.60}")
    if _SURROGATE.search(text):
        raise ValueError(
            f"field {_field_name(steps)}: holds half of a surrogate pair, no character"
        )
    return text


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _field_name(steps: Sequence[str | int]) -> str:
    """As in messages: `[1].ground_truth.value`."""
    parts = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps]
    return "".join(parts).removeprefix(".")
