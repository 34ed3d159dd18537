"""ppo.py: Eq. 1, Eq. 2, the KL terms of the ablations, the optimizer."""

import math

import pytest
import torch

import ppo


def test_on_policy_gradient_is_advantage_weighted_log_likelihood() -> None:
    """With π_old = π_θ the ratio is exactly 1, nothing is clipped and ∇L = −Σ Â_t ∇ log π."""
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    A = torch.tensor([0.3, -1.5, 2.0])
    loss, was_clipped = ppo.policy_loss(logp, logp.detach(), A, clip_eps=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.8)
    assert torch.equal(logp.grad, -A)
    assert not was_clipped.any()


@pytest.mark.parametrize(
    ("ratio", "A", "expected", "has_gradient"),
    [
        (1.5, 1.0, -1.2, False),  # a good action, already far more likely: clipped
        (0.5, 1.0, -0.5, True),  # a good action that became less likely: never clipped
        (0.5, -1.0, 0.8, False),  # a bad action, already far less likely: clipped
        (1.5, -1.0, 1.5, True),  # a bad action that became more likely: never clipped
        (1.1, 1.0, -1.1, True),  # inside the clip range
    ],
)
def test_clipped_objective_case_by_case(
    ratio: float, A: float, expected: float, has_gradient: bool
) -> None:
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, was_clipped = ppo.policy_loss(logp, torch.zeros(1), torch.tensor([A]), clip_eps=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert bool(logp.grad.abs().sum() > 0) == has_gradient
    assert was_clipped.item() == (not has_gradient)


def test_value_loss_plain_and_clipped() -> None:
    values = torch.tensor([0.9, 0.1], requires_grad=True)
    targets, values_old = torch.ones(2), torch.tensor([0.5, 0.5])
    assert ppo.value_loss(values, targets).item() == pytest.approx(0.5 * (0.01 + 0.81))
    # V may move by 0.2 from 0.5. So 0.9 counts as 0.7, and 0.1 as itself: it is worse than 0.3.
    loss = ppo.value_loss(values, targets, values_old, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.09 + 0.81))
    assert values.grad.tolist() == pytest.approx([0.0, -0.9])


def test_kl_estimators_agree_in_expectation() -> None:
    """Over tokens sampled from π, k1 and k3 average to KL(π ‖ π_ref) and k2 to something near it.
    k2 and k3 are never negative."""
    torch.manual_seed(0)
    logp, logp_ref = torch.randn(8).log_softmax(0), torch.randn(8).mul(0.2).log_softmax(0)
    exact = float((logp.exp() * (logp - logp_ref)).sum())
    sampled = torch.multinomial(logp.exp(), 200_000, replacement=True)
    estimates = {
        estimator: float(ppo.kl(logp[sampled], logp_ref[sampled], estimator).mean())
        for estimator in ("k1", "k2", "k3")
    }
    assert estimates["k1"] == pytest.approx(exact, rel=0.02)
    assert estimates["k3"] == pytest.approx(exact, rel=0.02)
    assert estimates["k2"] == pytest.approx(exact, rel=0.4)
    assert ppo.kl(logp, logp_ref, "k2").min() >= 0
    assert ppo.kl(logp, logp_ref, "k3").min() >= 0
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        ppo.kl(logp, logp_ref, "k4")


def test_kl_shaped_rewards() -> None:
    rewards = torch.tensor([0.0, 1.0])
    logp, logp_ref = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0])
    shaped = ppo.kl_shaped_rewards(rewards, logp, logp_ref, beta=0.1)
    assert shaped.tolist() == pytest.approx([-0.1, 1.0])


def test_truncated_importance_weights() -> None:
    logp, logp_sampler = torch.zeros(2), torch.tensor([-5.0, math.log(2)])
    weights = ppo.truncated_is(logp, logp_sampler, cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, 0.5])


def test_learning_rate_warms_up_from_the_first_step_and_anneals() -> None:
    assert ppo.learning_rate(0, 1.0, warmup=50) == pytest.approx(1 / 50)
    assert ppo.learning_rate(49, 1.0, warmup=50) == 1.0
    assert ppo.learning_rate(5000, 1.0, warmup=50) == 1.0
    assert ppo.learning_rate(0, 1.0, warmup=0) == 1.0
    annealed = [ppo.learning_rate(step, 1e-6, 0, 100, 3e-7) for step in (100, 200)]
    assert annealed[0] == annealed[1] == pytest.approx(3e-7)


def test_optimizer_is_adamw_of_the_paper_with_clipped_gradients() -> None:
    """The first gradient has norm 10 and is clipped to norm 1; the second is below the limit. Both
    steps equal AdamW by hand, with bias correction and β = (0.9, 0.95)."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = ppo.adamw([p])
    p.grad = torch.tensor([6.0, 8.0])
    assert ppo.optimizer_step(optimizer, lr=0.01, max_grad_norm=1.0) == pytest.approx(10.0)
    g = torch.tensor([0.6, 0.8])
    first = torch.tensor([1.0, -2.0]) - 0.01 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(p.data, first, atol=1e-6, rtol=1e-6)
    p.grad = torch.tensor([-0.3, 0.0])  # below the limit: not clipped
    ppo.optimizer_step(optimizer, lr=0.01)
    m = (0.9 * 0.1 * g + 0.1 * torch.tensor([-0.3, 0.0])) / (1 - 0.9**2)
    v = (0.95 * 0.05 * g**2 + 0.05 * torch.tensor([0.09, 0.0])) / (1 - 0.95**2)
    torch.testing.assert_close(p.data, first - 0.01 * m / (v.sqrt() + 1e-8), atol=1e-6, rtol=1e-6)
    assert p.grad is None
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = ppo.adamw([p])
    p.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        ppo.optimizer_step(optimizer, lr=0.1)
    assert p.data.tolist() == [1.0, 1.0]
