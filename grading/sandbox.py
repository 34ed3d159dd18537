r"""Run a program that a language model wrote in a sandbox that it cannot leave.

Each run has a sandbox of its own, which grading/sandbox_child.py builds:

| resource | limit |
|---|---|
| files | read: Python, its library, system libraries, its own input; write: `/tmp`, 64 MiB, empty |
| network | an empty network namespace, and no sockets |
| processes | one, with at most 32 threads; it cannot fork and sees no other process |
| memory | `memory_mb` of address space, and the files in `/tmp` |
| time | `seconds` of wall-clock time |
| output | 16 MiB each of stdout and stderr |
| rights | no capabilities, and no way to get any; a filter on system calls |
| from the caller | nothing: no environment variables, no open files |

It needs Linux 5.14 or later, and root or unprivileged user namespaces. `unavailable()` says what
is missing.
"""

import fcntl
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("sandbox_child.py")
# Imports the script and calls its main(). Unlike a script, a module is compiled only once.
START = "import sys; sys.path.append(sys.argv[1]); __import__(sys.argv[2]).main(sys.argv[3:])"
MAX_OUTPUT = 16 << 20  # bytes of stdout or stderr; right outputs are far below


@lru_cache(maxsize=1)
def unavailable() -> str:
    """ "" if the sandbox works on this machine, else one line: why not, and what to do."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}: run it on a Linux machine"
    try:
        reason, output = run("print(input())", "", "ready", seconds=30, memory_mb=512)
    except RuntimeError as error:
        reason, output = str(error), ""
    if output == "ready\n":
        return ""
    return (
        f"the sandbox does not work here ({reason}): it needs Linux 5.14 and root or unprivileged "
        "user namespaces (sysctl user.max_user_namespaces, "
        "kernel.apparmor_restrict_unprivileged_userns=0; docker run --privileged)"
    )


def run(program: str, function: str, given: str, seconds: float, memory_mb: int) -> tuple[str, str]:
    """Run `program` with `given` as its stdin; returns why it failed, "" if it did not, and its
    output.

    If `function` is not "", that function of the program is called instead, with the arguments in
    `given`, and its result is the output (grading/sandbox_child.py). Raises RuntimeError if the
    sandbox cannot be made.
    """
    due = time.monotonic() + seconds
    report, report_end = os.pipe()
    with os.fdopen(report, "rb", buffering=0) as report_stream:
        child = _start_child(program, function, given, report_end, math.ceil(seconds), memory_mb)
        with child:
            reason, texts = _read_all([report_stream, child.stdout, child.stderr], due)
            if reason:
                child.terminate()
    problem, output, errors = (text.decode(errors="replace") for text in texts)
    if problem:  # only the sandbox can write to this pipe; the program cannot
        raise RuntimeError(problem)
    return reason or _failure(child.returncode, errors), output


def _start_child(
    program: str, function: str, given: str, report_end: int, seconds: int, memory_mb: int
) -> subprocess.Popen:
    """Start grading/sandbox_child.py, which reports problems to `report_end`; closes that here."""
    source = _sealed_file(program)
    stdin = _sealed_file(given)
    # Not the interpreter of a virtual environment: the sandbox does not have its files.
    python = os.path.realpath(sys._base_executable)
    arguments = [str(value) for value in (source, report_end, function, seconds, memory_mb)]
    try:
        return subprocess.Popen(
            [python, "-I", "-S", "-c", START, str(CHILD.parent), CHILD.stem, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(source, report_end),
            env={},
            cwd="/",
            start_new_session=True,
        )
    finally:
        for descriptor in (source, stdin, report_end):
            os.close(descriptor)


def _sealed_file(text: str) -> int:
    """The descriptor of a file in memory that holds the text and that nobody can change. Unlike a
    pipe, it needs no thread that writes to it."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(text.encode(errors="surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _read_all(streams: list[IO[bytes]], due: float) -> tuple[str, list[bytearray]]:
    """The content of the streams, and "" if all were read to their ends, else the limit that was
    reached: "time limit" or "output limit"."""
    texts = [bytearray() for _ in streams]
    with selectors.DefaultSelector() as selector:
        for stream, text in zip(streams, texts, strict=True):
            selector.register(stream, selectors.EVENT_READ, text)
        while selector.get_map():
            left = due - time.monotonic()
            if left <= 0:
                return "time limit", texts
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(key.data) > MAX_OUTPUT:
                    return "output limit", texts
    return "", texts


def _failure(status: int, errors: str) -> str:
    """Why a program with this exit status and stderr failed; "" if it did not."""
    if status == 0:
        return ""
    if status == 128 + signal.SIGXCPU:
        return "time limit"
    last = errors.strip().rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return "memory limit"
    if not last and status > 128:
        last = f"ended by signal {status - 128}"
    elif not last:
        last = f"exit status {status}"
    return "error: " + "".join(char if char.isprintable() else "?" for char in last[:200])
