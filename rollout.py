"""Sampling responses: vLLM in the training process, or plain transformers with a key–value cache; and weight sync.

Ids in, ids out. What is trained is what was sampled: the token that completes `</answer>`, and EOS, are actions.
Both engines offer the same two methods, `generate` and `load_weights`, and hold weights of their own, which follow the
policy only through `sync`.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from data import Problem

STOP = ("User:", "Human:", "Assistant:", "</answer>")  # §3.1; after </answer> a response is over


@dataclass
class Rollout:
    """One sampled response: token ids as sampled, the sampler's log-probability of each, "stop" or "length", and, once
    graded, R ∈ {0, 1}."""

    problem: Problem
    ids: list[int]
    logprobs: list[float]
    finish: str
    text: str
    answer: str = ""
    reward: float = 0.0
    timeout: bool = False


@dataclass(frozen=True)
class Sampling:
    """How to sample; the paper's values are temperature 1, top-p 1, at most 8,000 response tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = STOP


class Sample(NamedTuple):
    """What an engine returns for one response."""

    ids: list[int]
    logprobs: list[float]
    finish: str


def sample(
    engine: "VllmEngine | TransformersEngine",
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    count: int,
    sampling: Sampling,
    seed: str,
) -> list[Rollout]:
    """`count` responses to each problem, problem by problem. Response i to the problem at place p is drawn from a random
    stream of its own, derived from (seed, p, i): it does not depend on what else is in the batch, and a resumed run draws
    it again."""
    seeds = [int.from_bytes(hashlib.blake2b(f"{seed}/{p}".encode(), digest_size=6).digest()) for p in range(len(problems))]
    samples = engine.generate([p.prompt_ids for p in problems], seeds, count, sampling)
    texts = tokenizer.batch_decode([s.ids for s in samples], skip_special_tokens=False)
    owners = [problem for problem in problems for _ in range(count)]
    return [Rollout(p, s.ids, s.logprobs, s.finish, text) for p, s, text in zip(owners, samples, texts, strict=True)]


def sync(engine: "VllmEngine | TransformersEngine", policy: PreTrainedModel) -> None:
    """Give the engine every weight of the policy. The head is passed by name even where it is tied to the embedding and
    a state dict may not list it: vLLM would go on with the new body and the old head, without an error."""
    weights = dict(policy.named_parameters())
    weights["lm_head.weight"] = policy.get_output_embeddings().weight
    engine.load_weights((name, weight.detach()) for name, weight in weights.items())


class VllmEngine:
    """vLLM as a library inside this process. `sync` reaches it through `reload_weights`, which works on GPUs and on its
    CPU build alike, and clears the prefix cache: its keys and values belong to the old weights."""

    def __init__(
        self, path: str, eos: Sequence[int], dtype: str, max_len: int, max_rows: int, memory: float, seed: int
    ) -> None:
        on_gpu = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, it takes and touches half of the memory
        # Left to itself the CPU build pins this process to cores of its choice and takes as many threads.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        if not on_gpu:
            torch._dynamo.config.disable = True  # some of vLLM's small functions would want a C++ compiler
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses Triton where none is needed
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)  # vLLM's affair
        from vllm import LLM, SamplingParams

        self.SamplingParams, self.eos = SamplingParams, list(eos)
        self.llm = LLM(
            model=path,
            dtype=dtype,
            max_model_len=max_len,
            max_num_seqs=max_rows,
            gpu_memory_utilization=memory,
            enforce_eager=not on_gpu,
            # A prompt read in pieces rewinds its random stream, which vLLM can do on a GPU only.
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(max_len, 8192),
            enable_prefix_caching=True,
            generation_config="vllm",  # nothing but our own sampling parameters
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature and top-p
            seed=seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], count: int, sampling: Sampling
    ) -> list[Sample]:
        parameters = [
            self.SamplingParams(
                n=count,
                seed=seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop),
                include_stop_str_in_output=True,
                stop_token_ids=self.eos,
                skip_special_tokens=False,
                logprobs=0,
            )
            for seed in seeds
        ]
        requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        return [
            Sample(
                list(c.token_ids),
                [step[i].logprob for i, step in zip(c.token_ids, c.logprobs, strict=True)],
                c.finish_reason,
            )
            for output in outputs
            for c in output.outputs
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight sync: it would answer with the old weights")


class TransformersEngine:
    """The policy's own architecture decoded with a key–value cache: no vLLM needed, any platform.

    Prompts are left-padded and read once, then their cache is repeated for the responses. Rows that have stopped are
    taken out of the batch when they are a quarter of it.
    """

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], dtype: str, device: str, max_rows: int
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.tokenizer, self.eos, self.max_rows, self.device = tokenizer, list(eos), max_rows, device
        self.pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        own["lm_head.weight"] = self.model.get_output_embeddings().weight
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], count: int, sampling: Sampling
    ) -> list[Sample]:
        per_call = max(1, self.max_rows // count)
        return [
            s
            for i in range(0, len(prompts), per_call)
            for s in self._generate(prompts[i : i + per_call], seeds[i : i + per_call], count, sampling)
        ]

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], count: int, sampling: Sampling
    ) -> list[Sample]:
        rows, width = len(prompts) * count, max(map(len, prompts))
        ids = torch.full((rows, sampling.max_tokens), self.eos[0], device=self.device)
        logp = torch.zeros(rows, sampling.max_tokens, device=self.device)
        length = torch.full((rows,), sampling.max_tokens)
        finish = ["length"] * rows
        streams = torch.stack(
            [
                torch.rand(sampling.max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
                for seed in seeds
                for i in range(count)
            ]
        ).to(self.device)
        may_stop = self._may_stop(sampling.stop)

        padded = torch.tensor([[self.eos[0]] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        cache = DynamicCache(config=self.model.config)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(padded, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(count)
        logits, mask = out.logits[:, -1].repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
        position = position[:, -1:].repeat_interleave(count, 0)

        row = torch.arange(rows, device=self.device)  # which response each row of the shrinking batch is
        live = torch.ones(rows, dtype=torch.bool, device=self.device)
        for t in range(sampling.max_tokens):
            token, token_logp = draw(logits, streams[row, t], sampling)
            ids[row, t], logp[row, t] = token, token_logp
            for i in may_stop[token].nonzero().flatten().tolist():
                if live[i] and self._stopped(ids[row[i], : t + 1], sampling.stop):
                    live[i], finish[int(row[i])], length[row[i]] = False, "stop", t + 1
            alive = int(live.sum())
            if alive == 0 or t + 1 == sampling.max_tokens:
                break
            if alive <= 0.75 * len(live):
                keep = live.nonzero().flatten()
                cache.batch_select_indices(keep)
                row, live, mask, token, position = row[keep], live[keep], mask[keep], token[keep], position[keep]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position = position + 1
            out = self.model(token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache)
            logits = out.logits[:, -1]
        return [
            Sample(i[:n], p[:n], f) for i, p, n, f in zip(ids.tolist(), logp.tolist(), length.tolist(), finish, strict=True)
        ]

    def _may_stop(self, stop: tuple[str, ...]) -> Tensor:
        """Whether a token can end a response: EOS, or one that holds the last character of a stop string. Only these are
        decoded and looked at."""
        last = {s[-1] for s in stop}
        flags = [any(c in last for c in piece) for piece in self.pieces]
        flags += [False] * (self.model.config.vocab_size - len(flags))  # the vocabulary may be wider than the tokenizer
        may_stop = torch.tensor(flags, device=self.device)
        may_stop[self.eos] = True
        return may_stop

    def _stopped(self, ids: Tensor, stop: tuple[str, ...]) -> bool:
        tail = ids[-max(map(len, stop), default=1) :].tolist()
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return tail[-1] in self.eos or any(s in text for s in stop)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at `uniform` ∈ [0, 1), and its log-probability under
    the distribution drawn from, after temperature and top-p. logits (R, V), uniform (R,) → (R,), (R,).

    >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.7]), Sampling(1))
    (tensor([1]), tensor([-0.6931]))
    """
    logp = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass above each token: the first token always stays
        logp = torch.full_like(logp, -torch.inf).scatter(
            -1, order, ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        )
        logp = logp.log_softmax(-1)
    cumulative = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)
