"""gae.py: the advantage of the paper, on ragged responses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gae import gae, grpo_advantages, last_token_rewards, normalize_advantages


def by_definition(r: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = Σ_k (γλ)^k δ_{t+k} of one response, term by term: O(T²), in float64."""
    r, v = r.double(), v.double()
    T = len(r)
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < T else 0.0) - v[t] for t in range(T)]
    return torch.stack(
        [sum((gamma * lam) ** k * delta[t + k] for k in range(T - t)) for t in range(T)]
    )


ragged = st.lists(st.integers(1, 12), min_size=1, max_size=6)
unit = st.floats(0, 1, width=32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    lengths = draw(ragged)
    n = sum(lengths)
    value = st.floats(-3, 3, width=32)
    rewards, values = (
        torch.tensor(draw(st.lists(value, min_size=n, max_size=n))) for _ in range(2)
    )
    return rewards, values, torch.tensor(lengths)


def test_gamma_lambda_one_is_exactly_R_minus_V() -> None:
    """The paper's setting: Â_t = R − V(s_t) and target R, to the last bit."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 300, 2])
    R, values = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.randn(310)
    A, targets = gae(last_token_rewards(R, lengths), values, lengths, gamma=1.0, lam=1.0)
    each = R.repeat_interleave(lengths)
    assert torch.equal(A, each - values)
    assert torch.equal(targets, each)


def test_by_hand() -> None:
    """γ = 0.5, λ = 0.5, r = (0, 0, 1), V = (0.5, 0.6, 0.9): δ = (−0.2, −0.15, 0.1); Â_2 = 0.1,
    Â_1 = −0.15 + 0.25·0.1 = −0.125, Â_0 = −0.2 + 0.25·(−0.125) = −0.23125."""
    A, targets = gae(
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([0.5, 0.6, 0.9]),
        torch.tensor([3]),
        gamma=0.5,
        lam=0.5,
    )
    torch.testing.assert_close(A, torch.tensor([-0.23125, -0.125, 0.1]))
    torch.testing.assert_close(targets, torch.tensor([0.26875, 0.475, 1.0]))


@settings(deadline=None, max_examples=60)
@given(batches(), unit, unit)
def test_equals_the_definition(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    rewards, values, lengths = batch
    A, targets = gae(rewards, values, lengths, gamma, lam)
    expected = [
        by_definition(r, v, gamma, lam)
        for r, v in zip(
            rewards.split(lengths.tolist()), values.split(lengths.tolist()), strict=True
        )
    ]
    torch.testing.assert_close(A, torch.cat(expected).float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(targets, A + values, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(batches(), unit, unit, st.randoms())
def test_nothing_leaks_between_responses(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float, rng: object
) -> None:
    """Each response alone gives the same bits as in any batch, in any order."""
    rewards, values, lengths = batch
    A, _ = gae(rewards, values, lengths, gamma, lam)
    parts = list(
        zip(
            rewards.split(lengths.tolist()),
            values.split(lengths.tolist()),
            A.split(lengths.tolist()),
            strict=True,
        )
    )
    for r, v, a in parts:
        assert torch.equal(gae(r, v, torch.tensor([len(r)]), gamma, lam)[0], a)
    rng.shuffle(parts)
    r, v, a = (torch.cat(p) for p in zip(*parts, strict=True))
    assert torch.equal(gae(r, v, torch.tensor([len(p[0]) for p in parts]), gamma, lam)[0], a)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0)])
def test_equals_torchrl(gamma: float, lam: float) -> None:
    """An implementation by others, which takes a padded (B, T) batch with done flags."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    torch.manual_seed(1)
    lengths = torch.tensor([5, 9, 1, 9])
    B, T = len(lengths), int(lengths.max())
    inside = torch.arange(T) < lengths[:, None]
    rewards, values = torch.randn(2, int(lengths.sum()))
    r, v = torch.zeros(B, T), torch.zeros(B, T)
    r[inside], v[inside] = rewards, values
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
    mine, my_target = gae(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(mine, A[..., 0][inside], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(my_target, target[..., 0][inside], atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not describe the same responses"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([2]))
    with pytest.raises(ValueError, match="shortest 0"):
        gae(torch.zeros(2), torch.zeros(2), torch.tensor([2, 0]))


def test_normalise() -> None:
    """Zero mean and unit population variance over all tokens; equal advantages give zeros, not NaN; shift and scale of the
    rewards do not matter."""
    a = torch.tensor([0.5, -0.5, 0.25, 1.0, 0.0])
    n = normalize_advantages(a)
    assert abs(float(n.mean())) < 1e-6
    assert math.isclose(float(n.var(correction=0)), 1.0, rel_tol=1e-5)
    torch.testing.assert_close(normalize_advantages(3 * a + 7), n)
    assert torch.equal(normalize_advantages(torch.full((4,), 0.3)), torch.zeros(4))


def test_grpo_advantages_are_per_group_and_constant_along_a_response() -> None:
    R, groups, lengths = (
        torch.tensor([1.0, 0.0, 1.0, 1.0]),
        torch.tensor([7, 7, 3, 3]),
        torch.tensor([2, 3, 1, 1]),
    )
    assert grpo_advantages(R, groups, lengths).tolist() == [1, 1, -1, -1, -1, 0, 0]
