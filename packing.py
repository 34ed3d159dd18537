"""Ragged rollouts ⇄ packed micro-batches: the only place that packs, pads or shifts.

A micro-batch is one pack: whole sequences, one after another ("sample packing", §3.1). The prompt
of several responses stands once, and the layers compute it once:

    sequence A: prompt p p p, response a b c        sequence C: prompt q q, response f g
    sequence B: prompt p p p, response d e

    place          0  1  2   3  4   5   6  7  8
    input_ids      p  p  p | a  b | d | q  q  f     a response's last token is no input: nothing
                                                    follows it
    position_ids   0  1  2   3  4   3   0  1  2     a response goes on where its prompt ends

    predict_index  2 3 4    2 5    7 8              the token *before* an action: its hidden state
                   ↓ ↓ ↓    ↓ ↓    ↓ ↓              gives log π(a_t|s_t) and V(s_t) alike
    actions        a b c    d e    f g
    flat           0 1 2    3 4    5 6              the action's place in the step's (N,) vectors

Attention is causal. The bars cut the pack into segments, and a segment attends to its prompt and to
itself, never to another sequence:

    a segment      p p p    a b          d          q q f    cu_seqlens_q = [0, 3, 5, 6, 9]
    its keys       p p p    p p p a b    p p p d    q q f    cu_seqlens_k = [0, 3, 8, 12, 15]
    key_index      0 1 2    0 1 2 3 4    0 1 2 5    6 7 8

No [T × T] mask is ever built.
"""

import heapq
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from itertools import accumulate
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

import distributed
from data import Problem
from rollout import Rollout


class MicroBatch(NamedTuple):
    """One pack of T input tokens and n actions; the picture above shows each field."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    layout: "Layout"  # which keys each token attends to
    predict_index: Tensor  # (n,)
    actions: Tensor  # (n,)
    flat: Tensor  # (n,)


class Layout(NamedTuple):
    """The segments of a pack, as both ways to compute attention want them."""

    cu_seqlens_q: Tensor  # (S + 1,) int32: where each segment begins and the last one ends
    cu_seqlens_k: Tensor  # (S + 1,) int32: the same for their keys
    key_index: Tensor | None  # (K,) the keys' places in the pack; None where no prompt is shared
    max_seqlen_q: int  # tokens of the longest segment
    max_seqlen_k: int  # keys of the segment that has most
    groups: tuple["Group", ...]  # segments of like lengths: see `_unfold`
    fold: Tensor  # (T,) where a token's output stands among those of all groups


class Group(NamedTuple):
    """Segments that attend together."""

    queries: Tensor  # (segments, L) places in the pack; behind a short segment stand others
    keys: Tensor  # (segments, before + L)
    before: int | Tensor  # keys that stand before the first query


class Size(NamedTuple):
    """Input tokens of a sequence. Sequences with an equal `prompt` can share it."""

    prompt: Hashable
    prompt_tokens: int
    own: int  # response tokens, without the last


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
    starts = [0, *accumulate(len(rollout.token_ids) for rollout in rollouts)]
    sizes = {i: size(rollouts[i]) for i in members}
    shortest = min(sizes, key=lambda i: sizes[i].prompt_tokens + sizes[i].own)
    packs = assign_packs(sizes, max_tokens, distributed.world_size())
    for pack in packs[distributed.rank()]:
        if pack:
            yield _micro_batch(rollouts, pack, starts, device)
        else:
            yield _filler(_micro_batch(rollouts, [shortest], starts, device))


def size(rollout: Rollout) -> Size:
    """The input tokens of a response and its prompt."""
    prompt = rollout.problem.prompt_ids
    return Size(prompt, len(prompt), len(rollout.token_ids) - 1)


def assign_packs(
    sizes: Mapping[int, Size], max_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """For each rank its packs, the fullest first, and for each pack the numbers of its sequences.

    Responses of one prompt meet where they may. Which sequences share a pack changes neither loss
    nor gradient.

    >>> sizes = {0: Size("p", 3, 2), 1: Size("q", 2, 4), 2: Size("p", 3, 5), 3: Size("q", 2, 1)}
    >>> assign_packs(sizes, max_tokens=10, world_size=1)  # p with its two responses: 3 + 5 + 2
    [[[2, 0], [1, 3]]]
    >>> assign_packs(sizes, max_tokens=8, world_size=2)
    [[[2], [0]], [[1, 3], []]]
    """
    ranks = [
        _fill_packs({i: sizes[i] for i in members}, max_tokens)
        for members in _assign_ranks(sizes, world_size)
    ]
    most = max(map(len, ranks))
    return [packs + [[]] * (most - len(packs)) for packs in ranks]


LIMITS = (2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # tokens of a piece, over the mean work of a rank


def _assign_ranks(sizes: Mapping[int, Size], world_size: int) -> list[list[int]]:
    """For each rank its sequences. Responses of one prompt stay together where the work can still
    be shared out evenly. Otherwise prompts with many responses are cut into pieces, which read the
    prompt again: into as many as make the slowest rank fastest."""
    groups = _by_prompt(sizes)
    if world_size == 1:
        return [[i for group in groups for i in group]]
    share = sum(_tokens(group, sizes) for group in groups) / world_size
    candidates = []
    for limit in LIMITS:
        pieces = [piece for group in groups for piece in _cut(group, sizes, limit * share)]
        tokens = {k: _tokens(piece, sizes) for k, piece in enumerate(pieces)}
        bins = balance(tokens, world_size)
        slowest = max(sum(tokens[k] for k in numbers) for numbers in bins)
        candidates.append((slowest, [[i for k in numbers for i in pieces[k]] for numbers in bins]))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _by_prompt(sizes: Mapping[int, Size]) -> list[list[int]]:
    """The sequences of each prompt, the longest first."""
    groups: dict[Hashable, list[int]] = {}
    for i in sorted(sizes, key=lambda i: -sizes[i].own):
        groups.setdefault(sizes[i].prompt, []).append(i)
    return list(groups.values())


def _tokens(group: Sequence[int], sizes: Mapping[int, Size]) -> int:
    """Input tokens of sequences that share their prompt."""
    return sizes[group[0]].prompt_tokens + sum(sizes[i].own for i in group)


def pack_tokens(pack: Sequence[int], sizes: Mapping[int, Size]) -> int:
    """Input tokens of a pack, in which every prompt stands once."""
    return sum(_tokens(group, sizes) for group in _by_prompt({i: sizes[i] for i in pack}))


def _cut(group: list[int], sizes: Mapping[int, Size], limit: float) -> list[list[int]]:
    """The sequences of one prompt in pieces of about `limit` tokens, of near-equal sums."""
    count = min(len(group), ceil(_tokens(group, sizes) / limit))
    return balance({i: sizes[i].own for i in group}, count)


def _fill_packs(sizes: Mapping[int, Size], max_tokens: int) -> list[list[int]]:
    """Packs of at most `max_tokens` tokens, the fullest first. A sequence goes into the last pack
    where it fits, which is most often that of its prompt."""
    packs: list[list[int]] = []
    prompts: list[set[Hashable]] = []  # in each pack
    loads: list[int] = []  # of each pack in tokens
    for group in _by_prompt(sizes):
        for i in group:
            prompt, prompt_tokens, own = sizes[i]
            for k in reversed(range(len(packs))):
                added = own if prompt in prompts[k] else prompt_tokens + own
                if loads[k] + added <= max_tokens:
                    break
            else:
                k, added = len(packs), prompt_tokens + own
                packs.append([])
                prompts.append(set())
                loads.append(0)
            packs[k].append(i)
            prompts[k].add(prompt)
            loads[k] += added
    return [packs[k] for k in sorted(range(len(packs)), key=lambda k: -loads[k])]


def balance(sizes: Mapping[int, int], num_bins: int) -> list[list[int]]:
    """Distribute numbered sizes over bins of near-equal sums: the largest first, each into the
    lightest bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, k) for k in range(num_bins)]
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        load, lightest = loads[0]
        bins[lightest].append(i)
        heapq.heapreplace(loads, (load + sizes[i], lightest))
    return bins


# ── one pack ──────────────────────────────────────────────────────────────────────────────────────


class Segment(NamedTuple):
    """Tokens of a pack that stand together and attend to themselves and to their prompt."""

    start: int
    length: int
    prompt: int  # where its prompt begins
    before: int  # tokens of that prompt; 0 where the segment begins with its prompt


def _micro_batch(
    rollouts: Sequence[Rollout], pack: list[int], starts: list[int], device: torch.device | str
) -> MicroBatch:
    """The rollouts numbered `pack` in one pack; `starts` are their places in the flat vectors."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    predict_index: list[int] = []
    actions: list[int] = []
    flat: list[int] = []
    segments: list[Segment] = []
    for group in _by_prompt({i: size(rollouts[i]) for i in pack}):
        prompt = rollouts[group[0]].problem.prompt_ids
        prompt_start = len(input_ids)
        input_ids += prompt
        position_ids += range(len(prompt))
        if len(group) > 1:
            segments.append(Segment(prompt_start, len(prompt), prompt_start, 0))
        for i in group:
            response = rollouts[i].token_ids
            start, own = len(input_ids), len(response) - 1
            input_ids += response[:-1]
            position_ids += range(len(prompt), len(prompt) + own)
            # The last prompt token predicts the first action.
            predict_index += [prompt_start + len(prompt) - 1, *range(start, start + own)]
            actions += response
            flat += range(starts[i], starts[i] + len(response))
            if len(group) == 1:
                segments.append(Segment(prompt_start, len(prompt) + own, prompt_start, 0))
            elif own:
                segments.append(Segment(start, own, prompt_start, len(prompt)))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    return MicroBatch(
        input_ids=tensor(input_ids)[None],
        position_ids=tensor(position_ids)[None],
        layout=_layout(segments, device),
        predict_index=tensor(predict_index),
        actions=tensor(actions),
        flat=tensor(flat),
    )


def _layout(segments: Sequence[Segment], device: torch.device | str) -> Layout:
    """The layout of a pack that is made of these segments, in this order."""
    queries = [s.length for s in segments]
    keys = [s.before + s.length for s in segments]
    num_tokens = sum(queries)
    key_index: list[int] = []
    for s in segments:
        key_index += range(s.prompt, s.prompt + s.before)
        key_index += range(s.start, s.start + s.length)
    fold = [0] * num_tokens
    groups = []
    filled = 0
    for members in like_lengths(segments):
        for s in members:
            end = filled + _num_queries(s)
            fold[s.start : s.start + s.length] = range(end - s.length, end)
            filled += _num_queries(members[0])
        groups.append(_group(members, num_tokens, device))
    shares = any(s.before for s in segments)
    return Layout(
        cu_seqlens_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=device),
        key_index=torch.tensor(key_index, device=device) if shares else None,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
        groups=tuple(groups),
        fold=torch.tensor(fold, device=device),
    )


def queries_alone(prompt_tokens: float, own: float) -> bool:
    """Whether unfolding computes only a response's queries, with a mask, and not its prompt's once
    more. A whole sequence leaves out pairs that causality hides (on CPUs in blocks of 512 keys);
    that is worth more where the prompt is short, or the response much longer."""
    return prompt_tokens >= max(64, own - 256)


def _before(s: Segment) -> int:
    """Keys that stand before the first query when a segment is unfolded."""
    return s.before if queries_alone(s.before, s.length) else 0


def _num_queries(s: Segment) -> int:
    """Queries of a segment when it is unfolded."""
    return s.before + s.length - _before(s)


# Those of a group are no shorter than this share of the longest, or by so many tokens.
LIKE, SLACK = 0.8, 8


def like_lengths(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that attend together: they have like numbers of queries, because all of them compute
    as many pairs of query and key as the longest, which comes first.

    >>> prompt, a, b = Segment(0, 90, 0, 0), Segment(90, 40, 0, 90), Segment(130, 38, 0, 90)
    >>> [len(group) for group in like_lengths([prompt, a, b])]
    [1, 2]
    """
    groups: list[list[Segment]] = []
    for s in sorted(segments, key=lambda s: (_before(s), -_num_queries(s))):
        if groups and _before(s) == _before(groups[-1][0]):
            longest = _num_queries(groups[-1][0])
            if _num_queries(s) >= min(LIKE * longest, longest - SLACK):
                groups[-1].append(s)
                continue
        groups.append([s])
    return groups


def _group(members: Sequence[Segment], num_tokens: int, device: torch.device | str) -> Group:
    """The places of the members' queries and keys: first those of its prompt, then its own."""
    before, longest = _before(members[0]), _num_queries(members[0])
    columns = [torch.tensor(column)[:, None] for column in zip(*members, strict=True)]
    start, _, prompt, prompt_tokens = columns
    place = torch.arange(before + longest)
    own = start + place - prompt_tokens
    keys = torch.where(place < prompt_tokens, prompt + place, own)
    keys = keys.clamp(max=num_tokens - 1).to(device)
    return Group(queries=keys[:, before:], keys=keys, before=before)


def pack_token_ids(
    sequences: Sequence[Sequence[int]], prompt_tokens: int = 1, device: str = "cpu"
) -> MicroBatch:
    """One pack of whole sequences, in which every token behind the first `prompt_tokens` is an
    action."""
    rollouts = []
    for sequence in sequences:
        prompt, response = tuple(sequence[:prompt_tokens]), list(sequence[prompt_tokens:])
        rollouts.append(Rollout(Problem("", "", "", prompt), response, [], "", ""))
    starts = [0, *accumulate(len(r.token_ids) for r in rollouts)]
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
        layout=micro.layout,
    )
    return out.last_hidden_state[0, micro.predict_index]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each segment of a pack to itself and its prompt; query (1, heads, T, d) →
    (1, T, heads, d). Raises ValueError at an argument that it does not know.

    The segments are unfolded, one group of like lengths after another (`_unfold`). On a GPU in
    bfloat16 torch's kernel for packs does the same without unfolding, where it can
    (`_varlen_attention`). Models find this function under the name "packed" (transformers'
    attention interface). That name has no mask function, which also keeps transformers from
    building a mask.

    A token sees itself and the `sliding_window` − 1 tokens before it; `softcap` c turns a score s
    into c · tanh(s / c); `s_aux` (heads,) are sinks, a further score in every softmax.
    """
    _require_known(module, attention_mask, others)
    window = None
    if sliding_window is not None and sliding_window < layout.max_seqlen_k:
        window = sliding_window
    plain = softcap is None and s_aux is None
    if plain and _varlen_takes(query, value):
        return _varlen_attention(query, key, value, layout, scaling, window), None
    groups, fold = layout.groups, layout.fold
    if torch.compiler.is_compiling():  # a pack with more groups would be compiled anew
        groups, fold = _one_group(layout, query.shape[2])
    outputs = []
    for group in groups:
        q, k, v = _unfold(query, key, value, group)
        if plain:
            out = _plain_attention(q, k, v, group.before, scaling, window)
        else:
            visible = _visible(q.shape[2], k.shape[2], group.before, window, q.device)
            out = _explicit_attention(q, k, v, visible, scaling, softcap, s_aux)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, fold)[None], None


def _unfold(query: Tensor, key: Tensor, value: Tensor, group: Group) -> tuple[Tensor, ...]:
    """The group's queries (S, heads, L, d) and keys and values (S, heads, before + L, d). Behind a
    short segment stand tokens of others. Causality keeps the real queries from looking that far,
    and the outputs of the other queries are dropped."""

    def gathered(x: Tensor, places: Tensor) -> Tensor:
        tokens_first = x[0].transpose(0, 1).index_select(0, places.flatten())
        return tokens_first.unflatten(0, places.shape).transpose(1, 2)

    return gathered(query, group.queries), gathered(key, group.keys), gathered(value, group.keys)


def _one_group(layout: Layout, num_tokens: int) -> tuple[tuple[Group], Tensor]:
    """All segments as one group, whatever their lengths, and the fold that belongs to it."""
    cu_q, cu_k, longest = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q
    device = cu_q.device
    queries = (cu_q[:-1, None] + torch.arange(longest, device=device)).clamp(max=num_tokens - 1)
    keys = cu_k[:-1, None] + torch.arange(layout.max_seqlen_k, device=device)
    if layout.key_index is None:
        keys = keys.clamp(max=num_tokens - 1)
    else:
        keys = layout.key_index[keys.clamp(max=len(layout.key_index) - 1)]
    before = (cu_k.diff() - cu_q.diff())[:, None, None, None]
    place = torch.arange(num_tokens, device=device, dtype=cu_q.dtype)
    segment = torch.searchsorted(cu_q, place, right=True) - 1
    fold = segment * longest + place - cu_q[segment]
    return (Group(queries, keys, before),), fold


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: int | Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of unfolded segments by torch's function."""
    grouped = False
    if query.shape[1] != key.shape[1]:  # a statement: to torch.compile the comparison itself is no
        grouped = True  # bool, and would break its graph
    causal = window is None and isinstance(before, int) and before == 0
    mask = None
    if not causal:
        mask = _visible(query.shape[2], key.shape[2], before, window, query.device)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )


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
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`packed_attention` by torch's kernel for packs: it attends to the pairs that are needed, and
    to no others. The last query of a segment sees the last key."""

    def keys(x: Tensor) -> Tensor:  # (1, heads, T, d) → (K, heads, d)
        x = x[0].transpose(0, 1)
        if layout.key_index is None:
            return x
        # The gradient of a prompt is a sum over its responses, and takes float32.
        return x.float().index_select(0, layout.key_index).to(x.dtype)

    before = -1 if window is None else window - 1  # tokens that a token sees before itself; -1: all
    out = VARLEN(
        query[0].transpose(0, 1),  # (T, heads, d)
        keys(key),
        keys(value),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scaling,
        window_size=(before, 0),
    )
    return out[None]


CHECK_PROMPT = 5  # tokens; the first prompt has all responses but one
CHECK_LENGTHS = (3, 7, 17, 5)  # of the responses
CHECK_TOLERANCE = 1e-4  # of the largest output, or of 1; rounding is about 1e-6


@torch.no_grad()
def check_against_own_forward(
    model: PreTrainedModel,
    packed: Callable[[MicroBatch], Tensor],
    own: Callable[[Tensor], tuple[Tensor, float]],
    name: str,
    quantity: str,
) -> None:
    """Compare a per-token quantity of a pack of random sequences, some with one prompt, with the
    model's own forward pass of one sequence at a time, with transformers' plainest attention. `own`
    returns the quantity of all tokens but the first and the largest number behind it. Raises
    ValueError, which begins with `name`, when they differ: the model does something that this
    program does not know of."""
    what = f"{name}: the architecture {model.config.model_type} is not supported: "
    sequences = _random_sequences(model.get_input_embeddings().weight.shape[0])
    try:
        micro = pack_token_ids([ids.tolist() for ids in sequences], CHECK_PROMPT)
        ours = packed(micro)[micro.flat.argsort()]
        model.set_attn_implementation("eager")
        quantities, magnitudes = zip(*map(own, sequences), strict=True)
        expected = [quantity[CHECK_PROMPT - 1 :] for quantity in quantities]
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"{what}{type(error).__name__}: {str(error).splitlines()[0]}") from error
    finally:
        model.set_attn_implementation("packed")
    if not torch.cat(expected).isfinite().all():
        raise ValueError(f"{name}: {quantity} of the model's own forward pass are not finite")
    gap = float((ours - torch.cat(expected)).abs().max())
    if not gap <= CHECK_TOLERANCE * max(1.0, *magnitudes):
        raise ValueError(
            f"{what}{quantity} of a pack differ from the model's own by up to {gap:.3g}"
        )


def _random_sequences(vocab_size: int) -> list[Tensor]:
    """Sequences to check a model with: prompts of CHECK_PROMPT tokens, the last one another than
    the first ones, and responses of CHECK_LENGTHS."""
    random_ids = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (2, CHECK_PROMPT), generator=random_ids)
    sequences = []
    for k, length in enumerate(CHECK_LENGTHS):
        response = torch.randint(vocab_size, (length,), generator=random_ids)
        prompt = prompts[1 if k == len(CHECK_LENGTHS) - 1 else 0]
        sequences.append(torch.cat([prompt, response]))
    return sequences


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
    micro = pack_token_ids([[0] * length for length in CHECK_LENGTHS], device="meta")
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


def _visible(
    num_queries: int,
    num_keys: int,
    before: int | Tensor,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Which keys a query sees, (queries, keys): itself and those before it, within the window. The
    first query stands behind `before` keys; a tensor (S, 1, 1, 1) gives (S, 1, queries, keys)."""
    place = torch.arange(num_queries, device=device)[:, None] + before
    distance = place - torch.arange(num_keys, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of unfolded segments with soft-capped scores or sinks, which torch's function does
    not have. It holds all scores, (S, heads, queries, keys)."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


AttentionInterface.register("packed", packed_attention)
