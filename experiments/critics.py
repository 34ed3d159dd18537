"""What a trained critic has learned: how well V(s_t) predicts success, and what it makes of
repetition. Everything is measured on held-out problems, after the training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import Config
from critic import Critic, load_critic
from data import Problem
from grading.extract import extract
from hf_sampler import HFSampler
from packing import forward_all_tokens
from preflight import Inputs, eos_ids
from reports.metrics import explained_variance, significant
from rollout import Rollout, load_rollouts, sample_responses

PREFIXES = 50  # of which the calibration is measured
CONTINUATIONS = 32  # of each prefix
GROUP = 8  # responses whose mean reward GRPO puts in the place of V
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)  # share of the response that a prefix holds
REPEATS = (1, 2, 4, 8)
MAX_PAIRS = 200  # responses of which a step is repeated


class Finished(NamedTuple):
    """A finished run: its settings, its models' folder and tokenizer, and its held-out problems
    with a response to each from after the training."""

    cfg: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    rollouts: list[Rollout]

    def values(self, critic: Critic, rollouts: Sequence[Rollout]) -> tuple[Tensor, ...]:
        """V(s_t) of every token of each response."""
        flat = forward_all_tokens(critic, rollouts, self.cfg.micro_tokens, "cpu")
        return flat.split([len(r.token_ids) for r in rollouts])


def load_finished(folder: Path, cfg: Config, inputs: Inputs) -> Finished:
    """A finished run with the responses of its last evaluation, one to each held-out problem. They
    are kept as text; with the test beds' tokenizer the text gives the sampled ids again (with rare
    exceptions)."""
    kept = load_rollouts(folder / f"heldout-{cfg.steps}.jsonl", with_ids=False)
    rollouts = [
        replace(r, problem=problem, token_ids=inputs.tokenizer.encode(r.text))
        for problem, r in zip(inputs.eval_problems, kept, strict=True)
    ]
    return Finished(cfg, folder, inputs.tokenizer, inputs.eval_problems, rollouts)


def is_right(text: str, problem: Problem) -> bool:
    """Whether the answer is the gold answer. The answers of the test beds are whole numbers, so
    equal answers are equal strings."""
    return extract(text) == problem.answer


# ── V(s_t) of the held-out responses ─────────────────────────────────────────────────────────────


def values_on_heldout(run: Finished, critic: Critic) -> dict[str, float]:
    """V(s_0), its Brier score mean (V(s_0) − R)², and the explained variance of R by V(s_t) over
    all tokens. The target is R whatever λ the critic was trained with."""
    values = run.values(critic, run.rollouts)
    R = torch.tensor([r.reward for r in run.rollouts])
    V_0 = torch.stack([v[0] for v in values])
    lengths = torch.tensor([len(v) for v in values])
    return {
        "value_first": float(V_0.mean()),
        "brier_first": float((V_0 - R).square().mean()),
        "explained_variance": explained_variance(torch.cat(values), R.repeat_interleave(lengths)),
    }


# ── calibration ──────────────────────────────────────────────────────────────────────────────────


def calibration(run: Finished, critic: Critic) -> dict[str, list[float]]:
    """V(s_t) against the empirical success rate from s_t.

    A state s_t is a held-out problem with the first part of the response to it; each of `PREFIXES`
    problems has one, the depths of `DEPTHS` in turn. `value` is V(s_t), `success` the share of
    right answers among `CONTINUATIONS` continuations sampled from the policy, and `group` the mean
    reward of `GROUP` new responses to the same problem, GRPO's baseline.
    """
    sampler = open_policy(run)
    rollouts = run.rollouts[:PREFIXES]
    depths = [DEPTHS[i % len(DEPTHS)] for i in range(len(rollouts))]
    cuts = [int(depth * len(r.token_ids)) for depth, r in zip(depths, rollouts, strict=True)]
    states = []
    for cut, r in zip(cuts, rollouts, strict=True):
        prefix = r.token_ids[:cut]
        states.append(replace(r.problem, prompt_ids=(*r.problem.prompt_ids, *prefix)))
    values = run.values(critic, rollouts)
    success = []
    continued = sample(run, sampler, states, CONTINUATIONS, "continuations")
    for i, cut in enumerate(cuts):
        prefix = run.tokenizer.decode(rollouts[i].token_ids[:cut])
        of_state = continued[i * CONTINUATIONS : (i + 1) * CONTINUATIONS]
        success.append(fmean(right_within(run.cfg, prefix, cut, c) for c in of_state))
    answers = sample(run, sampler, [r.problem for r in rollouts], GROUP, "group")
    right = [right_within(run.cfg, "", 0, answer) for answer in answers]
    return {
        "depth": depths,
        "value": [significant(float(v[cut])) for v, cut in zip(values, cuts, strict=True)],
        "success": success,
        "group": [fmean(right[i : i + GROUP]) for i in range(0, len(right), GROUP)],
    }


def open_policy(run: Finished) -> HFSampler:
    """A sampler of the trained policy."""
    folder = str(run.folder / "policy")
    eos = eos_ids(folder, run.tokenizer, len(run.tokenizer))
    return HFSampler(folder, run.tokenizer, eos, "float32", "cpu", run.cfg.max_num_seqs)


def sample(
    run: Finished, sampler: HFSampler, problems: Sequence[Problem], samples: int, stream: str
) -> list[Rollout]:
    """`samples` responses to each problem, with the settings of the training."""
    stream = f"{run.cfg.seed}/{stream}"
    return sample_responses(sampler, run.tokenizer, problems, samples, run.cfg.sampling, stream)


def right_within(cfg: Config, prefix: str, prefix_tokens: int, continued: Rollout) -> bool:
    """Whether prefix + continuation is right and no longer than a response may be."""
    length = prefix_tokens + len(continued.token_ids)
    finished = continued.finish_reason == "stop" and length <= cfg.response_tokens
    return finished and is_right(prefix + continued.text, continued.problem)


def brier_scores(found: dict[str, list[float]]) -> dict[str, float]:
    """Brier scores mean (q − R)² over all continuations, of four predictions q: V(s_t); the group's
    mean reward; the mean success of all states, a constant; and the success rate of the state
    itself, which no prediction can beat. A state with success rate p adds (q − p)² + p(1 − p).

    >>> two = {"value": [0.5, 0.5], "group": [1.0, 0.5], "success": [1.0, 0.0]}
    >>> scores = brier_scores(two)
    >>> scores["brier_value"], scores["brier_group"], scores["brier_constant"]
    (0.25, 0.125, 0.25)
    >>> scores["brier_best"], scores["brier_gain_over_group"]
    (0.0, -0.125)
    """
    success = found["success"]
    constant = [fmean(success)] * len(success)

    def score(predicted: Sequence[float]) -> float:
        return fmean((q - p) ** 2 + p * (1 - p) for q, p in zip(predicted, success, strict=True))

    value, group = score(found["value"]), score(found["group"])
    return {
        "brier_value": value,
        "brier_group": group,
        "brier_constant": score(constant),
        "brier_best": score(success),
        "brier_gain_over_group": group - value,
        "brier_gain_over_constant": score(constant) - value,
    }


def knowledge(found: dict[str, list[float]]) -> dict[str, float]:
    """What V(s_t) knows of the states beside its mean, which the normalization takes out of the
    advantages: its correlation with the success rate, 0 where one of them is constant, and the
    Brier score of V(s_t) shifted so that its mean is the success rates'.

    >>> knowledge({"value": [0.6, 0.4], "success": [0.4, 0.2], "group": [0.5, 0.5]})
    {'correlation': 1.0, 'brier_shifted': 0.2}
    """
    values, success = found["value"], found["success"]
    shift = fmean(success) - fmean(values)
    shifted = brier_scores(found | {"value": [value + shift for value in values]})
    constant = len({*values}) == 1 or len({*success}) == 1
    known = 0.0 if constant else correlation(values, success)
    return {"correlation": significant(known), "brier_shifted": significant(shifted["brier_value"])}


def accuracy_at_1(run: Finished) -> float:
    """The share of right answers to the held-out problems at temperature 1 and top-p 1."""
    cfg = replace(run.cfg, temperature=1.0, top_p=1.0)
    at_1 = run._replace(cfg=cfg)
    answers = sample(at_1, open_policy(run), run.problems, 1, "at-1")
    return fmean(right_within(cfg, "", 0, answer) for answer in answers)


# ── the critic's view of repetition (§2.2) ───────────────────────────────────────────────────────


class Repetition(NamedTuple):
    """A response cut after token `cut`, with its last step repeated: `length` more tokens."""

    repeated: Rollout
    cut: int
    length: int


def value_of_repetition(run: Finished, critic: Critic) -> dict[str, Any]:
    """What the critic expects along a loop.

    At most `MAX_PAIRS` right held-out responses are cut after half of their steps, and the last
    step is repeated 1, 2, 4 and 8 times. `along` is the mean of V(s_t) at the cut and after each
    number of repeats; `going_on` the mean of V as many tokens on in the response itself (or at its
    last token). The metrics are V at the cut − V after 4 repeats, and V further on − V after 4.
    """
    right = [r for r in run.rollouts if r.reward == 1 and r.text.count(",") >= 8][:MAX_PAIRS]
    of_whole = run.values(critic, right)
    along, going_on = [], []
    for times in (0, *REPEATS):
        pairs = [repeat_step(r, run.tokenizer, times) for r in right]
        of_repeated = run.values(critic, [pair.repeated for pair in pairs])
        after, further_on = [], []
        for pair, whole, repeated in zip(pairs, of_whole, of_repeated, strict=True):
            end = pair.cut + pair.length
            after.append(float(repeated[end]))
            further_on.append(float(whole[min(end, len(whole) - 1)]))
        along.append(significant(fmean(after)))
        going_on.append(significant(fmean(further_on)))
    at_4 = 1 + REPEATS.index(4)
    return {
        "value_lost_by_4_repeats": along[0] - along[at_4],
        "value_lost_against_going_on": going_on[at_4] - along[at_4],
        "along": along,
        "going_on": going_on,
        "responses": len(right),
    }


def repeat_step(r: Rollout, tokenizer: PreTrainedTokenizerBase, times: int) -> Repetition:
    """A response of the test bed with the last step of its first half repeated."""
    parts = r.text.split(",")
    half = len(parts) // 4 * 2  # a step has two commas
    before = ",".join(parts[:half]) + ","
    step = ",".join(parts[half - 2 : half]) + ","
    cut = len(tokenizer.encode(before))
    repeated = tokenizer.encode(before + step * times)
    return Repetition(
        repeated=replace(r, token_ids=[*repeated, r.token_ids[-1]]),
        cut=cut,
        length=len(repeated) - cut,
    )


def critic_of(run: Finished) -> Critic:
    """The trained critic."""
    return load_critic(str(run.folder / "critic"))
