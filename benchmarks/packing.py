"""Measure what a step of 128 × 64 responses computes, over what it would if every response were
computed with a prompt of its own.

    ORZ_DATA=folder python -m benchmarks.packing

Nothing is trained. Sequences are distributed over 1, 8 and 64 ranks with `packing.mini_batches` and
`packing.assign_packs`, and the packs are made, to see the segments and groups that attention
computes with.

There are three distributions of response lengths. "real" draws 8,192 times, with replacement, from
the responses in `ORZ_DATA`/responses that follow the paper's format, in tokens of Qwen2. The 128
prompts are drawn from `ORZ_DATA`/orz_train, under the template. The update "policy" is one
mini-batch with all sequences, and so are the values; "critic" is the critic's twelve.

"needed" counts every response with its whole prompt, which is what a program computes that does not
share prompts: below 1 is saved.

| column | meaning |
|---|---|
| packs per rank | packs that each rank computes in the update |
| pack fill | tokens per pack with actions, over the 16,384 of a micro-batch |
| linear | tokens that linear layers compute / needed |
| pairs, kernel | pairs of query and key that torch's kernel for packs (GPUs) computes / needed |
| pairs, unfolded | the same for groups of like lengths (CPUs), with hidden pairs: `causal_pairs` |
| FLOPs | with the kernel: computed / needed |
| imbalance | tokens, and FLOPs, of the slowest rank / of the mean rank; mini-batches add up |
| in step | Σ over packs of the slowest rank's FLOPs, with the kernel / needed FLOPs per rank |
| padded | tokens computed / needed without packing |

Ranks that share a sharded model wait for each other in every pack: "in step" is what that costs.
For "padded", each rank takes sequences in order of arrival and pads them in batches of at most
16,384 positions.

FLOPs are those of the layers of Qwen2.5-7B: 2 per weight and token, and 4·Q per attended pair and
layer, with Q = heads · head size.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import tyro
from transformers import AutoTokenizer

import data
import packing
from benchmarks.record import Row, record
from config import Config
from data import Problem
from rollout import Rollout
from tools import plan

MICRO_TOKENS = 16384  # the default of --micro-tokens
SHAPE = plan.shape("Qwen2.5-7B")
LINEAR = 2 * SHAPE.layers * SHAPE.layer  # FLOPs of a token
ATTENTION = 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_size  # FLOPs of a pair
LONGEST = 8000
KEYS = 512
SIGMA = 0.8  # of the lognormal distribution


def response_lengths(data: Path, count: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """For each distribution `count` response lengths in tokens."""
    with (data / "responses" / "responses.jsonl").open(encoding="utf-8") as file:
        responses = [json.loads(line) for line in file]
    texts = [response["pred"] for response in responses if response["fmt"] == "orz_think_answer"]
    tokenizer = AutoTokenizer.from_pretrained(data / "qwen2_tokenizer")
    real = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    lengths = {
        "real": rng.choice(real, count),
        "lognormal": rng.lognormal(np.log(1000) - SIGMA**2 / 2, SIGMA, count),
        "heavy tail": 300 * (1 + rng.pareto(1.2, count)),
    }
    return {name: x.round().clip(1, LONGEST).astype(int).tolist() for name, x in lengths.items()}


def prompt_lengths(folder: Path, count: int, rng: np.random.Generator) -> list[int]:
    """Tokens of `count` prompts of the training data, under the template."""
    problems = data.load(folder / "orz_train" / "orz_math_57k_first2048_w_num_correct.json")
    chosen = [problems[i] for i in rng.choice(len(problems), count, replace=False)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2_tokenizer")
    tokenized = data.tokenize(chosen, tokenizer, LONGEST, data.TEMPLATE)
    return [len(problem.prompt_ids) for problem in tokenized]


def empty_rollouts(prompts: list[int], lengths: list[int]) -> list[Rollout]:
    """Responses of these lengths, the first ones to the first prompt."""
    samples = len(lengths) // len(prompts)
    problems = []
    for k, length in enumerate(prompts):
        problems.append(Problem(str(k), "", "", (k,) + (0,) * (length - 1)))
    return [
        Rollout(problems[i // samples], [0] * length, [], "stop", "")
        for i, length in enumerate(lengths)
    ]


def pack_work(rollouts: list[Rollout], pack: list[int], starts: list[int]) -> tuple[float, ...]:
    """Tokens, pairs by the kernel and pairs unfolded that are computed for a pack."""
    micro = packing._micro_batch(rollouts, pack, starts, "cpu")
    queries = micro.layout.cu_seqlens_q.diff().double()
    keys = micro.layout.cu_seqlens_k.diff().double()
    by_kernel = queries * (keys - queries) + queries**2 / 2
    unfolded = 0.0
    for group in micro.layout.groups:
        segments, longest = group.queries.shape
        keys = group.keys.shape[1]
        unfolded += segments * (longest * keys if group.before else causal_pairs(keys))
    return micro.input_ids.numel(), float(by_kernel.sum()), unfolded


@cache
def causal_pairs(length: int) -> int:
    """Pairs that torch's kernel for CPUs computes for a sequence: a query takes its keys in blocks
    of KEYS.

    >>> causal_pairs(512), causal_pairs(1024)
    (262144, 786432)
    """
    return sum(min(length, (i // KEYS + 1) * KEYS) for i in range(length))


def flops(work: np.ndarray) -> np.ndarray:
    """FLOPs of work (..., 3) with the kernel: tokens, pairs by the kernel, pairs unfolded."""
    return LINEAR * work[..., 0] + ATTENTION * work[..., 1]


def measure_update(
    rollouts: list[Rollout], groups: list[list[int]], max_tokens: int, num_ranks: int
) -> Row:
    """One update on these responses; `groups` are its mini-batches."""
    starts = [0, *accumulate(len(r.token_ids) for r in rollouts)]
    sizes = [packing.size(r) for r in rollouts]
    inputs = [size.prompt_tokens + size.own for size in sizes]
    works = []  # for each group (ranks, packs, 3)
    with_actions = 0  # packs that are not fillers
    for members in groups:
        ranks = packing.assign_packs({i: sizes[i] for i in members}, max_tokens, num_ranks)
        with_actions += sum(len(pack) > 0 for packs in ranks for pack in packs)
        filler = [min(members, key=inputs.__getitem__)]
        work = [[pack_work(rollouts, pack or filler, starts) for pack in packs] for packs in ranks]
        works.append(np.array(work))
    by_rank = np.stack([work.sum(1) for work in works])  # (groups, ranks, 3)
    pairs = sum(n * n / 2 for n in inputs)
    needed = np.array([sum(inputs), pairs, pairs])
    linear, by_kernel, unfolded = (by_rank.sum((0, 1)) / needed).tolist()
    slowest = sum(flops(work).max(0).sum() for work in works)
    return {
        "packs per rank": sum(work.shape[1] for work in works),
        "pack fill": float(by_rank[..., 0].sum()) / with_actions / max_tokens,
        "linear": linear,
        "pairs, kernel": by_kernel,
        "pairs, unfolded": unfolded,
        "FLOPs": float(flops(by_rank).sum() / flops(needed)),
        "imbalance, tokens": imbalance(by_rank[..., 0]),
        "imbalance, FLOPs": imbalance(flops(by_rank)),
        "in step": float(slowest * num_ranks / flops(needed)),
        "padded": padded(inputs, groups, max_tokens, num_ranks),
    }


def imbalance(cost: np.ndarray) -> float:
    """Cost (groups, ranks) of the slowest rank / of the mean rank."""
    return float(cost.max(1).sum() / cost.mean(1).sum())


def padded(inputs: list[int], groups: list[list[int]], max_tokens: int, num_ranks: int) -> float:
    """Positions computed / tokens needed, if the ranks took sequences in turn and padded them."""
    positions = 0
    for members in groups:
        for rank in range(num_ranks):
            local = [inputs[i] for i in sorted(members)[rank::num_ranks]]
            positions += padded_positions(local, max_tokens)
    return positions / sum(inputs)


def padded_positions(lengths: Sequence[int], max_tokens: int) -> int:
    """Positions of one rank's sequences in batches as wide as their longest sequence.

    >>> padded_positions([3, 5, 2], max_tokens=10)  # 2 × 5 and 1 × 2
    12
    """
    positions = num_seqs = width = 0
    for length in lengths:
        if (num_seqs + 1) * max(width, length) > max_tokens:
            positions += num_seqs * width
            num_seqs = width = 0
        num_seqs += 1
        width = max(width, length)
    return positions + num_seqs * width


def measure() -> None:
    """Measure all distributions, numbers of ranks and updates, and record the table."""
    if "ORZ_DATA" not in os.environ:
        sys.exit(
            "benchmarks.packing: ORZ_DATA is not set; it names the folder that holds responses/, "
            "orz_train/ and qwen2_tokenizer/"
        )
    folder = Path(os.environ["ORZ_DATA"])
    cfg = Config()
    rng = np.random.default_rng(0)
    updates = {"policy": cfg.policy_steps, "critic": cfg.critic_steps}
    table: list[Row] = []
    prompts = prompt_lengths(folder, cfg.prompts, rng)
    notes = [f"Prompt tokens: mean {np.mean(prompts):,.0f}, most {max(prompts):,}."]
    for name, lengths in response_lengths(folder, cfg.prompts * cfg.samples, rng).items():
        rollouts = empty_rollouts(prompts, lengths)
        mean, middle = np.mean(lengths), np.median(lengths)
        notes.append(f"{name}: mean {mean:,.0f}, median {middle:,.0f}, most {max(lengths):,}.")
        for num_ranks in (1, 8, 64):
            for update, steps in updates.items():
                groups = packing.mini_batches(lengths, steps, "0/0")
                labels = {"lengths": name, "ranks": num_ranks, "update": update}
                table.append(labels | measure_update(rollouts, groups, MICRO_TOKENS, num_ranks))
    for column in ("linear", "pairs, kernel", "pairs, unfolded", "FLOPs", "in step"):
        notes.append(f"Most {column}: {max(float(row[column]) for row in table):.3f}.")
    record("packing", "Packing: computed against needed", table, [" ".join(notes)])


def main() -> None:
    """Command line; it takes no options."""
    tyro.cli(measure, description=__doc__, prog="python -m benchmarks.packing")


if __name__ == "__main__":
    main()
