r"""Judge programs that a language model wrote: does a program pass its tests?

    response ──extract_program──▶ program ─┐
    row ────────decode_tests──┬─▶ inputs ──┴──▶ [ grading/sandbox.py ] ──▶ output ─┐
                              └─▶ expected outputs ──────────────────────▶ equal? ─┴─▶ Verdict

A program passes if it ends by itself with exit status 0 and the right output on every test. The
expected outputs never enter the sandbox. How outputs are compared:

| tests | equal | not equal |
|---|---|---|
| text, by lines, without white space at their ends | `a b`, `a b ` | `a b`, `a  b`; `yes`, `Yes` |
| lines of numbers, number by number, exactly | `0.50 2`, `.5  2.0` | `0.5`, `0.50000001` |
| a function's JSON, by `==` | `[1, 2]`, `[1,2.0]`; `1`, `true` | `[1, 2]`, `[2, 1]`; `1`, `"1"` |

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
from decimal import Decimal
from typing import Any, NamedTuple

import tyro

from grading import sandbox

PROGRAM = 10  # the time limit of a whole program, in time limits of one test
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


def extract_program(text: str) -> str:
    r"""The last fenced block of Python, "" if there is none.

    | blocks in the text | program |
    |---|---|
    | ```` ```python ````, ```` ```python3 ````, ```` ```py ````, in any case | the last of them |
    | none of these, but ```` ``` ```` without a language | the last of them |
    | another language, or a fence that never closes | none |

    A fence is on a line of its own, or with a tag: `<answer> ```python`, ```` ``` </answer> ````.

    >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
    'print(1)\n'
    """
    last_python, last_unnamed = "", ""
    language, block = None, []
    for line in text.split("\n"):
        fence = re.fullmatch(r"\s*(?:<\w+>)?\s*```\s*([\w+#-]*)\s*(?:</\w+>)?\s*", line)
        if language is None:
            if fence:
                language, block = fence[1].lower(), []
        elif fence and not fence[1]:
            if language in ("python", "python3", "py"):
                last_python = "".join(block)
            elif language == "":
                last_unnamed = "".join(block)
            language = None
        else:
            block.append(line + "\n")
    return last_python or last_unnamed


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
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"field {field}: not valid JSON ({error})") from None


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

    `seconds` is the wall-clock time of one test, with about 0.1 s for the sandbox and the
    interpreter. All tests of a program together get `PROGRAM` times as much. An interrupt ends
    the running programs after their current test, and starts no others. Raises ValueError if a
    program has no tests, RuntimeError if there is no sandbox.

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
    due = time.monotonic() + PROGRAM * seconds
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        if stop.is_set():
            return Verdict(False, "interrupted")
        left = max(0.0, min(seconds, due - time.monotonic()))
        reason, output = sandbox.run(program, tests.function, given, left, memory_mb)
        if reason:
            return Verdict(False, reason)
        if not equal(expected, output):
            return Verdict(False, f"wrong answer on test {number}")
    return Verdict(True, "")


def _equal_values(expected: str, output: str) -> bool:
    value = json.loads(expected)
    try:
        return bool(json.loads(output) == value)
    except (ValueError, RecursionError):  # the output is not JSON, or nested too deeply to parse
        return False


def _equal_lines(expected: str, output: str) -> bool:
    r"""Whether all lines are equal, as text or number by number. White space at the ends of lines
    and at the end of the text does not count.

    >>> _equal_lines("1 2\n0.50\n", "1 2 \n.5"), _equal_lines("1 2\n", "1\n2\n")
    (True, False)
    >>> _equal_lines("0.5", "0.5000001")
    False
    """
    expected_lines, output_lines = _lines(expected), _lines(output)
    if len(expected_lines) != len(output_lines):
        return False
    return all(
        expected_line == output_line or _equal_numbers(expected_line, output_line)
        for expected_line, output_line in zip(expected_lines, output_lines, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?", re.ASCII)


def _equal_numbers(expected: str, output: str) -> bool:
    expected_words, output_words = expected.split(), output.split()
    if not all(_NUMBER.fullmatch(word) for word in expected_words + output_words):
        return False
    return [Decimal(word) for word in expected_words] == [Decimal(word) for word in output_words]


# ── the self-test ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SelfTest:
    """Test whether the sandbox works on this machine, and how many programs per second it judges.

    Judges correct programs of both kinds, from stdin to stdout and functions, and prints for each
    kind how many passed and the rate.
    """

    programs: int = 100
    """Number of programs of each kind."""
    workers: int = 0
    """Number of programs at a time; 0: one per CPU core of this process."""


def main() -> None:
    cfg = tyro.cli(SelfTest, prog="python -m grading.programs")
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
