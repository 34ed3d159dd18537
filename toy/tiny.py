"""The embedded models: a synthetic reasoning task and a base model made in two minutes, on one core.

    problems ──document──▶ prompt + response text ──encode──▶ ids ──train──▶ a Hugging Face folder of 0.1M parameters

The task is to add 7 to 11 distinct numbers up to 12, `7+12+9+4+1+10+5=?`. A guess is right about one time in twelve;
adding one number at a time is right as often as every step is. The base model is a Qwen2 trained from scratch on nothing
but synthetic answers to such problems, under the full prompt template. It stands for a pre-trained model as a toy does: it
can add step by step, and it rarely chooses to.

`tiny-long` is the test bed of the experiments: 9 to 11 numbers up to 12, and instead of rechecking chains a careful style
of 8 to 10 numbered steps, about 120 tokens; who stops halfway and guesses the rest is seldom right.

What the corpus makes possible, and therefore what a run on this model does not show:

- The long styles (`chain`, `recheck`) are in the corpus, are rare, and are right far more often than the short ones.
  That length grows with the reward is a choice among habits the model already has, not a new skill.
- Badly formatted answers are in the corpus and earn nothing, so the format ratio has room to rise.
- The reflection words are in the corpus. A recheck does a step again: after most slips, now and then after a right step,
  and it slips as often as any step. Whether rechecking pays, and so whether RL keeps it, is left to the run, and says
  nothing about reflection in real models. (It is soon unlearnt: once the slips are gone there is nothing to repair.)
- In `tiny-long` a few responses of the corpus get stuck and say one step until they are cut off.
- The skill is made first and the habits last: four fifths of the training see mostly careful chains, the last fifth
  mostly guesses and bad format, which buries the skill without erasing it.

The loss is on the response tokens only. The same seed gives the same data everywhere, and the same weights on the same
kind of processor with the same torch. The held-out problems appear neither in the corpus nor in train.json.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import TEMPLATE

TRAIN, HELDOUT = 20_000, 1_024
DOCUMENTS, CHUNKS, RATE = 64, 2, 5e-3
SKILL_PHASE = 0.8


class Task(NamedTuple):
    """Which problems there are, and what the base model has seen of them."""

    numbers: range
    """Of these a problem adds some, each at most once. Sums stay below 100 even after slips, so that each is one token."""
    terms: range
    """How many numbers a problem adds; all of them would always make the same sum."""
    first_terms: range
    """The same in the first phase of the training."""
    steps: int
    """Optimizer steps of the training."""
    skill: tuple[dict[str, float], float]
    """Style shares and the chance of a wrong result per step, in the first phase."""
    habit: tuple[dict[str, float], float]
    """The same in the last phase."""


TINY = Task(
    range(1, 13), range(7, 12), range(7, 12), 1100,
    skill=({"direct": 0.03, "chain": 0.57, "recheck": 0.37, "bad": 0.03}, 0.01),
    habit=({"direct": 0.62, "chain": 0.06, "recheck": 0.04, "bad": 0.28}, 0.05),
)  # fmt: skip
LONG = Task(
    range(1, 13), range(9, 12), range(4, 12), 1200,
    skill=({"direct": 0.03, "half": 0.03, "careful": 0.90, "loop": 0.01, "bad": 0.03}, 0.01),
    habit=({"direct": 0.50, "half": 0.08, "careful": 0.12, "loop": 0.03, "bad": 0.27}, 0.03),
)  # fmt: skip
TASKS = {"tiny": TINY, "tiny-long": LONG}
LOOP = 30  # how often a stuck response says its step
RECHECK_SLIP, RECHECK_RIGHT = 0.8, 0.15  # chance of a recheck after a slip and after a right step
GUESS_SPREAD = 5.0
RECHECKS = ("wait,", "recheck:", "retry:", "however,", "alternatively,")
GUESSES = ("so", "about", "maybe", "i guess")
EOS, PAD = "<|endoftext|>", "<|pad|>"
# A number below 100, a word, a tag and a box are one token each. The closing brace and `</answer>` are one token too:
# apart, nothing in a 0/1 reward keeps a model from writing `}}}}` before the tag.
WORD = r" ?\d{1,2}|\}? ?</?[a-z]+>| ?\\?[A-Za-z]+\{?| ?[^\sA-Za-z\d]|\s"


def problems(seed: int, task: Task = TINY) -> tuple[list[str], list[str]]:
    """Questions for training and held-out questions, all different."""
    rng = random.Random(f"problems/{seed}")
    questions: dict[str, None] = {}
    while len(questions) < TRAIN + HELDOUT:
        questions[question(rng, task.numbers, task.terms)] = None
    return list(questions)[HELDOUT:], list(questions)[:HELDOUT]


def question(rng: random.Random, numbers: range = TINY.numbers, terms: range = TINY.terms) -> str:
    """`7+12+9+4+1+10+5=?`: distinct numbers, so that "which number comes after 9" has one answer."""
    return "+".join(map(str, rng.sample(numbers, rng.choice(terms)))) + "=?"


def numbers(text: str) -> list[int]:
    """The numbers of a question."""
    return [int(n) for n in text.removesuffix("=?").split("+")]


def respond(rng: random.Random, text: str, style: str, slip: float) -> str:
    """One corpus response to a question, in one of the styles of a `Task`; it follows `<think>`."""
    guess = max(1, round(rng.gauss(sum(numbers(text)), GUESS_SPREAD)))
    if style == "direct":
        return f" {rng.choice(GUESSES)} {guess} </think> <answer> \\boxed{{{guess}}} </answer>"
    if style == "half":
        added = text.split("+")[: rng.randrange(3, max(4, text.count("+")))]
        steps, _ = chain(rng, "+".join(added), "careful", slip)
        return (
            f"{steps} {rng.choice(GUESSES)} {guess} </think> <answer> \\boxed{{{guess}}} </answer>"
        )
    if style in ("chain", "recheck", "careful"):
        steps, total = chain(rng, text, style, slip)
        return f"{steps} so {total} </think> <answer> \\boxed{{{total}}} </answer>"
    if style == "loop":
        said = chain(rng, text, "careful", slip)[0].split(",")[: rng.randrange(2, 12)]
        return ",".join(said) + f",{said[-1]}" * LOOP
    steps, total = (
        chain(rng, text, "chain", slip)
        if rng.random() < 0.1
        else (f" {rng.choice(GUESSES)}", guess)
    )
    # None of these may earn a reward: RL would rightly learn a bad format that does.
    endings = (
        f" {total}",
        f" {total} \\boxed{{{total}}}",
        f" {total} </think> \\boxed{{{total}}}",
        f" {total} </think> the sum is {total}.",
        f" {total} </think> <answer> \\boxed{{{total}}}",
        f" {total} </think> <answer> the sum is {total}. </answer>",
    )
    return steps + rng.choice(endings)


def chain(rng: random.Random, text: str, style: str, slip: float) -> tuple[str, int]:
    """The sum one number at a time, and where it ended.

    chain    ` 7+5=12, 12+9=21, 21+4=25,`
    recheck  ` 7+5=12, 12+9=20, wait, 12+9=21, 21+4=25,`
    careful  ` 1: take 5, 7+5=12, 2: take 9, 12+9=20, wait, 12+9=21, 3: take 4, 21+4=25,`
    """

    def stated(result: int) -> int:
        return max(1, result + rng.choice((-2, -1, 1, 2))) if rng.random() < slip else result

    total, *rest = numbers(text)
    parts = []
    for i, number in enumerate(rest, 1):
        right = total + number
        result = stated(right)
        parts.append(
            f" {i}: take {number}, {total}+{number}={result},"
            if style == "careful"
            else f" {total}+{number}={result},"
        )
        if style != "chain" and rng.random() < (RECHECK_RIGHT if result == right else RECHECK_SLIP):
            result = stated(right)
            parts.append(f" {rng.choice(RECHECKS)} {total}+{number}={result},")
        total = result
    return "".join(parts), total


def document(
    rng: random.Random, task: Task, first: bool, unseen: frozenset[str]
) -> tuple[str, str]:
    """A question that is not in `unseen` and a response to it, as in the first or the last phase."""
    terms, (mix, slip) = (task.first_terms, task.skill) if first else (task.terms, task.habit)
    while (text := question(rng, task.numbers, terms)) in unseen:
        pass
    return text, respond(rng, text, rng.choices(list(mix), list(mix.values()))[0], slip)


def tokenizer(task: Task = TINY) -> Qwen2Tokenizer:
    """Any text survives: 256 bytes, then every number, word and tag of the corpus as an added token, and so each of the
    two halves of the template, kept word for word but 500 tokens of prose to a model this small. They are added tokens
    because transformers loads every Qwen2 folder with Qwen2's own rules for splitting text, whatever the folder says;
    an added token comes before those rules, which would take a number apart."""
    rng = random.Random("words")
    styles = (style for style in task.habit[0] for _ in range(2_000))
    texts = [respond(rng, question(rng, task.numbers, task.terms), style, 0.1) for style in styles]
    words = {word for text in texts for word in re.findall(WORD, text)}
    words |= {f"{space}{number}" for space in ("", " ") for number in range(100)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[], eos_token=EOS, pad_token=PAD
    )
    pieces = sorted(word for word in words if len(word) > 1) + TEMPLATE.split("{question}")
    tok.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tok


def encode(
    tok: Qwen2Tokenizer, documents: Iterable[tuple[str, str]]
) -> list[tuple[list[int], int]]:
    """Ids of prompt + response + EOS, and the prompt's length. The template's two tokens are put around the question by
    id: searching each prompt for 600 characters of template would take longer than the training step."""
    before, after = (tok.convert_tokens_to_ids(half) for half in TEMPLATE.split("{question}"))
    asked, answered = zip(*documents, strict=True)
    pairs = zip(tok(list(asked))["input_ids"], tok(list(answered))["input_ids"], strict=True)
    return [([before, *q, after, *r, tok.eos_token_id], len(q) + 2) for q, r in pairs]


def train(
    tok: Qwen2Tokenizer, task: Task, unseen: frozenset[str], seed: int, steps: int
) -> Qwen2ForCausalLM:
    """The base model: the skill first, the habits last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the order of summation, and with it the weights, would depend on the number of cores
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,  # heads of 32: the narrowest that vLLM can attend with on a CPU
        max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.08,  # at the usual 0.02 a model this narrow learns no chain in three million tokens
        bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 20) * (0.02 + 0.98 * (1 + math.cos(math.pi * i / steps)) / 2),
    )
    rng = random.Random(f"corpus/{seed}")
    bar = tqdm(range(steps), desc="base model", unit="step", mininterval=0.5, disable=None)
    seen, started = 0, time.perf_counter()
    for i in bar:
        first = i < SKILL_PHASE * steps
        batch = encode(tok, [document(rng, task, first, unseen) for _ in range(DOCUMENTS)])
        answer_tokens = sum(len(ids) - prompt for ids, prompt in batch)
        # Sorting by length saves padding. The chunks share one denominator, else long responses would weigh less than
        # their share and the model would seldom write them.
        batch.sort(key=lambda document: len(document[0]))
        size = DOCUMENTS // CHUNKS
        loss = sum(
            _backward(model, batch[c : c + size], answer_tokens, tok.pad_token_id)
            for c in range(0, DOCUMENTS, size)
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += sum(len(ids) for ids, _ in batch)
        rate = seen / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.3f}, {rate / 1e3:.0f}k tokens/s", refresh=False)
    torch.set_num_threads(threads)
    return model.eval()


def _backward(
    model: Qwen2ForCausalLM, batch: list[tuple[list[int], int]], denominator: int, pad: int
) -> float:
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
    targets = torch.tensor(
        [[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in batch]
    )[:, 1:]
    # Padding is on the right, so the causal mask alone keeps it out of sight.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    answers = targets != -100
    loss = (
        F.cross_entropy(model.lm_head(hidden[answers]), targets[answers], reduction="sum")
        / denominator
    )
    loss.backward()
    return loss.item()


def make(folder: Path, seed: int = 0, steps: int = 0, task: Task = TINY) -> None:
    """Write the base model, after all of its training or `steps` of it, its tokenizer, train.json, heldout.json and
    samples.txt into `folder`."""
    started, steps = time.perf_counter(), steps or task.steps
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training, heldout = problems(seed, task)
    for name, questions in (("train.json", training), ("heldout.json", heldout)):
        rows = [
            [
                {"from": "human", "value": q},
                {"from": "assistant", "ground_truth": {"value": str(sum(numbers(q)))}},
            ]
            for q in questions
        ]
        (folder / name).write_text(
            "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8"
        )
    unseen, rng = frozenset(heldout), random.Random(f"samples/{seed}")
    samples = [document(rng, task, i < 20, unseen) for i in range(60)]
    (folder / "samples.txt").write_text(
        "".join(f"{q} <think>{r}\n" for q, r in samples), encoding="utf-8"
    )
    tok = tokenizer(task)
    model = train(tok, task, unseen, seed, steps)
    tok.save_pretrained(folder)
    model.generation_config = GenerationConfig(
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    print(
        f"base model: {model.num_parameters():,} parameters, {steps} steps, {len(training):,} + {len(heldout):,} "
        f"problems, {time.perf_counter() - started:.0f} s"
    )


def ensure(seed: int = 0, cache: Path = Path(".cache"), name: str = "tiny") -> Path:
    """The folder of this model and seed, made if it is not there yet. It is named after this file's text, so that a changed
    recipe makes a new model; and it appears whole or not at all."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + TEMPLATE.encode()).hexdigest()[:10]
    folder = Path(cache) / f"{name}-{seed}-{recipe}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent
        ) as unfinished:
            make(Path(unfinished) / "whole", seed, task=TASKS[name])
            try:
                os.replace(Path(unfinished) / "whole", folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same result
                    raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded base model and its problems.")
    parser.add_argument("--name", choices=TASKS, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: a cached folder under .cache)"
    )
    args = parser.parse_args()
    if args.out:
        make(args.out, args.seed, task=TASKS[args.name])
    print(args.out or ensure(args.seed, name=args.name))


if __name__ == "__main__":
    main()
