"""What an experiment keeps of a finished run: held-out metrics before and after, and curves."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import data
from config import Config
from critic import load_critic
from data import Problem
from experiments.claims import MODEL
from packing import forward_all_tokens
from reports.metrics import significant
from rollout import Rollout, load_rollouts
from toy import tiny

Record = dict[str, Any]
HELDOUT = ("length", "format", "reflection", "correct_reflection_length", "truncated")
CURVES = ("reward", *HELDOUT, "entropy", "explained_variance")


def measure(folder: Path, cfg: Config) -> dict[str, Any]:
    """Metrics of the held-out responses before and after the training, and curves over its steps,
    all to four significant digits."""
    steps = load_records(folder / "metrics.jsonl")
    evaluations = {e["step"]: e for e in load_records(folder / "evaluations.jsonl")}
    first = load_records(folder / "heldout-0.jsonl")
    last = load_records(folder / f"heldout-{cfg.steps}.jsonl")
    before = heldout_metrics(first, evaluations[0])
    after = heldout_metrics(last, evaluations[cfg.steps])
    excess = [
        step["correct_reflection_length"] - step["length"]
        for step in steps
        if "correct_reflection_length" in step
    ]
    if excess:
        after["reflection_excess"] = fmean(excess)
    if cfg.eval_samples > 1:
        hard = hard_problems(first)
        after["hard_accuracy"] = fmean(r["reward"] for r in last if r["problem"] in hard)
        after["hard_problems"] = len(hard)
    return {
        "before": {name: significant(value) for name, value in before.items()},
        "after": {name: significant(value) for name, value in after.items()},
        "curves": curves(steps),
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


def curves(steps: Sequence[Record]) -> dict[str, list[float | None]]:
    """Those of CURVES that the run has; None at a step without a value."""
    found = {}
    for name in CURVES:
        values = [significant(step[name]) if name in step else None for step in steps]
        if any(value is not None for value in values):
            found[name] = values
    return found


def hard_problems(responses: Sequence[Record]) -> set[str]:
    """Problems with at most one right response."""
    right: Counter[str] = Counter()
    for r in responses:
        right[r["problem"]] += r["reward"]
    return {problem for problem, count in right.items() if count <= 1}


# ── the critic's view of repetition (§2.2) ───────────────────────────────────────────────────────


class Repetition(NamedTuple):
    """A response, and the same with a step repeated: `length` tokens, from token `cut` on."""

    whole: Rollout
    repeated: Rollout
    cut: int
    length: int


def value_of_repetition(
    folder: Path, cfg: Config, times: int = 5, count: int = 200
) -> dict[str, float]:
    """What the trained critic expects after a repetition.

    At most `count` right held-out responses are cut after half of their steps, and the last step is
    repeated `times` times. Returns the mean of V at the cut − V after the repetition, and of V as
    many tokens on in the response itself − V after the repetition.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "critic")
    critic = load_critic(str(folder / "critic"))
    rows = data.load(tiny.ensure(cfg.seed, name=MODEL) / "heldout.json")
    problems = data.tokenize(rows, tokenizer, cfg.prompt_tokens, data.TEMPLATE)
    responses = load_rollouts(folder / f"heldout-{cfg.steps}.jsonl", with_ids=False)
    pairs = [
        repeat_step(problem, r.text, tokenizer, times)
        for problem, r in zip(problems, responses, strict=True)
        if r.reward == 1 and r.text.count(",") >= 8
    ][:count]

    def values(rollouts: list[Rollout]) -> tuple[Tensor, ...]:
        flat = forward_all_tokens(critic, rollouts, cfg.micro_tokens, "cpu")
        return flat.split([len(r.token_ids) for r in rollouts])

    of_whole = values([pair.whole for pair in pairs])
    of_repeated = values([pair.repeated for pair in pairs])
    at_cut, after, further_on = [], [], []
    for pair, whole, repeated in zip(pairs, of_whole, of_repeated, strict=True):
        end = pair.cut + pair.length
        at_cut.append(float(whole[pair.cut]))
        after.append(float(repeated[end]))
        further_on.append(float(whole[min(end, len(whole) - 1)]))
    return {
        "value_lost_by_repetition": significant(fmean(at_cut) - fmean(after)),
        "value_lost_against_going_on": significant(fmean(further_on) - fmean(after)),
    }


def repeat_step(
    problem: Problem, text: str, tokenizer: PreTrainedTokenizerBase, times: int
) -> Repetition:
    """A response of the test bed, whole and with the last step of its first half repeated."""
    parts = text.split(",")
    half = len(parts) // 4 * 2  # a step has two commas
    before = ",".join(parts[:half]) + ","
    step = ",".join(parts[half - 2 : half]) + ","
    token_ids = tokenizer.encode(text)
    cut = len(tokenizer.encode(before))
    repeated = tokenizer.encode(before + step * times)
    return Repetition(
        whole=Rollout(problem, token_ids, [], "stop", ""),
        repeated=Rollout(problem, [*repeated, token_ids[-1]], [], "stop", ""),
        cut=cut,
        length=len(repeated) - cut,
    )
