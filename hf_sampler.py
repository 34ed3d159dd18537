"""The two samplers: vLLM in the training process, or plain transformers with a key–value cache.

Ids in, ids out. What is trained is what was sampled: the token that completes `</answer>`, and EOS, are actions.
Both offer the same methods, `generate`, `load_weights`, `sleep` and `close`, and hold weights of their own, which follow
the policy only through `rollout.sync_weights`.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

import distributed

STOP = ("User:", "Human:", "Assistant:", "</answer>")  # §3.1; after </answer> a response is over


@dataclass(frozen=True)
class Sampling:
    """How to sample; the paper's values are temperature 1, top-p 1, at most 8,000 response tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = STOP


class Sample(NamedTuple):
    """What an engine returns for one response."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class VllmSampler:
    """vLLM as a library inside this process, one engine for every `tensor_parallel` ranks.

    `sync` reaches it through `reload_weights`, which works on GPUs and on its CPU build alike. On a GPU it sleeps while
    models train: weights and key-value cache are dropped, and come back empty, so that only `sync` can wake it.
    """

    def __init__(
        self, path: str, eos: Sequence[int], dtype: str, max_len: int, max_num_seqs: int, memory: float,
        tensor_parallel: int = 1,
    ) -> None:  # fmt: skip
        on_gpu = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault(
            "VLLM_CPU_KVCACHE_SPACE", "1"
        )  # GiB; unset, it takes and touches half of the memory
        # Left to itself the CPU build pins this process to cores of its choice and takes as many threads.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        if not on_gpu:
            torch._dynamo.config.disable = (
                True  # some of vLLM's small functions would want a C++ compiler
            )
        logging.getLogger("torch._library.triton").setLevel(
            logging.ERROR
        )  # it misses Triton where none is needed
        warnings.filterwarnings(
            "ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning
        )  # vLLM's affair
        from vllm import LLM, SamplingParams

        self.SamplingParams, self.eos, self.dtype = SamplingParams, list(eos), getattr(torch, dtype)
        self.ranks, self.sleeps, self.asleep = tensor_parallel, on_gpu, False
        self.llm = LLM(
            model=path,
            dtype=dtype,
            max_model_len=max_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=memory,
            enforce_eager=not on_gpu,
            # A prompt read in pieces rewinds its random stream, which vLLM can do on a GPU only.
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(max_len, 8192),
            enable_prefix_caching=True,
            generation_config="vllm",  # nothing but our own sampling parameters
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature and top-p
            seed=distributed.rank()
            // tensor_parallel,  # one inside an engine; unused, since every request has its own
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if distributed.started() else None,
            enable_sleep_mode=on_gpu,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if (
            tensor_parallel > 1 and not on_gpu
        ):  # mapped by all by now; left behind, the name would stop the next run
            place = distributed.rank() % tensor_parallel
            group = "-".join(str(distributed.rank() - place + i) for i in range(tensor_parallel))
            for file in Path("/dev/shm").glob(f"*-[[]{group}]-cpushm_{place}"):
                file.unlink(missing_ok=True)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        """One response to each prompt (several in a row may be the same), drawn from the stream of its seed."""
        if self.asleep:
            raise RuntimeError("vLLM is asleep and holds no weights; sync it before sampling")
        self._forget()
        parameters = [
            self.SamplingParams(
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
        outputs = [
            output.outputs[0] for output in self.llm.generate(requests, parameters, use_tqdm=False)
        ]
        return [
            Sample(
                list(c.token_ids),
                [step[i].logprob for i, step in zip(c.token_ids, c.logprobs, strict=True)],
                c.finish_reason,
            )
            for c in outputs
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._forget()

    def sleep(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Leave vLLM's process groups, and with them the ranks': the last thing a rank does. At the end of the process vLLM
        would do it by itself, but find them gone."""
        self.llm.llm_engine.engine_core.shutdown()

    def _forget(self) -> None:
        """Clear the prefix cache. After a sync its keys and values are those of the old weights; and a call that finds the
        prefixes of an earlier one computes in another order, so that a resumed run would differ by rounding."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache: it would answer with the keys and values of old weights"
            )


class HFSampler:
    """The policy's own architecture decoded with a key–value cache: no vLLM needed, any platform.

    Prompts are left-padded and read once, then their cache is repeated for their responses. Rows that have stopped are
    taken out of the batch when they are a quarter of it.
    """

    ranks = 1  # every rank has one

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
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=self.dtype, attn_implementation="sdpa"
        )
        self.model = self.model.to(device).eval()
        self.tokenizer, self.eos, self.max_num_seqs, self.device = (
            tokenizer,
            list(eos),
            max_num_seqs,
            device,
        )
        self.pieces = tokenizer.batch_decode(
            [[i] for i in range(len(tokenizer))], skip_special_tokens=False
        )
        self.may_stop = cache(self._may_stop)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        own["lm_head.weight"] = self.model.get_output_embeddings().weight
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)

    def sleep(self) -> None:
        """Nothing: this engine keeps its weights."""

    def close(self) -> None:
        """Nothing to leave."""

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        """One response to each prompt (several in a row may be the same), drawn from the stream of its seed."""
        calls = range(0, len(prompts), self.max_num_seqs)
        return [
            s
            for i in calls
            for s in self._generate(
                *(x[i : i + self.max_num_seqs] for x in (prompts, seeds)), sampling
            )
        ]

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        rows, width = len(prompts), max(map(len, prompts))
        ids = torch.full((rows, sampling.max_tokens), self.eos[0], device=self.device)
        logp = torch.zeros(rows, sampling.max_tokens, device=self.device)
        length = torch.full((rows,), sampling.max_tokens)
        finish = ["length"] * rows
        streams = torch.stack(
            [
                torch.rand(
                    sampling.max_tokens,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(s),
                )
                for s in seeds
            ]
        ).to(self.device)
        may_stop = self.may_stop(sampling.stop)

        distinct = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        of = torch.tensor(
            [distinct[tuple(prompt)] for prompt in prompts], device=self.device
        )  # whose prompt a row has
        padded = torch.tensor(
            [[self.eos[0]] * (width - len(p)) + list(p) for p in distinct], device=self.device
        )
        mask = torch.tensor(
            [[False] * (width - len(p)) + [True] * len(p) for p in distinct], device=self.device
        )
        past = DynamicCache(config=self.model.config)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        causal = (
            torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
            & mask[:, None, None]
        )
        causal |= torch.eye(
            width, dtype=torch.bool, device=self.device
        )  # padding sees itself: no row is without a key
        logits = self._logits(padded, causal, position, past)[of]
        past.batch_select_indices(of)
        mask, position = mask[of], position[of, -1:]

        row = torch.arange(
            rows, device=self.device
        )  # which response each row of the shrinking batch is
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
                past.batch_select_indices(keep)
                row, live, mask, token, position = (
                    row[keep],
                    live[keep],
                    mask[keep],
                    token[keep],
                    position[keep],
                )
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position = position + 1
            logits = self._logits(token[:, None], mask[:, None, None], position, past)
        return [
            Sample(i[:n], p[:n], f)
            for i, p, n, f in zip(ids.tolist(), logp.tolist(), length.tolist(), finish, strict=True)
        ]

    def _logits(self, ids: Tensor, mask: Tensor, position: Tensor, past: DynamicCache) -> Tensor:
        """Of the next token, (rows, V). A whole mask, (rows, 1, queries, keys), spares transformers making one each time."""
        out = self.model.base_model(
            ids, attention_mask=mask, position_ids=position, past_key_values=past
        )
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1])

    def _may_stop(self, stop: tuple[str, ...]) -> Tensor:
        """Whether a token can end a response: EOS, or one that holds the last character of a stop string. Only these are
        decoded and looked at."""
        last = {s[-1] for s in stop}
        flags = [any(c in last for c in piece) for piece in self.pieces]
        flags += [False] * (
            self.model.config.vocab_size - len(flags)
        )  # the vocabulary may be wider than the tokenizer
        may_stop = torch.tensor(flags, device=self.device)
        may_stop[self.eos] = True
        return may_stop

    def _stopped(self, ids: Tensor, stop: tuple[str, ...]) -> bool:
        tail = ids[-max(map(len, stop), default=1) :].tolist()
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return tail[-1] in self.eos or any(s in text for s in stop)


def open_sampler(
    cfg: Any, path: str, tokenizer: PreTrainedTokenizerBase, eos: list[int], asleep: bool = False
) -> VllmSampler | HFSampler:
    """The sampler that the settings ask for (`Config` or `Evaluation`, see its `engine`). It comes before other models: vLLM
    takes its share of a GPU that is still empty, and then, if `asleep`, sleeps until the first sync."""
    on_gpu = torch.cuda.is_available()
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    if cfg.engine == "vllm" or (cfg.engine == "auto" and on_gpu and find_spec("vllm")):
        longest = cfg.prompt_tokens + cfg.response_tokens
        engine = VllmSampler(
            path, eos, dtype, longest, cfg.max_num_seqs, cfg.vllm_memory, cfg.tensor_parallel
        )
        if asleep:
            engine.sleep()
        return engine
    return HFSampler(path, tokenizer, eos, dtype, distributed.device(), cfg.max_num_seqs)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at `uniform` ∈ [0, 1), and its log-probability under
    the distribution drawn from, after temperature and top-p. logits (R, V), uniform (R,) → (R,), (R,).

    >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.7]), Sampling(1))
    (tensor([1]), tensor([-0.6931]))
    """
    logp = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        before = (
            ordered.exp().cumsum(-1) - ordered.exp()
        )  # mass above each token: the first token always stays
        logp = torch.full_like(logp, -torch.inf).scatter(
            -1, order, ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        )
        logp = logp.log_softmax(-1)
    cumulative = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(
        cumulative, (uniform * cumulative[:, -1])[:, None], right=True
    ).squeeze(-1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)
