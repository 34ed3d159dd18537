"""Accuracy on held-out problems with the training template, sampler and grader."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from data import Problem
from grader import Grader
from metrics import describe
from rollout import Rollout, Sampling, TransformersEngine, VllmEngine, sample


def score(grader: Grader, rollouts: Sequence[Rollout]) -> None:
    """Set the reward of each rollout, in place: R = 1 if its answer is right and it stopped by itself, else 0 (§2.1.2).
    A truncated response gets 0 whatever it holds."""
    grades = grader.grade([r.text for r in rollouts], [r.problem.answer for r in rollouts])
    for rollout, grade in zip(rollouts, grades, strict=True):
        rollout.answer, rollout.timeout = grade.answer, grade.timeout
        rollout.reward = grade.reward if rollout.finish == "stop" else 0.0


def evaluate(
    engine: VllmEngine | TransformersEngine,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    problems: Sequence[Problem],
    samples: int,
    sampling: Sampling,
    seed: str,
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample `samples` responses to each problem, grade them, and describe them; "reward" is then avg@samples, the
    paper's metric with 16 samples. Returns the metrics and the responses."""
    rollouts = sample(engine, tokenizer, problems, samples, sampling, seed)
    score(grader, rollouts)
    return describe(rollouts), rollouts
