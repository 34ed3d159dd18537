"""Run the benchmarks of RESULTS.md one after another, and write the page.

    ORZ_DATA=folder python -m benchmarks [--only packing sharing]

All of them take about 50 minutes on two idle cores, a third of it beside TRL. `benchmarks.demo`
runs without another version to compare with.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks import flags, record

COMMANDS: dict[str, tuple[str, ...]] = {  # benchmark → its flags
    "step_overhead": (),
    "packing": (),
    "sharing": (),
    "logprob": ("--rounds", "1"),
    "scaling": ("--rounds", "2"),
    "sync": (),
    "grader_speed": (),
    "demo": (),
    "vs_trl_gradients": (),
    "vs_trl": (),
}
WITH_DATA = ("packing", "grader_speed")


@dataclass(frozen=True)
class Settings:
    """What to run."""

    only: tuple[str, ...] = ()
    """Names of the benchmarks; none: all."""


def main() -> None:
    """Command line. A benchmark that fails ends the program; what ran before it stays."""
    chosen = flags.parse(Settings, "", __doc__).only or tuple(COMMANDS)
    unknown = [name for name in chosen if name not in COMMANDS]
    if unknown:
        sys.exit(f"benchmarks: --only {unknown[0]}: expected one of {', '.join(COMMANDS)}")
    if "ORZ_DATA" not in os.environ and any(name in WITH_DATA for name in chosen):
        sys.exit(f"benchmarks: ORZ_DATA is not set; {' and '.join(WITH_DATA)} read that folder")
    for number, name in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {name}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *COMMANDS[name]]
        if subprocess.run(command).returncode:
            sys.exit(f"benchmarks: {name} failed; RESULTS.md is as before")
        print(f"{number}/{len(chosen)} {name}: {time.monotonic() - start:.0f} s", flush=True)
    record.write()


if __name__ == "__main__":
    main()
