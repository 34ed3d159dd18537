"""The command line of the benchmarks. It imports little: some of them measure their own memory."""

import sys
from typing import TypeVar

import tyro

from config import validate_ranges

T = TypeVar("T")


def parse(settings: type[T], name: str, description: str) -> T:
    """The settings that the command line of `benchmarks.<name>` gives. A number out of range ends
    the program in one line."""
    parsed = tyro.cli(settings, description=description, prog=f"python -m benchmarks.{name}")
    try:
        validate_ranges(parsed)
    except ValueError as error:
        sys.exit(f"benchmarks.{name}: {error}")
    return parsed
