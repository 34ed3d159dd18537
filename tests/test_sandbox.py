"""The sandbox: right programs pass, wrong programs fail, hostile programs fail and do no harm."""

import base64
import doctest
import errno
import itertools
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import SimpleNamespace

import pytest

from grading import programs, sandbox, sandbox_child
from grading.extract import extract
from grading.programs import Verdict, decode_tests, extract_program, judge

# Tries what the sandbox needs of the kernel, with numbers of its interface and without any code of
# the sandbox: mount, uts, ipc, pid and network namespaces, as root or in a user namespace, and a
# mount in them.
PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
user = 0 if os.geteuid() == 0 else 1 << 28
if libc.unshare(1 << 17 | 1 << 26 | 1 << 27 | 1 << 29 | 1 << 30 | user):
    sys.exit(f"no namespaces: {os.strerror(ctypes.get_errno())}")
if libc.mount(b"none", b"/", b"", ctypes.c_ulong(1 << 14 | 1 << 18), b""):
    sys.exit(f"no private mounts: {os.strerror(ctypes.get_errno())}")
if libc.mount(b"probe", b"/tmp", b"tmpfs", ctypes.c_ulong(0), b""):
    sys.exit(f"no mounts: {os.strerror(ctypes.get_errno())}")
"""


def missing() -> str:
    """What this machine lacks for any sandbox, "" if nothing. Does not use the sandbox's code, so
    that tests fail, and are not skipped, if the code is what does not work."""
    if sys.platform != "linux":
        return f"no Linux: {sys.platform}"
    release, machine = os.uname().release, os.uname().machine
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < (5, 14):
        return f"no Linux 5.14 or later: {release}"
    if machine not in ("x86_64", "aarch64"):
        return f"no processor that the filter of system calls knows: {machine}"
    probe = subprocess.run([sys.executable, "-I", "-c", PROBE], capture_output=True, text=True)
    return probe.stderr.strip().rpartition("\n")[2]


needs_sandbox = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")

PROJECT = Path(sandbox.__file__).parent.parent
Cases = programs.Tests  # pytest takes a name that begins with Test for a class of tests
SQUARE = Cases(("3\n", "-12\n"), ("9\n", "144\n"))
RIGHT = "print(int(input()) ** 2)"
OK = Cases(("",), ("ok\n",))  # passed by a hostile program that gets what it wants


@needs_sandbox
def test_the_sandbox_works_where_the_machine_has_what_it_needs() -> None:
    assert sandbox.unavailable() == ""


def verdict(program: str, tests: Cases = OK, **limits: float) -> Verdict:
    return judge([textwrap.dedent(program)], [tests], workers=1, **limits)[0]


# ── right and wrong ───────────────────────────────────────────────────────────────────────────────


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        (RIGHT, SQUARE, ""),
        ("print(9)", SQUARE, "wrong answer on test 2"),
        ("print(int(input()) ** 2)\nexit(0)\nprint(1)", SQUARE, ""),
        ("print(int(input()) ** 2); exit(3)", SQUARE, ""),
        ("print(int(input()) ** 2); exit('no good')", SQUARE, ""),
        ("print(9); exit(0)", SQUARE, "wrong answer on test 2"),
        ("import os; print(9, flush=True); os._exit(3)", SQUARE, "error: exit status 3"),
        (
            "import os; print(int(input()) ** 2, flush=True); os.kill(os.getpid(), 11)",
            SQUARE,
            "error: ended by signal 11",
        ),
        ("1 / 0", SQUARE, "error: ZeroDivisionError: division by zero"),
        ("print('é' if", SQUARE, "error: SyntaxError: '(' was never closed"),
        ("\ud800", SQUARE, "error: "),
        ("print(\0)", SQUARE, "error: "),
        ("  \n", SQUARE, "no program"),
        ("if __name__ == '__main__':\n    print(len(input()))", Cases(("äöü€\n",), ("4",)), ""),
        (
            "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
            Cases(("1\n2\n" * 300_000,), ("900000",)),
            "",
        ),
        (
            "import os\nprint(len(os.read(0, os.fstat(0).st_size)))",
            Cases(("1 " * 50_000,), ("100000",)),
            "",
        ),
        ("for line in open(0): print(line, end='')", Cases(("a\nb\n",), ("a\nb",)), ""),
        ("for line in open('/dev/stdin'): print(line, end='')", Cases(("a\nb\n",), ("a\nb",)), ""),
        (
            "a = open('/dev/stdin').read()\n"
            "print(len(a), a == open('/dev/stdin').read() == input())",
            Cases(("1 " * 3_000_000,), ("6000000 True",)),
            "",
        ),
        (
            "import fileinput\nfor line in fileinput.input(): print(line, end='')",
            Cases(("a\nb\n",), ("a\nb",)),
            "",
        ),
        ("print('x ' * 3)", Cases(("",), ("x x x",)), ""),
        ("print('\\n\\n  a\\n\\n  b')", Cases(("",), ("a\n \n b",)), ""),
        ("print(1.50, 2)", Cases(("",), ("1.5 2.0",)), ""),
        ("print(1.5000001)", Cases(("",), ("1.5",)), "wrong answer on test 1"),
        ("print('1\\n2')", Cases(("",), ("1 2",)), "wrong answer on test 1"),
        ("", Cases(("",), ("",)), "no program"),
        ("pass", Cases(("",), ("",)), ""),
        (
            "print(pow(2, 10, 1000), gcd(4, 6), Counter('aab')['a'], deepcopy([1]))",
            Cases(("",), ("24 2 2 [1]",)),
            "",
        ),
        (
            "print(datetime.date(2020, 1, 2), bisect.bisect_left([1], 2), copy.deepcopy([1]))\n"
            "print(statistics.mean([1, 3]), mode([1, 1]), dumps([1]), json.loads('[2]'))\n"
            "print(randint(3, 3), random.choice([4]), re.sub('a', 'b', 'a'), match('a', 'b'))\n"
            "print(StringIO('x').read(), io.StringIO('y').read(), ascii_lowercase[:2])\n"
            "print(string.digits, timedelta(1).days, stdin is sys.stdin, maxsize > 0)\n"
            "print(heapq.nsmallest(1, [2, 1]), itemgetter(0)([5]), List[int], fabs(-1))",
            Cases(
                ("",),
                (
                    "2020-01-02 1 [1]\n2 1 [1] [2]\n3 4 b None\nx y ab\n0123456789 1 True True\n"
                    "[1] 5 typing.List[int] 1.0",
                ),
            ),
            "",
        ),
        (
            "n = int(input())\nprint(n * n)",
            Cases(("1" + "0" * 20_000,), ("1" + "0" * 40_000,)),
            "",
        ),
        (
            "print(10 ** 60_000)",  # Python 3.12 and later allow somewhat more than the limit
            OK,
            "error: ValueError: Exceeds the limit (50000 digits) for "
            "integer string conversion; use sys.set_int_max_str_digits() to increase the limit",
        ),
        (
            "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(40_000))",
            Cases(("",), ("40000",)),
            "",
        ),
        pytest.param(
            "@cache\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000))",
            Cases(("",), ("20000",)),
            "",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12),
                reason="Python has a limit of its own for functools.cache",
            ),
        ),
        (
            "from threading import Thread\n"
            "thread = Thread(target=print, args=['ok'])\nthread.start(); thread.join()",
            OK,
            "",
        ),
        ("open('x', 'w').write('ok'); print(open('x').read())", OK, ""),
        (
            "import decimal, random, datetime, fractions, sqlite3, ctypes, ssl, lzma, hashlib\n"
            "print('ok')",
            OK,
            "",
        ),
    ],
)
def test_stdin(program: str, tests: Cases, reason: str) -> None:
    found = judge([program], [tests], workers=1)[0]
    assert found.passed is (reason == "")
    assert found.reason == reason or (reason == "error: " and found.reason.startswith(reason))


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "result", "reason"),
    [
        (
            "class Solution:\n    def add(self, a: List[int], b: int): return [x + b for x in a]",
            [3, 4],
            "",
        ),
        ("def add(a, b): return [x + b for x in a]", [3, 4], ""),
        ("def add(a, b): return tuple(x + b for x in a)", [3, 4], ""),
        ("def add(a, b):\n    print([3, 4])\n    return [3, 5]", [3, 4], "wrong answer on test 1"),
        ("def add(a, b): print([3, 4])", [3, 4], "wrong answer on test 1"),
        ("def add(a, b):\n    print('so', a)\n    return [3, 4]", [3, 4], ""),
        ("def add(a, b): return [(1, 2), [(3,)]]", [[1, 2], [[3]]], ""),
        ("def add(a, b): return True", 1, ""),
        ("def add(a, b): return [3.0, 4]", [3, 4], ""),
        ("def add(a, b): return '[,{'", "[,{", ""),
        ("def add(a, b): return {'x': [3, 4], 'y': {}}", {"y": {}, "x": [3, 4]}, ""),
        (
            "def add(a, b): return add",
            [3, 4],
            "error: TypeError: Object of type function is not JSON serializable",
        ),
        ("def add(a, b): print(1); exit()", [3, 4], "wrong answer on test 1"),
        ("def add(a, b): exit(1)", [3, 4], "error: exit status 1"),
        ("def add(a, b): return 'é'", "é", ""),
        ("def add(a, b): return None", None, ""),
        ("def add(a, b): return float('nan')", [3, 4], "wrong answer on test 1"),
        (
            "def add(a, b): return {1}",
            [1],
            "error: TypeError: Object of type set is not JSON serializable",
        ),
        (
            "def add(a): return a",
            [3, 4],
            "error: TypeError: add() takes 1 positional argument but 2 were given",
        ),
        ("def sub(a, b): return a", [3, 4], "error: KeyError: 'add'"),
        ("from __future__ import annotations\ndef add(a: no, b) -> no: return [3, 4]", [3, 4], ""),
        (
            "def add(a, b): return [3, 4]\n"
            "if __name__ == '__main__':\n    print(add(int(input()), 1))",
            [3, 4],
            "",
        ),
        (
            "print('[' * 100_000); import os; os.write(3, b'[' * 100_000)\ndef add(a, b): exit()",
            [3, 4],
            None,
        ),
        (
            "import os\nfor fd in 3, 4:\n"
            "    try: os.write(fd, b'[' * 99_999)\n    except OSError: pass\nexit()",
            [3],
            None,
        ),
    ],
)
def test_function(program: str, result: object, reason: str | None) -> None:
    found = judge([program], [Cases(("[1, 2]\n2",), (json.dumps(result),), "add")], workers=1)[0]
    assert found.passed is (reason == "")
    assert reason is None or found.reason == reason


@needs_sandbox
def test_functions_of_long_integers() -> None:
    """As in LiveCodeBench's checker, up to 50,000 digits."""
    given, product = "1" + "0" * 20_000, "1" + "0" * 40_000
    tests = Cases((f"{given}\n{given}",), (f"[{product}, 1]",), "multiply")
    assert verdict("def multiply(a, b): return [a * b, 1]", tests).passed
    wrong = verdict("def multiply(a, b): return [a * b + 1, 1]", tests)
    assert wrong.reason == "wrong answer on test 1"
    assert (
        decode_tests(
            {
                "public_test_cases": cases("functional", (tests.inputs[0], tests.outputs[0])),
                "private_test_cases": "[]",
                "metadata": '{"func_name": "multiply"}',
            }
        )
        == tests
    )


@needs_sandbox
def test_a_verdict_does_not_depend_on_the_order_of_hashes() -> None:
    order = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    printed = {sandbox.run(order, "", "", 6.0, 512)[1] for _ in range(4)}
    assert len(printed) == 1


@needs_sandbox
def test_the_sandbox_works_under_a_strict_umask() -> None:
    """Its folders and files must be open to the user that the program runs as."""
    before = os.umask(0o077)
    try:
        program = "print(open('/dev/stdin').read())"
        assert judge([program], [Cases(("ok",), ("ok",))], workers=1)[0] == (True, "")
    finally:
        os.umask(before)


def test_the_reason_of_a_failure_is_short() -> None:
    assert sandbox._failure(1, "x\n" * 10 + "é\rno\n\n") == "error: é?no"
    assert sandbox._failure(1, "MemoryError\n") == "memory limit"
    assert len(sandbox._failure(1, "x" * 1000)) == len("error: ") + 200
    assert sandbox._failure(1, " \n ") == "error: exit status 1"


@needs_sandbox
def test_many_programs_in_order() -> None:
    programs = [f"print({i})" for i in range(12)]
    tests = [Cases(("",), (str(i if i % 3 else -1),)) for i in range(12)]
    assert [v.passed for v in judge(programs, tests)] == [i % 3 != 0 for i in range(12)]


def test_each_test_of_a_program_has_the_whole_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tests there are, as in LiveCodeBench's checker."""
    now, limits = 0.0, []

    def run(*arguments: object) -> tuple[str, str]:
        nonlocal now
        now += 6.0
        limits.append(arguments[3])
        return "", "ok"

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sandbox, "unavailable", lambda: "")
    monkeypatch.setattr(sandbox, "run", run)
    assert verdict("slow", Cases(("",) * 40, ("ok",) * 40), seconds=6.0) == (True, "")
    assert limits == [6.0] * 40


@needs_sandbox
def test_the_time_limit_is_of_one_test() -> None:
    program = "import time; time.sleep(float(input())); print('ok')"
    assert verdict(program, Cases(("0.9",) * 4, ("ok",) * 4), seconds=3.0) == (True, "")
    assert verdict(program, Cases(("0", "9"), ("ok", "ok")), seconds=3.0) == (False, "time limit")


@needs_sandbox
def test_the_example_of_judge() -> None:
    text = judge.__doc__.replace("# doctest: +SKIP", "")
    parser = doctest.DocTestParser()
    example = parser.get_doctest(text, dict(vars(programs)), "judge", "programs.py", 0)
    assert doctest.DocTestRunner().run(example) == (0, 2)


def test_errors_of_the_caller() -> None:
    with pytest.raises(ValueError, match="program 2: 1 inputs and 0 outputs"):
        judge(["", ""], [SQUARE, Cases(("",), ())])
    with pytest.raises(ValueError, match="program 1: 0 inputs"):
        judge([""], [Cases((), ())])
    with pytest.raises(ValueError, match="shorter"):
        judge(["", ""], [SQUARE])


def test_where_there_is_no_sandbox_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sandbox.unavailable.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "darwin")
            message = "the sandbox needs Linux, this is darwin: .+"
            assert re.fullmatch(message, sandbox.unavailable())
            with pytest.raises(RuntimeError, match="needs Linux"):
                judge([RIGHT], [SQUARE])
        sandbox.unavailable.cache_clear()
        code = sandbox.CHILD.read_text()
        broken = tmp_path / "sandbox_child.py"
        broken.write_text(code.replace('"pivot_root"', '"pivot_root", None'))
        assert broken.read_text() != code
        monkeypatch.setattr(sandbox, "CHILD", broken)
        assert "does not work here" in sandbox.unavailable() and "\n" not in sandbox.unavailable()
        with pytest.raises(RuntimeError, match="does not work here"):
            judge([RIGHT], [SQUARE])
    finally:
        sandbox.unavailable.cache_clear()


# ── hostile programs ──────────────────────────────────────────────────────────────────────────────

# Each prints "ok", and so passes, if it gets what it wants; or its harm would be seen outside.
HOSTILE = {
    "fork bomb": """
        import os
        while True: os.fork()
        """,
    "fork bomb by every other way": """
        import ctypes
        import os
        import signal
        libc = ctypes.CDLL(None)
        for call in (lambda: os.posix_spawn('/proc/self/exe', ['x'], {}),
                     lambda: libc.vfork(), lambda: libc.fork(),
                     lambda: libc.syscall(56, signal.SIGCHLD, 0, 0, 0, 0),
                     lambda: libc.syscall(57),
                     lambda: libc.syscall(435, bytes(32) + bytes([17]) + bytes(31), 64),
                     lambda: __import__('subprocess').run(['/bin/sh', '-c', 'true']),
                     lambda: __import__('multiprocessing').Process(target=print).start()):
            try:
                if call() not in (-1, None): print('ok')
            except OSError: pass
        """,
    "thread bomb": """
        import threading
        import time
        threading.stack_size(1 << 15)
        for number in range(1000):
            threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        print('ok')
        """,
    "connect to loopback": """
        import socket
        socket.create_connection(('127.0.0.1', PORT), timeout=1).sendall(b'x')
        print('ok')
        """,
    "connect outwards": """
        import socket
        socket.create_connection(('1.1.1.1', 53), timeout=1)
        print('ok')
        """,
    "sockets of other families": """
        import socket
        for family in (1, 2, 10, 16, 17, 38, 40):
            kind = socket.SOCK_STREAM if family != 16 else socket.SOCK_RAW
            try: socket.socket(family, kind); print('ok')
            except OSError: pass
        """,
    "read the caller's files": """
        import os
        for path in ('FOLDER/secret', 'PROJECT/grading/sandbox.py', '/etc/passwd',
                     '/proc/self/environ', '/proc/PID/environ', '/sys',
                     '/bin/sh', '/usr/bin/env', '/home', '/var', '/run'):
            if os.path.exists(path): print('ok')
        """,
    "read the environment": """
        import ctypes
        import os
        if ctypes.CDLL(None).getenv(b'SECRET'): print('ok')
        if set(os.environ) - {'HOME', 'PYTHONHASHSEED', 'LC_CTYPE'}: print('ok')
        """,
    "use inherited files": """
        import os
        for fd in range(3, 64):
            try: os.fstat(fd); print('ok')
            except OSError: pass
        """,
    "change the input": """
        import os
        for change in (lambda: os.write(0, b'x'), lambda: os.ftruncate(0, 1 << 24),
                       lambda: open('/dev/stdin', 'w'), lambda: os.chmod('/dev/stdin', 0o666),
                       lambda: os.remove('/dev/stdin'), lambda: os.rename('/dev/stdin', 'x')):
            try: change(); print('ok')
            except OSError: pass
        """,
    "write elsewhere": """
        import os
        library = os.path.dirname(os.__file__)
        for folder in ('/', '/usr/lib', '/lib', '/etc', '/dev', 'FOLDER', library):
            for name in ('written-by-a-program', '../written-by-a-program'):
                try: open(f'{folder}/{name}', 'w').write('x'); print('ok')
                except OSError: pass
        """,
    "symlinks": """
        import os
        targets = ['FOLDER', '/root', '/proc/self/root', '/tmp/../../..' + 'FOLDER', '/proc/1/cwd']
        for number, target in enumerate(targets):
            os.symlink(target, f'link{number}')
            try: open(f'link{number}/written-by-a-program', 'w'); print('ok')
            except OSError: pass
            try: os.listdir(f'link{number}/secrets'); print('ok')
            except OSError: pass
        os.symlink('loop', 'loop'); open('loop')
        """,
    "leave the root": """
        import ctypes
        import os
        libc = ctypes.CDLL(None)
        done = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)] + [
            libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/tmp', 2),
            libc.chroot(b'/tmp'), libc.pivot_root(b'/tmp', b'/tmp'), libc.setuid(0),
            libc.setgid(0), libc.ptrace(16, 1, 0, 0), libc.mknod(b'/tmp/disk', 0o60666, 0xFE00),
            libc.sethostname(b'x', 1), libc.syscall(250, 1, 0)]
        if any(code >= 0 for code in done) or os.getuid() == 0: print('ok')
        """,
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "ignore signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "allocate 10 GB": "x = bytearray(10 << 30); print('ok')",
    "allocate little by little": """
        x = []
        while True: x.append(bytearray(1 << 24))
        """,
    "memory outside of the address space": """
        import ctypes
        import os
        libc = ctypes.CDLL(None)
        if libc.shmget(0, 1 << 32, 0o1600) >= 0: print('ok')
        try: os.memfd_create('x'); print('ok')
        except OSError: pass
        """,
    "print for ever": "while True: print('x' * 1000)",
    "print 100 MB": "print('x' * 100_000_000)",
    "complain for ever": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "close the output and stay": """
        import os
        import time
        os.write(1, b'ok')
        os.close(1)
        os.close(2)
        time.sleep(1000)
        """,
    "fill the disk": """
        for number in range(200):
            with open(str(number), 'wb') as file: file.write(bytes(1 << 20))
        print('ok')
        """,
    "fill the disk with names": """
        for number in range(100_000): open(str(number), 'w').close()
        print('ok')
        """,
    "kill everybody": """
        import os
        import signal
        for target in (os.getppid(), 1, -1):
            try: os.kill(target, signal.SIGKILL)
            except OSError: pass
        try: os.killpg(0, signal.SIGKILL)
        except OSError: pass
        """,
    "kill processes by number": """
        import os
        for target in {*range(1, 70_000), PID} - {1, os.getpid()}:
            try: os.kill(target, 9); print('ok')
            except OSError: pass
        """,
    "outlive": """
        import os
        import time
        if os.fork(): os._exit(0)
        os.setsid()
        if os.fork(): os._exit(0)
        while True: time.sleep(1)
        """,
}
REASONS = {
    "time limit": {"loop", "sleep", "ignore signals", "close the output and stay"},
    "memory limit": {"allocate 10 GB"},
    "output limit": {"print for ever", "print 100 MB", "complain for ever"},
}

# Those that the namespaces and limits stop without the filter on system calls.
STOPPED_WITHOUT_FILTER = [
    "fork bomb",
    "thread bomb",
    "connect to loopback",
    "connect outwards",
    "read the caller's files",
    "write elsewhere",
    "symlinks",
    "kill everybody",
    "kill processes by number",
    "outlive",
    "ignore signals",
]


@pytest.fixture
def mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A word in the command lines of all processes of this test's sandboxes. With the parameter
    "open", these have no filter on system calls."""
    word = f"sandbox-{os.getpid()}-{tmp_path.name}"
    changes = {'"program.py"': f'"{word}"'}
    if getattr(request, "param", "") == "open":
        changes["    filter_calls()\n"] = ""
    code = sandbox.CHILD.read_text()
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / f"{word}.py").write_text(code)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / f"{word}.py")
    return word


def processes(mark: str) -> list[int]:
    """The ids of the processes of this test's sandboxes, parents before their children. (Their
    numbers are no order: the kernel starts again at low ones.)"""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since it was listed
            if mark.encode() in (folder / "cmdline").read_bytes():
                parent = re.search(r"^PPid:\s*(\d+)$", (folder / "status").read_text(), re.M)
                parents[int(folder.name)] = int(parent[1])

    def depth(process: int) -> int:
        return 1 + depth(parents[process]) if process in parents else 0

    return sorted(parents, key=depth)


def wait_for_processes(mark: str, count: int, seconds: float = 60.0) -> list[int]:
    """The ids of these processes as soon as there are so many. Fails if there never are."""
    due = time.monotonic() + seconds
    while len(processes(mark)) < count:
        assert time.monotonic() < due
        time.sleep(0.02)
    return processes(mark)


def all_end(mark: str, seconds: float = 5.0) -> bool:
    """Whether all processes of this test's sandboxes end within this time."""
    due = time.monotonic() + seconds
    while processes(mark) and time.monotonic() < due:
        time.sleep(0.05)
    return not processes(mark)


@pytest.fixture
def server() -> Iterator[tuple[int, list[str]]]:
    """A server on the loopback interface: its port, and the addresses that have connected."""
    connected: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return  # the server is closed
                connected.append(str(address))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it does notice a connection
        while not connected:
            time.sleep(0.01)
        connected.clear()
        yield port, connected
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process outside that hostile programs try to kill."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def filled_in(program: str, values: dict[str, object]) -> str:
    for placeholder, value in values.items():
        program = program.replace(placeholder, str(value))
    return textwrap.dedent(program).replace("print('ok')", "(print('ok'), exit())")


def measured_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Program → the seconds until its verdict, filled while `judge` runs."""
    times: dict[str, float] = {}
    original = programs._judge

    def timed(program: str, *rest: object) -> Verdict:
        start = time.monotonic()
        found = original(program, *rest)
        times[program] = max(time.monotonic() - start, times.get(program, 0.0))
        return found

    monkeypatch.setattr(programs, "_judge", timed)
    return times


def written_files(folder: Path) -> list[Path]:
    """The files that hostile programs have written outside of the sandbox."""
    places = [folder, PROJECT, Path.home(), Path("/"), Path("/tmp"), Path("/usr/lib")]
    places.append(Path(os.__file__).parent)
    places += [place.parent for place in places]
    files = [place / "written-by-a-program" for place in places]
    return [file for file in files if file.exists()]


@needs_sandbox
@pytest.mark.parametrize(
    ("mark", "names"),
    [("", list(HOSTILE)), ("open", STOPPED_WITHOUT_FILTER)],
    indirect=["mark"],
    ids=["all", "no filter"],
)
def test_hostile_programs_do_no_harm(
    mark: str,
    names: list[str],
    server: tuple[int, list[str]],
    bystander: subprocess.Popen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, connected = server
    monkeypatch.setenv("SECRET", "SECRET")
    (tmp_path / "secret").write_text("SECRET")
    values = {"PORT": port, "PROJECT": PROJECT, "FOLDER": tmp_path, "PID": bystander.pid}
    submitted, tests = [], []
    for name in names:
        submitted += [filled_in(HOSTILE[name], values), RIGHT]
        tests += [OK, SQUARE]
    times = measured_times(monkeypatch)
    verdicts = judge(submitted, tests, workers=2, seconds=3.0, memory_mb=512)

    assert set(verdicts[1::2]) == {Verdict(True, "")}
    assert times[RIGHT] < 3.0 and max(times.values()) < 6.0
    assert processes(mark) == []
    assert connected == []
    assert bystander.poll() is None
    assert written_files(tmp_path) == []
    found = dict(zip(names, verdicts[::2], strict=True))
    assert not {name: verdict for name, verdict in found.items() if verdict.passed}
    if names is not STOPPED_WITHOUT_FILTER:
        # It reaches one of these limits first.
        either = found.pop("allocate little by little")
        assert either.reason in ("memory limit", "time limit")
        for reason, expected in REASONS.items():
            assert {name for name, verdict in found.items() if verdict.reason == reason} == expected


@needs_sandbox
@pytest.mark.parametrize("mark", ["open"], indirect=True)
def test_without_the_filter_processes_are_counted(mark: str) -> None:
    program = """
        import os
        import time
        for count in range(200):
            try: child = os.fork()
            except BlockingIOError: break
            if not child: time.sleep(100)
        print(count)
        """
    reason, output = sandbox.run(textwrap.dedent(program), "", "", 5.0, 512)
    assert reason == "" and 20 < int(output) < 32
    assert processes(mark) == []


@needs_sandbox
def test_the_files_in_the_sandbox() -> None:
    """All files outside of the folders of libraries, and the folders that a program can write."""
    program = """
        import json
        import os
        import sys
        listed, writable, mounts = [], [], set()
        for folder, folders, files in os.walk('/'):
            if os.access(folder, os.W_OK): writable.append(folder)
            if not folder.startswith('/tmp'): mounts.add(os.statvfs(folder).f_flag & 3)
            if not folder.startswith(('/lib', '/usr/lib', sys.base_prefix + '/lib')):
                listed += [os.path.join(folder, name) for name in files]
        print(json.dumps({
            'listed': listed, 'writable': writable, 'mounts': list(mounts), 'folder': os.getcwd(),
            'files': os.listdir(), 'python': sys.executable, 'host': os.uname().nodename}))
        """
    reason, output = sandbox.run(textwrap.dedent(program), "", "", 20.0, 512)
    assert reason == ""
    found = json.loads(output)
    devices = [f"/dev/{name}" for name in ("null", "random", "urandom", "zero")]
    listed = set(found.pop("listed")) - {"/etc/ld.so.cache"}
    assert listed == {*devices, "/dev/stdin", found.pop("python")}
    read_only = os.ST_RDONLY | os.ST_NOSUID
    assert found == {
        "writable": ["/tmp"],
        "mounts": [read_only],
        "folder": "/tmp",
        "files": [],
        "host": "box",
    }


def program_process(mark: str) -> int:
    """The process of the program itself, once it runs: the third of its sandbox."""
    program = wait_for_processes(mark, 3)[2]
    while b"exec(code, space)" not in Path(f"/proc/{program}/cmdline").read_bytes():
        time.sleep(0.02)
    return program


@needs_sandbox
def test_the_rights_and_limits_of_a_program(mark: str) -> None:
    """As the kernel shows them outside: namespaces, capabilities, users, limits."""
    code = "import time; print('ok', flush=True); time.sleep(1)"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(verdict, code, seconds=5.0, memory_mb=300)
        program = program_process(mark)
        for kind in ("mnt", "pid", "net", "ipc", "uts"):
            assert os.readlink(f"/proc/{program}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        lines = Path(f"/proc/{program}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        limits = Path(f"/proc/{program}/limits").read_text()
        assert future.result().passed
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert status[name] == ["0" * 16]
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == (["1"], ["2"], ["1"])
    assert "0" not in status["Uid"] + status["Gid"]
    assert os.geteuid() or status["Groups"] == []
    values = {}
    for name, soft, hard in re.findall(r"^Max ([a-z ]+?) {2,}(\S+) +(\S+)", limits, re.M):
        if soft == hard and soft != "unlimited":
            values[name] = int(soft)
    expected = {
        "address space": 300 << 20,
        "cpu time": 6,
        "file size": sandbox_child.MAX_FILE,
        "open files": sandbox_child.MAX_OPEN_FILES,
        "processes": sandbox_child.MAX_THREADS,
        "core file size": 0,
    }
    assert values.items() >= expected.items()


@needs_sandbox
def test_calls_that_are_refused() -> None:
    machine = os.uname().machine
    column = sandbox_child.ARCHITECTURES[machine][1]
    refused = {name: numbers[column] for name, numbers in sandbox_child.REFUSED.items()}
    numbers = {name: number for name, number in refused.items() if number is not None}
    numbers |= {"clone": sandbox_child.CLONE[column], "clone3": sandbox_child.CLONE3}
    try_all = f"""
        import ctypes
        import json
        libc, errors = ctypes.CDLL(None, use_errno=True), {{}}
        for name, number in {numbers}.items():
            ctypes.set_errno(0)
            errors[name] = libc.syscall(number, 17, 0, 0, 0, 0, 0) < 0 and ctypes.get_errno()
        print(json.dumps(errors))
        """
    reason, output = sandbox.run(textwrap.dedent(try_all), "", "", 5.0, 512)
    assert reason == ""
    assert json.loads(output) == dict.fromkeys(numbers, errno.EPERM) | {"clone3": errno.ENOSYS}
    if machine == "x86_64":
        second_table = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39); print('ok')"
        assert verdict(second_table).reason == f"error: ended by signal {signal.SIGSYS}"


def start_caller(program: str, tests: int, seconds: int) -> subprocess.Popen:
    """Start a Python process that judges twenty such programs, each with so many tests."""
    # A background job of a shell ignores SIGINT, and so do the processes that it starts. Python
    # then raises no KeyboardInterrupt, unless the handler is set.
    code = f"""if True:
        import os
        import pathlib
        import signal
        from grading import programs
        from grading import sandbox
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sandbox.CHILD = pathlib.Path(os.environ["CHILD"])
        tests = programs.Tests(("",) * {tests}, ("",) * {tests})
        programs.judge([{program!r}] * 20, [tests] * 20, seconds={seconds})
        """
    environment = os.environ | {"CHILD": str(sandbox.CHILD)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=PROJECT, env=environment
    )


@needs_sandbox
@pytest.mark.parametrize(
    ("sent", "program", "tests", "seconds"),
    [
        (signal.SIGKILL, "while True: pass", 1, 60),
        (signal.SIGINT, "while True: pass", 1, 2),
        (signal.SIGINT, "import time; time.sleep(1)", 20, 6),
    ],
    ids=["killed", "interrupted", "interrupted between tests"],
)
def test_sandboxes_end_with_their_caller(
    sent: int, program: str, tests: int, seconds: int, mark: str
) -> None:
    caller = start_caller(program, tests, seconds)
    wait_for_processes(mark, 6)  # two sandboxes of three processes
    start = time.monotonic()
    caller.send_signal(sent)
    assert caller.wait() != 0
    assert time.monotonic() - start < 10  # less than all programs, or all tests of one, take
    assert all_end(mark)


class InterruptedList(list):
    """A list that raises KeyboardInterrupt at its end, but not the first time it is read."""

    times_read = 0

    def __iter__(self) -> Iterator:
        self.times_read += 1
        yield from super().__iter__()
        if self.times_read > 1:
            raise KeyboardInterrupt


@needs_sandbox
def test_an_interrupt_cancels_queued_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an interrupt that comes while the programs are being queued."""
    started = []

    def slow(program: str, *_: object) -> Verdict:
        started.append(program)
        time.sleep(0.2)
        return Verdict(True, "")

    monkeypatch.setattr(programs, "_judge", slow)
    with pytest.raises(KeyboardInterrupt):
        judge(InterruptedList([RIGHT] * 40), [SQUARE] * 40, workers=2)
    assert len(started) <= 4


@needs_sandbox
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_sandbox_ends_if_one_of_its_processes_is_killed(which: int, mark: str) -> None:
    """The outer process, process 1 or the program, as the kernel does when memory runs out."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(verdict, "import time; time.sleep(30); print('ok')", seconds=30.0)
        found = wait_for_processes(mark, 3)
        scores = {Path(f"/proc/{process}/oom_score_adj").read_text() for process in found}
        assert scores == {"1000\n"}
        os.kill(found[which], signal.SIGKILL)
        assert not future.result(timeout=5).passed
    assert future.result().reason.startswith("error: ")
    assert all_end(mark)


@needs_sandbox
def test_a_sandbox_that_nobody_ends_ends_itself(mark: str) -> None:
    code = sandbox.CHILD.read_text()
    assert code.count("SET_PDEATHSIG, signal.SIGKILL") == 2
    sandbox.CHILD.write_text(code.replace("SET_PDEATHSIG, signal.SIGKILL", "SET_PDEATHSIG, 0"))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(verdict, "import time; time.sleep(60)", seconds=1.0)
        found = wait_for_processes(mark, 3)
        os.kill(found[0], signal.SIGKILL)
        assert not future.result(timeout=5).passed
    assert processes(mark)
    assert all_end(mark, 10.0)


# ── comparing outputs ─────────────────────────────────────────────────────────────────────────────


def equal_for_the_checker(expected: str, output: str) -> bool:
    """LiveCodeBench's rule for printed outputs, in other words than grading/programs.py."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (expected, output)]
    if len(lines[0]) != len(lines[1]):
        return False
    for pair in zip(*lines, strict=True):
        if pair[0] != pair[1]:
            try:
                numbers = [[Decimal(word) for word in line.split()] for line in pair]
                if numbers[0] != numbers[1]:
                    return False
            except InvalidOperation:
                return False
    return True


def test_outputs_are_compared_by_the_rule_of_the_checker() -> None:
    words = (
        "1 1.0 +1 01 1e0 10E-1 １ 1_0 10 -0 0 inf Infinity nan NaN sNaN a A 0x1 1. . 1e999999999 "
        "1e99999999999999999999"
    ).split()
    spaces = [" ", "  ", "\n", " \n", "\n ", "\n\n", "\t", "\r\n", "\u3000", ""]
    rng = random.Random(0)
    compared = Counter()
    for _ in range(20_000):
        expected = [part for _ in range(3) for part in (rng.choice(spaces), rng.choice(words))]
        output = [*expected, rng.choice(spaces)]
        for place in rng.sample(range(6), 2):
            output[place] = rng.choice(words if place % 2 else spaces)
        texts = "".join(expected), "".join(output)
        found = equal_for_the_checker(*texts)
        assert programs._equal_lines(*texts) is found, texts
        compared[found] += 1
    assert min(compared.values()) > 1000


@pytest.mark.parametrize(
    ("expected", "output", "equal"),
    [
        ("[1, 2]", "[1,2.0]", True),
        ("[1, 2]", "[2, 1]", False),
        ("1", "true", True),
        ("1", '"1"', False),
        ('"a, b"', '"a, b"', True),
        ('["\\u002c"]', '[","]', True),
        ('{"a": 1, "b": [2]}', '{"b": [2], "a": 1}', True),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("1" + "0" * 300, "1e300", False),
        (str(int(1e300)), "1e300", True),
        ("1e300", str(int(1e300)), True),
        ("null", "", False),
        ("null", "nul", False),
        ("[" * 500 + "]" * 500, "[" * 500 + "]" * 500, True),
        ("[]", "[" * 100_000, False),
    ],
)
def test_values_are_compared(expected: str, output: str, equal: bool) -> None:
    assert programs._equal_values(expected, output) is equal


def seconds_of_processor(function: Callable, *arguments: object) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


# What a model or its program may repeat.
REPEATED = [
    " ",
    "\t",
    "\n",
    "\r",
    "\v",
    "`",
    "```",
    "```\n",
    "```a ",
    "<",
    "<a",
    "<a>",
    ">",
    "#",
    "_",
]
REPEATED += [
    "a",
    "1",
    "1 ",
    "1\n",
    "1e",
    "0",
    ".",
    "-",
    "+",
    "[",
    "[]",
    "{",
    '{"":',
    ",",
    "1,",
    '"',
]
REPEATED += [
    "\\",
    "\\u0041",
    "é",
    "１",
    "\u2028",
    "\0",
    "\ud800",
    "\U0001f600",
    "<answer>",
    "</answer>",
]


@pytest.mark.parametrize("size", [1 << 14, 1 << 20, 16 << 20])
def test_long_texts_take_linear_time(size: int) -> None:
    """None holds the trainer. A quadratic step would take minutes for a megabyte."""
    shapes = [("", "x"), ("```python\n", "\n```"), ("[", "]")]
    repeated = REPEATED
    if size > 1 << 20:
        shapes, repeated = shapes[:1], ["1", " ", "\n", "[]", "1 "]
    limit = 0.5 + 3.0 * size / (1 << 20)
    for part, (before, after) in itertools.product(repeated, shapes):
        text = before + part * (size // len(part)) + after
        for function in (extract_program, programs.answer_content):
            assert seconds_of_processor(function, text) < limit, (part, before)
        for expected in ("1 2\n3", "1", "1." + "0" * 100):
            spent = seconds_of_processor(programs._equal_lines, expected, text)
            assert spent < limit, (part, before)
        for expected in ("[1, 2]", "[[], []]", "1" * 5000, '"a"'):
            spent = seconds_of_processor(programs._equal_values, expected, text)
            assert spent < limit, (part, before)
        assert seconds_of_processor(sandbox._failure, 1, text) < limit, (part, before)


@pytest.mark.parametrize(
    ("compare", "expected", "output"),
    [
        (programs._equal_values, "[1, 2]", "[" + "[]," * 300_000 + "1]"),
        (programs._equal_values, "[1, 2]", "[" + '{"":1},' * 100_000 + "1]"),
        (programs._equal_values, "[1, 2]", "[" + "1," * 500_000 + "1]"),
        (programs._equal_lines, "1\n2", "1\n" * 500_000 + "1"),
        (programs._equal_lines, "1 2", "1 " * 500_000 + "1"),
    ],
)
def test_long_outputs_take_little_memory(compare: Callable, expected: str, output: str) -> None:
    """An output of many values, words or lines would take forty times its size, were it parsed."""
    tracemalloc.start()
    try:
        assert compare(expected, output) is False
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(output)


# ── extracting programs, reading tests ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```", "b\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("```python\na\n```\n```\n1\n```", "a\n"),
        ("```python\na\n```\n```cpp\nb\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("  ```python\n  a\n    b\n  ```", "  a\n    b\n"),
        ("```python\nx = 'so ``` it is'\n```", "x = 'so ``` it is'\n"),
        ("so <b>\n<answer>```python\na\n```</answer>", "a\n"),
        ("<answer> ```python\na\n``` </answer>", "a\n"),
        ("use ```x``` or ```python\na\n```", "a\n"),
        ("The code: ```python\na\n```", "a\n"),
        ("1. ```Python3  \na\n```\nThat is all ```python", "a\n"),
        ("```python\na\n``` It works.\n```\n1\n```", "a\n"),
        ("``` python\na\n```", "a\n"),
        ("It is ```python``` code:\n```python\na\n```", "a\n"),
        ("The ```x``` python\n```\na\n```", "a\n"),
        ("See ```\n```\na\n```", "a\n"),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("```python\na\n```text\n1\n```", "a\n"),
        ("```\n1\n```python\na\n```", "a\n"),
        ("```python\na  # as ```python\n```", "a  # as ```python\n"),
        ("```bash\nls\n```", ""),
        ("```python\na", ""),
        ("print(1)", ""),
        ("", ""),
    ],
)
def test_extract_program(text: str, program: str) -> None:
    assert extract_program(text) == program


def test_answers_are_the_content_of_closed_tags() -> None:
    """As for mathematics, whose rule is in grading/extract.py."""
    assert programs.answer_content("<answer>a</answer>") == "a"
    parts = ["<answer>", "</answer>", "<answer>", "</answer>", "1", "22", "333", "4444"]
    rng = random.Random(0)
    found = Counter()
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=8))
        content = programs.answer_content(text)
        if "<answer>" not in content:  # such an answer is prose for extract()
            assert content == extract(text), text
        found[bool(content)] += 1
    assert min(found.values()) > 200


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think> so </think> <answer>\n{block}</answer>", 1.0),
        ("<answer>{block}</answer> <answer>{block}", 1.0),
        ("<answer>the code: {block}</answer>", 1.0),
        ("<answer>```python\n0\n```\n</answer> <answer>{block}</answer>", 1.0),
        ("<answer>{block}</answer> <answer>I am not sure.</answer>", 0.0),
        ("{block}", 0.0),
        ("{block}</answer>", 0.0),
        ("<answer>{block}", 0.0),
        ("</answer>{block}<answer>", 0.0),
        ("<answer></answer>{block}", 0.0),
    ],
)
def test_programs_are_paid_only_in_closed_tags(text: str, reward: float) -> None:
    from reward import _run_programs

    row = {"public_test_cases": cases("stdin", ("3", "9")), "private_test_cases": "[]"}
    response = text.format(block=f"```python\n{RIGHT}\n```\n")
    rollout = SimpleNamespace(text=response, problem=SimpleNamespace(tests=row))
    assert _run_programs([rollout]) == [reward]
    assert reward or RIGHT not in rollout.answer


def cases(kind: str, *pairs: tuple[str, str]) -> str:
    return json.dumps(
        [{"input": given, "output": output, "testtype": kind} for given, output in pairs]
    )


def packed(value: object, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_decode_tests(protocol: int) -> None:
    public, private = cases("stdin", ("1\n", "é")), cases("stdin", ("2", "3" * 300), ("", ""))
    wanted = Cases(("1\n", "2", ""), ("é", "3" * 300, ""), "")
    row = {
        "public_test_cases": public,
        "private_test_cases": private,
        "metadata": "{}",
        "starter_code": "",
    }
    assert decode_tests(row) == wanted
    assert decode_tests(row | {"private_test_cases": packed(private, protocol)}) == wanted

    row = {
        "public_test_cases": cases("functional", ("1\n2", "3")),
        "private_test_cases": packed("[]", protocol),
    }
    assert decode_tests(row | {"metadata": '{"func_name": "add"}'}) == Cases(
        ("1\n2",), ("3",), "add"
    )


class Trap:
    def __reduce__(self) -> tuple:
        return os.system, ("touch trapped",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"public_test_cases": None}, "field public_test_cases: expected text, found None"),
        ({"public_test_cases": "[1"}, "field public_test_cases: not valid JSON"),
        ({"public_test_cases": "7"}, "field public_test_cases: test 1: "),
        (
            {"public_test_cases": '[{"input": "", "output": 3, "testtype": "stdin"}]'},
            "test 1: .*text in output",
        ),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "field testtype: "),
        ({"public_test_cases": cases("other", ("", ""))}, "field testtype: .*other"),
        (
            {"public_test_cases": cases("functional", ("", ""))},
            "field testtype: .*functional.*stdin",
        ),
        (
            {
                "public_test_cases": cases("functional", ("1", "[3")),
                "private_test_cases": "[]",
                "metadata": '{"func_name": "f"}',
            },
            "test 1: not valid JSON",
        ),
        ({"private_test_cases": "%%%"}, "field private_test_cases: neither JSON nor"),
        (
            {"private_test_cases": base64.b64encode(b"no zlib").decode()},
            "field private_test_cases: neither",
        ),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(b"x" * 999)[:-3]).decode()},
            "field private_test_cases: .*cut off",
        ),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(b"no pickle")).decode()},
            "field private_test_cases: neither",
        ),
        (
            {"private_test_cases": packed(["[]"])},
            "field private_test_cases: a pickle of one string .*APPEND|LIST",
        ),
        (
            {"private_test_cases": packed(("[]", "[]"))},
            "field private_test_cases: a pickle of one string",
        ),
        (
            {"private_test_cases": packed(Trap())},
            "field private_test_cases: a pickle of one string .*REDUCE",
        ),
        ({"private_test_cases": packed(b"[]")}, "field private_test_cases: a pickle of one string"),
        ({"private_test_cases": packed("no JSON")}, "field private_test_cases: not valid JSON"),
    ],
)
def test_rows_that_are_refused(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {
        "public_test_cases": cases("stdin", ("1", "2")),
        "private_test_cases": cases("stdin", ("1", "2")),
        "metadata": "{}",
    }
    with pytest.raises(ValueError, match=message):
        decode_tests(row | change)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "metadata", [None, "", "[]", "{}", '{"func_name": null}', '{"func_name": "a b"}']
)
def test_functional_rows_name_their_function(metadata: str | None) -> None:
    row = {
        "public_test_cases": cases("functional", ("1", "2")),
        "private_test_cases": "[]",
        "metadata": metadata,
    }
    with pytest.raises(ValueError, match="field metadata"):
        decode_tests(row)


def test_unpacking_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "UNPACKED", 1 << 20)
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    with pytest.raises(ValueError, match=r"field private_test_cases: .*over 1048576 bytes"):
        decode_tests({"public_test_cases": cases("stdin", ("1", "2")), "private_test_cases": bomb})
