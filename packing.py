"""Ragged rollouts ⇄ packed micro-batches: the only place that packs, pads or shifts.

A micro-batch is one pack: whole sequences, one after another ("sample packing", §3.1):

    sequence A: prompt p p p, response a b c        sequence B: prompt q q, response d e

    input_ids      p  p  p  a  b | q  q  d    a sequence's last token is no input: nothing follows
    position_ids   0  1  2  3  4 | 0  1  2    restart: rotary angles are those of A and B alone
    predict_index        2  3  4 |    6  7    the token *before* an action: its hidden state gives
                         ↓  ↓  ↓      ↓  ↓    log π(a_t|s_t) and V(s_t) alike
    actions              a  b  c      d  e
    flat                 0  1  2      3  4    the action's place in the step's (N,) vectors (gae.py)

    cu_seqlens = [0, 5, 8], max_seqlen = 5

Attention is causal inside a sequence and blind between sequences. No [T × T] mask is ever built.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

import distributed
from rollout import Rollout


class MicroBatch(NamedTuple):
    """One pack of S sequences, T input tokens and n actions; the picture above shows each field."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    cu_seqlens: Tensor  # (S + 1,) int32: where each sequence begins and the last one ends
    max_seqlen: int  # input tokens of the longest sequence
    predict_index: Tensor  # (n,)
    actions: Tensor  # (n,)
    flat: Tensor  # (n,)


# ── which sequences share a mini-batch, a rank, a pack ────────────────────────────────────────────


def mini_batches(lengths: Sequence[int], count: int, seed: str) -> list[list[int]]:
    """Split sequences into `count` mini-batches of near-equal token counts, using each sequence
    exactly once (§3.1: 12 for the critic). The seed shuffles which sequences share a mini-batch.
    Fewer sequences than `count` give one mini-batch each.

    >>> mini_batches([5, 1, 1, 3], 2, seed="0/0")
    [[0], [3, 2, 1]]
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    return balance({i: lengths[i] for i in order}, min(count, len(lengths)))


def micro_batches(
    rollouts: Sequence[Rollout],
    members: Sequence[int],
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """This rank's packs of the rollouts numbered `members`, each of at most `max_tokens` input
    tokens; a longer sequence gets a pack of its own. All ranks get the same number of packs, since
    sharded models compute in lockstep: a filler pack has one sequence and no actions, and so adds
    nothing to any sum."""
    starts = [0]
    for rollout in rollouts:
        starts.append(starts[-1] + len(rollout.token_ids))
    num_inputs = {i: _num_inputs(rollouts[i]) for i in members}
    shortest = min(num_inputs, key=num_inputs.__getitem__)
    packs = assign_packs(num_inputs, max_tokens, distributed.world_size())
    for pack in packs[distributed.rank()]:
        if pack:
            yield _micro_batch(rollouts, pack, starts, device)
        else:
            yield _filler(_micro_batch(rollouts, [shortest], starts, device))


def assign_packs(
    num_inputs: Mapping[int, int], max_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """For each rank its packs, and for each pack the numbers of its sequences. `num_inputs` maps a
    sequence's number to its input tokens.

    A rank packs its sequences in order of length, because packs of like lengths waste least
    (`packed_attention`). Which sequences share a pack changes neither loss nor gradient.

    >>> assign_packs({0: 5, 1: 9, 2: 4, 3: 6, 4: 7}, max_tokens=11, world_size=2)
    [[[0], [1]], [[2, 3], [4]]]
    """
    ranks = []
    for sequences in balance(num_inputs, world_size):
        packs: list[list[int]] = []
        for i in reversed(sequences):
            if not packs or sum(num_inputs[j] for j in packs[-1]) + num_inputs[i] > max_tokens:
                packs.append([])
            packs[-1].append(i)
        ranks.append(packs)
    most = max(map(len, ranks))
    return [packs + [[]] * (most - len(packs)) for packs in ranks]


def balance(sizes: Mapping[int, int], num_bins: int) -> list[list[int]]:
    """Distribute numbered sizes over bins of near-equal sums: the largest first, each into the
    lightest bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        bins[lightest].append(i)
        loads[lightest] += sizes[i]
    return bins


# ── one pack ──────────────────────────────────────────────────────────────────────────────────────


def _num_inputs(rollout: Rollout) -> int:
    """Input tokens of a sequence: prompt and response without the last token."""
    return len(rollout.problem.prompt_ids) + len(rollout.token_ids) - 1


def _micro_batch(
    rollouts: Sequence[Rollout], pack: list[int], starts: list[int], device: torch.device | str
) -> MicroBatch:
    """The rollouts numbered `pack` in one pack; `starts` are their places in the flat vectors."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    predict_index: list[int] = []
    actions: list[int] = []
    flat: list[int] = []
    cu_seqlens = [0]
    for i in pack:
        prompt, response = rollouts[i].problem.prompt_ids, rollouts[i].token_ids
        sequence = [*prompt, *response]
        # The last prompt token predicts the first action.
        first = len(input_ids) + len(prompt) - 1
        input_ids += sequence[:-1]
        position_ids += range(len(sequence) - 1)
        predict_index += range(first, first + len(response))
        actions += response
        flat += range(starts[i], starts[i] + len(response))
        cu_seqlens.append(len(input_ids))

    def tensor(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return MicroBatch(
        input_ids=tensor(input_ids)[None],
        position_ids=tensor(position_ids)[None],
        cu_seqlens=tensor(cu_seqlens, torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(cu_seqlens)),
        predict_index=tensor(predict_index),
        actions=tensor(actions),
        flat=tensor(flat),
    )


def _filler(micro: MicroBatch) -> MicroBatch:
    """The same inputs without actions."""
    nothing = micro.flat[:0]
    return micro._replace(predict_index=nothing, actions=nothing, flat=nothing)


# ── what models compute on packs ──────────────────────────────────────────────────────────────────


@torch.no_grad()
def forward_all_tokens(
    quantity: Callable[[MicroBatch], Tensor],
    rollouts: Sequence[Rollout],
    max_tokens: int,
    device: torch.device | str,
) -> Tensor:
    """A per-token quantity of all responses, flat (N,): computed pack by pack without gradient, and
    joined from all ranks."""
    flat = torch.zeros(sum(len(r.token_ids) for r in rollouts), device=device)
    for micro in micro_batches(rollouts, range(len(rollouts)), max_tokens, device):
        flat[micro.flat] = quantity(micro)
    return distributed.all_reduce_sum(flat)


def hidden_states(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """Final-norm hidden states (n, H) that predict the actions; `model` is a policy's or
    critic's."""
    out = model.base_model(
        input_ids=micro.input_ids,
        position_ids=micro.position_ids,
        use_cache=False,
        cu_seqlens=micro.cu_seqlens,
        max_seqlen=micro.max_seqlen,
    )
    return out.last_hidden_state[0, micro.predict_index]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence of a pack to itself; query (1, heads, T, d) → (1, T, heads,
    d).

    The pack is unfolded to (S, heads, max_seqlen, d), each sequence left-aligned. Behind a short
    sequence stands the beginning of its neighbor. Causality keeps the real queries from looking
    that far, and the outputs of the other queries are dropped. Models find this function under the
    name "packed" (transformers' attention interface). That name has no mask function, which also
    keeps transformers from building a mask.
    """
    if sliding_window is not None:
        raise ValueError(
            "packed attention has no sliding window; use a model whose layers attend to the whole "
            "sequence"
        )
    num_seqs, num_tokens = len(cu_seqlens) - 1, query.shape[2]
    place = torch.arange(num_tokens, device=query.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, place, right=True) - 1
    # Place in the pack → place in the unfolded tensor, and back.
    fold = sequence * max_seqlen + place - cu_seqlens[sequence]
    offsets = torch.arange(max_seqlen, device=query.device)
    unfold = (cu_seqlens[:-1, None] + offsets).clamp(max=num_tokens - 1).flatten()

    def unfolded(x: Tensor) -> Tensor:  # (1, heads, T, d) → (S, heads, max_seqlen, d)
        tokens_first = x[0].transpose(0, 1).index_select(0, unfold)
        return tokens_first.unflatten(0, (num_seqs, max_seqlen)).transpose(1, 2)

    out = scaled_dot_product_attention(
        unfolded(query),
        unfolded(key),
        unfolded(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, fold)[None], None


AttentionInterface.register("packed", packed_attention)
