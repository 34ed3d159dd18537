"""policy.py and critic.py: log-probabilities without [tokens × vocabulary]; values read before the action."""

import shutil
from pathlib import Path

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
from packing import micro_batches
from reports.metrics import explained_variance


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


def one_row(problems: list[Problem], vocab: int, lengths: list[int]) -> policy.MicroBatch:
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
    """Values, entropy and gradients, with chunks that leave a remainder."""
    model = policy.load_policy(str(untied_folder))
    V = model.model.config.vocab_size
    micro = one_row(problems, V, [30, 17, 44])
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
    torch.testing.assert_close(
        entropy, -(log_softmax.exp() * log_softmax).sum(-1), atol=1e-5, rtol=1e-5
    )
    assert not entropy.requires_grad
    for p, e in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - e).norm()) <= 1e-5 * float(e.norm())


def test_tokens_times_vocabulary_never_exists(
    model_folder: Path, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation of forward or backward returns a tensor of n × V elements, or more than a chunk of logits."""
    model = policy.load_policy(str(model_folder))
    V = model.model.config.vocab_size
    micro = one_row(problems, V, [60] * 12)
    n = len(micro.actions)
    monkeypatch.setitem(policy.CHUNK, "cpu", 32 * V)
    monkeypatch.setattr(policy, "LEAST", 1)
    with Largest() as largest:
        model(micro)[0].sum().backward()
    other = (
        max(p.numel() for p in model.parameters()),
        micro.input_ids.shape[1] * model.model.config.intermediate_size,
    )
    assert largest.elements <= max(32 * V, *other, len(micro.cu_seqlens) * micro.max_seqlen * 64)
    assert largest.elements < n * V / 2


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on a CPU"
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(
    model_folder: Path, problems: list[Problem], checkpointing: bool
) -> None:
    """In one graph for all layers and all shapes of rows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = policy.load_policy(str(model_folder))
    sharding = Sharding(compile=True, activation_checkpointing=checkpointing)
    compiled = policy.load_policy(str(model_folder), sharding)
    for lengths in ([30, 17, 44], [20, 60, 50, 40, 30], [9] * 30):
        micro = one_row(problems, 400, lengths)
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
    micro = one_row(problems, 100, [20] * 60)
    T = micro.input_ids.shape[1]
    with Largest() as largest:
        policy.hidden_states(model.model, micro)
    assert largest.elements < T * T / 4


def test_value_is_read_before_the_action(model_folder: Path, problems: list[Problem]) -> None:
    """Changing action t leaves V(s_0) … V(s_t) as they are and changes V(s_{t+1}); the last action changes nothing."""
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
    """authors: N(0, 1/(d+1)²); paper: U(−√5, √5); zeros. Only the first and the last keep V(s_t) near the rewards."""
    d = 64
    std = {}
    for head in ("authors", "paper", "zeros"):
        weight = critic.load_critic(str(model_folder), head, seed=1).model.score.weight
        assert weight.shape == (1, d)
        std[head] = float(weight.detach().std())
    assert std["authors"] == pytest.approx(1 / (d + 1), rel=0.3)
    assert std["paper"] == pytest.approx((5 / 3) ** 0.5, rel=0.3)
    assert std["zeros"] == 0
    a, b = (critic.load_critic(str(model_folder), seed=s).model.score.weight for s in (1, 1))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="authors, paper or zeros"):
        critic.load_critic(str(model_folder), "uniform")


def test_printed_value_head_starts_far_outside_the_rewards(
    model_folder: Path, problems: list[Problem]
) -> None:
    """What the choice does: values of U(−√5, √5) have a spread far above that of any 0/1 reward, so they explain worse than
    nothing (explained variance ≪ 0); the authors' head starts at about 0."""
    micro = one_row(problems, 100, [10] * 8)
    targets = torch.tensor([0.0, 1.0]).repeat_interleave(10).repeat(4)
    spread = {}
    for head in ("authors", "paper"):
        v = critic.load_critic(str(model_folder), head)(micro).detach()
        spread[head] = float(v.std())
        if head == "paper":
            assert explained_variance(v, targets) < -10
    assert spread["authors"] < 0.3 < 3 < spread["paper"]


def test_critic_folder_keeps_its_value_head(
    tmp_path: Path, model_folder: Path, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> None:
    """An exported critic gives the same values again, here and as transformers' sequence classifier."""
    model = critic.load_critic(str(model_folder), "authors", seed=5)
    export_model(model, tokenizer, tmp_path / "critic")
    again = critic.load_critic(str(tmp_path / "critic"), "zeros")
    micro = one_row(problems, 100, [4, 9])
    assert torch.equal(model(micro), again(micro))
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "critic", dtype=torch.float32
    )
    assert torch.equal(plain.score.weight, model.model.score.weight)
