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
from contextlib import suppress
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

import distributed
from data import Problem
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


def pack_token_ids(sequences: Sequence[Sequence[int]], device: str = "cpu") -> MicroBatch:
    """One pack of whole sequences, in which every token but a sequence's first is an action."""
    rollouts = []
    starts = [0]
    for first, *rest in sequences:
        rollouts.append(Rollout(Problem("", "", "", (first,)), rest, [], "", ""))
        starts.append(starts[-1] + len(rest))
    return _micro_batch(rollouts, list(range(len(rollouts))), starts, device)


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
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence of a pack to itself; query (1, heads, T, d) → (1, T, heads,
    d). Raises ValueError at an argument that it does not know.

    The pack is unfolded to (S, heads, max_seqlen, d), each sequence left-aligned. Behind a short
    sequence stands the beginning of its neighbor. Causality keeps the real queries from looking
    that far, and the outputs of the other queries are dropped. Models find this function under the
    name "packed" (transformers' attention interface). That name has no mask function, which also
    keeps transformers from building a mask. On a GPU in bfloat16 torch's kernel for packs does the
    same without unfolding, where it can (`_varlen_attention`).

    A token sees itself and the `sliding_window` − 1 tokens before it; `softcap` c turns a score s
    into c · tanh(s / c); `s_aux` (heads,) are sinks, a further score in every softmax.
    """
    _require_known(module, attention_mask, others)
    window = None
    if sliding_window is not None and sliding_window < max_seqlen:
        window = sliding_window
    plain = softcap is None and s_aux is None
    if plain and _varlen_takes(query, value):
        return _varlen_attention(query, key, value, cu_seqlens, max_seqlen, scaling, window), None
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

    query, key, value = unfolded(query), unfolded(key), unfolded(value)
    if plain:
        grouped = False
        if query.shape[1] != key.shape[1]:  # a statement: to torch.compile the comparison itself
            grouped = True  # is no bool, and would break its graph
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if window is None else _visible(max_seqlen, window, query.device),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    else:
        out = _explicit_attention(query, key, value, scaling, window, softcap, s_aux)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, fold)[None], None


def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's attention for packs on GPUs, FlashAttention 2; None where there is none. Newer
    versions have to be told that heads may be grouped."""
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" in signature(varlen_attn).parameters:
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn


VARLEN = _varlen_kernel()
VARLEN_HEAD_SIZES = (32, 64, 96, 128, 192, 256)  # those that it has without padding


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for packs computes attention of these; both (1, heads, T, d)."""
    if VARLEN is None or not query.is_cuda or query.dtype != torch.bfloat16:
        return False
    return query.shape[3] == value.shape[3] and query.shape[3] in VARLEN_HEAD_SIZES


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`packed_attention` by torch's kernel for packs: it attends to the pairs that are needed, and
    to no others."""
    before = -1 if window is None else window - 1  # tokens that a token sees before itself; -1: all
    out = VARLEN(
        query[0].transpose(0, 1),  # (T, heads, d)
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(before, 0),
    )
    return out[None]


CHECK_LENGTHS = (3, 7, 17)
CHECK_TOLERANCE = 1e-4  # of the largest output, or of 1; rounding is about 1e-6


@torch.no_grad()
def check_against_own_forward(
    model: PreTrainedModel,
    packed: Callable[[MicroBatch], Tensor],
    own: Callable[[Tensor], tuple[Tensor, float]],
    name: str,
    quantity: str,
) -> None:
    """Compare a per-token quantity of a pack of random sequences with the model's own forward pass
    of one sequence at a time, with transformers' plainest attention. `own` returns the quantity of
    all tokens but the first and the largest number behind it. Raises ValueError, which begins with
    `name`, when they differ: the model does something that this program does not know of."""
    what = f"{name}: the architecture {model.config.model_type} is not supported: "
    random_ids = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    sequences = [
        torch.randint(vocab_size, (length,), generator=random_ids) for length in CHECK_LENGTHS
    ]
    try:
        ours = packed(pack_token_ids([ids.tolist() for ids in sequences]))
        model.set_attn_implementation("eager")
        expected, magnitudes = zip(*map(own, sequences), strict=True)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"{what}{type(error).__name__}: {str(error).splitlines()[0]}") from error
    finally:
        model.set_attn_implementation("packed")
    gap = float((ours - torch.cat(expected)).abs().max())
    if not gap <= CHECK_TOLERANCE * max(1.0, *magnitudes):
        raise ValueError(
            f"{what}{quantity} of a pack differ from the model's own by up to {gap:.3g}"
        )


@torch.no_grad()
def attention_windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer's attention, None for one that sees all, as far as a model
    without numbers (on torch's device "meta") can be run on a small pack."""
    windows: list[int | None] = []

    def record(module: torch.nn.Module, *states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        windows.append(arguments.get("sliding_window"))
        return packed_attention(module, *states, **arguments)

    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    micro = pack_token_ids([[0] * length for length in CHECK_LENGTHS], "meta")
    with suppress(RuntimeError):  # routing to experts needs numbers
        hidden_states(model, micro)
    return windows


# Arguments of transformers' attention functions that cannot change the result here.
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states"}
HARMLESS |= {"output_router_logits", "return_dict", "cache_position"}


def _require_known(
    module: torch.nn.Module, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    """Raise ValueError when a model asks for more than `packed_attention` computes."""
    if attention_mask is not None:
        raise ValueError("packed attention: the model makes an attention mask of its own")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError("packed attention: the model's attention is not causal")
    for name, argument in others.items():
        known = name in HARMLESS or name == "is_causal" or (name == "dropout" and argument == 0)
        if argument is not None and not known:
            raise ValueError(f"packed attention: the argument {name} is not supported")


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys a query sees, (queries, keys): itself and those before it, within the window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of unfolded sequences (S, heads, L, d) with soft-capped scores or sinks, which
    torch's function does not have. It holds all scores, (S, heads, L, L)."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(scores.shape[-1], window, query.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


AttentionInterface.register("packed", packed_attention)
