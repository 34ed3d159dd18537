"""The command line of the benchmarks. It imports little: some of them measure their own memory."""

import sys
from typing import TypeVar

import tyro

from config import validate_ranges

T = TypeVar("T")


def parse(settings: type[T], name: str, description: str) -> T:
    """The settings that the command line of `benchmarks.<name>` gives, or that of `benchmarks`. A
    number out of range ends the program in one line."""
    program = f"benchmarks.{name}".rstrip(".")
    parsed = tyro.cli(settings, description=description, prog=f"python -m {program}")
    try:
        validate_ranges(parsed)
    except ValueError as error:
        sys.exit(f"{program}: {error}")
    return parsed
