"""The losses of vanilla PPO (§2.1, Eq. 1 and Eq. 2), the KL terms of its ablations, and the
optimizer.

Every loss returns the *sum* over the tokens it was given. The caller divides by the number of
response tokens of the whole update (all micro-batches, all ranks), so that micro-batch size,
packing and world size change nothing. This module imports torch alone.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def policy_loss(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_eps: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Clipped policy objective, Eq. 1 with the sign of a loss:

        L = − Σ_t min( ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t )
        ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)    (the probability ratio)

    The paper takes one policy step per rollout, so π_old *is* π_θ and ρ_t = 1: pass `logp.detach()`
    as logp_old, and the gradient is −Σ Â_t ∇ log π_θ(a_t|s_t). No entropy bonus, no KL.

    | symbol | shape | meaning |
    |---|---|---|
    | logp = log π_θ(a_t given s_t) | (n,) | current policy, with gradient |
    | logp_old = log π_old | (n,) | policy that the update started from, no gradient |
    | advantages Â_t | (n,) | normalized, no gradient |
    | → loss, was_clipped | scalar, (n,) | Σ_t; bool, where the clip took the gradient away |

    >>> logp, logp_old = torch.tensor([0.0, 0.5]), torch.zeros(2)
    >>> policy_loss(logp, logp_old, advantages=torch.ones(2))[0]  # −(1 + 1.2)
    tensor(-2.2000)
    """
    ratio = (logp - logp_old).exp()
    objective = ratio * advantages
    clipped_objective = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    was_clipped = clipped_objective < objective
    return -torch.minimum(objective, clipped_objective).sum(), was_clipped


def value_loss(
    values: Tensor, targets: Tensor, values_old: Tensor | None = None, clip: float = 0.0
) -> Tensor:
    """Value objective, Eq. 2: ½ Σ_t (V_φ(s_t) − G_t)². All shapes are (n,); targets and values_old
    have no gradient.

    With clip > 0 it is the form of the authors' code, in which a value gains nothing by moving more
    than `clip` away from values_old: ½ Σ_t max( (V − G)², (V_old + clip(V − V_old, ±clip) − G)² ).

    >>> value_loss(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0]))  # ½ (0.25 + 1)
    tensor(0.6250)
    """
    error = (values - targets) ** 2
    if clip > 0:
        near = values_old + (values - values_old).clamp(-clip, clip)
        error = torch.maximum(error, (near - targets) ** 2)
    return 0.5 * error.sum()


def kl(logp: Tensor, logp_ref: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled from π, with d = log π − log π_ref;
    all shapes are (n,):

        k1 = d                  unbiased, can be negative
        k2 = ½ d²               biased, ≥ 0, low variance
        k3 = e^{−d} − 1 + d     unbiased, ≥ 0

    Only the ablations of Fig. 8 use it; the recipe has no KL and loads no reference model.

    >>> logp, logp_ref = torch.tensor([0.0]), torch.tensor([-1.0])
    >>> kl(logp, logp_ref, "k1"), kl(logp, logp_ref, "k2")
    (tensor([1.]), tensor([0.5000]))
    """
    d = logp - logp_ref
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl estimator {estimator!r}: expected k1, k2 or k3")


def kl_shaped_rewards(
    rewards: Tensor, logp: Tensor, logp_ref: Tensor, beta: float, estimator: str = "k1"
) -> Tensor:
    """KL as a reward penalty (Fig. 8): r_t − β KL_t, shapes (N,)."""
    return rewards - beta * kl(logp, logp_ref, estimator).detach()


def truncated_is(logp: Tensor, logp_sampler: Tensor, cap: float) -> Tensor:
    """Truncated importance weight min(π_θ / π_sampler, cap) of each token, (n,) without gradient.
    It corrects for a sampler whose arithmetic is not the trainer's. The recipe does not use it."""
    return (logp - logp_sampler).exp().clamp(max=cap).detach()


def learning_rate(
    step: int, base: float, warmup: int, anneal_steps: int = 0, anneal_to: float = 0.0
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant; or linear
    annealing.

    The warm-up runs 1/warmup, 2/warmup, … 1, so the first step already learns (the authors'
    scheduler starts at 0 and wastes it). With anneal_steps > 0 the rate falls linearly from `base`
    to `anneal_to`, as in the paper's last stage.

    >>> [learning_rate(s, 1e-6, warmup=50) for s in (0, 24, 49, 1000)]
    [2e-08, 5e-07, 1e-06, 1e-06]
    >>> [learning_rate(s, 1e-6, 0, anneal_steps=100, anneal_to=3e-7) for s in (0, 100)]
    [1e-06, 3e-07]
    """
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, step / anneal_steps) if anneal_steps else 0.0
    return warm * (base + done * (anneal_to - base))


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW as in §3.1: β = (0.9, 0.95), no weight decay. `optimizer_step` sets the rate."""
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )


def optimizer_step(optimizer: torch.optim.AdamW, lr: float, max_grad_norm: float = 1.0) -> float:
    """Clip the gradient norm to `max_grad_norm`, take one step at learning rate `lr`, and clear the
    gradients. Returns the norm before clipping. Raises FloatingPointError when the norm is not
    finite; nothing has changed then."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
