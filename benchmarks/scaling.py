"""Measure how a training step grows with response length, batch, vocabulary, and on two ranks.

    python -m benchmarks.scaling [--rounds 3]

The model is a random Qwen2 with an untied head. All responses are random tokens of the same number,
after a prompt of 16. A step does with them what train.py does: values and advantages, the critic's
mini-batches, the policy's step. It runs on one thread. The last two rows compare one process of two
threads with two ranks of one thread each, on the same responses. Every round measures all settings;
the table has medians of the rounds.

| column | meaning |
|---|---|
| sample s | sampling as many tokens with `hf_sampler.HFSampler`; not in the sum |
| values s, critic s, policy s, sum s | phases of the update |
| ratio | the sum / that of the row above |
| attention FLOPs | attention's share of the update's operations, as tools/plan.py counts them |
| attention s | `packing.packed_attention` alone on the same packs, with the backward passes |
| other ratio | the sum without attention s / that of the row above |
"""

import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from benchmarks import flags
from benchmarks.record import Row, record
from config import Config, Count, Sampling
from critic import load_critic
from data import Problem
from gae import normalize_advantages
from hf_sampler import HFSampler
from packing import MicroBatch, micro_batches, mini_batches, packed_attention
from policy import load_policy
from rollout import Rollout
from tools import plan
from toy import tiny
from train import Models

PROMPT_TOKENS = 16
CFG = Config(micro_tokens=4 * (1024 + PROMPT_TOKENS))
NO_TOKEN = -1  # as the sampler's EOS it never ends a response, so all get the full length
PHASES = ("sample", "values", "critic", "policy")
Seconds = dict[str, float]  # phase → seconds


class Setting(NamedTuple):
    """Sizes of a step."""

    length: int = 128  # response tokens
    batch: int = 16  # responses
    vocabulary: int = 4096


class Processes(NamedTuple):
    """Processes that share a step."""

    ranks: int
    threads: int  # of each


DOUBLED = {
    "length": [Setting(length=n) for n in (128, 256, 512, 1024)],
    "batch": [Setting(batch=n) for n in (16, 32, 64, 128)],
    "vocabulary": [Setting(vocabulary=n) for n in (4096, 8192, 16384, 32768)],
}
ON_RANKS = Setting(length=256, batch=32)
COMPARED = {
    Processes(ranks=1, threads=2): "1 process, 2 threads",
    Processes(ranks=2, threads=1): "2 ranks, 1 thread each",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    rounds: Count = 3
    """Number of times that every setting is measured."""


# ── one step ──────────────────────────────────────────────────────────────────────────────────────


def random_model(folder: Path, vocabulary: int) -> str:
    """The folder of a Qwen2 of two layers, 1.9 million weights beside embedding and head."""
    path = folder / str(vocabulary)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def random_rollouts(setting: Setting) -> list[Rollout]:
    """Responses of random tokens; every second one is right."""
    rng = random.Random(0)

    def token_ids(count: int) -> list[int]:
        return [rng.randrange(setting.vocabulary) for _ in range(count)]

    problem = Problem("random:1", "", "", tuple(token_ids(PROMPT_TOKENS)))
    logprobs = [0.0] * setting.length
    return [
        Rollout(problem, token_ids(setting.length), logprobs, "stop", "", reward=float(i % 2))
        for i in range(setting.batch)
    ]


class Stepper:
    """Models, optimizers and a sampler, which make steps of any length and batch."""

    def __init__(self, path: str) -> None:
        policy, critic = load_policy(path), load_critic(path)
        policy_optimizer = ppo.adamw(list(policy.parameters()))
        critic_optimizer = ppo.adamw(list(critic.parameters()))
        self.models = Models(policy, policy_optimizer, critic, critic_optimizer, None)
        tokenizer = tiny.tokenizer()
        self.sampler = HFSampler(path, tokenizer, [NO_TOKEN], "float32", "cpu", CFG.max_num_seqs)
        self.seconds: Seconds = {}

    def step(self, setting: Setting) -> Seconds:
        """Make a step; returns the seconds of its phases."""
        self.seconds = {}
        models, rollouts = self.models, random_rollouts(setting)
        self._timed("sample", lambda: self._sample(rollouts, setting.length))
        values, targets, advantages = self._timed("values", lambda: self._predict(rollouts))
        self._timed(
            "critic", lambda: train.update_critic(CFG, models, rollouts, values, targets, 0)
        )
        self._timed("policy", lambda: train.update_policy(CFG, models, rollouts, advantages, 0))
        return self.seconds

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        distributed.all_gather_objects(None)  # until the last rank has done its part
        self.seconds[phase] = time.perf_counter() - start
        return result

    def _sample(self, rollouts: Sequence[Rollout], length: int) -> None:
        local = rollouts[distributed.rank() :: distributed.world_size()]
        prompts = [r.problem.prompt_ids for r in local]
        self.sampler.generate(prompts, range(len(prompts)), Sampling(length, stop=()))

    def _predict(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, ...]:
        """Values, their targets, and normalized advantages."""
        values = train.predict_values(CFG, self.models.critic, rollouts)
        advantages, targets = train.compute_advantages(CFG, self.models, rollouts, values)
        return values, targets, normalize_advantages(advantages)


# ── attention's share of it ───────────────────────────────────────────────────────────────────────


def attention_flops(setting: Setting, shape: plan.Shape) -> float:
    """Attention's share of the operations of values (one forward pass), critic and policy (three
    times as many each)."""
    tokens = setting.length + PROMPT_TOKENS - 1
    attention = tokens * shape.layers * 2 * shape.heads * shape.head_size * tokens
    body = attention + tokens * shape.layers * 2 * shape.layer
    head = setting.length * 2 * shape.vocab * shape.hidden
    return 7 * attention / (7 * body + 3 * head)


def attention_seconds(setting: Setting, shape: plan.Shape) -> float:
    """Seconds of attention alone, on packs like those of the update."""
    rollouts = random_rollouts(setting)
    lengths = [len(r.token_ids) for r in rollouts]
    passes = [  # mini-batches, and whether there is a backward pass
        (1, False),  # values
        (CFG.critic_steps, True),
        (CFG.policy_steps, True),
    ]
    seconds = 0.0
    for steps, backward in passes:
        for members in mini_batches(lengths, steps, f"{CFG.seed}/0"):
            for micro in micro_batches(rollouts, members, CFG.micro_tokens):
                seconds += pack_seconds(micro, shape, backward)
    return shape.layers * seconds


def pack_seconds(micro: MicroBatch, shape: plan.Shape, backward: bool) -> float:
    """Seconds of one layer's attention on a pack."""
    tokens = micro.input_ids.shape[1]
    query, key, value = (
        torch.randn(1, heads, tokens, shape.head_size, requires_grad=backward)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    how = {"layout": micro.layout, "scaling": 0.1}
    start = time.perf_counter()
    out, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **how)
    if backward:
        out.backward(torch.ones_like(out))
    return time.perf_counter() - start


# ── a step in new processes ───────────────────────────────────────────────────────────────────────


def step_in_new_processes(path: str, processes: Processes) -> Seconds:
    """Seconds of the step ON_RANKS, as rank 0 measures them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds.json")
        arguments = (path, processes, port, out)
        torch.multiprocessing.spawn(step_on_rank, arguments, nprocs=processes.ranks)
        return json.loads(out.read_text())


def step_on_rank(rank: int, path: str, processes: Processes, port: int, out: Path) -> None:
    """What each of these processes does; rank 0 writes `out`."""
    quiet()
    torch.set_num_threads(processes.threads)
    if processes.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(timeout_minutes=5)
    stepper = Stepper(path)
    stepper.step(Setting())  # warm-up
    seconds = stepper.step(ON_RANKS)
    if rank == 0:
        out.write_text(json.dumps(seconds))
    distributed.stop()


def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ── all settings ──────────────────────────────────────────────────────────────────────────────────


def measure(
    rounds: int, paths: dict[int, str], shapes: dict[int, plan.Shape]
) -> dict[Setting | Processes, list[Seconds]]:
    """For every setting the seconds of each round."""
    steppers = {vocabulary: Stepper(path) for vocabulary, path in paths.items()}
    for vocabulary, stepper in steppers.items():
        stepper.step(Setting(vocabulary=vocabulary))  # warm-up
    settings = dict.fromkeys(setting for group in DOUBLED.values() for setting in group)
    measured: dict[Setting | Processes, list[Seconds]] = {key: [] for key in (*settings, *COMPARED)}
    for _ in range(rounds):
        for setting in settings:
            attention = attention_seconds(setting, shapes[setting.vocabulary])
            seconds = steppers[setting.vocabulary].step(setting)
            measured[setting].append(seconds | {"attention": attention})
        for processes in COMPARED:
            path = paths[ON_RANKS.vocabulary]
            measured[processes].append(step_in_new_processes(path, processes))
    return measured


def row(labels: Row, rounds: list[Seconds]) -> Row:
    """Medians of the rounds."""
    phases = {f"{phase} s": median(seconds[phase] for seconds in rounds) for phase in PHASES}
    sums = [seconds["values"] + seconds["critic"] + seconds["policy"] for seconds in rounds]
    return labels | phases | {"sum s": median(sums), "ratio": None}


def doubled_rows(
    name: str, measured: dict[Setting | Processes, list[Seconds]], shapes: dict[int, plan.Shape]
) -> list[Row]:
    """The rows of a size that doubles."""
    rows = []
    for setting in DOUBLED[name]:
        value = f"{getattr(setting, name):,}"
        cells = row({"doubled": name, "value": value}, measured[setting])
        cells["attention FLOPs"] = attention_flops(setting, shapes[setting.vocabulary])
        cells["attention s"] = median(seconds["attention"] for seconds in measured[setting])
        rows.append(cells)
    for above, cells in pairwise(rows):
        cells["ratio"] = cells["sum s"] / above["sum s"]
        others, others_above = (x["sum s"] - x["attention s"] for x in (cells, above))
        cells["other ratio"] = others / others_above
    return rows


def table(rounds: int) -> list[Row]:
    """All settings, then one process beside two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        vocabularies = [setting.vocabulary for setting in DOUBLED["vocabulary"]]
        paths = {v: random_model(Path(folder), v) for v in vocabularies}
        shapes = {v: plan.shape(path) for v, path in paths.items()}
        measured = measure(rounds, paths, shapes)
    rows: list[Row] = []
    for name in DOUBLED:
        rows += doubled_rows(name, measured, shapes)
    one_process, two_ranks = (
        row({"doubled": "ranks", "value": value}, measured[processes])
        for processes, value in COMPARED.items()
    )
    two_ranks["ratio"] = two_ranks["sum s"] / one_process["sum s"]
    return [*rows, one_process, two_ranks]


def notes(rounds: int) -> list[str]:
    """What the table does not say."""
    base = Setting()
    qwen = plan.shape("Qwen2.5-7B")
    shares = [f"{attention_flops(Setting(length=n), qwen):.1%}" for n in (1000, 4000, 8000)]
    return [
        f"Otherwise {base.length} tokens, {base.batch} responses, vocabulary "
        f"{base.vocabulary:,}; last two rows {ON_RANKS.length} tokens, {ON_RANKS.batch} responses. "
        f"{CFG.critic_steps} critic steps, at most {CFG.micro_tokens:,} tokens in a pack, "
        f"{rounds} rounds.",
        f"At Qwen2.5-7B's shape attention has {shares[0]}, {shares[1]} and {shares[2]} of the "
        "operations of responses of 1,000, 4,000 and 8,000 tokens.",
    ]


def main() -> None:
    cfg = flags.parse(Settings, "scaling", __doc__)
    torch.set_num_threads(1)
    quiet()
    title = "A step as length, batch and vocabulary double"
    record("scaling", title, table(cfg.rounds), notes(cfg.rounds))


if __name__ == "__main__":
    main()
