"""Rollouts: sampled with vLLM (or plain transformers), gathered from all ranks, saved and loaded;
and the weights that the sampler gets from the policy after each update.

    policy ──sync_weights──▶ sampler ──sample_responses──▶ [Rollout] ──gather_rollouts──▶ all ranks
"""

import gc
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
from config import BatchSettings, Sampling
from curation.files import write_atomically
from data import Problem
from hf_sampler import HFSampler, SampledTokens


@dataclass
class Rollout:
    """One sampled response.

    | field | meaning |
    |---|---|
    | problem | what was asked, with the token ids of the prompt |
    | token_ids | the actions a_t, as sampled; never tokenized again |
    | logprobs | the sampler's log-probability of each action |
    | finish_reason | "stop": the response ended by itself; "length": it was cut off |
    | text | the decoded response |
    | answer, reward, timeout | set by `reward.score`: the extracted answer, R, grader out of time |
    """

    problem: Problem
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    answer: str = ""
    reward: float = 0.0
    timeout: bool = False


def sample_responses(
    sampler: "VllmSampler | HFSampler",
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    samples: int,
    sampling: Sampling,
    stream: str,
    first_problem: int = 0,
) -> list[Rollout]:
    """This rank's share of `samples` responses to each problem; `gather_rollouts` joins the shares.

    Responses go to the samplers in turn, so that every sampler gets a part of each problem's: the
    expected number of tokens is then the same for all. Response i to problem p has a random stream
    of its own, derived from (stream, p, i): neither the number of samplers nor the batch matters,
    and a resumed run samples it again. `first_problem` is the number of the first problem where
    these are a part of a longer list. Of the ranks that share a sampler, the first returns the
    responses.
    """
    num_samplers = distributed.world_size() // sampler.num_ranks
    sampler_number = distributed.rank() // sampler.num_ranks
    total = len(problems) * samples
    share = [divmod(k, samples) for k in range(sampler_number, total, num_samplers)]
    prompts = [problems[p].prompt_ids for p, _ in share]
    seeds = [stream_seed(f"{stream}/{first_problem + p}", i) for p, i in share]
    responses = sampler.generate(prompts, seeds, sampling)
    # Of nothing, transformers decodes one empty text.
    if distributed.rank() % sampler.num_ranks or not responses:
        return []
    texts = tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=False)
    return [
        Rollout(problems[p], r.token_ids, r.logprobs, r.finish_reason, text)
        for (p, _), r, text in zip(share, responses, texts, strict=True)
    ]


def stream_seed(name: str, sample: int) -> int:
    """The seed of one response's random stream: 48 bits of the name's hash, plus its number."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) + sample


def gather_rollouts(local_rollouts: list[Rollout]) -> list[Rollout]:
    """The responses of all ranks, problem by problem, on every rank: `sample_responses` gave
    response k to sampler k mod n. Ranks that share a sampler have no share of their own."""
    shares = [share for share in distributed.all_gather_objects(local_rollouts) if share]
    total = sum(map(len, shares))
    return [shares[k % len(shares)][k // len(shares)] for k in range(total)]


# ── the samplers ──────────────────────────────────────────────────────────────────────────────────


class VllmSampler:
    """vLLM as a library inside this process, one engine for every `tensor_parallel` ranks.

    generate → sleep → (models train) → load_weights → generate → …

    On a GPU it sleeps while models train, if `can_sleep`: weights and key-value cache are dropped
    and come back empty, so that only `sync_weights`, below, can wake it. Weights arrive through
    vLLM's own `reload_weights`, on GPUs and on its CPU build alike.
    """

    def __init__(
        self,
        path: str,
        eos: Sequence[int],
        dtype: str,
        max_len: int,
        max_num_seqs: int,
        memory: float,
        tensor_parallel: int = 1,
        can_sleep: bool = False,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        _prepare_vllm(on_gpu)
        from vllm import LLM, SamplingParams

        self.SamplingParams = SamplingParams
        self.eos = list(eos)
        self.dtype = getattr(torch, dtype)
        self.num_ranks = tensor_parallel
        self.can_sleep = can_sleep and on_gpu
        self.asleep = False
        # The trainer's logits are float32: rounded to bfloat16, they would be off by up to 0.06.
        float32_head = {"head_dtype": "float32"} if dtype == "bfloat16" else None
        self.llm = LLM(
            model=path,
            dtype=dtype,
            hf_overrides=float32_head,
            max_model_len=max_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=memory,
            enforce_eager=not on_gpu,
            # After reading a prompt in pieces vLLM resets its random stream: on GPUs only.
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(max_len, 8192),
            enable_prefix_caching=True,
            generation_config="vllm",  # nothing but our own sampling parameters
            # log-probabilities of the distribution sampled from, after temperature and top-p
            logprobs_mode="processed_logprobs",
            # The ranks of one engine need one seed; it is unused, since every request has its own.
            seed=distributed.rank() // tensor_parallel,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if distributed.started() else None,
            enable_sleep_mode=self.can_sleep,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[SampledTokens]:
        """One response to each prompt, sampled from the random stream of its seed. The same prompt
        may occur several times. Raises RuntimeError while vLLM sleeps."""
        if self.asleep:
            raise RuntimeError("vLLM is asleep and holds no weights; sync them before sampling")
        self._clear_prefix_cache()
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
                logprobs=0,  # no candidates beside the sampled token
            )
            for seed in seeds
        ]
        requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        return [_sampled_tokens(output.outputs[0]) for output in outputs]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up and load (name, weight) pairs; the key-value cache comes back after them."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._clear_prefix_cache()

    def sleep(self) -> None:
        """Free the GPU's memory until the next `load_weights`, if the sampler `can_sleep`; on a
        CPU nothing happens."""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """End vLLM and free its memory; then another sampler may be opened. vLLM destroys all
        process groups, so the ranks make their own again, but models that were sharded over the old
        one are of no more use."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM refuses a GPU that has less than its share left
        distributed.rejoin()

    def _clear_prefix_cache(self) -> None:
        """After a sync the cached keys and values are those of the old weights. And a call that
        finds the prefixes of an earlier one computes in another order: a resumed run would differ
        by rounding."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache; it would answer with old weights")


def _prepare_vllm(on_gpu: bool) -> None:
    """Settings that vLLM reads when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # In GiB. Without it the CPU build takes half of the memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Without these the CPU build binds this process to cores of its choice, with as many threads.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if not on_gpu:
        torch._dynamo.config.disable = True  # some small functions would need a C++ compiler
    # A warning that Triton is missing where it is not needed, and one that is raised inside vLLM.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", "`torch.distributed.reduce_op` is deprecated", category=FutureWarning
    )


def _sampled_tokens(completion: Any) -> SampledTokens:
    """vLLM's completion, with the log-probability of each sampled token."""
    token_ids = list(completion.token_ids)
    logprobs = [
        candidates[token_id].logprob
        for token_id, candidates in zip(token_ids, completion.logprobs, strict=True)
    ]
    return SampledTokens(token_ids, logprobs, completion.finish_reason)


def uses_vllm(cfg: BatchSettings) -> bool:
    """Whether `cfg.engine` asks for vLLM; otherwise plain transformers sample."""
    has_vllm = torch.cuda.is_available() and find_spec("vllm") is not None
    return cfg.engine == "vllm" or (cfg.engine == "auto" and has_vllm)


def open_sampler(
    cfg: BatchSettings,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    asleep: bool = False,
) -> VllmSampler | HFSampler:
    """The sampler that `cfg.engine` asks for. Open it before other models are loaded: vLLM takes
    its share of a GPU that is still empty, and then, with `asleep`, sleeps until the first sync.
    Without `asleep` it never sleeps."""
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    if uses_vllm(cfg):
        max_len = cfg.prompt_tokens + cfg.response_tokens
        sampler = VllmSampler(
            path,
            eos,
            dtype,
            max_len,
            cfg.max_num_seqs,
            cfg.vllm_memory,
            cfg.tensor_parallel,
            can_sleep=asleep,
        )
        if asleep:
            sampler.sleep()
        return sampler
    return HFSampler(path, tokenizer, eos, dtype, distributed.device(), cfg.max_num_seqs)


def sync_weights(sampler: VllmSampler | HFSampler, policy: torch.nn.Module) -> None:
    """Give the sampler every weight of the policy, and the buffers that are stored with them,
    gathered from the ranks one at a time. The head is passed by name even where it is tied to the
    embedding and `named_parameters` does not list it: vLLM would continue with the new body and the
    old head, without an error."""
    stored = policy.model.state_dict(keep_vars=True)
    sampler.load_weights(
        (name, distributed.full_tensor(tensor, _sampler_dtype(tensor, sampler.dtype)))
        for name, tensor in stored.items()
    )


def _sampler_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Weights are rounded to the sampler's dtype; a buffer keeps its own."""
    return dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def transcript(r: Rollout) -> dict[str, Any]:
    """A rollout as one JSON object for people: texts instead of token ids."""
    return {
        "problem": r.problem.source,
        "question": r.problem.question,
        "gold": r.problem.answer,
        "response": r.text,
        "answer": r.answer,
        "reward": r.reward,
        "finish": r.finish_reason,
        "tokens": len(r.token_ids),
        "timeout": r.timeout,
    }


def save_rollouts(path: Path, rollouts: Sequence[Rollout], with_ids: bool = True) -> None:
    """Rollouts as JSON lines. With token ids and log-probabilities, `load_rollouts` restores the
    same rollouts. The file appears whole or not at all."""

    def line(r: Rollout) -> str:
        record = transcript(r)
        if with_ids:
            record |= {"prompt_ids": r.problem.prompt_ids, "ids": r.token_ids}
            record |= {"logprobs": r.logprobs}
        return json.dumps(record, ensure_ascii=False) + "\n"

    write_atomically(path, (line(r) for r in rollouts))


def load_rollouts(path: Path, with_ids: bool = True) -> list[Rollout]:
    """Rollouts that `save_rollouts` left. Of those saved without ids only the number of tokens is
    known; their ids are zeros. Raises ValueError naming file, line and what is missing."""
    rollouts = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                rollouts.append(_parse_rollout(json.loads(line), with_ids))
            except (json.JSONDecodeError, KeyError) as error:
                message = f"{path}: line {number}: not a saved rollout ({error!r})"
                raise ValueError(message) from None
    return rollouts


def _parse_rollout(record: dict[str, Any], with_ids: bool) -> Rollout:
    prompt_ids, token_ids, logprobs = (), [0] * record["tokens"], []
    if with_ids:
        prompt_ids, token_ids, logprobs = record["prompt_ids"], record["ids"], record["logprobs"]
    problem = Problem(record["problem"], record["question"], record["gold"], tuple(prompt_ids))
    return Rollout(
        problem,
        token_ids,
        logprobs,
        record["finish"],
        record["response"],
        record["answer"],
        record["reward"],
        record["timeout"],
    )
