"""What an experiment keeps of a finished run: metrics before and after the training, its curves,
and what its critic has learned."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from config import Config
from experiments import critics
from experiments.format_reward import BONUS
from preflight import Inputs
from reports.metrics import significant

Record = dict[str, Any]
HELDOUT = ("length", "format", "reflection", "correct_reflection_length", "truncated")
CURVES = ("reward", *HELDOUT, "entropy", "explained_variance", "value_mean")

CALIBRATED = (  # arms whose critic is compared with success
    "default",
    "ppo-128x1",
    "half-critic",
    "loops-critic",
)
LOOPING = ("loops", "loops-critic")  # arms whose critic reads repeated steps
AT_ONE = ("T-0.6", "T-1.2", "T-0.6-top-p-0.95")  # arms that are measured at temperature 1, too


def measure(arm: str, folder: Path, cfg: Config, inputs: Inputs) -> dict[str, Any]:
    """The entry of a finished run in results/ARM.json, numbers to four significant digits."""
    steps = load_records(folder / "metrics.jsonl")
    evaluations = {e["step"]: e for e in load_records(folder / "evaluations.jsonl")}
    first = load_records(folder / "heldout-0.jsonl")
    last = load_records(folder / f"heldout-{cfg.steps}.jsonl")
    before = heldout_metrics(first, evaluations[0])
    after = heldout_metrics(last, evaluations[cfg.steps])
    after |= over_training(steps, evaluations, cfg)
    if cfg.eval_samples > 1:
        hard = hard_problems(first)
        after["hard_accuracy"] = fmean(r["reward"] for r in last if r["problem"] in hard)
        after["hard_problems"] = len(hard)
    entry = {"curves": curves(steps)}
    if cfg.eval_samples == 1:  # one response to each held-out problem
        run = critics.load_finished(folder, cfg, inputs)
        after |= measure_values(arm, run, entry)
        if arm in AT_ONE:
            after["accuracy_at_1"] = critics.accuracy_at_1(run)
    if arm == "default":
        after["accuracy_at_1"] = after["accuracy"]
    return entry | {
        "before": {name: significant(value) for name, value in before.items()},
        "after": {name: significant(value) for name, value in after.items()},
    }


def load_records(path: Path) -> list[Record]:
    """The objects of a finished JSON-lines file."""
    with path.open() as file:
        return [json.loads(line) for line in file]


def heldout_metrics(responses: Sequence[Record], evaluation: Record) -> dict[str, float]:
    """Accuracy, and those of HELDOUT that the evaluation has. A right answer earns at least 1 with
    every reward of the experiments."""
    accuracy = fmean(r["reward"] >= 1 for r in responses)
    return {"accuracy": accuracy} | {k: evaluation[k] for k in HELDOUT if k in evaluation}


def over_training(
    steps: Sequence[Record], evaluations: dict[int, Record], cfg: Config
) -> dict[str, float]:
    """Means over many steps of a run.

    late_accuracy      of the last quarter of the policy's steps, see claims.py
    memorized          on few problems: accuracy on them − on held-out problems, in that quarter
    loop_share         share of cut-off responses in the first quarter
    reflection_excess  length of correct reflecting responses − mean length, all steps
    """
    quarter = max(1, (cfg.steps - cfg.critic_only_steps) // 4)
    late = steps[-quarter:]
    found = {"late_accuracy": fmean(accuracy_of_step(step, cfg) for step in late)}
    if cfg.eval_every:
        heldout = [e["reward"] for n, e in evaluations.items() if n > cfg.steps - quarter]
        found["memorized"] = found["late_accuracy"] - fmean(heldout)
        found["late_accuracy"] = fmean(heldout)
    found["loop_share"] = fmean(step["truncated"] for step in steps[:quarter])
    excess = [
        step["correct_reflection_length"] - step["length"]
        for step in steps
        if "correct_reflection_length" in step
    ]
    if excess:
        found["reflection_excess"] = fmean(excess)
    return found


def accuracy_of_step(step: Record, cfg: Config) -> float:
    """The share of right answers of a step: its mean reward, less a reward for the format.

    >>> cfg = Config(reward="experiments.format_reward:answer_and_format")
    >>> round(accuracy_of_step({"reward": 0.59, "format": 0.9}, cfg), 3)
    0.5
    """
    return step["reward"] - (BONUS * step["format"] if cfg.reward else 0.0)


def measure_values(arm: str, run: critics.Finished, entry: dict[str, Any]) -> dict[str, float]:
    """Metrics of the run's critic, none with GRPO; what a figure shows is added to `entry`."""
    if "critic" not in run.cfg.trained_roles:
        return {}
    critic = critics.critic_of(run)
    found = critics.values_on_heldout(run, critic)
    if arm in CALIBRATED:
        entry["calibration"] = critics.calibration(run, critic)
        found |= critics.brier_scores(entry["calibration"])
    if arm in LOOPING:
        entry["repetition"] = critics.value_of_repetition(run, critic)
        for name in ("value_lost_by_4_repeats", "value_lost_against_going_on"):
            found[name] = entry["repetition"].pop(name)
    return found


def curves(steps: Sequence[Record]) -> dict[str, list[float | None]]:
    """Those of CURVES that the run has; None at a step without a value."""
    found = {}
    for name in CURVES:
        values_of_steps = [significant(step[name]) if name in step else None for step in steps]
        if any(value is not None for value in values_of_steps):
            found[name] = values_of_steps
    return found


def hard_problems(responses: Sequence[Record]) -> set[str]:
    """Problems with at most one right response."""
    right: Counter[str] = Counter()
    for r in responses:
        right[r["problem"]] += r["reward"]
    return {problem for problem, count in right.items() if count <= 1}
