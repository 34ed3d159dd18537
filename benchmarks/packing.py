"""Measure what packing wastes: computed / needed tokens in a step of 128 × 64 responses.

    ORZ_DATA=folder python -m benchmarks.packing

Nothing is trained. Sequences are distributed over 1, 8 and 64 ranks with `packing.mini_batches` and
`packing.assign_packs`. `packing.packed_attention` is called on every pack, to see the shapes that
it computes with.

There are three distributions of response lengths. "real" draws 8,192 times, with replacement, from
the responses in `ORZ_DATA`/responses that follow the paper's format, in tokens of Qwen2. Prompts
have 150 to 350 tokens. The update "policy" is one mini-batch with all sequences; "critic" is the
critic's twelve.

| column | meaning |
|---|---|
| packs per rank | packs that each rank computes in the update |
| pack fill | needed tokens per pack with actions, over the 16,384 of a micro-batch |
| linear | tokens that linear layers compute / needed; above 1 only through filler packs |
| attention positions, pairs | positions, and causal pairs of query and key, computed / needed |
| imbalance | tokens, and FLOPs, of the slowest rank / of the mean rank; mini-batches add up |
| in step | Σ over packs of the slowest rank's FLOPs / needed FLOPs per rank |
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
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer

import packing
from benchmarks.record import Row, record
from config import Config
from tools import plan

MICRO_TOKENS = 16384  # the default of --micro-tokens
SHAPE = plan.shape("Qwen2.5-7B")
LINEAR = 2 * SHAPE.layers * SHAPE.layer  # FLOPs of a token
ATTENTION = 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_size  # FLOPs of a pair
LONGEST = 8000
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


class AttentionShapes(TorchFunctionMode):
    """Keeps the shapes of the queries of scaled_dot_product_attention, which is not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is scaled_dot_product_attention:
            query = args[0]
            self.shapes.append(query.shape)
            return query
        return function(*args, **(kwargs or {}))


@cache
def pack_work(lengths: tuple[int, ...]) -> tuple[float, float, float]:
    """Tokens, attention positions and attention pairs that are computed for a pack of sequences of
    these lengths."""
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    x = torch.zeros(1, 1, tokens, 1)
    how = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "scaling": 1.0}
    with AttentionShapes() as seen:
        packing.packed_attention(torch.nn.Identity(), x, x, x, None, **how)
    positions = sum(num_seqs * width for num_seqs, _, width, _ in seen.shapes)
    pairs = sum(num_seqs * width**2 / 2 for num_seqs, _, width, _ in seen.shapes)
    return tokens, positions, pairs


def flops(work: np.ndarray) -> np.ndarray:
    """FLOPs of work (..., 3): tokens, positions, pairs."""
    return LINEAR * work[..., 0] + ATTENTION * work[..., 2]


def measure_update(
    inputs: list[int], groups: list[list[int]], max_tokens: int, num_ranks: int
) -> Row:
    """One update on sequences of these numbers of input tokens; `groups` are its mini-batches."""
    works = []  # for each group (ranks, packs, 3)
    with_actions = 0  # packs that are not fillers
    for members in groups:
        ranks = packing.assign_packs({i: inputs[i] for i in members}, max_tokens, num_ranks)
        with_actions += sum(len(pack) > 0 for packs in ranks for pack in packs)
        filler = (min(inputs[i] for i in members),)
        lengths = [[tuple(inputs[i] for i in pack) or filler for pack in packs] for packs in ranks]
        works.append(np.array([[pack_work(n) for n in packs] for packs in lengths], dtype=float))
    by_rank = np.stack([work.sum(1) for work in works])  # (groups, ranks, 3)
    needed = np.array([sum(inputs), sum(inputs), sum(n * n / 2 for n in inputs)])
    linear, positions, pairs = (by_rank.sum((0, 1)) / needed).tolist()
    slowest = sum(flops(work).max(0).sum() for work in works)
    return {
        "packs per rank": sum(work.shape[1] for work in works),
        "pack fill": sum(inputs) / with_actions / max_tokens,
        "linear": linear,
        "attention positions": positions,
        "attention pairs": pairs,
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
            "benchmarks.packing: ORZ_DATA is not set; it names the folder that holds responses/ "
            "and qwen2_tokenizer/"
        )
    cfg = Config()
    rng = np.random.default_rng(0)
    count = cfg.prompts * cfg.samples
    updates = {"policy": cfg.policy_steps, "critic": cfg.critic_steps}
    table: list[Row] = []
    described = []
    for name, lengths in response_lengths(Path(os.environ["ORZ_DATA"]), count, rng).items():
        prompts = rng.integers(150, 351, count).tolist()
        inputs = [prompt + n - 1 for prompt, n in zip(prompts, lengths, strict=True)]
        mean, middle = np.mean(lengths), np.median(lengths)
        described.append(f"{name} mean {mean:,.0f}, median {middle:,.0f}, most {max(lengths):,}")
        for num_ranks in (1, 8, 64):
            for update, steps in updates.items():
                groups = packing.mini_batches(lengths, steps, "0/0")
                labels = {"lengths": name, "ranks": num_ranks, "update": update}
                table.append(labels | measure_update(inputs, groups, MICRO_TOKENS, num_ranks))
    linear = max(row["linear"] for row in table)
    tokens = max(row["imbalance, tokens"] for row in table)
    notes = [
        f"Response tokens: {'; '.join(described)}.",
        f"Worst linear {linear:.3f}, worst token imbalance {tokens:.3f}.",
    ]
    record("packing", "Packing: computed against needed", table, notes)


def main() -> None:
    """Command line; it takes no options."""
    tyro.cli(measure, description=__doc__, prog="python -m benchmarks.packing")


if __name__ == "__main__":
    main()
