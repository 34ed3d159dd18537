"""Seconds of a training step as response length, batch and vocabulary double, and on one process or two ranks.

    python -m benchmarks.scaling [--rounds 3]

A random Qwen2 with an untied head; responses of random tokens, all equally long, under a prompt of 16. A step is what
train.py does with them: values and advantages, the critic's mini-batches, the policy's step. One thread, except for the
last two rows: one process with two threads, and two ranks with one each, on the same responses. Every round measures all
settings; medians of the rounds.

| column | meaning |
|---|---|
| sample s | drawing as many tokens with `hf_sampler.HFSampler`, which no token ends; not in the sum |
| values s, critic s, policy s, sum s | phases of the update |
| ratio | the sum / that of the row above |
| attention FLOPs | attention's share of the update's operations, as tools/plan.py counts them |
| attention s | `packing.packed_attention` alone on the same rows, forward and, for critic and policy, backward |
| other ratio | the sum less attention s / that of the row above |
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

import distributed
import ppo
import train
from benchmarks import record
from config import Config
from critic import load_critic
from data import Problem
from hf_sampler import HFSampler, Sampling
from packing import micro_batches, mini_batches, packed_attention
from policy import load_policy
from rollout import Rollout
from tools import plan
from toy import tiny

PROMPT = 16
CFG = Config(micro_tokens=4 * (1024 + PROMPT))
Seconds = dict[str, float]  # phase → seconds


class Setting(NamedTuple):
    length: int = 128  # response tokens
    batch: int = 16  # responses
    vocabulary: int = 4096


DOUBLED = {
    "length": [Setting(length=n) for n in (128, 256, 512, 1024)],
    "batch": [Setting(batch=n) for n in (16, 32, 64, 128)],
    "vocabulary": [Setting(vocabulary=n) for n in (4096, 8192, 16384, 32768)],
}
ON_RANKS = Setting(length=256, batch=32)


def random_model(folder: Path, vocabulary: int) -> str:
    """The folder of a Qwen2 of two layers, 1.9 million weights beside embedding and head."""
    path = folder / str(vocabulary)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def responses(setting: Setting) -> list[Rollout]:
    """Random tokens, every second response right."""
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(setting.vocabulary) for _ in range(n)]

    problem, zeros = Problem("random:1", "", "", tuple(ids(PROMPT))), [0.0] * setting.length
    return [
        Rollout(problem, ids(setting.length), zeros, "stop", "", reward=float(i % 2))
        for i in range(setting.batch)
    ]


def stepper(path: str) -> Callable[[Setting], Seconds]:
    """Load models, optimizers and a sampler; returns what makes a step of a setting and times its phases."""
    engine = HFSampler(path, tiny.tokenizer(), [0], "float32", "cpu", CFG.rows)
    engine._may_stop = lambda _: torch.zeros(
        engine.model.config.vocab_size, dtype=torch.bool
    )  # all lengths alike
    policy, critic = load_policy(path), load_critic(path)
    policy_optimizer, critic_optimizer = (ppo.adamw(list(m.parameters())) for m in (policy, critic))

    def step(setting: Setting) -> Seconds:
        rollouts, seconds = responses(setting), {}
        prompts = [r.problem.prompt_ids for r in rollouts][
            distributed.rank() :: distributed.world_size()
        ]

        def timed(phase: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            distributed.all_gather_objects(None)  # until the last rank has done its part
            seconds[phase] = time.perf_counter() - start
            return result

        def values_advantages() -> tuple[torch.Tensor, ...]:
            values = train.predict_values(CFG, critic, rollouts)
            A, targets = train.compute_advantages(CFG, policy, None, rollouts, values)
            return values, targets, train.normalize_advantages(A)

        timed(
            "sample",
            lambda: engine.generate(
                prompts, range(len(prompts)), Sampling(setting.length, stop=())
            ),
        )
        values, targets, A = timed("values", values_advantages)
        timed(
            "critic",
            lambda: train.update_critic(
                CFG, critic, critic_optimizer, rollouts, values, targets, 0
            ),
        )
        timed(
            "policy",
            lambda: train.update_policy(CFG, policy, None, policy_optimizer, rollouts, A, 0),
        )
        return seconds

    return step


def attention_flops(setting: Setting, shape: plan.Shape) -> float:
    """Attention's share of the operations of values (a forward pass), critic and policy (three times that)."""
    tokens = setting.length + PROMPT - 1
    attention = tokens * shape.layers * 2 * shape.heads * shape.head_size * tokens
    body = attention + tokens * shape.layers * 2 * shape.layer
    return 7 * attention / (7 * body + 3 * setting.length * 2 * shape.vocab * shape.hidden)


def attention_seconds(setting: Setting, shape: plan.Shape) -> float:
    """Of an update: attention alone, on rows like the update's."""
    rollouts, total = responses(setting), 0.0
    lengths = [len(r.token_ids) for r in rollouts]
    for steps, backward in (
        (1, False),
        (CFG.critic_steps, True),
        (CFG.policy_steps, True),
    ):  # values, critic, policy
        for members in mini_batches(lengths, steps, f"{CFG.seed}/0"):
            for micro in micro_batches(rollouts, members, CFG.micro_tokens):
                heads, tokens = (
                    (shape.heads, shape.kv_heads, shape.kv_heads),
                    micro.input_ids.shape[1],
                )
                qkv = [
                    torch.randn(1, n, tokens, shape.head_size, requires_grad=backward)
                    for n in heads
                ]
                start = time.perf_counter()
                out, _ = packed_attention(
                    torch.nn.Identity(),
                    *qkv,
                    None,
                    cu_seqlens=micro.cu_seqlens,
                    max_seqlen=micro.max_seqlen,
                    scaling=0.1,
                )
                if backward:
                    out.backward(torch.ones_like(out))
                total += time.perf_counter() - start
    return total * shape.layers


def on_ranks(path: str, ranks: int, threads: int) -> Seconds:
    """A step in new processes, `ranks` of them with `threads` each; this file calls itself."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds.json")
        command = [
            sys.executable,
            *launch,
            __file__,
            "--step",
            path,
            "--threads",
            str(threads),
            "--out",
            str(out),
        ]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        return json.loads(out.read_text())


def row(labels: record.Row, rounds: list[Seconds]) -> record.Row:
    """Medians of the rounds."""
    phases = {
        f"{phase} s": median(one[phase] for one in rounds)
        for phase in ("sample", "values", "critic", "policy")
    }
    sums = median(one["values"] + one["critic"] + one["policy"] for one in rounds)
    return labels | phases | {"sum s": sums, "ratio": None}


def tables(rounds: int) -> list[record.Row]:
    """All settings, then one process against two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            s.vocabulary: random_model(Path(folder), s.vocabulary) for s in DOUBLED["vocabulary"]
        }
        steps = {vocabulary: stepper(path) for vocabulary, path in paths.items()}
        shapes = {vocabulary: plan.shape(path) for vocabulary, path in paths.items()}
        settings = list(dict.fromkeys(s for group in DOUBLED.values() for s in group))
        for vocabulary, step in steps.items():
            step(Setting(vocabulary=vocabulary))  # warm
        measured: dict[Any, list[Seconds]] = {s: [] for s in settings} | {(1, 2): [], (2, 1): []}
        for _ in range(rounds):
            for s in settings:
                attention = {"attention": attention_seconds(s, shapes[s.vocabulary])}
                measured[s].append(steps[s.vocabulary](s) | attention)
            for ranks, threads in ((1, 2), (2, 1)):
                measured[ranks, threads].append(
                    on_ranks(paths[ON_RANKS.vocabulary], ranks, threads)
                )
    table: list[record.Row] = []
    for name, group in DOUBLED.items():
        rows = [
            row({"doubled": name, "value": f"{getattr(s, name):,}"}, measured[s]) for s in group
        ]
        for s, cells in zip(group, rows, strict=True):
            cells["attention FLOPs"] = attention_flops(s, shapes[s.vocabulary])
            cells["attention s"] = median(one["attention"] for one in measured[s])
        for above, cells in pairwise(rows):
            others = [x["sum s"] - x["attention s"] for x in (above, cells)]
            cells |= {
                "ratio": cells["sum s"] / above["sum s"],
                "other ratio": others[1] / others[0],
            }
        table += rows
    names = {(1, 2): "1 process, 2 threads", (2, 1): "2 ranks, 1 thread each"}
    pair = [row({"doubled": "ranks", "value": name}, measured[key]) for key, name in names.items()]
    pair[1]["ratio"] = pair[1]["sum s"] / pair[0]["sum s"]
    return table + pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--step", help=argparse.SUPPRESS
    )  # a model: time a step of ON_RANKS and write it to --out
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.step:
        distributed.start(5)
        step = stepper(args.step)
        step(Setting())  # warm
        seconds = step(ON_RANKS)
        if distributed.rank() == 0:
            args.out.write_text(json.dumps(seconds))
        distributed.stop()
        return
    table = tables(args.rounds)
    base, seven = Setting(), plan.shape("Qwen2.5-7B")
    shares = [attention_flops(Setting(length=n), seven) for n in (1000, 4000, 8000)]
    notes = [
        f"Otherwise {base.length} tokens, {base.batch} responses, vocabulary {base.vocabulary:,}; last two rows "
        f"{ON_RANKS.length} tokens, {ON_RANKS.batch} responses. {CFG.critic_steps} critic steps, at most "
        f"{CFG.micro_tokens:,} tokens in a row, {args.rounds} rounds.",
        "At Qwen2.5-7B's shape attention has {:.1%}, {:.1%} and {:.1%} of the operations of responses of 1,000, 4,000 and "
        "8,000 tokens.".format(*shares),
    ]
    record.record("scaling", "A step as length, batch and vocabulary double", table, notes)


if __name__ == "__main__":
    main()
