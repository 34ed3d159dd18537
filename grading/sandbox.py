r"""Run a program that a language model wrote, in a box that it cannot leave.

Every run has a box of its own (grading/sandbox_child.py says how it is made and what it holds):

| what | bound |
|---|---|
| files | to read, the interpreter, its library and the system's libraries; to write, `/tmp`, empty, of 64 MiB; no others |
| network | a namespace with nothing in it, and no sockets |
| processes | one, with at most 32 threads; it cannot fork and sees no other |
| memory | `memory_mb` of address space, and what is in `/tmp` |
| time | `seconds` by the wall clock |
| output | 16 MiB each of stdout and stderr |
| rights | no capabilities and no way to new ones, a filter on system calls |
| the caller's | nothing: no environment variables, no open files |

It takes Linux 5.14 or later, and root or unprivileged user namespaces; `unavailable()` says what is missing.
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

BOX = Path(__file__).with_name("sandbox_child.py")
OUTPUT = 16 << 20  # bytes of stdout or stderr; answers stay far below


@lru_cache(maxsize=1)
def unavailable() -> str:
    """ "" if this machine can run the sandbox, else one line: why not, and what to do."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}: run it on a Linux machine"
    try:
        reason, output = run("print(input())", "", "ready", seconds=30, memory_mb=512)
    except RuntimeError as error:
        reason, output = str(error), ""
    if output == "ready\n":
        return ""
    return (
        f"the sandbox does not work here ({reason}): it needs Linux 5.14 and root or unprivileged user namespaces "
        "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0; docker run --privileged)"
    )


def run(program: str, function: str, given: str, seconds: float, memory_mb: int) -> tuple[str, str]:
    """Run `program` with `given` as its standard input; `function` is the one to call on it instead, "" for none (grading/sandbox_child.py).

    Returns why it failed, "" if it did not, and what it printed. Raises RuntimeError if there was no box to run it in.
    """
    due = time.monotonic() + seconds
    source, stdin, (report, report_end) = _sealed(program), _sealed(given), os.pipe()
    python = os.path.realpath(
        sys._base_executable
    )  # of no virtual environment: the box knows nothing of one
    arguments = [
        str(argument) for argument in (source, report_end, function, math.ceil(seconds), memory_mb)
    ]
    with os.fdopen(report, "rb", buffering=0) as report:
        try:
            box = subprocess.Popen(
                [python, "-I", "-S", str(BOX), *arguments],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(source, report_end),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            for end in (source, stdin, report_end):
                os.close(end)
        with box:
            reason, texts = _listen([report, box.stdout, box.stderr], due)
            if reason:
                box.terminate()
    problem, output, errors = (text.decode(errors="replace") for text in texts)
    if problem:  # only the box itself can write there, not the program
        raise RuntimeError(problem)
    return reason or _failure(box.returncode, errors), output


def _sealed(text: str) -> int:
    """A file in memory that holds the text and that nobody can change. (Not a pipe: it needs no feeding.)"""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(text.encode(errors="surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(
        file,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
    )
    return file


def _listen(streams: list[IO[bytes]], due: float) -> tuple[str, list[bytearray]]:
    """Read all streams to their ends; or until the deadline, or one of them has said too much."""
    texts = {stream: bytearray() for stream in streams}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ, texts[stream])
        while selector.get_map():
            if (left := due - time.monotonic()) <= 0:
                return "time limit", list(texts.values())
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(key.data) > OUTPUT:
                    return "output limit", list(texts.values())
    return "", list(texts.values())


def _failure(status: int, errors: str) -> str:
    last = (errors.strip().splitlines() or [""])[-1]
    if status == 0:
        return ""
    if status == 128 + signal.SIGXCPU:
        return "time limit"
    if last.startswith("MemoryError"):
        return "memory limit"
    cause = f"ended by signal {status - 128}" if status > 128 else f"exit status {status}"
    return "error: " + "".join(c if c.isprintable() else "?" for c in last[:200] or cause)
