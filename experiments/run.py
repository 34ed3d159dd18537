"""Run the arms of the paper's claims, two at a time, and keep their results.

    python -m experiments.run lambda gamma        the arms of two claims
    python -m experiments.run all                 everything

Every arm first tries three learning rates, in runs of half the length on a seed used for nothing
else. Then it runs with the best rate and each of the seeds. A run leaves its folder under
runs/experiments and an entry in experiments/results/ARM.json: metrics of held-out responses before
and after the training, and curves.

A run that has an entry is not run again, and an interrupted run starts again from its beginning. So
the same command continues where it was stopped.
"""

import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import tyro

import train
from config import Config, Processes, parse, validate_ranges
from curation.files import write_atomically
from experiments.claims import ARMS, CLAIMS, MODEL, RATES, SEEDS, SWEEP_SEED
from experiments.measure import measure, value_of_repetition
from experiments.variants import RUNS, SETTINGS, TRAINING
from preflight import prepare
from reports.log import revision, versions
from toy import tiny

RESULTS = Path(__file__).parent / "results"
FIRST = {"anneal": "default", "anneal-hard": "default"}  # arms that begin where another ended


class Job(NamedTuple):
    """One run of an arm."""

    arm: str
    seed: int
    rate: str  # of the policy

    def folder_name(self) -> str:
        """The name of the run's folder; the runs that try the rates have the rate in it."""
        return f"{self.arm}-{self.rate if self.seed == SWEEP_SEED else self.seed}"


# ── one run ──────────────────────────────────────────────────────────────────────────────────────


def run(job: Job) -> dict[str, Any]:
    """Do one run in this process; returns its entry in results/ARM.json."""
    started = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    log = RUNS / f"{job.folder_name()}.log"
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        cfg = settings(job)
        train_arm = TRAINING.get(job.arm, train.train)
        folder = train_arm(cfg, prepare(cfg))
        entry = measure(folder, cfg)
        if job.arm == "default":
            entry["after"] |= value_of_repetition(folder, cfg)
    seconds = round(time.perf_counter() - started)
    return {"seed": job.seed, "rate": job.rate, "seconds": seconds, **entry}


def settings(job: Job) -> Config:
    """The settings of a run; what the arm needs for its seed is prepared."""
    flags = f"--model {MODEL} --seed {job.seed} --policy-lr {job.rate} {ARMS[job.arm]}"
    where = f"--runs {RUNS} --name {job.folder_name()} --overwrite --checkpoint-every 0"
    cfg = parse(f"{flags} {where}".split())
    if job.arm in SETTINGS:
        cfg = SETTINGS[job.arm](cfg)
    if job.seed == SWEEP_SEED:
        cfg = replace(cfg, steps=math.ceil(cfg.steps / 2))
    return cfg


# ── results ──────────────────────────────────────────────────────────────────────────────────────


def load_results(arm: str) -> dict[str, Any]:
    """What results/ARM.json holds; without runs if there is no such file."""
    file = RESULTS / f"{arm}.json"
    if file.exists():
        return json.loads(file.read_text())
    return {"arm": arm, "flags": ARMS[arm], "sweep": {}, "runs": {}}


def keep(arm: str, entry: dict[str, Any]) -> None:
    """Add the entry of a run to results/ARM.json."""
    results = load_results(arm)
    results |= {"revision": revision(), "versions": versions()}
    if entry["seed"] == SWEEP_SEED:
        results["sweep"][entry["rate"]] = entry["after"]["accuracy"]
    else:
        results["runs"][f"{entry['seed']}"] = entry
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{arm}.json", [as_text(results)])


def as_text(results: dict[str, Any]) -> str:
    """JSON with each curve on one line, so that a diff can be read.

    >>> print(as_text({"curve": [1, 2]}), end="")
    {
     "curve": [ 1, 2 ]
    }
    """
    text = json.dumps(results, indent=1, sort_keys=True)
    return re.sub(r"\[[^\]]*\]", lambda curve: re.sub(r"\s+", " ", curve[0]), text) + "\n"


# ── all runs ─────────────────────────────────────────────────────────────────────────────────────


def arms_of(claims: Sequence[str]) -> list[str]:
    """The arms of these claims: first those that others begin from, then those of the primary
    comparisons, then the rest."""
    arms = []
    for primary in (True, False):
        for name in claims:
            arms += CLAIMS[name].arms(primary)
    return list(dict.fromkeys([FIRST[arm] for arm in arms if arm in FIRST] + arms))


def open_jobs(arms: Sequence[str]) -> list[Job]:
    """The runs that are missing and can be started: of each arm first those that try the rates,
    then the seeds with the best rate."""
    jobs = []
    for arm in arms:
        origin = FIRST.get(arm, arm)  # an arm that begins where another ended keeps its rate
        sweep = load_results(origin)["sweep"]
        if len(sweep) < len(RATES):
            if arm not in FIRST:
                jobs += [Job(arm, SWEEP_SEED, rate) for rate in RATES if rate not in sweep]
            continue
        best = max(RATES, key=lambda rate: sweep[rate])
        seeds = load_results(origin)["runs"] if arm in FIRST else map(str, SEEDS)
        finished = load_results(arm)["runs"]
        jobs += [Job(arm, int(seed), best) for seed in seeds if seed not in finished]
    return jobs


def count_missing(arms: Sequence[str]) -> int:
    """How many runs of these arms have no result yet, those that cannot start yet included."""
    missing = 0
    for arm in arms:
        results = load_results(arm)
        rates = 0 if arm in FIRST else len(RATES)
        missing += len(SEEDS) + rates - len(results["runs"]) - len(results["sweep"])
    return missing


def run_all(arms: Sequence[str], workers: int) -> None:
    """Do all missing runs of these arms, one arm after the other, and keep each result."""
    running: dict[Future, Job] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(tiny.ensure, name=MODEL), (SWEEP_SEED, *SEEDS)))
        started = time.perf_counter()
        done = 0
        while True:
            waiting = [job for job in open_jobs(arms) if job not in running.values()]
            for job in waiting[: workers - len(running)]:
                running[pool.submit(run, job)] = job
            if not running:
                return
            finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            job = running.pop(finished)
            try:
                entry = finished.result()
            except Exception as error:
                log = RUNS / f"{job.folder_name()}.log"
                raise RuntimeError(
                    f"{job.folder_name()}: {error!r}; its output is in {log}"
                ) from error
            keep(job.arm, entry)
            done += 1
            left = count_missing(arms)
            minutes = (time.perf_counter() - started) / done * left / 60
            print(f"{one_line(job, entry)}; {left} runs left, about {minutes:.0f} min", flush=True)


def one_line(job: Job, entry: dict[str, Any]) -> str:
    """What a run was and how it ended."""
    seed = "sweep " if job.seed == SWEEP_SEED else f"seed {job.seed}"
    after = entry["after"]
    result = f"accuracy {after['accuracy']:.3f}, length {after['length']:3.0f}"
    return f"{job.arm:18s} {seed}, rate {job.rate:6s}: {result}, {entry['seconds']} s"


@dataclass(frozen=True)
class Options:
    """The command line."""

    claims: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CLAIM ...", help=f"all, or names of {', '.join(CLAIMS)}"),
    ]
    workers: Processes = 2
    """Runs at a time; each takes one core."""


def main() -> None:
    """Run the arms of the claims that are named."""
    options = tyro.cli(Options, description=__doc__, prog="python -m experiments.run")
    try:
        validate_ranges(options)
    except ValueError as error:
        sys.exit(f"experiments.run: {error}")
    unknown = [name for name in options.claims if name not in (*CLAIMS, "all")]
    if unknown or not options.claims:
        found = ", ".join(unknown) or "nothing"
        sys.exit(f"experiments.run: expected all, or of {', '.join(CLAIMS)}; found {found}")
    claims = list(CLAIMS) if "all" in options.claims else options.claims
    run_all(arms_of(claims), options.workers)


if __name__ == "__main__":
    main()
