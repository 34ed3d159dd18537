"""Rollouts for people: some of every step as JSON, a few of them token by token with V(s_t) and
Â_t."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reports.metrics import significant
from rollout import Rollout, transcript


def transcripts(
    rollouts: Sequence[Rollout],
    keep: int,
    keep_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    values: Tensor | None,
    advantages: Tensor,
) -> Iterator[dict[str, Any]]:
    """Transcripts of `keep` rollouts, spread over the step's problems. `keep_tokens` of them,
    spread likewise, have the text, id, log-probability as sampled, V(s_t) (unless `values` is None)
    and Â_t of every token, to four digits. Values and advantages are flat (N,), in the order of
    `rollouts`. A response whose tokens' texts do not add up to its text has no such lists."""
    starts = [0, *accumulate(len(r.token_ids) for r in rollouts)]
    kept = _spread(range(len(rollouts)), keep)
    detailed = _spread(kept, keep_tokens)
    for i in kept:
        record = transcript(rollouts[i])
        if i in detailed:
            tokens = slice(starts[i], starts[i + 1])
            local_values = None if values is None else values[tokens]
            record |= _per_token(rollouts[i], tokenizer, local_values, advantages[tokens])
        yield record


def _spread(items: Sequence[int], count: int) -> Sequence[int]:
    """`count` of the items, evenly spaced."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def _per_token(
    r: Rollout, tokenizer: PreTrainedTokenizerBase, values: Tensor | None, advantages: Tensor
) -> dict[str, list]:
    texts = token_texts(tokenizer, r.token_ids)
    if "".join(texts) != r.text:
        return {}
    lists = {"pieces": texts, "ids": r.token_ids}
    lists["logprobs"] = [significant(x) for x in r.logprobs]
    if values is not None:
        lists["values"] = [significant(x) for x in values.tolist()]
    lists["advantages"] = [significant(x) for x in advantages.tolist()]
    return lists


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text of the response. A character that is split
    over several tokens belongs to the last of them, and the others are empty. A token is decoded
    after the one before it, because some tokenizers drop a space at the beginning.

    >>> from toy import tiny
    >>> token_texts(tiny.tokenizer(), tiny.tokenizer().encode(" so 7 ∑"))
    [' so', ' 7', ' ', '', '', '∑']
    """
    texts = []
    start = 0
    seen = ""  # the text of the token before, which is decoded again
    for t in range(len(token_ids)):
        text = tokenizer.decode(token_ids[start : t + 1])
        if text.endswith("\ufffd") and t + 1 < len(token_ids):  # perhaps half of a character
            texts.append("")
            continue
        texts.append(text[len(seen) :])
        start, seen = t, tokenizer.decode(token_ids[t : t + 1])
    return texts
