"""Measure how the sampler gets the policy's weights: seconds, bytes, and whether it uses them.

    python -m benchmarks.sync [--sizes 1M 10M 100M 10M-untied] [--engines transformers vllm]

Random Qwen2 models in float32. vLLM runs in a new process for each model, because two of its
engines in one process disturb each other. Five times, responses are sampled, the policy takes a
step on them (`train.update_policy`), and `rollout.sync_weights` passes the new weights to the
sampler. The learning rate is so high that a sampler with the old weights would show. The table has
medians of the five.

| column | meaning |
|---|---|
| MB | what is passed: all parameters, and the head by name also where it is the embedding |
| sync s, GB/s | seconds of `rollout.sync_weights`; bytes passed per second |
| first token s | one token for each of 4 prompts, in the first call after a sync |
| later | the same in the next call |
| gap stale | largest \\|Δ log-prob\\| of sampler and trainer between step and sync; least of five |
| gap | the same after the sync; largest of five |
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import transformers
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import ppo
import train
from benchmarks.record import Row, record
from config import Config, Sampling
from data import Problem
from policy import Policy, load_policy
from rollout import Rollout, open_sampler, sample_responses, sync_weights
from toy import tiny
from train import Models

# Vocabulary, hidden size, layers, key-value heads. Heads have 32 dimensions, the least that vLLM
# supports on a CPU.
SIZES = {
    "1M": (1024, 128, 4, 2),
    "10M": (4096, 320, 6, 2),
    "100M": (16384, 768, 12, 4),
}
NUM_PROMPTS = 4
RESPONSE_TOKENS = 8
REPETITIONS = 5

Engine = Literal["transformers", "vllm"]
Size = Literal["1M", "10M", "100M", "1M-untied", "10M-untied", "100M-untied"]
INSTALLED: list[Engine] = ["transformers"]
if find_spec("vllm"):
    INSTALLED.append("vllm")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    sizes: tuple[Size, ...] = ("1M", "10M", "100M", "10M-untied")
    """Parameters of the models; untied: the head is not the embedding."""
    engines: tuple[Engine, ...] = tuple(INSTALLED)
    """What samples; by default vLLM only where it is installed."""


def random_model(folder: Path, size: str) -> None:
    """Write a Qwen2 of this size with the tiny tokenizer, which knows only a part of its
    vocabulary."""
    name, _, untied = size.partition("-")
    vocabulary, hidden, layers, kv_heads = SIZES[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=not untied,
        initializer_range=0.05,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def make_problems() -> list[Problem]:
    """Held-out problems of the tiny task, with their prompts."""
    _, questions = tiny.problems(seed=0)
    problems = [Problem(f"sync:{i}", text, "") for i, text in enumerate(questions[:NUM_PROMPTS])]
    return data.tokenize(problems, tiny.tokenizer(), 64, data.TEMPLATE)


def settings_of(engine: Engine) -> Config:
    """Settings of the sampler and of the policy's step."""
    return Config(
        engine=engine,
        dtype="float32",
        prompt_tokens=64,
        response_tokens=64,
        max_num_seqs=NUM_PROMPTS,
        policy_lr=1e-3,
        policy_lr_warmup=0,
    )


def measure(engine: Engine, size: str, folder: Path) -> Row:
    """One sampler beside one policy, in this process."""
    cfg = settings_of(engine)
    tokenizer = tiny.tokenizer()
    problems = make_problems()
    sampler = open_sampler(cfg, str(folder), tokenizer, [tokenizer.eos_token_id])
    policy = load_policy(str(folder))
    models = Models(policy, ppo.adamw(list(policy.parameters())), None, None, None)

    def sample(max_tokens: int) -> list[Rollout]:
        return sample_responses(sampler, tokenizer, problems, 1, Sampling(max_tokens), "0")

    syncs, firsts, laters, gaps_stale, gaps = [], [], [], [], []
    sync_weights(sampler, policy)
    rollouts = sample(RESPONSE_TOKENS)
    for step in range(REPETITIONS):
        train.update_policy(cfg, models, rollouts, alternating_advantages(rollouts), step)
        gaps_stale.append(largest_gap(cfg, policy, rollouts))
        syncs.append(timed(lambda: sync_weights(sampler, policy)))
        firsts.append(timed(lambda: sample(1)))
        laters.append(timed(lambda: sample(1)))
        rollouts = sample(RESPONSE_TOKENS)
        gaps.append(largest_gap(cfg, policy, rollouts))
    sampler.close()
    megabytes = passed_bytes(policy, sampler.dtype) / 1e6
    return {
        "engine": engine,
        "model": size,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "MB": megabytes,
        "sync s": median(syncs),
        "GB/s": megabytes / 1e3 / median(syncs),
        "first token s": median(firsts),
        "later": median(laters),
        "gap stale": min(gaps_stale),
        "gap": max(gaps),
    }


def alternating_advantages(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """−½ for all tokens of the first response, ½ for those of the second, and so on."""
    return torch.cat([torch.full((len(r.token_ids),), i % 2 - 0.5) for i, r in enumerate(rollouts)])


def largest_gap(cfg: Config, policy: Policy, rollouts: Sequence[Rollout]) -> float:
    """Largest |Δ log-prob| between sampler and trainer."""
    gaps = train.compute_logprobs(cfg, policy, rollouts) - train.sampler_logprobs(rollouts)
    return float(gaps.abs().max())


def passed_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Bytes that a sync passes."""
    count = sum(p.numel() for p in policy.parameters())
    if policy.model.config.tie_word_embeddings:
        count += policy.model.get_output_embeddings().weight.numel()
    return dtype.itemsize * count


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_in_new_process(engine: Engine, size: str, folder: Path) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, engine, size, folder).result()


def main() -> None:
    cfg = tyro.cli(Settings, description=__doc__, prog="python -m benchmarks.sync")
    if not set(cfg.engines) <= set(INSTALLED):
        sys.exit("benchmarks.sync: --engines vllm: vLLM is not installed here")
    transformers.utils.logging.disable_progress_bar()
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in cfg.sizes:
            random_model(folder, size)
            if "transformers" in cfg.engines:
                table.append(measure("transformers", size, folder))
            if "vllm" in cfg.engines:
                table.append(measure_in_new_process("vllm", size, folder))
    note = (
        f"Medians of {REPETITIONS}, {torch.get_num_threads()} threads, {NUM_PROMPTS} prompts, "
        f"{RESPONSE_TOKENS} sampled tokens of each."
    )
    record("sync", "From an optimizer step to the sampler", table, [note])


if __name__ == "__main__":
    main()
