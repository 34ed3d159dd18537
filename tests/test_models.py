"""policy.py and critic.py: log-probabilities without a [tokens × vocabulary] tensor, and values
read before the action."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rollouts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

import critic
import policy
from checkpoint import export_model
from data import Problem
from distributed import Sharding
from packing import MicroBatch, micro_batches
from reports.metrics import explained_variance


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def one_pack(problems: list[Problem], vocab: int, lengths: list[int]) -> MicroBatch:
    """Random responses of the given lengths, with their prompts, in one pack."""
    rollouts = random_rollouts(problems, vocab, lengths)
    (micro,) = micro_batches(rollouts, range(len(lengths)), 10**6)
    return micro


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_the_naive_ones(
    untied_folder: Path,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    """Log-probabilities, entropy and gradients, with chunks that leave a remainder."""
    model = policy.load_policy(str(untied_folder))
    V = model.model.config.vocab_size
    micro = one_pack(problems, V, [30, 17, 44])
    weights = torch.randn(len(micro.actions), generator=torch.Generator().manual_seed(0))

    h = policy.hidden_states(model.model, micro)
    log_softmax = (model.model.lm_head(h) / temperature).log_softmax(-1)
    naive = log_softmax.gather(-1, micro.actions[:, None])[:, 0]
    (naive * weights).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    monkeypatch.setitem(policy.CHUNK, "cpu", 16 * V)
    monkeypatch.setattr(policy, "LEAST", 1)
    logp, entropy = model(micro, temperature)
    (logp * weights).sum().backward()
    torch.testing.assert_close(logp, naive, atol=1e-5, rtol=1e-5)
    naive_entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    torch.testing.assert_close(entropy, naive_entropy, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_tokens_times_vocabulary_never_exists(
    model_folder: Path, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation of the forward or backward pass returns a tensor of n × V elements, or more than
    a chunk of logits."""
    model = policy.load_policy(str(model_folder))
    V = model.model.config.vocab_size
    micro = one_pack(problems, V, [60] * 12)
    n = len(micro.actions)
    monkeypatch.setitem(policy.CHUNK, "cpu", 32 * V)
    monkeypatch.setattr(policy, "LEAST", 1)
    with LargestTensor() as largest:
        model(micro)[0].sum().backward()
    chunk = 32 * V
    weight = max(p.numel() for p in model.parameters())
    mlp = micro.input_ids.shape[1] * model.model.config.intermediate_size
    attention = max(group.keys.numel() for group in micro.layout.groups) * 64
    assert largest.elements <= max(chunk, weight, mlp, attention)
    assert largest.elements < n * V / 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@torch._dynamo.config.patch(disable=False)  # vLLM's sampler sets it on a CPU
def test_compiled_layers_compute_the_same(
    model_folder: Path, problems: list[Problem], checkpointing: bool
) -> None:
    """All layers and packs of all shapes use one graph, where prompts are shared."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = policy.load_policy(str(model_folder))
    sharding = Sharding(compile=True, activation_checkpointing=checkpointing)
    compiled = policy.load_policy(str(model_folder), sharding)
    for lengths in ([30, 17, 44], [20, 60, 50, 40, 30], [9] * 30):
        micro = one_pack(problems[:2], 400, lengths)
        logps = [model(micro)[0] for model in (plain, compiled)]
        torch.testing.assert_close(*logps, atol=1e-4, rtol=1e-5)
        for logp in logps:
            logp.mean().backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert float((p.grad - q.grad).norm()) <= 1e-4 * float(p.grad.norm())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_no_square_mask_is_built(model_folder: Path, problems: list[Problem]) -> None:
    model = policy.load_policy(str(model_folder))
    micro = one_pack(problems, 100, [20] * 60)
    T = micro.input_ids.shape[1]
    with LargestTensor() as largest:
        policy.hidden_states(model.model, micro)
    assert largest.elements < T * T / 4


def test_value_is_read_before_the_action(model_folder: Path, problems: list[Problem]) -> None:
    """Changing action t leaves V(s_0) … V(s_t) as they are and changes V(s_{t+1}), … Changing the
    last action changes nothing."""
    model = critic.load_critic(str(model_folder))
    (r,) = random_rollouts(problems, 100, [6])

    def values() -> torch.Tensor:
        (micro,) = micro_batches([r], [0], 1000)
        return model(micro).detach()

    before = values()
    assert before.shape == (6,)
    r.token_ids[2] = (r.token_ids[2] + 1) % 100
    after = values()
    assert torch.equal(before[:3], after[:3])
    assert bool((before[3:] != after[3:]).all())
    r.token_ids[5] = (r.token_ids[5] + 1) % 100
    assert torch.equal(values(), after)


def test_value_heads(model_folder: Path) -> None:
    """How the head starts. authors: N(0, 1/(d+1)²); paper: U(−√5, √5); zeros: 0."""
    d = 64
    std = {}
    for head in ("authors", "paper", "zeros"):
        weight = critic.load_critic(str(model_folder), head, seed=1).model.score.weight
        assert weight.shape == (1, d)
        std[head] = float(weight.detach().std())
    assert std["authors"] == pytest.approx(1 / (d + 1), rel=0.3)
    assert std["paper"] == pytest.approx((5 / 3) ** 0.5, rel=0.3)
    assert std["zeros"] == 0
    once, again = (critic.load_critic(str(model_folder), seed=1) for _ in range(2))
    assert torch.equal(once.model.score.weight, again.model.score.weight)
    with pytest.raises(ValueError, match="authors, paper or zeros"):
        critic.load_critic(str(model_folder), "uniform")


def test_printed_value_head_starts_far_outside_the_rewards(
    model_folder: Path, problems: list[Problem]
) -> None:
    """The values of a U(−√5, √5) head spread far more than a 0/1 reward, and are much worse than a
    constant (explained variance ≪ 0). The values of the authors' head start at about 0."""
    micro = one_pack(problems, 100, [10] * 8)
    targets = torch.tensor([0.0, 1.0]).repeat_interleave(10).repeat(4)
    spread = {}
    for head in ("authors", "paper"):
        values = critic.load_critic(str(model_folder), head)(micro).detach()
        spread[head] = float(values.std())
        if head == "paper":
            assert explained_variance(values, targets) < -10
    assert spread["authors"] < 0.3
    assert spread["paper"] > 3


def test_critic_folder_keeps_its_value_head(
    tmp_path: Path, model_folder: Path, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> None:
    """An exported critic gives the same values again. transformers loads it, head included, as a
    sequence classifier."""
    model = critic.load_critic(str(model_folder), "authors", seed=5)
    export_model(model, tokenizer, tmp_path / "critic")
    again = critic.load_critic(str(tmp_path / "critic"), "zeros")
    micro = one_pack(problems, 100, [4, 9])
    assert torch.equal(model(micro), again(micro))
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "critic", dtype=torch.float32
    )
    assert torch.equal(plain.score.weight, model.model.score.weight)
