"""Advantages and value targets of ragged responses (§2.1, "Generalized Advantage Estimation").

Per-token quantities of a whole batch are flat: the response tokens of all B responses in one vector
of N = Σ lengths, response after response. Nothing is padded; `lengths` says where a response ends.

    lengths = [3, 2]      flat index  0 1 2 | 3 4
                          token t     0 1 2 | 0 1
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages Â_t and value targets G_t of every response token (§2.1).

    The code computes the targets G_t from the last token backwards, then Â_t = G_t − V(s_t); there
    is no delta in it, although the result is that of the paper's recursion. The paper writes
    Â_t = Σ_k (γλ)^k δ_{t+k}, that is Â_t = δ_t + γλ Â_{t+1}, with the one-step error
    δ_t = r_t + γ V(s_{t+1}) − V(s_t). Through the λ-return G_t, the value target, it reads

        G_t = r_t + γ [ (1 − λ) V(s_{t+1}) + λ G_{t+1} ],     Â_t = G_t − V(s_t)

    They are the same, because with Â_{t+1} = G_{t+1} − V(s_{t+1})

        δ_t + γλ Â_{t+1} = r_t + γ V(s_{t+1}) − V(s_t) + γλ [ G_{t+1} − V(s_{t+1}) ]
                         = r_t + γ [ (1 − λ) V(s_{t+1}) + λ G_{t+1} ] − V(s_t)
                         = G_t − V(s_t) = Â_t

    Nothing is bootstrapped past the last token (V = G = 0 there), even when the response was
    truncated. With the paper's γ = λ = 1 and a reward R on the last token, this form gives
    *exactly* Â_t = R − V(s_t) and G_t = R, without the rounding of a telescoping sum of δ.

    | symbol | shape | meaning |
    |---|---|---|
    | rewards r_t | (N,) | reward after action t; R on each response's last token, else 0 |
    | values V(s_t) | (N,) | critic's value of the state *before* action t |
    | lengths | (B,) | response tokens per response, each ≥ 1, summing to N |
    | gamma γ | scalar | discount |
    | lam λ | scalar or (B,) | GAE's bias–variance trade-off, for all responses or for each |
    | → advantages Â_t, targets G_t | (N,), (N,) | float32 |

    Raises ValueError when the shapes do not belong together. A response of three tokens with R = 1
    and V = (0.5, 0.6, 0.9):

    >>> r, v = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.6, 0.9])
    >>> gae(r, v, torch.tensor([3]))[0]
    tensor([0.5000, 0.4000, 0.1000])
    >>> gae(r, v, torch.tensor([3]), gamma=1.0, lam=0.0)[0]  # the one-step errors δ_t
    tensor([0.1000, 0.3000, 0.1000])
    """
    total, shortest = int(lengths.sum()), int(lengths.min())
    if rewards.shape != values.shape or total != rewards.numel() or shortest < 1:
        raise ValueError(
            f"gae: rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and lengths "
            f"summing to {total} (shortest {shortest}) do not describe the same responses"
        )
    r, v = rewards.float(), values.float()
    targets = torch.empty_like(v)
    last = lengths.cumsum(0) - 1  # (B,) flat index of each response's last token
    # All responses at once: first their last tokens, then those one before, and so on.
    for distance in range(int(lengths.max())):
        long_enough = lengths > distance
        t = (last - distance)[long_enough]  # flat indices of the tokens at this distance
        if distance == 0:
            targets[t] = r[t]
        else:
            lam_t = lam[long_enough] if isinstance(lam, Tensor) else lam
            targets[t] = r[t] + gamma * ((1 - lam_t) * v[t + 1] + lam_t * targets[t + 1])
    return targets - v, targets


def length_adaptive_lam(alpha: float, lengths: Tensor) -> Tensor:
    """VAPO's λ of each response (arXiv 2504.05118, "Length-Adaptive GAE"), (B,) float32:

        λ = 1 − 1/(α l)     for a response of l tokens

    With it the weights of the one-step errors, Σ_k λ^k ≈ 1/(1 − λ), sum to α l: a share α of the
    response, whatever its length. A fixed λ = 0.95 has a sum of 20, so a reward at token 5,000 does
    not reach token 0. The paper does not say what holds for α l ≤ 1, where the formula is not above
    0; here λ is 0 there, and the advantage is the one-step error.

    >>> length_adaptive_lam(0.05, torch.tensor([10, 40, 400, 8000]))
    tensor([0.0000, 0.5000, 0.9500, 0.9975])
    """
    return (1 - 1 / (alpha * lengths.float())).clamp(min=0)


def last_token_rewards(R: Tensor, lengths: Tensor) -> Tensor:
    """Per-token rewards r_t (N,): the reward R (B,) of each response on its last token, 0 elsewhere
    (§2.1.2)."""
    r = torch.zeros(int(lengths.sum()), device=R.device)
    r[lengths.cumsum(0) - 1] = R.float()
    return r


def normalize_advantages(advantages: Tensor, eps: float = 1e-8) -> Tensor:
    """Batch-level advantage normalization (§3.1): (Â − mean) / std over all N response tokens of
    the step.

    std² = max(variance, eps), with the population's variance: a batch of equal advantages gives
    zeros instead of NaN. Value targets are never normalized.

    >>> normalize_advantages(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.2247,  0.0000,  1.2247])
    """
    advantages = advantages.float()
    variance = advantages.var(correction=0)
    return (advantages - advantages.mean()) * variance.clamp(min=eps).rsqrt()


def grpo_advantages(R: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """GRPO's advantage without a critic, the paper's comparison: Â_t = (R − mean) / std over the
    group of responses to one problem, the same on every token of a response.

    R (B,) rewards, groups (B,) the problem each response answers, lengths (B,) → (N,). A group of
    equal rewards gets 0.

    >>> R, groups = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    >>> grpo_advantages(R, groups, lengths=torch.tensor([1, 1, 1, 1]))
    tensor([ 1., -1.,  0.,  0.])
    """
    R = R.float()
    _, group = groups.unique(return_inverse=True)
    count = torch.bincount(group)
    centered = R - (torch.bincount(group, weights=R) / count)[group]
    std = (torch.bincount(group, weights=centered**2) / count).sqrt()[group]
    scaled = torch.where(std > 1e-6, centered / std.clamp(min=1e-6), torch.zeros_like(centered))
    return scaled.float().repeat_interleave(lengths)
