"""How much work a step is, in counts that no machine changes: a loop that does something twice fails here."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import critic
import hf_sampler
import policy
import preflight
import rollout
import train
from grading import pool
from rollout import Rollout
from tools import plan

STEPS = 2


class Work(NamedTuple):
    """What was counted in two steps of training."""

    counts: Counter[str]
    rollouts: list[list[Rollout]]  # of each step
    model: plan.Shape
    cfg: config.Config
    folder: Path

    def inputs(self) -> int:
        """Input tokens that a pass over all sequences reads."""
        return sum(
            len(r.problem.prompt_ids) + len(r.token_ids) - 1 for step in self.rollouts for r in step
        )

    def actions(self) -> int:
        return sum(len(r.token_ids) for step in self.rollouts for r in step)


def counting(counts: Counter[str], patch: pytest.MonkeyPatch) -> None:
    def around(owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    def forward(model: Any, micro: Any, *_: Any) -> None:
        kind = (
            f"{type(model).__name__}, {'with' if torch.is_grad_enabled() else 'without'} gradient"
        )
        counts[f"passes: {kind}"] += 1
        counts[f"tokens: {kind}"] += micro.input_ids.numel()

    def parameters(
        _: Any, weights: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        counts["syncs"] += 1
        for name, weight in weights:
            counts["parameters copied"] += weight.numel()
            yield name, weight

    load = hf_sampler.HFSampler.load_weights
    patch.setattr(
        hf_sampler.HFSampler, "load_weights", lambda self, ws: load(self, parameters(self, ws))
    )
    around(policy.Policy, "forward", forward)
    around(critic.Critic, "forward", forward)
    around(pool.Grader, "_compare", lambda _, pairs: counts.update({"pairs compared": len(pairs)}))
    around(
        hf_sampler, "sample_token", lambda logits, *_: counts.update({"tokens drawn": len(logits)})
    )
    around(hf_sampler.HFSampler, "_generate_batch", lambda *_: counts.update({"generations": 1}))
    for name in ("predict_values", "update_critic", "update_policy"):
        counted_flops(counts, patch, name)


def counted_flops(counts: Counter[str], patch: pytest.MonkeyPatch, name: str) -> None:
    """Operations of matrix products, attention apart: it computes on rectangles, and FLOPs of masked pairs are no work."""
    original = getattr(train, name)

    def counted(*args: Any) -> Any:
        with FlopCounterMode(display=False) as flops:
            out = original(*args)
        by_operation = flops.get_flop_counts()["Global"]
        counts[f"flops: {name}"] += sum(
            n for operation, n in by_operation.items() if "attention" not in str(operation)
        )
        return out

    patch.setattr(train, name, counted)


@pytest.fixture(scope="module")
def work(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    cfg = config.parse([
        "--model", str(base_folder), "--data", str(base_folder / "train.json"), "--engine", "transformers",
        "--runs", str(tmp_path_factory.mktemp("runs")), "--name", "work", "--save-rollouts", "--steps", str(STEPS),
        "--prompts", "6", "--samples", "8", "--prompt-tokens", "64", "--response-tokens", "48", "--micro-tokens", "512",
        "--critic-steps", "3", "--policy-lr", "1e-3", "--critic-lr", "1e-3", "--grader-workers", "1",
    ])  # fmt: skip
    prepared = preflight.prepare(cfg)  # compares golds with themselves, which is not a step's work
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        counting(counts, patch)
        folder = train.train(cfg, prepared)
    rollouts = [
        rollout.load_rollouts(folder / "rollouts" / f"step-{s}.jsonl") for s in range(STEPS)
    ]
    yield Work(counts, rollouts, plan.shape(str(base_folder)), cfg, folder)


def test_every_token_is_read_as_often_as_it_must(work: Work) -> None:
    """One value pass, one policy pass and one critic pass with gradient; none for log-probabilities that are known."""
    counts = work.counts
    check = 4  # responses that the check of the sampler asks for before the first step
    assert counts["tokens: Critic, without gradient"] == work.inputs()
    assert counts["tokens: Critic, with gradient"] == work.inputs()
    assert counts["tokens: Policy, with gradient"] == work.inputs()
    assert counts["passes: Policy, without gradient"] == 1
    assert counts["tokens: Policy, without gradient"] <= check * (64 + 48)


def test_rows_are_full(work: Work) -> None:
    """No more passes than rows of --micro-tokens that are three quarters full, and a last one of each mini-batch."""
    full = work.inputs() / (0.75 * work.cfg.micro_tokens)
    assert work.counts["passes: Policy, with gradient"] <= full + STEPS
    assert work.counts["passes: Critic, without gradient"] <= full + STEPS
    assert work.counts["passes: Critic, with gradient"] <= full + STEPS * work.cfg.critic_steps


def test_fourteen_operations_a_weight_and_token(work: Work) -> None:
    """2 for the values, 6 each for critic and policy. The vocabulary head reads response tokens alone and costs 8: its
    logits are computed again in the backward pass."""
    s = work.model
    matrices = s.layers * (
        s.layer - 2 * s.hidden - (s.heads + 2 * s.kv_heads) * s.head_size
    )  # without norms and biases
    body, value_head = matrices * work.inputs(), s.hidden * work.actions()
    counts = work.counts
    assert counts["flops: predict_values"] == 2 * (body + value_head)
    assert counts["flops: update_critic"] == 6 * (body + value_head)
    head = s.vocab * s.hidden * work.actions()
    assert counts["flops: update_policy"] == 6 * body + 8 * head


def test_sampling_draws_little_more_than_it_keeps(work: Work) -> None:
    """A prompt's responses share its prefill, and rows that have stopped leave when they are a quarter of the batch."""
    assert work.counts["generations"] == STEPS + 1
    assert work.counts["tokens drawn"] <= work.actions() / 0.75 + (STEPS + 1) * 48


def test_weights_are_passed_once_a_step(work: Work) -> None:
    """Every parameter, and a tied head by its own name too."""
    assert work.counts["syncs"] == STEPS + 1
    assert work.counts["parameters copied"] == (STEPS + 1) * (
        work.model.policy + work.model.vocab * work.model.hidden
    )


def test_like_answers_are_compared_once(work: Work) -> None:
    pairs = {(r.problem.answer, r.answer) for step in work.rollouts for r in step if r.answer}
    wrong = {(gold, answer) for gold, answer in pairs if gold != answer}
    assert len(wrong) > 5
    assert work.counts["pairs compared"] <= len(wrong)


def test_a_checkpoint_is_twelve_bytes_a_parameter(work: Work) -> None:
    files = (work.folder / "checkpoints" / f"step-{STEPS}").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    weights = 12 * (work.model.policy + work.model.critic)
    assert weights <= size <= 1.05 * weights + 2**18  # names and places of some hundred tensors
