"""From an optimizer step to a sampler with the new weights: seconds, bytes, and whether it really uses them.

    python -m benchmarks.sync [--sizes 1M 10M 100M 10M-untied] [--engines transformers vllm]

Random Qwen2 models in float32, vLLM each in a process of its own: two engines in one interfere. Five times: responses are
sampled, the policy takes a step on them (`train.update_policy`, at a learning rate that no stale sampler could hide), and
`rollout.sync_weights` passes the weights on. Medians of the five.

| column | meaning |
|---|---|
| MB | what is passed: every parameter, and the head by name also where it is the embedding |
| sync s, GB/s | seconds of `rollout.sync_weights`; the same bytes a second |
| first token s, later | one token for each of 4 prompts: the first call after a sync, and the next |
| gap stale | largest |log-probability of the sampler − of the trainer| after the step, before the sync; least of the five |
| gap | the same after the sync; largest of the five |
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import ppo
import rollout
import train
from benchmarks import record
from config import Config
from data import Problem
from hf_sampler import HFSampler, Sampling, VllmSampler
from policy import Policy, load_policy
from toy import tiny

SIZES = {  # vocabulary, hidden size, layers, key-value heads; heads of 32, the narrowest that vLLM has on a CPU
    "1M": (1024, 128, 4, 2),
    "10M": (4096, 320, 6, 2),
    "100M": (16384, 768, 12, 4),
}
CFG = Config(policy_lr=1e-3, policy_lr_warmup=0)
PROMPTS, TOKENS, TIMES = 4, 8, 5


def random_model(folder: Path, size: str) -> None:
    """A Qwen2 of a size of `SIZES`, under the tiny tokenizer, which knows only the first of its tokens."""
    name, _, untied = size.partition("-")
    vocab, hidden, layers, kv_heads = SIZES[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=kv_heads, max_position_embeddings=1024,
        tie_word_embeddings=not untied, initializer_range=0.05, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def seconds(call: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gap(policy: Policy, sampled: Sequence[rollout.Rollout]) -> float:
    """Largest |Δ log-prob| between sampler and trainer."""
    logp = torch.tensor([p for r in sampled for p in r.logprobs])
    return float((train.compute_logprobs(CFG, policy, sampled) - logp).abs().max())


def measure(kind: str, size: str, folder: Path) -> record.Row:
    """One engine beside one policy, in this process."""
    tokenizer = tiny.tokenizer()
    questions = [
        Problem(f"sync:{i}", question, "")
        for i, question in enumerate(tiny.problems(0)[1][:PROMPTS])
    ]
    problems = data.tokenize(questions, tokenizer, 64, data.TEMPLATE)
    if kind == "vllm":
        engine = VllmSampler(str(folder), [tokenizer.eos_token_id], "float32", 128, PROMPTS, 0.4)
    else:
        engine = HFSampler(
            str(folder), tokenizer, [tokenizer.eos_token_id], "float32", "cpu", PROMPTS
        )
    policy = load_policy(str(folder))
    optimizer = ppo.adamw(list(policy.parameters()))

    def sample(tokens: int) -> list[rollout.Rollout]:
        return rollout.sample_responses(engine, tokenizer, problems, 1, Sampling(tokens), "0")

    rollout.sync_weights(engine, policy)
    syncs, firsts, laters, stale, after = [], [], [], [], []
    sampled = sample(TOKENS)
    for step in range(TIMES):
        A = torch.cat([torch.full((len(r.token_ids),), i % 2 - 0.5) for i, r in enumerate(sampled)])
        train.update_policy(CFG, policy, None, optimizer, sampled, A, step)
        stale.append(gap(policy, sampled))
        syncs.append(seconds(lambda: rollout.sync_weights(engine, policy)))
        firsts.append(seconds(lambda: sample(1)))
        laters.append(seconds(lambda: sample(1)))
        sampled = sample(TOKENS)
        after.append(gap(policy, sampled))
    parameters = sum(p.numel() for p in policy.parameters())
    tied = policy.model.config.tie_word_embeddings
    passed = engine.dtype.itemsize * (
        parameters + tied * policy.model.get_output_embeddings().weight.numel()
    )
    engine.close()
    return {
        "engine": kind, "model": size, "parameters": parameters, "MB": passed / 1e6, "sync s": median(syncs),
        "GB/s": passed / 1e9 / median(syncs), "first token s": median(firsts), "later": median(laters),
        "gap stale": min(stale), "gap": max(after),
    }  # fmt: skip


def measure_alone(size: str, folder: Path) -> record.Row:
    """The same for vLLM, in a process of its own."""
    command = [sys.executable, __file__, "--sizes", size, "--alone", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "row.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=[*SIZES, "10M-untied"])
    kinds = ["transformers", *(["vllm"] if find_spec("vllm") else [])]
    parser.add_argument("--engines", nargs="+", default=kinds, choices=kinds)
    parser.add_argument(
        "--alone", type=Path, help=argparse.SUPPRESS
    )  # vLLM with the model in this folder
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if args.alone:
        (args.alone / "row.json").write_text(json.dumps(measure("vllm", args.sizes[0], args.alone)))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            random_model(Path(folder), size)
            if "transformers" in args.engines:
                table.append(measure("transformers", size, Path(folder)))
            if "vllm" in args.engines:
                table.append(measure_alone(size, Path(folder)))
    note = f"Medians of {TIMES}, {torch.get_num_threads()} threads, {PROMPTS} prompts, {TOKENS} sampled tokens of each."
    record.record("sync", "From an optimizer step to the sampler", table, [note])


if __name__ == "__main__":
    main()
