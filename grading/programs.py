r"""Judge programs that a language model wrote: each runs in a sandbox, and what it prints is compared outside of it.

    response ──extract_program──▶ program ─┐
    dataset row ──decode_tests──▶ inputs ──┴──▶ [ grading/sandbox.py: no network, no files, limits ] ──▶ output ──┐
                      expected outputs, which never enter it ─────────────────────────────────── equal? ──┴──▶ Verdict

A program passes if for every test it ends by itself, with exit status 0 and the right output. Outputs are compared thus:

| tests | equal | not equal |
|---|---|---|
| stdout, line by line, but for white space at the ends of lines and of all | `a b`, `a b ` | `a b`, `a  b`; `yes`, `Yes` |
| two lines of numbers, number by number, exactly | `0.50 2`, `.5  2.0` | `0.5`, `0.50000001` |
| a function's result as JSON, by Python's `==` | `[1, 2]`, `[1,2.0]`; `1`, `true` | `[1, 2]`, `[2, 1]`; `1`, `"1"` |

    python -m grading.programs     # does it work here, and how many programs a second?
"""

import base64
import json
import os
import pickletools
import re
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, NamedTuple

from grading import sandbox

PROGRAM = 10  # all tests of a program together get this many times the seconds of one
UNPACKED = 1 << 30  # bytes of a row's tests; a few kilobytes of zlib can hold more than any memory


class Tests(NamedTuple):
    """What a program must pass: an output for each input.

    `function` is "" for a program from stdin to stdout. Else it is the method of `class Solution`, or the plain function,
    to call; an input then holds its arguments, one JSON value a line, and an output is the JSON of its result.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str = ""


class Verdict(NamedTuple):
    """`reason` is "" if passed, else of the first test that failed: "wrong answer on test 3", "time limit", "memory limit",
    "output limit", "error: …" with the last line of stderr, or "no program"."""

    passed: bool
    reason: str


# ── text to program, row to tests ──────────────────────────────────────────────────────────────────────────────────────


def extract_program(text: str) -> str:
    r"""The last fenced block of Python, "" if there is none.

    | blocks | program |
    |---|---|
    | ```` ```python ````, ```` ```python3 ````, ```` ```py ````, upper or lower case | the last of them |
    | none of these, but bare ```` ``` ```` | the last of them |
    | another language, or a fence that never closes | none |

    A fence stands on a line of its own, or with a tag: `<answer> ```python`, ```` ``` </answer> ````.

    >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
    'print(1)\n'
    """
    found: dict[bool, str] = {}
    language, block = None, []
    for line in text.split("\n"):
        fence = re.fullmatch(r"\s*(?:<\w+>)?\s*```\s*([\w+#-]*)\s*(?:</\w+>)?\s*", line)
        if language is None:
            if fence:
                language, block = fence[1].lower(), []
        elif fence and not fence[1]:
            if language in ("python", "python3", "py", ""):
                found[language != ""] = "".join(block)
            language = None
        else:
            block.append(line + "\n")
    return found.get(True) or found.get(False) or ""


def decode_tests(row: dict) -> Tests:
    """The tests, public then private, of a row of livecodebench/code_generation_lite.

    | field | content |
    |---|---|
    | public_test_cases | JSON text, a list of {"input", "output", "testtype": "stdin" or "functional"} |
    | private_test_cases | the same, or base64 of zlib of a pickle of that text |
    | metadata | JSON text, an object; for functional tests it names the function: {"func_name": …} |

    The pickle is read as a list of opcodes and never run. Raises ValueError naming the field.
    """
    cases = _cases("public_test_cases", _text(row, "public_test_cases"))
    cases += _cases(
        "private_test_cases", _unpack("private_test_cases", _text(row, "private_test_cases"))
    )
    kinds = {case["testtype"] for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(
            f"field testtype: expected stdin for all or functional for all, found {sorted(kinds)}"
        )
    function = ""
    if kinds == {"functional"}:
        for number, case in enumerate(cases, 1):
            for value in [*filter(str.strip, case["input"].split("\n")), case["output"]]:
                _json(f"public_test_cases + private_test_cases: test {number}", value)
        metadata = _json("metadata", _text(row, "metadata"))
        function = metadata.get("func_name") if isinstance(metadata, dict) else None
        if not isinstance(function, str) or not function.isidentifier():
            raise ValueError(
                f"field metadata: functional tests need a func_name, found {function!r:.60}"
            )
    return Tests(
        tuple(case["input"] for case in cases), tuple(case["output"] for case in cases), function
    )


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
                    f"field {field}: test {number}: expected an object with text in {key}, found {case!r:.60}"
                )
    return cases


_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def _unpack(field: str, text: str) -> str:
    """JSON text as it is, or the text in base64(zlib(pickle(text))): the one string of a pickle with nothing else in it."""
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
    strings = [value for name, value in opcodes if name in _STRINGS]
    foreign = {name for name, _ in opcodes} - _STRINGS - _HARMLESS
    if foreign or len(strings) != 1:
        raise ValueError(
            f"field {field}: a pickle of one string was expected, found {sorted(foreign) or len(strings)}"
        )
    return strings[0]


# ── verdicts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(
    programs: Sequence[str],
    tests: Sequence[Tests],
    workers: int = 2,
    seconds: float = 6.0,
    memory_mb: int = 1024,
) -> list[Verdict]:
    """One verdict per program, `workers` at a time; a program's tests run in order until one fails.

    `seconds` is the wall clock of one test; all tests of a program get `PROGRAM` times as much. It includes about 0.1 s for
    the box and the interpreter. Raises ValueError if a program has no tests, RuntimeError where there is no sandbox.

    >>> squares = Tests(("3\\n", "-4\\n"), ("9\\n", "16\\n"))
    >>> judge(["print(int(input()) ** 2)", "print(9)"], [squares, squares])  # doctest: +SKIP
    [Verdict(passed=True, reason=''), Verdict(passed=False, reason='wrong answer on test 2')]
    """
    for number, (inputs, outputs, _) in enumerate(
        (test for _, test in zip(programs, tests, strict=True)), 1
    ):
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(
                f"tests of program {number}: {len(inputs)} inputs and {len(outputs)} outputs"
            )
    if problem := sandbox.unavailable():
        raise RuntimeError(problem)
    with ThreadPoolExecutor(workers) as pool:
        return list(
            pool.map(
                lambda program, test: _judge(program, test, seconds, memory_mb), programs, tests
            )
        )


def _judge(program: str, tests: Tests, seconds: float, memory_mb: int) -> Verdict:
    if not program.strip():
        return Verdict(False, "no program")
    due = time.monotonic() + PROGRAM * seconds
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        left = max(0.0, min(seconds, due - time.monotonic()))
        reason, output = sandbox.run(program, tests.function, given, left, memory_mb)
        equal = _equal_values if tests.function else _equal_lines
        if reason or not equal(expected, output):
            return Verdict(False, reason or f"wrong answer on test {number}")
    return Verdict(True, "")


def _equal_values(expected: str, output: str) -> bool:
    value = json.loads(expected)
    try:
        return bool(json.loads(output) == value)
    except (ValueError, RecursionError):  # what was printed is not JSON, or too deep to read
        return False


def _equal_lines(expected: str, output: str) -> bool:
    r"""Whether all lines are equal, but for white space at the ends of lines and of the text; or equal number by number.

    >>> _equal_lines("1 2\n0.50\n", "1 2 \n.5"), _equal_lines("1 2\n", "1\n2\n"), _equal_lines("0.5", "0.5000001")
    (True, False, False)
    """
    lines, printed = (
        [line.rstrip() for line in text.rstrip().split("\n")] for text in (expected, output)
    )
    return len(lines) == len(printed) and all(
        a == b or _equal_numbers(a, b) for a, b in zip(lines, printed, strict=True)
    )


def _equal_numbers(expected: str, printed: str) -> bool:
    rows = expected.split(), printed.split()
    return all(_NUMBER.fullmatch(token) for row in rows for token in row) and (
        [Decimal(token) for token in rows[0]] == [Decimal(token) for token in rows[1]]
    )


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?", re.ASCII)


def main() -> None:
    if problem := sandbox.unavailable():
        sys.exit(problem)
    workers = len(os.sched_getaffinity(0))
    for name, program, test in (
        ("stdin", "print(int(input()) ** 2)", Tests(("3",), ("9",))),
        (
            "function",
            "class Solution:\n    def square(self, x): return x * x",
            Tests(("3",), ("9",), "square"),
        ),
    ):
        start = time.monotonic()
        verdicts = judge([program] * 100, [test] * 100, workers)
        rate, passed = (
            len(verdicts) / (time.monotonic() - start),
            sum(verdict.passed for verdict in verdicts),
        )
        print(
            f"{name}: {passed} of {len(verdicts)} passed, {rate:.0f} programs/s, {workers} at a time"
        )


if __name__ == "__main__":
    main()
