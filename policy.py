"""The policy π_θ: log-probabilities of the sampled tokens, without ever holding [tokens ×
vocabulary]."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import distributed
from distributed import Sharding
from packing import MicroBatch, hidden_states

# Logits held at once: what a CPU's cache holds; on a GPU 883 tokens of Qwen's vocabulary.
CHUNK = {"cpu": 2**19, "cuda": 2**27}
LEAST = 128  # tokens in a chunk at least, because every chunk reads the whole head
WHOLE = Sharding()


class Policy(torch.nn.Module):
    """π_θ: a causal language model, called on packs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            name = type(model).__name__
            raise ValueError(f"{name}: a vocabulary head with a bias is not supported")

    def forward(self, micro: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log π_θ(a_t|s_t) of each action and, for logging, the entropy of π_θ(·|s_t); both (n,)
        float32. Only positions that predict an action reach the vocabulary head."""
        h = hidden_states(self.model, micro)  # (n, H)
        head = self.model.get_output_embeddings().weight  # (V, H)
        return TokenLogProbs.apply(h, head, micro.actions, temperature)


class TokenLogProbs(torch.autograd.Function):
    """h (n, H), W (V, H), actions (n,), T → log p(a_t) and, without gradient, the entropy of p,
    with p = softmax(W h_t / T); both (n,).

    Logits are float32 whatever h and W are, and exist for one chunk of tokens at a time. The
    backward pass computes them again and turns them, in place, into their own gradients. The
    gradient of logit v of token t is g_t (1[v = a_t] − p_v) / T.

    >>> h, W = torch.zeros(1, 3), torch.zeros(8, 3)
    >>> logp, entropy = TokenLogProbs.apply(h, W, torch.tensor([5]), 1.0)
    >>> logp.exp(), entropy.exp()  # one of 8, and as uncertain as a choice among 8
    (tensor([0.1250]), tensor([8.]))
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, actions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logp, log_z, entropy = (torch.empty(len(h), device=h.device) for _ in range(3))
        for chunk, logits, buffer in _logits(h, W, temperature):
            top = logits.amax(-1)
            logits -= top[:, None]
            p = torch.exp(logits, out=buffer)  # up to the factor 1/Z
            Z = p.sum(-1)
            logp[chunk] = logits.gather(-1, actions[chunk, None]).squeeze(-1) - Z.log()
            # Both terms are ≥ 0: nothing cancels.
            entropy[chunk] = Z.log() - p.mul_(logits).sum(-1) / Z
            log_z[chunk] = Z.log() + top
        ctx.save_for_backward(h, W, actions, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, W, actions, log_z = ctx.saved_tensors
        g = g / ctx.temperature
        grad_h = torch.empty_like(h)
        grad_W = torch.zeros(W.shape, device=W.device)
        for chunk, logits, _ in _logits(h, W, ctx.temperature):
            d = logits.sub_(log_z[chunk, None]).exp_().mul_(-g[chunk, None])
            d = d.scatter_add_(-1, actions[chunk, None], g[chunk, None]).to(h.dtype)
            torch.mm(d, W, out=grad_h[chunk])
            _add_product(grad_W, d.T, h[chunk])
        logits = _ = d = None  # free their memory before grad_W is copied
        return grad_h, grad_W.to(W.dtype), None, None


def _logits(h: Tensor, W: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk: which tokens, their logits W h_t / T (tokens, V), and a buffer of the same
    shape. The memory is allocated once, because allocating it costs more than filling it."""
    size = max(1, min(len(h), max(LEAST, CHUNK[h.device.type] // len(W))))
    memory = torch.empty(2, size, len(W), device=h.device)
    for start in range(0, len(h), size):
        chunk = slice(start, min(start + size, len(h)))
        logits, buffer = memory[:, : chunk.stop - start]
        _add_product(logits, h[chunk], W.T, keep=0)
        if temperature != 1:
            logits.div_(temperature)
        yield chunk, logits, buffer


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: int = 1) -> Tensor:
    """out ← keep · out + a b, in float32: logits rounded to bfloat16 would be off by up to 0.06."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=keep, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=keep, out=out)


def load_policy(path: str, sharding: Sharding = WHOLE) -> Policy:
    """The base model in float32 (master weights), over all ranks. Dropout stays off: PPO's ratio
    compares two passes over the same weights, and must be 1 when nothing changed."""
    policy = Policy(distributed.load_pretrained(AutoModelForCausalLM, path).eval())
    distributed.apply_fsdp(policy, sharding)
    return policy
