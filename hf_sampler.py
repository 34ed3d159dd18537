"""The policy's own architecture, decoded with plain transformers: no vLLM needed, on any platform.

    prompts ──left-padded, read once──▶ key-value cache ──repeated per response──▶ token by token

Token ids go in and token ids come out. What is trained is what was sampled: the token that
completes `</answer>`, and EOS, are actions. `rollout.VllmSampler` has the same methods.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicLayer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config import Sampling
from distributed import load_whole


class SampledTokens(NamedTuple):
    """What a sampler returns for one response: token ids as sampled, the log-probability of each
    under the distribution sampled from, and "stop" or "length"."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, (B, heads, tokens, head size), in buffers with room for
    more tokens. transformers' own layer copies them all to append one token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers."""
        super().lazy_initialization(key_states, value_states)
        self.key_buffer = key_states[:, :, :0]
        self.value_buffer = value_states[:, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.key_buffer = _append(self.key_buffer, length, key_states)
        self.value_buffer = _append(self.value_buffer, length, value_states)
        length += key_states.shape[-2]
        self.keys = self.key_buffer[:, :, :length]
        self.values = self.value_buffer[:, :, :length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; one may occur several times."""
        length = self.get_seq_length()
        self.key_buffer = self.key_buffer[indices]
        self.value_buffer = self.value_buffer[indices]
        self.keys = self.key_buffer[:, :, :length]
        self.values = self.value_buffer[:, :, :length]


def _append(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """The buffer with `new` after its first `length` tokens; a copy twice as long if it is full."""
    end = length + new.shape[-2]
    if end > buffer.shape[-2]:
        larger = new.new_empty(*new.shape[:-2], 2 * end, new.shape[-1])
        larger[..., :length, :] = buffer[..., :length, :]
        buffer = larger
    buffer[..., length:end, :] = new
    return buffer


class HFSampler:
    """Samples with a model of its own, which follows the policy only through `load_weights`.

    Prompts are left-padded and read once; then their cache is repeated for their responses.
    Finished sequences leave the batch when they are a quarter of it.
    """

    num_ranks = 1  # every rank has a sampler of its own

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        eos: Sequence[int],
        dtype: str,
        device: str,
        max_num_seqs: int,
    ) -> None:
        self.dtype = getattr(torch, dtype)
        self.model = load_for_sampling(path, self.dtype).to(device)
        config = self.model.config
        self.attention = config._attn_implementation
        windows = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
        self.window = min((w for w in windows if w), default=math.inf)
        self.tokenizer = tokenizer
        self.eos = list(eos)
        self.device = device
        self.max_num_seqs = max_num_seqs
        token_ids = [[i] for i in range(len(tokenizer))]
        self.token_texts = tokenizer.batch_decode(token_ids, skip_special_tokens=False)
        self.may_stop = cache(self._may_stop)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy (name, weight) pairs into the sampler's model."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)

    def sleep(self) -> None:
        """Nothing: this sampler keeps its weights."""

    def close(self) -> None:
        """Nothing to release."""

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[SampledTokens]:
        """One response to each prompt, sampled from the random stream of its seed. The same prompt
        may occur several times."""
        responses = []
        for start in range(0, len(prompts), self.max_num_seqs):
            batch = slice(start, start + self.max_num_seqs)
            responses += self._generate_batch(prompts[batch], seeds[batch], sampling)
        return responses

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[SampledTokens]:
        count, max_tokens = len(prompts), sampling.max_tokens
        token_ids = torch.full((count, max_tokens), self.eos[0], device=self.device)
        logprobs = torch.zeros(count, max_tokens, device=self.device)
        lengths = [max_tokens] * count
        finish_reasons = ["length"] * count
        uniforms = torch.stack([_uniforms(seed, max_tokens) for seed in seeds]).to(self.device)
        may_stop = self.may_stop(sampling.stop)

        logits, past, mask, position = self._read_prompts(prompts)
        bias = additive(mask, max_tokens, self.dtype)
        active = torch.arange(count, device=self.device)  # the responses that are in the batch
        running = torch.ones(count, dtype=torch.bool, device=self.device)
        for t in range(max_tokens):
            token, token_logp = sample_token(logits, uniforms[active, t], sampling)
            token_ids[active, t] = token
            logprobs[active, t] = token_logp
            for i in may_stop[token].nonzero().flatten().tolist():
                response = int(active[i])
                if running[i] and self._stopped(token_ids[response, : t + 1], sampling.stop):
                    running[i] = False
                    finish_reasons[response] = "stop"
                    lengths[response] = t + 1
            num_running = int(running.sum())
            if num_running == 0 or t + 1 == max_tokens:
                break
            if num_running <= 0.75 * len(running):
                keep = running.nonzero().flatten()
                past.batch_select_indices(keep)
                active, running, bias = active[keep], running[keep], bias[keep]
                token, position = token[keep], position[keep]
            position = position + 1
            keys = past.get_seq_length() + 1
            seen = bias[..., :keys] if self._sees_all(keys) else bias[:, 0, 0, :keys] == 0
            logits = self._next_logits(token[:, None], seen, position, past)
        return [
            SampledTokens(ids[:length], logp[:length], finish_reason)
            for ids, logp, length, finish_reason in zip(
                token_ids.tolist(), logprobs.tolist(), lengths, finish_reasons, strict=True
            )
        ]

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Cache, Tensor, Tensor]:
        """Read every distinct prompt once. Returns, with one entry per response: logits of the
        first token (B, V), the key-value cache, the mask of prompt tokens (B, width), and the
        position of the last prompt token (B, 1)."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        prompt_of = torch.tensor([distinct[tuple(p)] for p in prompts], device=self.device)
        width = max(map(len, distinct))
        padded = [[self.eos[0]] * (width - len(p)) + list(p) for p in distinct]
        real = [[False] * (width - len(p)) + [True] * len(p) for p in distinct]
        input_ids = torch.tensor(padded, device=self.device)
        mask = torch.tensor(real, device=self.device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        past = Cache(layer_class_to_replicate=GrowingLayer)
        seen = mask
        if self._sees_all(width):
            square = torch.ones(width, width, dtype=torch.bool, device=self.device)
            seen = square.tril() & mask[:, None, None]
            # Padding attends to itself: a query without any key would give NaN.
            seen |= torch.eye(width, dtype=torch.bool, device=self.device)
        logits = self._next_logits(input_ids, seen, position, past)
        past.batch_select_indices(prompt_of)
        return logits[prompt_of], past, mask[prompt_of], position[prompt_of, -1:]

    def _next_logits(
        self, input_ids: Tensor, mask: Tensor, position: Tensor, past: Cache
    ) -> Tensor:
        """Logits of the next token as the model itself computes them, (B, V). `mask` says which
        keys are no padding, (B, keys), or is whole, (B, 1, queries, keys): truth values, or what
        `additive` makes of them."""
        out = self.model(
            input_ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=past,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _sees_all(self, length: int) -> bool:
        """Whether every layer sees all tokens before it. Then one whole mask serves all layers, and
        transformers need not make masks at each position. Otherwise it makes them."""
        return self.attention == "sdpa" and length <= self.window

    def _may_stop(self, stop: tuple[str, ...]) -> Tensor:
        """Whether a token can end a response, (V,): EOS, or a token that holds the last character
        of a stop string, or a part of it. Only responses that end in one of these are decoded and
        searched."""
        last_characters = {s[-1] for s in stop}
        if not all(map(str.isascii, last_characters)):
            last_characters.add("\ufffd")  # what a part of a character is decoded to
        flags = [any(c in last_characters for c in text) for text in self.token_texts]
        # The model's vocabulary may be wider than the tokenizer's.
        flags += [False] * (self.model.config.vocab_size - len(flags))
        may_stop = torch.tensor(flags, device=self.device)
        may_stop[self.eos] = True
        return may_stop

    def _stopped(self, token_ids: Tensor, stop: tuple[str, ...]) -> bool:
        """Whether a response ends here: with EOS, or with a stop string."""
        longest = max((len(s.encode()) for s in stop), default=1)  # a token may be one byte
        tail = token_ids[-longest:].tolist()
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return tail[-1] in self.eos or any(s in text for s in stop)


def load_for_sampling(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model that computes logits and nothing beside them. Raises ValueError when
    the folder does not hold it whole (`distributed.load_whole`)."""
    attention = attention_for(AutoConfig.from_pretrained(path))
    model = load_whole(
        AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention
    ).eval()
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # for a loss of the experts' router
    return model


def attention_for(config: PreTrainedConfig) -> str:
    """The attention that computes all that a model asks for: "sdpa", or "eager" for soft-capped
    scores, which transformers leaves out of "sdpa" without a word, and for models without it."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not capped else "eager"


def additive(mask: Tensor, max_tokens: int, dtype: torch.dtype) -> Tensor:
    """What the mask of prompt tokens (B, width) adds to the scores of a response's token: 0, or −∞
    at padding, (B, 1, 1, width + max_tokens). torch makes the same from truth values, but again at
    each token and in each layer."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias.masked_fill_(~mask, -torch.inf)
    return torch.nn.functional.pad(bias, (0, max_tokens))[:, None, None]


def _uniforms(seed: int, count: int) -> Tensor:
    """The random stream of a response: one number in [0, 1) for each token, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator)


def sample_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per sequence, by inverting the cumulative distribution at `uniform` ∈ [0, 1), and
    its log-probability under the distribution sampled from, after temperature and top-p.
    logits (B, V), uniform (B,) → (B,), (B,).

    >>> sample_token(torch.tensor([[0.0, 0.0]]), torch.tensor([0.7]), Sampling(1))
    (tensor([1]), tensor([-0.6931]))
    """
    logp = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        mass_above = ordered.exp().cumsum(-1) - ordered.exp()  # 0 for the first: it always stays
        ordered = ordered.masked_fill(mass_above >= sampling.top_p, -torch.inf)
        logp = torch.full_like(logp, -torch.inf).scatter(-1, order, ordered).log_softmax(-1)
    cumulative = logp.double().exp_().cumsum_(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    token = token.clamp(max=logits.shape[-1] - 1)  # NaN is beyond all; its log-probability is NaN
    return token, logp.gather(-1, token[:, None]).squeeze(-1)
