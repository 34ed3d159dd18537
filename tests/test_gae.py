"""gae.py: the paper's advantages, on responses of different lengths."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import Config
from data import Problem
from gae import gae, grpo_advantages, last_token_rewards, length_adaptive_lam, normalize_advantages
from rollout import Rollout
from train import Models, compute_advantages


def one_step_errors(r: Tensor, v: Tensor, gamma: float) -> Tensor:
    """δ_t = r_t + γ V(s_{t+1}) − V(s_t) of one response, with V = 0 after its last token."""
    v_next = torch.cat([v[1:], v.new_zeros(1)])
    return r + gamma * v_next - v


def by_definition(r: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = Σ_k (γλ)^k δ_{t+k} of one response, term by term: O(T²), in float64."""
    delta = one_step_errors(r.double(), v.double(), gamma)
    advantages = torch.zeros_like(delta)
    for t in range(len(delta)):
        for k in range(len(delta) - t):
            advantages[t] += (gamma * lam) ** k * delta[t + k]
    return advantages


def by_recursion(r: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = δ_t + γλ Â_{t+1} of one response, from its last token to its first, in float64."""
    delta = one_step_errors(r.double(), v.double(), gamma)
    advantages = torch.zeros_like(delta)
    next_advantage = 0.0  # nothing comes after the last token
    for t in reversed(range(len(delta))):
        advantages[t] = delta[t] + gamma * lam * next_advantage
        next_advantage = advantages[t]
    return advantages


unit = st.floats(0, 1, width=32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (N,), values (N,) and lengths (B,) of up to six responses."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    numbers = st.lists(st.floats(-3, 3, width=32), min_size=sum(lengths), max_size=sum(lengths))
    rewards, values = torch.tensor(draw(numbers)), torch.tensor(draw(numbers))
    return rewards, values, torch.tensor(lengths)


def by_response(x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """A flat (N,) vector, split into one vector for each response."""
    return x.split(lengths.tolist())


def test_gamma_lambda_one_is_exactly_R_minus_V() -> None:
    """The paper's setting: Â_t = R − V(s_t) and target R, to the last bit."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 300, 2])
    R, values = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.randn(310)
    A, targets = gae(last_token_rewards(R, lengths), values, lengths, gamma=1.0, lam=1.0)
    R_of_token = R.repeat_interleave(lengths)
    assert torch.equal(A, R_of_token - values)
    assert torch.equal(targets, R_of_token)


def test_by_hand() -> None:
    """γ = 0.5, λ = 0.5, r = (0, 0, 1), V = (0.5, 0.6, 0.9): δ = (−0.2, −0.15, 0.1); Â_2 = 0.1,
    Â_1 = −0.15 + 0.25·0.1 = −0.125, Â_0 = −0.2 + 0.25·(−0.125) = −0.23125."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.6, 0.9])
    A, targets = gae(rewards, values, torch.tensor([3]), gamma=0.5, lam=0.5)
    torch.testing.assert_close(A, torch.tensor([-0.23125, -0.125, 0.1]))
    torch.testing.assert_close(targets, torch.tensor([0.26875, 0.475, 1.0]))


@settings(deadline=None, max_examples=60)
@given(batches(), unit, unit)
def test_equals_the_definition(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    """Advantages are Σ_k (γλ)^k δ_{t+k}, and targets are Â_t + V(s_t)."""
    rewards, values, lengths = batch
    A, targets = gae(rewards, values, lengths, gamma, lam)
    responses = zip(by_response(rewards, lengths), by_response(values, lengths), strict=True)
    expected = torch.cat([by_definition(r, v, gamma, lam) for r, v in responses])
    torch.testing.assert_close(A, expected.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(targets, A + values, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(batches(), unit, unit)
def test_equals_the_recursion(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    """The paper's recursion Â_t = δ_t + γλ Â_{t+1} gives the same advantages as the λ-returns."""
    rewards, values, lengths = batch
    A, _ = gae(rewards, values, lengths, gamma, lam)
    responses = zip(by_response(rewards, lengths), by_response(values, lengths), strict=True)
    expected = torch.cat([by_recursion(r, v, gamma, lam) for r, v in responses])
    torch.testing.assert_close(A, expected.float(), atol=2e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(batches(), unit, unit, st.randoms())
def test_nothing_leaks_between_responses(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float, rng: random.Random
) -> None:
    """Each response alone gives the same bits as in any batch, in any order."""
    rewards, values, lengths = batch
    A, _ = gae(rewards, values, lengths, gamma, lam)
    columns = [by_response(x, lengths) for x in (rewards, values, A)]
    responses = list(zip(*columns, strict=True))
    for r, v, expected in responses:
        alone, _ = gae(r, v, torch.tensor([len(r)]), gamma, lam)
        assert torch.equal(alone, expected)
    rng.shuffle(responses)
    r, v, expected = (torch.cat(column) for column in zip(*responses, strict=True))
    shuffled_lengths = torch.tensor([len(rewards) for rewards, _, _ in responses])
    shuffled, _ = gae(r, v, shuffled_lengths, gamma, lam)
    assert torch.equal(shuffled, expected)


def by_torchrl(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """torchrl's independent implementation, which takes a padded (B, T) batch with done flags. The
    test is skipped without torchrl."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    B, T = len(lengths), int(lengths.max())
    inside = torch.arange(T) < lengths[:, None]
    r, v = torch.zeros(B, T), torch.zeros(B, T)
    r[inside] = rewards
    v[inside] = values
    v_next = torch.cat([v[:, 1:], torch.zeros(B, 1)], 1)
    done = torch.arange(T) == lengths[:, None] - 1
    A, target = functional.generalized_advantage_estimate(
        gamma,
        lam,
        v[..., None],
        v_next[..., None],
        r[..., None],
        done=done[..., None],
        terminated=done[..., None],
    )
    return A[..., 0][inside], target[..., 0][inside]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0)])
def test_equals_torchrl(gamma: float, lam: float) -> None:
    torch.manual_seed(1)
    lengths = torch.tensor([5, 9, 1, 9])
    rewards, values = torch.randn(2, int(lengths.sum()))
    A, targets = by_torchrl(rewards, values, lengths, gamma, lam)
    our_A, our_targets = gae(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(our_A, A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_targets, targets, atol=1e-5, rtol=1e-5)


# ── λ of the critic, and of each response ─────────────────────────────────────────────────────────


def of_step(values: Tensor, lengths: Tensor, R: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
    """Advantages and targets of a step with these settings."""
    rollouts = [
        Rollout(Problem(f"p:{i}", "", ""), [0] * n, [0.0] * n, "stop", "", reward=float(r))
        for i, (n, r) in enumerate(zip(lengths.tolist(), R, strict=True))
    ]
    models = Models(None, None, None, None, None)
    return compute_advantages(Config(**settings), models, rollouts, values)


def test_decoupled_and_length_adaptive_by_hand() -> None:
    """R = 1 and V = (0.5, 0.6, 0.9): δ = (0.1, 0.3, 0.1). With λ = 0.5 and λ_critic = 1 the
    advantages are Â_2 = 0.1, Â_1 = 0.3 + 0.05 = 0.35, Â_0 = 0.1 + 0.175 = 0.275, and the targets
    are R. With α = 0.5 λ is 1 − 1/1.5 = 1/3: Â_1 = 0.3 + 0.1/3, Â_0 = 0.1 + Â_1/3."""
    V, length, R = torch.tensor([0.5, 0.6, 0.9]), torch.tensor([3]), torch.tensor([1.0])
    A, targets = of_step(V, length, R, lam=0.5, lam_critic=1.0)
    torch.testing.assert_close(A, torch.tensor([0.275, 0.35, 0.1]))
    assert torch.equal(targets, torch.ones(3))
    A, targets = of_step(V, length, R, lam_adaptive=0.5)
    torch.testing.assert_close(A, torch.tensor([0.1 + 1 / 9, 1 / 3, 0.1]))
    assert torch.equal(targets, torch.ones(3))
    _, targets = of_step(V, length, R, lam_adaptive=0.5, lam_critic=0.0)  # r_t + V(s_{t+1})
    torch.testing.assert_close(targets, torch.tensor([0.6, 0.9, 1.0]))


def test_decoupled_gae_with_equal_lambdas_is_gae_to_the_last_bit() -> None:
    torch.manual_seed(2)
    lengths, R = torch.tensor([7, 300, 1, 2]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    values = torch.rand(310)
    expected = gae(last_token_rewards(R, lengths), values, lengths, 0.99, 0.95)
    decoupled = of_step(values, lengths, R, gamma=0.99, lam=0.95, lam_critic=0.95)
    coupled = of_step(values, lengths, R, gamma=0.99, lam=0.95)
    assert all(map(torch.equal, decoupled, expected))
    assert all(map(torch.equal, coupled, expected))


def test_length_adaptive_lambda_equals_torchrl_response_by_response() -> None:
    """Each response has the λ of its length; those of up to 1/α tokens have λ = 0."""
    torch.manual_seed(3)
    lengths, R = torch.tensor([25, 1, 60, 20]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    values, rewards = torch.rand(106), last_token_rewards(R, lengths)
    assert length_adaptive_lam(0.05, lengths).tolist() == pytest.approx([0.2, 0, 2 / 3, 0])
    A, targets = of_step(values, lengths, R, gamma=0.99, lam_adaptive=0.05, lam_critic=0.9)
    columns = (by_response(x, lengths) for x in (rewards, values, A))
    lams = (0.2, 0.0, 2 / 3, 0.0)
    for r, v, ours, lam in zip(*columns, lams, strict=True):
        expected, _ = by_torchrl(r, v, torch.tensor([len(r)]), 0.99, lam)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    _, expected = by_torchrl(rewards, values, lengths, 0.99, 0.9)
    torch.testing.assert_close(targets, expected, atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not describe the same responses"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([2]))
    with pytest.raises(ValueError, match="shortest 0"):
        gae(torch.zeros(2), torch.zeros(2), torch.tensor([2, 0]))


def test_normalize_advantages() -> None:
    """Zero mean and unit population variance over all tokens. Shifting and scaling changes nothing.
    Equal advantages give zeros, not NaN."""
    A = torch.tensor([0.5, -0.5, 0.25, 1.0, 0.0])
    normalized = normalize_advantages(A)
    assert abs(float(normalized.mean())) < 1e-6
    assert math.isclose(float(normalized.var(correction=0)), 1.0, rel_tol=1e-5)
    torch.testing.assert_close(normalize_advantages(3 * A + 7), normalized)
    assert torch.equal(normalize_advantages(torch.full((4,), 0.3)), torch.zeros(4))


def test_grpo_advantages_are_per_group_and_constant_along_a_response() -> None:
    R = torch.tensor([1.0, 0.0, 1.0, 1.0])
    groups, lengths = torch.tensor([7, 7, 3, 3]), torch.tensor([2, 3, 1, 1])
    assert grpo_advantages(R, groups, lengths).tolist() == [1, 1, -1, -1, -1, 0, 0]
