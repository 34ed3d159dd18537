"""The rule of experiments/claims.py: what the results say of a comparison and of a claim, and how
many seeds a claim still asks for."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from experiments.claims import LOOKS, SEEDS, Claim, Comparison

RESULTS = Path(__file__).parent / "results"

REPRODUCES = "reproduces"
CONTRADICTS = "contradicts"
NO_DIFFERENCE = "no difference"
UNDECIDED = "undecided"
# Student's t at each look: its quantile at 1 − ERROR_RATE / len(LOOKS) / 2, for n − 1 degrees.
T_QUANTILES = {5: 4.3147, 10: 3.1109, 15: 2.8640, 20: 2.7586}

Results = Mapping[str, dict[str, Any]]  # arm → its results/ARM.json


class Decided(NamedTuple):
    """A comparison with its numbers: mean and interval of the paired differences of the first
    `seeds` seeds, at the look at which it ended."""

    comparison: Comparison
    mean: float
    low: float
    high: float
    seeds: int
    verdict: str

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


# ── one comparison ───────────────────────────────────────────────────────────────────────────────


def decide(comparison: Comparison, results: Results) -> Decided | None:
    """The comparison at the first look that decides it, or at the last that has its seeds; None
    before the first look."""
    by_seed = differences(comparison, results)
    latest = None
    for seeds in LOOKS:
        if not all(seed in by_seed for seed in SEEDS[:seeds]):
            break
        mean, low, high = interval([by_seed[seed] for seed in SEEDS[:seeds]])
        latest = Decided(comparison, mean, low, high, seeds, verdict(comparison, low, high))
        if latest.verdict != UNDECIDED:
            break
    return latest


def differences(comparison: Comparison, results: Results) -> dict[int, float]:
    """seed → first − second. The metric of an arm against itself is a difference already."""
    first = metric_by_seed(results, comparison.first, comparison.metric)
    if comparison.first == comparison.second:
        return first
    second = metric_by_seed(results, comparison.second, comparison.metric)
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def metric_by_seed(results: Results, arm: str, metric: str) -> dict[int, float]:
    """seed → the metric of an arm at the end of its training, or before it (ARM@0)."""
    name, at, _ = arm.partition("@")
    when = "before" if at else "after"
    runs = results.get(name, {}).get("runs", {})
    return {int(seed): run[when][metric] for seed, run in runs.items() if metric in run[when]}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high at a look: mean ± t·s/√n, with the t that allows for all looks.

    >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3, 0.2, 0.2])]
    [0.2, 0.064, 0.336]
    """
    mean = fmean(values)
    half = T_QUANTILES[len(values)] * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def verdict(comparison: Comparison, low: float, high: float) -> str:
    """The verdict of a comparison from its interval.

    >>> verdict(Comparison("a", "b"), 0.01, 0.2), verdict(Comparison("a", "b"), -0.01, 0.02)
    ('reproduces', 'no difference')
    >>> verdict(Comparison("a", "b", paper="alike"), 0.01, 0.2)
    'undecided'
    """
    margin = comparison.margin
    within = low > -margin and high < margin
    if comparison.paper == "alike":
        if within:
            return REPRODUCES
        return CONTRADICTS if low > margin or high < -margin else UNDECIDED
    if low > 0:
        return REPRODUCES
    if high < 0:
        return CONTRADICTS
    return NO_DIFFERENCE if within else UNDECIDED


def seeds_to_decide(decided: Decided) -> float:
    """About how many seeds would decide an undecided comparison, if mean and spread stayed as they
    are: the interval must leave out 0 or the nearer margin, whichever comes first."""
    c = decided.comparison
    spread = decided.half_width * math.sqrt(decided.seeds)
    distances = [abs(abs(decided.mean) - c.margin)]
    if c.paper == "more":
        distances.append(abs(decided.mean))
    distance = max(distances)
    return math.ceil((spread / distance) ** 2) if distance else math.inf


# ── a claim ──────────────────────────────────────────────────────────────────────────────────────


def decisions(claim: Claim, results: Results) -> list[Decided]:
    """The claim's comparisons that have been looked at."""
    found = [decide(comparison, results) for comparison in claim.comparisons]
    return [decided for decided in found if decided]


def claim_verdict(claim: Claim, results: Results) -> str | None:
    """The verdict of a claim, from its primary comparisons; None if one has not been looked at."""
    found = [decide(c, results) for c in claim.comparisons if c.primary]
    if None in found:
        return None
    verdicts = {decided.verdict for decided in found}
    for worst in (CONTRADICTS, UNDECIDED, NO_DIFFERENCE):
        if worst in verdicts:
            return worst
    return REPRODUCES


def seeds_wanted(claim: Claim, results: Results) -> dict[str, int]:
    """arm → how many seeds it should have before the next look at the claim. A comparison that is
    decided, or was looked at for the last time, asks for nothing. Arms of comparisons that are not
    primary get the first look's."""
    wanted = dict.fromkeys(claim.arms(), LOOKS[0])
    for comparison in claim.comparisons:
        decided = decide(comparison, results)
        if not comparison.primary or decided is None:
            continue
        seeds = decided.seeds
        if decided.verdict == UNDECIDED and seeds < LOOKS[-1]:
            seeds = LOOKS[LOOKS.index(seeds) + 1]
        for arm in comparison.arms():
            wanted[arm] = max(wanted[arm], seeds)
    return wanted


def load() -> dict[str, dict[str, Any]]:
    """arm → its results, for the arms that have any."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
