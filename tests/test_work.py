"""How much work a step is, in counts that are the same on every machine. A loop that does something
twice fails here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import critic
import hf_sampler
import packing
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
    steps: list[list[Rollout]]
    model: plan.Shape
    cfg: config.Config
    folder: Path

    def needed(self, mini_batches: int) -> int:
        """Input tokens of both steps, if each mini-batch reads each of its prompts once."""
        tokens = 0
        for step, rollouts in enumerate(self.steps):
            lengths = [len(r.token_ids) for r in rollouts]
            for members in packing.mini_batches(lengths, mini_batches, f"{self.cfg.seed}/{step}"):
                tokens += sum(lengths[i] - 1 for i in members)
                tokens += sum(map(len, {rollouts[i].problem.prompt_ids for i in members}))
        return tokens

    def unshared(self) -> int:
        """Input tokens of both steps, if each response reads its prompt."""
        return sum(len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in self.rollouts())

    def rollouts(self) -> list[Rollout]:
        """The responses of both steps."""
        return [r for step in self.steps for r in step]

    def actions(self) -> int:
        """Response tokens of all sequences."""
        return sum(len(r.token_ids) for r in self.rollouts())


# ── counting ──────────────────────────────────────────────────────────────────────────────────────


def count_work(counts: Counter[str], patch: pytest.MonkeyPatch) -> None:
    """Patch the program's functions, so that they count their work in `counts`."""

    def forward(model: Any, micro: Any, *_: Any) -> None:
        gradient = "with" if torch.is_grad_enabled() else "without"
        kind = f"{type(model).__name__}, {gradient} gradient"
        counts[f"passes: {kind}"] += 1
        counts[f"tokens: {kind}"] += micro.input_ids.numel()

    def compare(_: Any, pairs: Any) -> None:
        counts["pairs compared"] += len(pairs)

    def sample_token(logits: torch.Tensor, *_: Any) -> None:
        counts["tokens sampled"] += len(logits)

    def generate_batch(*_: Any) -> None:
        counts["generations"] += 1

    call_first(forward, policy.Policy, "forward", patch)
    call_first(forward, critic.Critic, "forward", patch)
    call_first(compare, pool.Grader, "_compare", patch)
    call_first(sample_token, hf_sampler, "sample_token", patch)
    call_first(generate_batch, hf_sampler.HFSampler, "_generate_batch", patch)
    count_copied_parameters(counts, patch)
    for name in ("predict_values", "update_critic", "update_policy"):
        count_flops(counts, patch, name)


def call_first(note: Callable[..., None], owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """Make `owner.name` call `note` with its arguments before it does its work."""
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)


def count_copied_parameters(counts: Counter[str], patch: pytest.MonkeyPatch) -> None:
    """Count the parameters that the sampler is given."""
    original = hf_sampler.HFSampler.load_weights

    def counted(
        weights: Iterable[tuple[str, torch.Tensor]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            counts["parameters copied"] += weight.numel()
            yield name, weight

    def load_weights(sampler: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        counts["syncs"] += 1
        original(sampler, counted(weights))

    patch.setattr(hf_sampler.HFSampler, "load_weights", load_weights)


def count_flops(counts: Counter[str], patch: pytest.MonkeyPatch, name: str) -> None:
    """Count the operations of the matrix products in a stage of train.py. Attention is left out,
    because its count includes masked pairs, which are no work."""
    original = getattr(train, name)

    def counted(*args: Any) -> Any:
        with FlopCounterMode(display=False) as flops:
            out = original(*args)
        for operation, flop in flops.get_flop_counts()["Global"].items():
            if "attention" not in str(operation):
                counts[f"flops: {name}"] += flop
        return out

    patch.setattr(train, name, counted)


@pytest.fixture(scope="module")
def work(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Two steps of 6 problems × 8 responses."""
    files = ["--model", str(base_folder), "--data", str(base_folder / "train.json")]
    files += ["--runs", str(tmp_path_factory.mktemp("runs"))]
    settings = f"""
        --name work --engine transformers --save-rollouts --steps {STEPS} --prompts 6 --samples 8
        --prompt-tokens 64 --response-tokens 48 --micro-tokens 512 --critic-steps 3
        --policy-lr 1e-3 --critic-lr 1e-3 --grader-workers 1
    """.split()
    cfg = config.parse([*files, *settings])
    prepared = preflight.prepare(cfg)  # compares gold answers; that is not the work of a step
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        count_work(counts, patch)
        folder = train.train(cfg, prepared)
    files = [folder / "rollouts" / f"step-{step}.jsonl" for step in range(STEPS)]
    return Work(
        counts,
        [rollout.load_rollouts(file) for file in files],
        plan.shape(str(base_folder)),
        cfg,
        folder,
    )


# ── what was counted ──────────────────────────────────────────────────────────────────────────────


STAGES = {  # → its mini-batches
    "Critic, without gradient": 1,
    "Critic, with gradient": 3,
    "Policy, with gradient": 1,
}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_models_read_every_token_once_per_stage(work: Work, stage: str) -> None:
    """One pass for the values, one of the critic and one of the policy with gradient. A mini-batch
    reads a prompt once for all of its responses, and once more where a pack is full."""
    tokens, needed = work.counts[f"tokens: {stage}"], work.needed(STAGES[stage])
    longest = max(len(r.problem.prompt_ids) for r in work.rollouts())
    assert needed <= tokens <= needed + longest * work.counts[f"passes: {stage}"]
    assert tokens < 0.8 * work.unshared()


def test_known_logprobs_are_not_computed(work: Work) -> None:
    """Before the first step the policy reads twice without gradient: the check of the model at
    load, and that of the sampler. Afterwards it never does."""
    checked = 4  # responses that are sampled to check the sampler before the first step
    assert work.counts["passes: Policy, without gradient"] == 2
    assert work.counts["tokens: Policy, without gradient"] <= checked * (64 + 48)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_packs_are_full(work: Work, stage: str) -> None:
    """No more packs than if each was three quarters full, but for the last one of each
    mini-batch."""
    packs = work.needed(STAGES[stage]) / (0.75 * work.cfg.micro_tokens)
    assert work.counts[f"passes: {stage}"] <= packs + STEPS * STAGES[stage]


def test_fourteen_operations_per_weight_and_token(work: Work) -> None:
    """2 for the values, 6 each for critic and policy. The vocabulary head computes on response
    tokens alone and costs 8: its logits are computed again in the backward pass."""
    shape, counts = work.model, work.counts
    norms = 2 * shape.hidden
    biases = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    matrices = shape.layers * (shape.layer - norms - biases)
    value_head = shape.hidden * work.actions()
    vocabulary_head = shape.vocab * shape.hidden * work.actions()

    def body(stage: str) -> int:
        return matrices * counts[f"tokens: {stage}"]

    assert counts["flops: predict_values"] == 2 * (body("Critic, without gradient") + value_head)
    assert counts["flops: update_critic"] == 6 * (body("Critic, with gradient") + value_head)
    policy_flops = 6 * body("Policy, with gradient") + 8 * vocabulary_head
    assert counts["flops: update_policy"] == policy_flops


def test_sampler_computes_few_tokens_that_are_not_kept(work: Work) -> None:
    """The responses to all prompts are one batch. Finished sequences leave it when they are a
    quarter of it."""
    assert work.counts["generations"] == STEPS + 1
    assert work.counts["tokens sampled"] <= work.actions() / 0.75 + (STEPS + 1) * 48


def test_weights_are_copied_once_per_step(work: Work) -> None:
    """Every parameter, and also a tied head by its own name."""
    shape = work.model
    assert work.counts["syncs"] == STEPS + 1
    parameters = shape.policy + shape.vocab * shape.hidden
    assert work.counts["parameters copied"] == (STEPS + 1) * parameters


def test_the_same_answer_is_compared_once(work: Work) -> None:
    pairs = {(r.problem.answer, r.answer) for r in work.rollouts() if r.answer}
    different = {(gold, answer) for gold, answer in pairs if gold != answer}
    assert len(different) > 5
    assert work.counts["pairs compared"] <= len(different)


def test_a_checkpoint_is_twelve_bytes_per_parameter(work: Work) -> None:
    folder = work.folder / "checkpoints" / f"step-{STEPS}"
    about = (folder / "run.json").stat().st_size  # settings and checksums, for models of any size
    assert about <= 2**14
    files = folder.rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file()) - about
    weights = 12 * (work.model.policy + work.model.critic)
    assert weights <= size <= 1.05 * weights + 2**18  # names and places of some hundred tensors
