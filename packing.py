"""Ragged rollouts ⇄ packed micro-batches: the only place that packs, pads or shifts.

A micro-batch is one row in which whole sequences stand one after another ("sample packing", §3.1):

    sequence A: prompt p p p, response a b c        sequence B: prompt q q, response d e

    input_ids      p  p  p  a  b | q  q  d        the last token of a sequence is never an input: nothing follows it
    position_ids   0  1  2  3  4 | 0  1  2        restart, so that rotary angles are those of A and B alone
    predict_index            2  3  4 |    6  7        the token *before* an action: its hidden state gives
                         ↓  ↓  ↓      ↓  ↓        log π(a_t|s_t) and V(s_t) alike
    actions              a  b  c      d  e
    flat                 0  1  2      3  4        the action's place in the step's flat (N,) vectors (see gae.py)

Attention is causal inside a sequence and blind between sequences. No [T × T] mask is ever built.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

import distributed
from rollout import Rollout


class MicroBatch(NamedTuple):
    """One packed row of S sequences, T input tokens and n actions; the picture above shows each field."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    cu_seqlens: Tensor  # (S + 1,) int32: where each sequence begins and the last one ends
    max_seqlen: int  # input tokens of the max_seqlen sequence
    predict_index: Tensor  # (n,)
    actions: Tensor  # (n,)
    flat: Tensor  # (n,)


def micro_batches(
    rollouts: Sequence[Rollout],
    members: Sequence[int],
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """This rank's rows of the rollouts numbered `members`, each of at most `max_tokens` input tokens (a longer sequence
    gets a row of its own). All ranks get the same number of rows, since sharded models compute in step; a filler row
    holds one sequence and no actions, and so adds nothing to any sum."""
    starts = [0]
    for rollout in rollouts:
        starts.append(starts[-1] + len(rollout.token_ids))
    inputs = {
        i: len(rollouts[i].problem.prompt_ids) + len(rollouts[i].token_ids) - 1 for i in members
    }
    for row in assign_packs(inputs, max_tokens, distributed.world_size())[distributed.rank()]:
        yield _pack(
            rollouts, row or [min(inputs, key=inputs.__getitem__)], starts, device, filler=not row
        )


def assign_packs(inputs: dict[int, int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Which sequences stand in which row of which rank; `inputs` are their input tokens by number.

    A rank's own sequences are packed in order of length. Rows of like lengths waste least (`packed_attention`); which
    share a row changes neither loss nor gradient.

    >>> assign_packs({0: 5, 1: 9, 2: 4, 3: 6, 4: 7}, max_tokens=11, ranks=2)
    [[[0], [1]], [[2, 3], [4]]]
    """
    dealt = []
    for own in balance(inputs, ranks):
        rows: list[list[int]] = []
        for i in reversed(own):
            if not rows or sum(inputs[j] for j in rows[-1]) + inputs[i] > max_tokens:
                rows.append([])
            rows[-1].append(i)
        dealt.append(rows)
    most = max(map(len, dealt))
    return [rows + [[]] * (most - len(rows)) for rows in dealt]


def balance(sizes: dict[int, int], num_bins: int) -> list[list[int]]:
    """Numbered sizes in near-equal num_bins: the largest first, each to the lightest hand."""
    dealt, load = [[] for _ in range(num_bins)], [0] * num_bins
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        lightest = load.index(min(load))
        dealt[lightest].append(i)
        load[lightest] += sizes[i]
    return dealt


def _pack(
    rollouts: Sequence[Rollout],
    row: list[int],
    starts: list[int],
    device: torch.device | str,
    filler: bool = False,
) -> MicroBatch:
    tokens, positions, predict_index, actions, flat, cu_seqlens = [], [], [], [], [], [0]
    for i in row:
        prompt, response = rollouts[i].problem.prompt_ids, rollouts[i].token_ids
        sequence = [*prompt, *response]
        first = len(tokens) + len(prompt) - 1  # the last prompt token predicts the first action
        tokens += sequence[:-1]
        positions += range(len(sequence) - 1)
        predict_index += range(first, first + len(response))
        actions += response
        flat += range(starts[i], starts[i] + len(response))
        cu_seqlens.append(len(tokens))

    def tensor(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    max_seqlen = max(b - a for a, b in pairwise(cu_seqlens))
    return MicroBatch(
        tensor(tokens)[None], tensor(positions)[None], tensor(cu_seqlens, torch.int32), max_seqlen,
        tensor([] if filler else predict_index), tensor([] if filler else actions), tensor([] if filler else flat),
    )  # fmt: skip


def mini_batches(lengths: Sequence[int], count: int, seed: str) -> list[list[int]]:
    """Split sequences into `count` mini-batches of near-equal token counts, using each exactly once; the seed decides who
    meets whom. Fewer sequences than `count` give one mini-batch each.

    >>> mini_batches([5, 1, 1, 3], 2, seed="0/0")
    [[0], [3, 2, 1]]
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    return balance({i: lengths[i] for i in order}, min(count, len(lengths)))


@torch.no_grad()
def forward_all_tokens(
    quantity: Callable[[MicroBatch], Tensor],
    rollouts: Sequence[Rollout],
    max_tokens: int,
    device: torch.device | str,
) -> Tensor:
    """A per-token quantity of all responses, flat (N,), computed row by row without gradient and put together from all
    ranks."""
    flat = torch.zeros(sum(len(r.token_ids) for r in rollouts), device=device)
    for micro in micro_batches(rollouts, range(len(rollouts)), max_tokens, device):
        flat[micro.flat] = quantity(micro)
    return distributed.all_reduce_sum(flat)


def hidden_states(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """Final-norm hidden states (n, H) from which the actions are predicted; `model` is that of a policy or a critic."""
    out = model.base_model(
        input_ids=micro.input_ids,
        position_ids=micro.position_ids,
        use_cache=False,
        cu_seqlens=micro.cu_seqlens,
        max_seqlen=micro.max_seqlen,
    )
    return out.last_hidden_state[0, micro.predict_index]


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    cu_seqlens: Tensor, max_seqlen: int, scaling: float, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of each sequence of a packed row to itself; query (1, heads, T, d) → (1, T, heads, d).

    The row is unfolded to (S, heads, max_seqlen, d), each sequence left-aligned. What stands behind a short sequence is
    the beginning of its neighbour: causality keeps the real queries from looking that far, and the outputs of the rest
    are dropped. Models find it under the name "packed" (transformers' attention interface), which, having no mask
    function of its own, also keeps transformers from building a mask.
    """
    if sliding_window is not None:
        raise ValueError(
            "packed attention has no sliding window; use a model whose layers attend to the whole sequence"
        )
    S, T = len(cu_seqlens) - 1, query.shape[2]
    at = torch.arange(T, device=query.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, at, right=True) - 1
    fold = (
        sequence * max_seqlen + at - cu_seqlens[sequence]
    )  # place in the row → place in the unfolded one
    unfold = (
        (cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=query.device))
        .clamp(max=T - 1)
        .flatten()
    )  # and back
    q, k, v = (
        x[0].transpose(0, 1).index_select(0, unfold).unflatten(0, (S, max_seqlen)).transpose(1, 2)
        for x in (query, key, value)
    )  # (S, heads, max_seqlen, d)
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, fold)[None], None


AttentionInterface.register("packed", packed_attention)
