"""Sampled responses: who samples which, how they come together, how the engines follow the policy, and files of them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
from data import Problem
from hf_sampler import HFSampler, Sampling, VllmSampler


@dataclass
class Rollout:
    """One sampled response: token ids as sampled, the sampler's log-probability of each, "stop" or "length", and, once
    graded, R ∈ {0, 1}."""

    problem: Problem
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    answer: str = ""
    reward: float = 0.0
    timeout: bool = False


def sample_responses(
    engine: VllmSampler | HFSampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    count: int,
    sampling: Sampling,
    seed: str,
    first: int = 0,
) -> list[Rollout]:
    """This rank's share of `count` responses to each problem; `gathered` puts the shares together.

    Responses are dealt to engines one by one, so that every engine gets its part of every problem's: the expected
    number of tokens is the same for all, which no division of problems could promise. Response i to the problem at
    place p is drawn from a random stream of its own, derived from (seed, p, i): neither the number of engines nor the batch
    matters, and a resumed run draws it again. `first` is the place of the first problem, where these are a part of more. Of
    the ranks that share an engine the first one answers.
    """
    engines, number = distributed.world_size() // engine.ranks, distributed.rank() // engine.ranks
    share = [divmod(k, count) for k in range(number, len(problems) * count, engines)]
    streams = [_number(f"{seed}/{first + p}") for p in range(len(problems))]
    samples = engine.generate(
        [problems[p].prompt_ids for p, _ in share], [streams[p] + i for p, i in share], sampling
    )
    if distributed.rank() % engine.ranks:
        return []
    texts = tokenizer.batch_decode([s.token_ids for s in samples], skip_special_tokens=False)
    return [
        Rollout(problems[p], s.token_ids, s.logprobs, s.finish_reason, text)
        for (p, _), s, text in zip(share, samples, texts, strict=True)
    ]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())


def gather_rollouts(mine: list[Rollout]) -> list[Rollout]:
    """The responses of all ranks, problem by problem, on every rank."""
    parts = [part for part in distributed.all_gather_objects(mine) if part]
    return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]


def sync_weights(engine: VllmSampler | HFSampler, policy: torch.nn.Module) -> None:
    """Give the engine every weight of the policy, gathered from the ranks one parameter at a time. The head is passed by
    name even where it is tied to the embedding and a state dict may not list it: vLLM would go on with the new body and
    the old head, without an error."""
    weights = dict(policy.model.named_parameters())
    weights["lm_head.weight"] = policy.model.get_output_embeddings().weight
    engine.load_weights(
        (name, distributed.full_tensor(weight, engine.dtype)) for name, weight in weights.items()
    )


def transcript(r: Rollout) -> dict[str, Any]:
    """A rollout as one JSON object for people: texts, not ids."""
    return {
        "problem": r.problem.source, "question": r.problem.question, "gold": r.problem.answer, "response": r.text,
        "answer": r.answer, "reward": r.reward, "finish": r.finish_reason, "tokens": len(r.token_ids), "timeout": r.timeout,
    }  # fmt: skip


def transcripts(
    rollouts: Sequence[Rollout], keep: int, keep_tokens: int,
    tokenizer: PreTrainedTokenizerBase, values: Tensor | None, advantages: Tensor,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Transcripts of `keep` rollouts, spread over the step's problems. `keep_tokens` of them, spread likewise, have every
    token's text, id, log-probability as sampled, V(s_t) (unless `values` is None) and Â_t, to four digits. Values and
    advantages are flat (N,), in the order of `rollouts`. Where the texts of the tokens are not the response, these are
    left out."""
    starts = [0, *accumulate(len(r.token_ids) for r in rollouts)]
    kept = _spread(range(len(rollouts)), keep)
    detailed = _spread(kept, keep_tokens)
    for i in kept:
        r, here, per_token = rollouts[i], slice(starts[i], starts[i + 1]), {}
        if i in detailed and "".join(texts := pieces(tokenizer, r.token_ids)) == r.text:
            per_token = {"pieces": texts, "ids": r.token_ids, "logprobs": _short(r.logprobs)}
            per_token |= {} if values is None else {"values": _short(values[here].tolist())}
            per_token["advantages"] = _short(advantages[here].tolist())
        yield transcript(r) | per_token


def _spread(items: Sequence[int], count: int) -> Sequence[int]:
    return items[:: max(1, len(items) // max(1, count))][:count]


def _short(numbers: Sequence[float]) -> list[float]:
    return [float(f"{x:.4g}") for x in numbers]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that all of them together are the text of the response. A character that is split over
    tokens belongs to its last one; the others are empty. A token is decoded after the one before it, because some
    tokenizers drop a space at the beginning.

    >>> import tiny
    >>> pieces(tiny.tokenizer(), tiny.tokenizer().encode(" so 7 ∑"))
    [' so', ' 7', ' ', '', '', '∑']
    """
    texts, start, seen = [], 0, ""
    for t in range(len(ids)):
        text = tokenizer.decode(ids[start : t + 1])
        if text.endswith("\ufffd") and t + 1 < len(ids):  # perhaps the beginning of a character
            texts.append("")
            continue
        texts.append(text[len(seen) :])
        start, seen = t, tokenizer.decode(ids[t : t + 1])
    return texts


def save_rollouts(path: Path, rollouts: Sequence[Rollout], ids: bool = True) -> None:
    """Rollouts as JSON lines; with `ids`, and log-probabilities, `read` makes the same rollouts of them again. Written
    beside and renamed, by whichever rank calls."""
    beside = path.with_name(f"{path.name}.{distributed.rank()}.tmp")
    with beside.open("w") as file:
        for r in rollouts:
            exact = (
                {"prompt_ids": r.problem.prompt_ids, "ids": r.token_ids, "logprobs": r.logprobs}
                if ids
                else {}
            )
            print(json.dumps(transcript(r) | exact, ensure_ascii=False), file=file)
    beside.replace(path)


def load_rollouts(path: Path, ids: bool = True) -> list[Rollout]:
    """Rollouts that `write` left. Of those it left without ids only the number of tokens is known: they are zeros.
    Raises ValueError naming file, line and what is missing."""
    rollouts = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                r = json.loads(line)
                exact = (
                    (r["prompt_ids"], r["ids"], r["logprobs"])
                    if ids
                    else ((), [0] * r["tokens"], [])
                )
                problem = Problem(r["problem"], r["question"], r["gold"], tuple(exact[0]))
                graded = (r["response"], r["answer"], r["reward"], r["timeout"])
                rollouts.append(Rollout(problem, exact[1], exact[2], r["finish"], *graded))
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(
                    f"{path}: line {number}: not a saved rollout ({error!r})"
                ) from None
    return rollouts
