"""Computed against needed tokens of a step of 128 × 64 responses, packed for 1, 8 and 64 ranks.

    ORZ_DATA=folder python -m benchmarks.packing

Nothing is trained: `packing.mini_batches` and `packing.assign_packs` deal and pack sequences of three distributions of response
lengths, and `packing.packed_attention` is called on every row to see the shapes it attends with. Real lengths are those of the
responses in the paper's format of `ORZ_DATA`/responses in Qwen2's tokens, drawn 8,192 times with replacement; prompts have
150 to 350 tokens. "policy" is one update with all sequences, "critic" the twelve mini-batches of the critic's.

| column | meaning |
|---|---|
| rows per rank | packed rows that each rank computes in the update |
| row fill | needed tokens per row with sequences, over the 16,384 of a micro-batch |
| linear | tokens that linear layers compute / needed: more than 1 only through filler rows |
| attention | query positions, and causal pairs of query and key, that attention computes / needed |
| imbalance | the slowest rank's tokens, and FLOPs, / the mean rank's; summed over mini-batches first |
| in step | Σ over rows of the slowest rank's FLOPs / needed FLOPs per rank: sharded models wait in every row |
| padded | positions of rectangles in order of arrival, at most as large / needed tokens |

FLOPs are those of Qwen2.5-7B's layers: 2 per weight and token, and 4·Q per attended pair and layer, Q = heads · head size.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer

import packing
from benchmarks import record
from config import Config
from tools import plan

MICRO_TOKENS = 16384  # the default of --micro-tokens
SHAPE = plan.shape("Qwen2.5-7B")
LINEAR = 2 * SHAPE.layers * SHAPE.layer  # FLOPs of a token
ATTENTION = 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_size  # FLOPs of a pair
LONGEST = 8000


def response_lengths(data: Path, count: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """Distribution → `count` response lengths, tokens."""
    answered = [
        json.loads(line) for line in (data / "responses" / "responses.jsonl").open(encoding="utf-8")
    ]
    texts = [row["pred"] for row in answered if row["fmt"] == "orz_think_answer"]
    real = [
        len(ids)
        for ids in AutoTokenizer.from_pretrained(data / "qwen2_tokenizer")(texts)["input_ids"]
    ]
    sigma = 0.8
    drawn = {
        "real": rng.choice(real, count),
        "lognormal": rng.lognormal(np.log(1000) - sigma**2 / 2, sigma, count),
        "heavy tail": 300 * (1 + rng.pareto(1.2, count)),
    }
    return {name: x.round().clip(1, LONGEST).astype(int).tolist() for name, x in drawn.items()}


@cache
def row_work(row: tuple[int, ...]) -> tuple[float, float, float]:
    """Tokens, attention positions and attention pairs computed for a row of sequences of these lengths."""
    cu_seqlens = torch.tensor([0, *accumulate(row)], dtype=torch.int32)
    x, shapes = torch.zeros(1, 1, sum(row), 1), []

    def attend(query: torch.Tensor, *_: torch.Tensor, **__: object) -> torch.Tensor:
        shapes.append(query.shape)
        return query

    with mock.patch.object(packing, "scaled_dot_product_attention", attend):
        packing.packed_attention(
            torch.nn.Identity(),
            x,
            x,
            x,
            None,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(row),
            scaling=1.0,
        )
    positions = sum(sequences * longest for sequences, _, longest, _ in shapes)
    return (
        sum(row),
        positions,
        sum(sequences * longest**2 / 2 for sequences, _, longest, _ in shapes),
    )


def flops(work: np.ndarray) -> np.ndarray:
    """FLOPs of work (..., 3): tokens, positions, pairs."""
    return LINEAR * work[..., 0] + ATTENTION * work[..., 2]


def packed(inputs: list[int], groups: list[list[int]], max_tokens: int, ranks: int) -> record.Row:
    """One update on sequences of these input tokens, `groups` its mini-batches."""
    works, with_sequences = [], 0  # works: of each group (ranks, rows, 3)
    for members in groups:
        dealt = packing.assign_packs({i: inputs[i] for i in members}, max_tokens, ranks)
        filler = min(inputs[i] for i in members)  # what micro_batches puts into an empty row
        with_sequences += sum(bool(row) for own in dealt for row in own)
        rows = [
            [row_work(tuple(inputs[i] for i in row) or (filler,)) for row in own] for own in dealt
        ]
        works.append(np.array(rows, dtype=float))
    of_ranks = np.stack([work.sum(1) for work in works])  # (groups, ranks, 3)
    needed = np.array([sum(inputs), sum(inputs), sum(n * n / 2 for n in inputs)])
    linear, positions, pairs = (of_ranks.sum((0, 1)) / needed).tolist()
    tokens, operations = of_ranks[..., 0], flops(of_ranks)
    shares = [
        [inputs[i] for i in sorted(members)[r::ranks]] for members in groups for r in range(ranks)
    ]
    return {
        "rows per rank": sum(work.shape[1] for work in works),
        "row fill": sum(inputs) / with_sequences / max_tokens,
        "linear": linear,
        "attention positions": positions,
        "attention pairs": pairs,
        "imbalance, tokens": float(tokens.max(1).sum() / tokens.mean(1).sum()),
        "imbalance, FLOPs": float(operations.max(1).sum() / operations.mean(1).sum()),
        "in step": float(sum(flops(work).max(0).sum() for work in works) * ranks / flops(needed)),
        "padded": sum(padded(share, max_tokens) for share in shares) / sum(inputs),
    }


def padded(inputs: Sequence[int], max_tokens: int) -> int:
    """Positions computed for these sequences, a rank's own, if each row were a rectangle as wide as its longest."""
    positions, count, width = 0, 0, 0
    for n in inputs:
        if (count + 1) * max(width, n) > max_tokens:
            positions, count, width = positions + count * width, 0, 0
        count, width = count + 1, max(width, n)
    return positions + count * width


def main() -> None:
    if "ORZ_DATA" not in os.environ:
        sys.exit("ORZ_DATA is not set: the folder that holds responses/ and qwen2_tokenizer/")
    rng, cfg, table, lengths_of = np.random.default_rng(0), Config(), [], []
    count = cfg.prompts * cfg.samples
    for name, lengths in response_lengths(Path(os.environ["ORZ_DATA"]), count, rng).items():
        inputs = [
            p + n - 1 for p, n in zip(rng.integers(150, 351, count).tolist(), lengths, strict=True)
        ]
        lengths_of.append(
            f"{name} mean {np.mean(lengths):,.0f}, median {np.median(lengths):,.0f}, most {max(lengths):,}"
        )
        for ranks in (1, 8, 64):
            for update, steps in (("policy", cfg.policy_steps), ("critic", cfg.critic_steps)):
                groups = packing.mini_batches(lengths, steps, "0/0")
                labels = {"lengths": name, "ranks": ranks, "update": update}
                table.append(labels | packed(inputs, groups, MICRO_TOKENS, ranks))
    linear, tokens = (
        max(row[column] for row in table) for column in ("linear", "imbalance, tokens")
    )
    notes = [
        f"Response tokens: {'; '.join(lengths_of)}.",
        f"Worst linear {linear:.3f}, worst token imbalance {tokens:.3f}.",
    ]
    record.record("packing", "Packing: computed against needed", table, notes)


if __name__ == "__main__":
    main()
