"""Run one stage of the installation, and show how far it is in one line.

    python tools/progress.py "2/5 torch" .venv/bin/pip install torch

    2/5 torch
         installing 3 of 9 packages, 41 s

It reads what pip prints, and shows it if the stage fails. A command that prints nothing, or that
shows its progress on stderr as uv does, keeps its own. It needs Python alone, because it runs
before anything is installed.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

INSTALLING = "Installing collected packages: "
TERMINAL_SECONDS, LINE_SECONDS = 0.5, 10.0  # between two displays of the progress


class Stage:
    """What pip has done so far, by its output."""

    def __init__(self, environment: Path) -> None:
        self.environment = environment
        self.lines: list[str] = []
        self.collected = 0
        self.total = 0  # packages to install; known when all are collected
        self.before = self._installed()

    def read(self, output: Iterable[str]) -> None:
        """Follow the output of pip to its end."""
        for line in output:
            self.lines.append(line)
            self.collected += line.startswith("Collecting ")
            if line.startswith(INSTALLING):
                self.total = line.count(",") + 1

    def so_far(self) -> str:
        """What it is doing, and how far it is; "" before the first package."""
        if self.total:
            done = max(0, self._installed() - self.before)
            return f"installing {min(done, self.total)} of {self.total} packages"
        return f"downloading package {self.collected}" if self.collected else ""

    def _installed(self) -> int:
        """Installed packages: each leaves its description when its files are there."""
        return len(list(self.environment.glob("lib/python*/site-packages/*.dist-info")))


def run(title: str, command: list[str], environment: Path) -> int:
    """Run the command; returns its exit status. A terminal shows the progress in one line that
    changes, another output gets a line every ten seconds."""
    began = time.perf_counter()
    terminal = sys.stdout.isatty()
    print(title, flush=True)
    stage = Stage(environment)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(target=stage.read, args=(process.stdout,))
    reader.start()
    while reader.is_alive():
        reader.join(timeout=TERMINAL_SECONDS if terminal else LINE_SECONDS)
        if reader.is_alive() and stage.so_far():
            seconds = time.perf_counter() - began
            text = f"     {stage.so_far()}, {seconds:.0f} s"
            print(f"\r{text}\033[K" if terminal else text, end="" if terminal else "\n", flush=True)
    status = process.wait()
    if terminal:
        print("\r\033[K", end="")
    if status:
        print("".join(stage.lines), end="")
    print(f"     {'failed' if status else 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
    return status


def main() -> None:
    """Command line: a title, and the command."""
    title, *command = sys.argv[1:]
    sys.exit(run(title, command, Path(".venv")))


if __name__ == "__main__":
    main()
