"""The policy π_θ: log-probabilities of the sampled tokens.

No [tokens × vocabulary] tensor is ever held: logits exist for one chunk of tokens at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import distributed
from distributed import Sharding
from packing import MicroBatch, check_against_own_forward, hidden_states

# Logits held at once: what a CPU's cache holds; on a GPU those of 883 tokens of Qwen2.5.
CHUNK = {"cpu": 2**19, "cuda": 2**27}
LEAST = 128  # tokens in a chunk at least, because every chunk reads the whole head
DEFAULT_SHARDING = Sharding()


class LogitsTransform(NamedTuple):
    """What a model does to the output x = W h + b of its head: its logits are scale · x, and where
    there is a cap, cap · tanh(scale · x / cap)."""

    scale: float = 1.0
    cap: float | None = None


PLAIN = LogitsTransform()


def logits_transform(config: Any) -> LogitsTransform:
    """The transform that a model's configuration asks for: Cohere and HyperCLOVAX multiply, Granite
    and MiniCPM3 divide, Gemma 2 and NanoChat cap. `load_policy` compares the result with the
    model's own logits, so that a model that does anything else is refused.

    >>> from transformers import GraniteConfig
    >>> logits_transform(GraniteConfig(logits_scaling=8.0))
    LogitsTransform(scale=0.125, cap=None)
    """
    scale = float(getattr(config, "logit_scale", None) or 1)
    scaling = float(getattr(config, "logits_scaling", None) or 1)
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    return LogitsTransform(scale, getattr(config, "final_logit_softcapping", None))


class Policy(torch.nn.Module):
    """π_θ: a causal language model, called on packs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.transform = logits_transform(model.config)

    def forward(
        self, micro: MicroBatch, temperature: float = 1.0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log π_θ(a_t|s_t) of each action and, for logging, the entropy of π_θ(·|s_t); both (n,)
        float32. Only positions that predict an action, the tokens *before* the
        actions (packing.py), reach the vocabulary head."""
        h = hidden_states(self.model, micro)  # (n, H)
        head = self.model.get_output_embeddings()  # weight (V, H)
        return TokenLogProbs.apply(
            h, head.weight, micro.actions, temperature, head.bias, self.transform, top_p
        )


class TokenLogProbs(torch.autograd.Function):
    """h (n, H), W (V, H), actions (n,), T → log p(a_t) and, without gradient, the entropy of p,
    with p = softmax(z_t / T); both (n,). The logits are z_t = f(W h_t + b), with the bias b (V,) of
    the head, if it has one, and the model's own transform f. With top_p < 1, p is the distribution
    that nucleus sampling draws from; an action outside the nucleus, by rounding, is counted in.

    Logits are float32 whatever h and W are, and exist for one chunk of tokens at a time. The
    backward pass computes them again and turns them, in place, into their own gradients. The
    gradient of logit v of token t is g_t (1[v = a_t] − p_v) / T, times f′ for W h_t + b.

    >>> h, W = torch.zeros(1, 3), torch.zeros(8, 3)
    >>> logp, entropy = TokenLogProbs.apply(h, W, torch.tensor([5]), 1.0)
    >>> logp.exp(), entropy.exp()  # one of 8, and as uncertain as a choice among 8
    (tensor([0.1250]), tensor([8.]))
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        W: Tensor,
        actions: Tensor,
        temperature: float,
        bias: Tensor | None = None,
        transform: LogitsTransform = PLAIN,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        logp, log_z, entropy = (torch.empty(len(h), device=h.device) for _ in range(3))
        ctx.softmax = (temperature, transform, top_p)
        for chunk, logits, buffer in _logits(h, W, bias, actions, *ctx.softmax):
            top = logits.amax(-1)
            logits -= top[:, None]
            p = torch.exp(logits, out=buffer)  # up to the factor 1/Z
            Z = p.sum(-1)
            logp[chunk] = logits.gather(-1, actions[chunk, None]).squeeze(-1) - Z.log()
            # Both terms are ≥ 0: nothing cancels.
            entropy[chunk] = Z.log() - p.mul_(logits).sum(-1) / Z
            log_z[chunk] = Z.log() + top
        ctx.save_for_backward(h, W, actions, log_z, bias)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        h, W, actions, log_z, bias = ctx.saved_tensors
        temperature, transform, _ = ctx.softmax
        g = g * transform.scale / temperature
        grad_h = torch.empty_like(h)
        grad_W = torch.zeros(W.shape, device=W.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, device=W.device)
        for chunk, logits, buffer in _logits(h, W, bias, actions, *ctx.softmax):
            if transform.cap is not None:  # tanh′ = 1 − tanh²
                tanh = torch.mul(logits, temperature / transform.cap, out=buffer)
                slope = tanh.square_().neg_().add_(1)
            d = logits.sub_(log_z[chunk, None]).exp_().mul_(-g[chunk, None])
            d = d.scatter_add_(-1, actions[chunk, None], g[chunk, None])
            if transform.cap is not None:
                d.mul_(slope)
            if bias is not None:
                grad_bias += d.sum(0)
            d = d.to(h.dtype)
            torch.mm(d, W, out=grad_h[chunk])
            _add_product(grad_W, d.T, h[chunk])
        # Free their memory before grad_W is copied.
        logits = buffer = tanh = slope = d = None
        if bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_h, grad_W.to(W.dtype), None, None, grad_bias, None, None


def _logits(
    h: Tensor,
    W: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    temperature: float,
    transform: LogitsTransform,
    top_p: float,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk: which tokens, their logits f(W h_t + b) / T (tokens, V), far down outside the
    nucleus, and a buffer of the same shape. The memory is allocated once, because allocating it
    costs more than filling it."""
    size = max(1, min(len(h), max(LEAST, CHUNK[h.device.type] // len(W))))
    memory = torch.empty(2, size, len(W), device=h.device)
    for start in range(0, len(h), size):
        chunk = slice(start, min(start + size, len(h)))
        logits, buffer = memory[:, : chunk.stop - start]
        _add_product(logits, h[chunk], W.T, keep=0)
        if bias is not None:
            logits += bias
        if transform.scale != 1:
            logits.mul_(transform.scale)
        if transform.cap is not None:
            logits.div_(transform.cap).tanh_().mul_(transform.cap)
        if temperature != 1:
            logits.div_(temperature)
        if top_p < 1:
            _leave_nucleus(logits, actions[chunk], top_p)
        yield chunk, logits, buffer


def _leave_nucleus(logits: Tensor, actions: Tensor, top_p: float) -> None:
    """Lower the logits (tokens, V) of what nucleus sampling cannot draw, so far that their
    probability is 0. The nucleus is the smallest set of most likely tokens with at least the mass
    top_p; see `hf_sampler.sample_token`."""
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    mass_above = ordered.cumsum(-1) - ordered  # 0 for the first: it always stays
    outside = torch.empty_like(logits, dtype=torch.bool)
    outside.scatter_(-1, order, mass_above >= top_p)
    outside.scatter_(-1, actions[:, None], False)
    floor = logits.amax(-1, keepdim=True) - 1e4  # finite: 0 · −∞ would be NaN
    torch.where(outside, floor, logits, out=logits)


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: int = 1) -> Tensor:
    """out ← keep · out + a b, in float32: logits rounded to bfloat16 would be off by up to 0.06."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=keep, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=keep, out=out)


def load_policy(path: str, sharding: Sharding = DEFAULT_SHARDING) -> Policy:
    """The base model in float32 (master weights), over all ranks. Dropout stays off: PPO's ratio
    compares two passes over the same weights, and must be 1 when nothing changed. Raises ValueError
    when weights are missing or left over, and when log-probabilities of a pack are not those of the
    model itself."""
    policy = Policy(distributed.load_pretrained(AutoModelForCausalLM, path).eval())
    distributed.on_rank0(lambda: check_logprobs(policy, path))
    distributed.apply_fsdp(policy, sharding)
    return policy


@torch.no_grad()
def check_logprobs(policy: Policy, path: str) -> None:
    """Compare log-probabilities of a small pack with what the model's own `forward` gives for one
    sequence at a time. Raises ValueError when they differ. It runs before the model is sharded, in
    float32 on the CPU."""

    def packed(micro: MicroBatch) -> Tensor:
        return policy(micro)[0]

    def own(token_ids: Tensor) -> tuple[Tensor, float]:
        logits = policy.model(input_ids=token_ids[None], use_cache=False).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(-1, token_ids[1:, None]).squeeze(-1)
        return logp, float(logits.abs().max())

    check_against_own_forward(policy.model, packed, own, f"--model {path}", "log-probabilities")
