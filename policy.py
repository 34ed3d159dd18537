"""The policy π_θ: log-probabilities of the sampled tokens, without ever holding [tokens × vocabulary]."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import distributed
from distributed import Sharding
from packing import MicroBatch, hidden_states

CHUNK = {
    "cpu": 2**19,
    "cuda": 2**27,
}  # logits alive at once: what a cache holds, and 883 tokens of Qwen's vocabulary;
LEAST = 128  # but of so many tokens at least, since every chunk reads the whole head


class Policy(torch.nn.Module):
    """π_θ: a causal language model, called on packed micro-batches."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise ValueError(
                f"{type(model).__name__}: a vocabulary head with a bias is not supported"
            )

    def forward(self, micro: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log π_θ(a_t|s_t) of each action and, for logging, the entropy of π_θ(·|s_t); both (n,) float32. Prompt positions
        are dropped before the vocabulary head."""
        h = hidden_states(self.model, micro)  # (n, H)
        return TokenLogProbs.apply(
            h, self.model.get_output_embeddings().weight, micro.actions, temperature
        )


class TokenLogProbs(torch.autograd.Function):
    """h (n, H), W (V, H), actions (n,), T → log p(a_t) and, without gradient, the entropy of p = softmax(W h_t / T).

    Logits are float32 whatever h and W are, and live a chunk of tokens at a time. The backward pass computes them again
    and turns them, in place, into their own gradients, of logit v: g_t (1[v = a_t] − p_v) / T.

    >>> h, W = torch.zeros(1, 3), torch.zeros(8, 3)
    >>> [x.exp() for x in TokenLogProbs.apply(h, W, torch.tensor([5]), 1.0)]  # 1 of 8, and as unsure as a choice among 8
    [tensor([0.1250]), tensor([8.])]
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, actions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logp, log_z, entropy = (torch.empty(len(h), device=h.device) for _ in range(3))
        for part, logits, memory in _logits(h, W, temperature):
            top = logits.amax(-1)
            logits -= top[:, None]
            p = torch.exp(logits, out=memory)  # up to 1/Z
            Z = p.sum(-1)
            logp[part] = logits.gather(-1, actions[part, None]).squeeze(-1) - Z.log()
            entropy[part] = Z.log() - p.mul_(logits).sum(-1) / Z  # both ≥ 0: nothing cancels
            log_z[part] = Z.log() + top
        ctx.save_for_backward(h, W, actions, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, W, actions, log_z = ctx.saved_tensors
        g = g / ctx.temperature
        grad_h, grad_W = torch.empty_like(h), torch.zeros(W.shape, device=W.device)
        for part, logits, _ in _logits(h, W, ctx.temperature):
            d = logits.sub_(log_z[part, None]).exp_().mul_(-g[part, None])
            d = d.scatter_add_(-1, actions[part, None], g[part, None]).to(h.dtype)
            torch.mm(d, W, out=grad_h[part])
            _add_product(grad_W, d.T, h[part])
        logits = _ = d = None  # free their memory for the copy
        return grad_h, grad_W.to(W.dtype), None, None


def _logits(h: Tensor, W: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk: which tokens, their logits, and as much memory again, which costs more to get than to fill."""
    size = max(1, min(len(h), max(LEAST, CHUNK[h.device.type] // len(W))))
    memory = torch.empty(2, size, len(W), device=h.device)
    for start in range(0, len(h), size):
        part = slice(start, min(start + size, len(h)))
        logits, more = memory[:, : part.stop - start]
        _add_product(logits, h[part], W.T, keep=0)
        yield part, logits if temperature == 1 else logits.div_(temperature), more


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: int = 1) -> Tensor:
    """out ← keep · out + a b, in float32: logits rounded to bfloat16 would be off by up to 0.06."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=keep, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=keep, out=out)


def load_policy(path: str, sharding: Sharding = Sharding()) -> Policy:  # noqa: B008
    """The base model in float32 (master weights), over all ranks. Dropout stays off: PPO's ratio compares two passes over
    the same weights, and must be 1 when nothing changed."""
    policy = Policy(distributed.load_pretrained(AutoModelForCausalLM, path).eval())
    distributed.apply_fsdp(policy, sharding)
    return policy
