"""Run the arms of the paper's claims, two at a time, and keep their results.

    python -m experiments.run lambda gamma        the arms of two claims
    python -m experiments.run all                 everything

Every arm first tries three learning rates, in runs of half the length on a seed used for nothing
else. Then it runs with the best rate, on blocks of five seeds, until the rule of claims.py has
decided its claims or 20 seeds are done. A run leaves its folder under runs/experiments and an entry
in experiments/results/ARM.json: metrics before and after the training, curves, and the revision of
the program.

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
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import tyro

import train
from config import PRESETS, Config, Processes, parse, validate_ranges
from curation.files import write_atomically
from experiments import rule
from experiments.claims import (
    ARMS,
    CLAIMS,
    LOOKS,
    MODEL,
    PRESET,
    RATES,
    SAME_RATE,
    SEEDS,
    SWEEP_SEED,
)
from experiments.measure import measure
from experiments.variants import HALF_CRITIC, RUNS, SETTINGS, TRAINING
from preflight import prepare
from reports.log import revision, versions
from toy import tiny


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
        inputs = prepare(cfg)
        folder = train_arm(cfg, inputs)
        entry = measure(job.arm, folder, cfg, inputs)
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
    file = rule.RESULTS / f"{arm}.json"
    if file.exists():
        return json.loads(file.read_text())
    return {"arm": arm, "flags": ARMS[arm], "sweep": {}, "runs": {}}


def keep(arm: str, entry: dict[str, Any]) -> None:
    """Add the entry of a run to results/ARM.json."""
    results = load_results(arm)
    results["versions"] = versions()
    if entry["seed"] == SWEEP_SEED:
        results["sweep"][entry["rate"]] = entry["after"]["accuracy"]
    else:
        made_by = revision(aside="experiments/results")  # the results are no other program
        results["runs"][f"{entry['seed']}"] = entry | {"revision": made_by}
    rule.RESULTS.mkdir(exist_ok=True)
    write_atomically(rule.RESULTS / f"{arm}.json", [as_text(results)])


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


def rate_of(arm: str) -> str | None:
    """The policy's learning rate of an arm: the best of its sweep, that of another arm, or that of
    its model's preset. None: the sweep has not ended."""
    if arm in PRESET:
        return f"{PRESETS[_model(arm)]['policy_lr']}"
    sweep = load_results(SAME_RATE.get(arm, arm))["sweep"]
    if len(sweep) < len(RATES):
        return None
    return max(RATES, key=lambda rate: sweep[rate])


def _model(arm: str) -> str:
    """The model that an arm trains."""
    words = ARMS[arm].split()
    return words[words.index("--model") + 1] if "--model" in words else MODEL


def missing_rates(arms: Sequence[str]) -> list[Job]:
    """The runs that try learning rates and have no result yet."""
    jobs = []
    for arm in dict.fromkeys(SAME_RATE.get(arm, arm) for arm in arms if arm not in PRESET):
        sweep = load_results(arm)["sweep"]
        jobs += [Job(arm, SWEEP_SEED, rate) for rate in RATES if rate not in sweep]
    return jobs


def missing_seeds(claims: Sequence[str], look: int) -> list[Job]:
    """The runs that these claims ask for and that have no result yet, up to `look` seeds. The rates
    must be known."""
    results = rule.load()
    wanted: dict[str, int] = {}
    for name in claims:
        for arm, seeds in rule.seeds_wanted(CLAIMS[name], results).items():
            wanted[arm] = max(wanted.get(arm, 0), min(seeds, look))
    jobs = []
    for arm, seeds in wanted.items():
        runs = load_results(arm)["runs"]
        rate = rate_of(arm)
        jobs += [Job(arm, seed, rate) for seed in SEEDS[:seeds] if f"{seed}" not in runs]
    return jobs


def run_all(claims: Sequence[str], workers: int) -> None:
    """Do all runs that the claims ask for, one block of seeds after the other, and keep each
    result."""
    arms = list(dict.fromkeys(arm for name in claims for arm in CLAIMS[name].arms()))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        run_jobs(pool, missing_rates(arms), workers)
        for look in LOOKS:
            run_jobs(pool, missing_seeds(claims, look), workers)
            verdicts = [rule.claim_verdict(CLAIMS[name], rule.load()) for name in claims]
            open_claims = verdicts.count(rule.UNDECIDED)
            print(f"after the look at {look} seeds {open_claims} claims are undecided", flush=True)


def run_jobs(pool: ProcessPoolExecutor, jobs: Sequence[Job], workers: int) -> None:
    """Make the base models that these runs need, then do the runs, and keep each result. Those that
    other runs begin from come first."""
    bases = dict.fromkeys(base for job in jobs for base in bases_of(job))
    made = [pool.submit(tiny.ensure, seed, name=name) for name, seed in bases]
    for done, base in enumerate(made, 1):
        print(f"base model {done} of {len(made)}: {base.result()}", flush=True)
    waiting = sorted(jobs, key=lambda job: job.arm != "default")
    running: dict[Future, Job] = {}
    started = time.perf_counter()
    done = 0
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            running[pool.submit(run, job)] = job
        finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
        job = running.pop(finished)
        entry = result_of(job, finished)
        keep(job.arm, entry)
        done += 1
        minutes = (time.perf_counter() - started) / done * (len(jobs) - done) / 60
        left = f"{len(jobs) - done} runs of this block left, about {minutes:.0f} min"
        print(f"{one_line(job, entry)}; {left}", flush=True)


def bases_of(job: Job) -> list[tuple[str, int]]:
    """Name and seed of the base models that a run needs."""
    names = [_model(job.arm)]
    if job.arm == "half-critic":
        names.append(HALF_CRITIC)
    return [(name, job.seed) for name in names]


def result_of(job: Job, finished: Future) -> dict[str, Any]:
    """The entry of a finished run. Raises RuntimeError if it failed."""
    try:
        return finished.result()
    except Exception as error:
        log = RUNS / f"{job.folder_name()}.log"
        message = f"{job.folder_name()}: {error!r}; its output is in {log}"
        raise RuntimeError(message) from error


def one_line(job: Job, entry: dict[str, Any]) -> str:
    """What a run was and how it ended."""
    seed = "sweep " if job.seed == SWEEP_SEED else f"seed {job.seed}"
    after = entry["after"]
    accuracies = f"accuracy {after['accuracy']:.3f}, late {after['late_accuracy']:.3f}"
    return f"{job.arm:18s} {seed}, rate {job.rate:6s}: {accuracies}, {entry['seconds']} s"


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
    run_all(claims, options.workers)


if __name__ == "__main__":
    main()
