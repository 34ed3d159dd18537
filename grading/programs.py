r"""Judge programs that a language model wrote: does a program pass its tests?

    response ──extract_program──▶ program ─┐
    row ────────decode_tests──┬─▶ inputs ──┴──▶ [ grading/sandbox.py ] ──▶ output ─┐
                              └─▶ expected outputs ──────────────────────▶ equal? ─┴─▶ Verdict

A program passes if it ends by itself with exit status 0 and the right output on every test. The
expected outputs never enter the sandbox. Outputs are compared as LiveCodeBench's checker does it:

| tests | equal | not equal |
|---|---|---|
| text, by lines, without white space at both ends | `a b`, ` a b ` | `a b`, `a  b`; `yes`, `Yes` |
| lines of numbers, number by number, exactly | `0.50 2`, `.5  2.0` | `0.5`, `0.50000001` |
| a function's JSON, by `==` | `[1, 2]`, `[1,2.0]`; `1`, `true` | `[1, 2]`, `[2, 1]`; `1`, `"1"` |

Each step here that meets a response or an output takes time linear in its length, and memory for
as many lines, words and values as the expected output has. The trainer waits for it, and no
deadline ends it.

    python -m grading.programs     # does the sandbox work here, and how fast is it?
"""

import base64
import json
import os
import pickletools
import re
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, NamedTuple

import tyro

from config import Count, Range, validate_ranges
from grading import sandbox

UNPACKED = 1 << 30  # bytes of a row's tests; a few kilobytes of zlib data can unpack to far more


class Tests(NamedTuple):
    """The tests of a program: an expected output for each input.

    With `function` "" the program reads its input from stdin and prints its output. Otherwise
    `function` names a method of `class Solution` or a plain function. Then an input has its
    arguments, one JSON value per line, and an output is its result as JSON.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str = ""


class Verdict(NamedTuple):
    """Whether a program passed, and why not.

    `reason` is "" if it passed. Otherwise it says what the first failed test ended with: "wrong
    answer on test 3", "time limit", "memory limit", "output limit", or "error: …" with the last
    line of stderr. It is "no program" if the program is empty.
    """

    passed: bool
    reason: str


# ── extracting programs ───────────────────────────────────────────────────────────────────────────


def answer_content(response: str) -> str:
    """The content of the last closed `<answer>…</answer>`, "" if there is none: what
    grading/extract.py takes an answer from."""
    end = max(0, response.rfind("</answer>"))
    start = response.rfind("<answer>", 0, end)
    if start < 0:
        return ""
    return response[start + len("<answer>") : response.find("</answer>", start)]


def extract_program(text: str) -> str:
    r"""The last fenced block of Python, "" if there is none.

    | blocks in the text | program |
    |---|---|
    | ```` ```python ````, ```` ```python3 ````, ```` ```py ````, in any case | the last of them |
    | none of these, but ```` ``` ```` without a language | the last of them |
    | another language, or a fence that never closes | none |

    A block opens with a fence on a line of its own, or behind a tag: `<answer> ```python`. Only a
    fence of Python opens one behind other text, too: ```` The code: ```python ````. A block ends at
    the next line that begins with a fence; if that fence has a language, it opens another block.

    >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
    'print(1)\n'
    """
    blocks = {"python": "", "": ""}
    language, block = None, []
    for line in text.split("\n"):
        opened = _opened_language(line)
        if language is None:
            language, block = opened, []
        elif line.lstrip().startswith("```"):
            blocks[language] = "".join(block)
            language, block = opened or None, []
        else:
            block.append(line + "\n")
    return blocks["python"] or blocks[""]


def _opened_language(line: str) -> str | None:
    """The language of the fence that ends this line, "python" for all names of it; None if no
    block can open here."""
    before, fence, name = line.rpartition("```")
    before, language = before.strip(), name.strip().lower()
    if not fence or not re.fullmatch(r"[\w+#-]*", language):
        return None
    own_line = not before or re.fullmatch(r"<\w+>", before)
    next_to_fence = not language or not name[0].isspace()
    if language in ("python", "python3", "py"):
        return "python" if own_line or next_to_fence else None
    return language if own_line and next_to_fence else None


# ── reading tests ─────────────────────────────────────────────────────────────────────────────────


def decode_tests(row: dict) -> Tests:
    """The tests, public then private, of a row of livecodebench/code_generation_lite.

    | field | content |
    |---|---|
    | public_test_cases | JSON text: a list of {"input", "output", "testtype"} |
    | private_test_cases | the same, or base64 of zlib of a pickle of that text |
    | metadata | JSON text: an object; functional tests need its "func_name" |

    "testtype" is "stdin" or "functional", the same for all tests of a row. The pickle is parsed as
    a list of opcodes and never executed. Raises ValueError with the name of the field.
    """
    cases = _cases("public_test_cases", _text(row, "public_test_cases"))
    private = _unpack("private_test_cases", _text(row, "private_test_cases"))
    cases += _cases("private_test_cases", private)
    kinds = {case["testtype"] for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(
            f"field testtype: expected stdin for all or functional for all, found {sorted(kinds)}"
        )
    function = _function(row, cases) if kinds == {"functional"} else ""
    inputs = tuple(case["input"] for case in cases)
    outputs = tuple(case["output"] for case in cases)
    return Tests(inputs, outputs, function)


def _function(row: dict, cases: list[dict]) -> str:
    """The name of the function that functional tests call; all their values must be JSON."""
    for number, case in enumerate(cases, 1):
        arguments = [line for line in case["input"].split("\n") if line.strip()]
        for value in [*arguments, case["output"]]:
            _json(f"public_test_cases + private_test_cases: test {number}", value)
    metadata = _json("metadata", _text(row, "metadata"))
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(
            f"field metadata: functional tests need a func_name, found {function!r:.60}"
        )
    return function


def _text(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"field {field}: expected text, found {value!r:.60}")
    return value


def _json(field: str, text: str) -> Any:
    try:
        return _load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"field {field}: not valid JSON ({error})") from None


def _load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError."""
    return json.loads(text, parse_int=_exact_integer)


def _exact_integer(digits: str) -> int | Decimal:
    """The value of a decimal integer. int() takes quadratic time, and by default refuses more than
    4,300 digits; a Decimal takes linear time and is equal to the same numbers."""
    return int(digits) if len(digits) < 600 else Decimal(digits)


def _cases(field: str, text: str) -> list[dict]:
    cases = _json(field, text)
    for number, case in enumerate(cases if isinstance(cases, list) else [cases], 1):
        for key in ("input", "output", "testtype"):
            if not isinstance(case, dict) or not isinstance(case.get(key), str):
                raise ValueError(
                    f"field {field}: test {number}: expected an object with text in {key}, "
                    f"found {case!r:.60}"
                )
    return cases


_STRING_OPCODES = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_OTHER_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def _unpack(field: str, text: str) -> str:
    """The text itself if it is JSON; else the one string in base64(zlib(pickle(string)))."""
    if text.lstrip().startswith("["):
        return text
    try:
        unzip = zlib.decompressobj()
        packed = unzip.decompress(base64.b64decode(text, validate=True), UNPACKED)
        if not unzip.eof:
            raise ValueError(f"cut off, or over {UNPACKED} bytes")
        opcodes = [(opcode.name, value) for opcode, value, _ in pickletools.genops(packed)]
    except (ValueError, zlib.error) as error:
        raise ValueError(
            f"field {field}: neither JSON nor base64 of zlib of a pickle ({error})"
        ) from None
    strings = [value for name, value in opcodes if name in _STRING_OPCODES]
    foreign = {name for name, _ in opcodes} - _STRING_OPCODES - _OTHER_OPCODES
    if foreign or len(strings) != 1:
        found = sorted(foreign) or len(strings)
        raise ValueError(f"field {field}: a pickle of one string was expected, found {found}")
    return strings[0]


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────


def judge(
    programs: Sequence[str],
    tests: Sequence[Tests],
    workers: int = 2,
    seconds: float = 6.0,
    memory_mb: int = 1024,
) -> list[Verdict]:
    """One verdict per program, `workers` programs at a time; the tests of a program run in order
    until one fails.

    `seconds` is the wall-clock time of each test, with about 0.1 s for the sandbox and the
    interpreter. An interrupt ends the running programs after their current test, and starts no
    others. Raises ValueError if a program has no tests, RuntimeError if there is no sandbox.

    >>> squares = Tests(("3\\n", "-4\\n"), ("9\\n", "16\\n"))
    >>> judge(["print(int(input()) ** 2)", "print(9)"], [squares, squares])  # doctest: +SKIP
    [Verdict(passed=True, reason=''), Verdict(passed=False, reason='wrong answer on test 2')]
    """
    for number, (_, test) in enumerate(zip(programs, tests, strict=True), 1):
        if not test.inputs or len(test.inputs) != len(test.outputs):
            raise ValueError(
                f"tests of program {number}: {len(test.inputs)} inputs and "
                f"{len(test.outputs)} outputs"
            )
    problem = sandbox.unavailable()
    if problem:
        raise RuntimeError(problem)
    stop = threading.Event()

    def judge_one(program: str, test: Tests) -> Verdict:
        return _judge(program, test, seconds, memory_mb, stop)

    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(judge_one, programs, tests))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _judge(
    program: str, tests: Tests, seconds: float, memory_mb: int, stop: threading.Event
) -> Verdict:
    if not program.strip():
        return Verdict(False, "no program")
    equal = _equal_values if tests.function else _equal_lines
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        if stop.is_set():
            return Verdict(False, "interrupted")
        reason, output = sandbox.run(program, tests.function, given, seconds, memory_mb)
        if reason:
            return Verdict(False, reason)
        if not equal(expected, output):
            return Verdict(False, f"wrong answer on test {number}")
    return Verdict(True, "")


def _equal_values(expected: str, output: str) -> bool:
    """Whether two JSON texts have equal values. The second may be the program's own, not only what
    the sandbox writes: it is parsed only if it has as many values as the first.

    >>> _equal_values("[1, true]", "[1.0, 1]"), _equal_values("[1, 2]", "[2, 1]")
    (True, False)
    """
    value = _load_json(expected)
    written = json.dumps(value, default=str)
    if any(written.count(mark) != output.count(mark) for mark in "[{,"):
        return False
    try:
        return bool(_load_json(output) == value)
    except (ValueError, RecursionError):  # the output is not JSON, or nested too deeply to parse
        return False


def _equal_lines(expected: str, output: str) -> bool:
    r"""Whether all lines are equal, as text or number by number. White space at both ends of the
    text and of each line does not count.

    >>> _equal_lines("1 2\n0.50\n", "\n 1 2 \n.5"), _equal_lines("1 2\n", "1\n2\n")
    (True, False)
    >>> _equal_lines("0.5", "0.5000001")
    False
    """
    expected, output = expected.strip(), output.strip()
    if expected.count("\n") != output.count("\n"):
        return False
    pairs = zip(expected.split("\n"), output.split("\n"), strict=True)
    return all(_equal_line(first.strip(), second.strip()) for first, second in pairs)


def _equal_line(expected: str, output: str) -> bool:
    """Whether two lines are the same text, or the same number of equal numbers. A number is what
    Python's Decimal takes, as in LiveCodeBench's checker: also `1e9`, `inf`, `1_000`."""
    if expected == output:
        return True
    expected_words = expected.split()
    output_words = output.split(None, len(expected_words))  # at most one more
    if len(expected_words) != len(output_words):
        return False
    try:
        pairs = zip(expected_words, output_words, strict=True)
        return all(Decimal(first) == Decimal(second) for first, second in pairs)
    except InvalidOperation:  # a word is no number
        return False


# ── the self-test ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SelfTest:
    """Test whether the sandbox works on this machine, and how many programs per second it judges.

    Judges correct programs of both kinds, from stdin to stdout and functions, and prints for each
    kind how many passed and the rate.
    """

    programs: Count = 100
    """Number of programs of each kind."""
    workers: Annotated[int, Range(0, 1024)] = 0
    """Number of programs at a time; 0: one per CPU core of this process."""


def main() -> None:
    cfg = tyro.cli(SelfTest, prog="python -m grading.programs")
    try:
        validate_ranges(cfg)
    except ValueError as error:
        sys.exit(f"grading.programs: {error}")
    problem = sandbox.unavailable()
    if problem:
        sys.exit(f"grading.programs: {problem}")
    workers = cfg.workers or len(os.sched_getaffinity(0))
    function = "class Solution:\n    def square(self, x): return x * x"
    kinds = {
        "stdin": ("print(int(input()) ** 2)", Tests(("3",), ("9",))),
        "function": (function, Tests(("3",), ("9",), "square")),
    }
    for name, (program, test) in kinds.items():
        start = time.monotonic()
        verdicts = judge([program] * cfg.programs, [test] * cfg.programs, workers)
        rate = len(verdicts) / (time.monotonic() - start)
        passed = sum(verdict.passed for verdict in verdicts)
        print(
            f"{name}: {passed} of {len(verdicts)} passed, {rate:.0f} programs/s, "
            f"{workers} at a time"
        )


if __name__ == "__main__":
    main()
