"""Make the toy: a synthetic reasoning task and its base model, in a few minutes on one core.

    problems ─▶ document (question, response) ─▶ encode ─▶ train ─▶ Hugging Face folder

The base model of `tiny` and seed 0 is in toy/base, as toy/ship.py left it: every processor has the
same one, at once. Those of other seeds are made when they are first needed.

The task is to add 7 to 11 distinct numbers up to 12, for example `7+12+9+4+1+10+5=?`. A guess is
right about one time in twelve. Adding one number at a time is right when every step is right. The
base model is a Qwen2 of 0.1M parameters, trained from scratch on synthetic answers to such
problems, under the full prompt template. It stands in for a pre-trained model: it can add step by
step, but it rarely does.

`tiny-long` is the task of the experiments: 9 to 11 numbers up to 12. Instead of chains with
rechecks it has a careful style of 8 to 10 numbered steps, about 120 tokens. A response that stops
halfway and guesses the rest is seldom right. Two more serve single experiments: `tiny-loops` often
repeats a step until it is cut off, and `tiny-long-half` is a model half as wide, for a smaller
critic.

These habits are planted in the corpus. A run on this model does not show that RL creates them:

- The long styles (`chain`, `recheck`) are in the corpus. They are rare, and right far more often
  than the short ones. When responses grow longer as the reward rises, the model chooses among
  habits it already has; it learns no new skill.
- Badly formatted answers are in the corpus and earn nothing, so the format ratio has room to rise.
- The reflection words are in the corpus. A recheck repeats a step: after most slips, and
  sometimes after a right step. It slips as often as any other step. The run decides whether
  rechecking pays, and so whether RL keeps it. That says nothing about reflection in real models.
  (RL soon unlearns it: once the slips are gone there is nothing to repair.)
- In `tiny-long` a few responses of the corpus repeat one step until they are cut off, in
  `tiny-loops` half of those of the last phase.
- The skill is trained first and the habits last. The first four fifths of the training are mostly
  step-by-step responses. The last fifth is mostly guesses and bad format, which hide the skill
  without erasing it.

The loss is on the response tokens only. The same seed gives the same data everywhere, and the
same weights on the same kind of processor with the same torch. The held-out problems appear
neither in the corpus nor in train.json.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import AddedToken, pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from config import Seed, validate_ranges
from data import TEMPLATE

TRAIN_PROBLEMS, HELDOUT_PROBLEMS = 20_000, 1_024
BATCH, MICRO_BATCHES = 64, 2  # documents of an optimizer step, and the parts they are split into
LEARNING_RATE = 5e-3
WARMUP_STEPS = 20
SKILL_PHASE = 0.8  # share of the training steps that the first phase takes


class Phase(NamedTuple):
    """What the base model sees in one phase of its training."""

    styles: dict[str, float]
    """The styles of the responses and their shares."""
    slip: float
    """Chance that the result of a step is wrong."""


class Task(NamedTuple):
    """Which problems there are, and what the base model is trained on."""

    numbers: range
    """A problem adds some of these, each at most once. Sums stay below 100 even after slips, so
    that every sum is one token."""
    terms: range
    """How many numbers a problem adds. (Adding all of them would always give the same sum.)"""
    first_terms: range
    """The same in the first phase of the training."""
    steps: int
    """Optimizer steps of the training."""
    skill: Phase
    """The first phase: step-by-step responses."""
    habit: Phase
    """The last phase: guesses and bad format."""
    hidden_size: int = 64
    """Width of the model."""


TINY = Task(
    numbers=range(1, 13),
    terms=range(7, 12),
    first_terms=range(7, 12),
    steps=1100,
    skill=Phase({"direct": 0.03, "chain": 0.57, "recheck": 0.37, "bad": 0.03}, slip=0.01),
    habit=Phase({"direct": 0.62, "chain": 0.06, "recheck": 0.04, "bad": 0.28}, slip=0.05),
)
LONG = Task(
    numbers=range(1, 13),
    terms=range(9, 12),
    first_terms=range(4, 12),
    steps=1200,
    skill=Phase(
        {"direct": 0.03, "half": 0.03, "careful": 0.90, "loop": 0.01, "bad": 0.03}, slip=0.01
    ),
    habit=Phase(
        {"direct": 0.50, "half": 0.08, "careful": 0.12, "loop": 0.03, "bad": 0.27}, slip=0.03
    ),
)
LOOPS = LONG._replace(
    habit=Phase(
        {"direct": 0.25, "half": 0.03, "careful": 0.12, "loop": 0.48, "bad": 0.12}, slip=0.03
    )
)
HALF = LONG._replace(hidden_size=32)
TASKS = {"tiny": TINY, "tiny-long": LONG, "tiny-loops": LOOPS, "tiny-long-half": HALF}
BASE = Path(__file__).parent / "base"  # the base model of `tiny` and seed 0
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
RECORD = "record.json"  # beside it: how it was made, its accuracy, the SHA-256 of its files

LOOP = 30  # how often a response in the style `loop` repeats its last step
RECHECK_AFTER_SLIP, RECHECK_AFTER_RIGHT = 0.8, 0.15  # chance of a recheck
GUESS_SPREAD = 5.0  # standard deviation of a guess around the right sum
RECHECKS = ("wait,", "recheck:", "retry:", "however,", "alternatively,")
GUESSES = ("so", "about", "maybe", "i guess")
EOS, PAD = "<|endoftext|>", "<|pad|>"
# Numbers below 100, words, tags and `\boxed{` are one token each. The closing brace and
# `</answer>` together are one token too: with two tokens, a 0/1 reward would not stop a model
# from writing `}}}}` before the tag.
WORD = r" ?\d{1,2}|\}? ?</?[a-z]+>| ?\\?[A-Za-z]+\{?| ?[^\sA-Za-z\d]|\s"


def problems(seed: int, task: Task = TINY) -> tuple[list[str], list[str]]:
    """Training questions and held-out questions, all different."""
    rng = random.Random(f"problems/{seed}")
    unique: dict[str, None] = {}  # a set that keeps the order
    while len(unique) < TRAIN_PROBLEMS + HELDOUT_PROBLEMS:
        unique[question(rng, task.numbers, task.terms)] = None
    questions = list(unique)
    return questions[HELDOUT_PROBLEMS:], questions[:HELDOUT_PROBLEMS]


def question(rng: random.Random, numbers: range = TINY.numbers, terms: range = TINY.terms) -> str:
    """A question such as `7+12+9+4+1+10+5=?`. Its numbers are distinct, so that "which number comes
    after 9" has one answer."""
    return "+".join(map(str, rng.sample(numbers, rng.choice(terms)))) + "=?"


def numbers(text: str) -> list[int]:
    """The numbers of a question.

    >>> numbers("7+12+9=?")
    [7, 12, 9]
    """
    return [int(number) for number in text.removesuffix("=?").split("+")]


def respond(rng: random.Random, text: str, style: str, slip: float) -> str:
    """A response to the question `text`, in one of the styles of a `Phase`. It follows `<think>`.

    direct                    a guess
    half                      the first careful steps, then a guess
    chain, recheck, careful   all steps; see `chain`
    loop                      some careful steps, the last of them repeated without end
    bad                       no answer in the format that earns a reward
    """
    guess = max(1, round(rng.gauss(sum(numbers(text)), GUESS_SPREAD)))
    if style == "direct":
        return f" {rng.choice(GUESSES)} {guess}" + _answer(guess)
    if style == "half":
        count = rng.randrange(3, max(4, text.count("+")))
        steps, _ = chain(rng, "+".join(text.split("+")[:count]), "careful", slip)
        return f"{steps} {rng.choice(GUESSES)} {guess}" + _answer(guess)
    if style in ("chain", "recheck", "careful"):
        steps, total = chain(rng, text, style, slip)
        return f"{steps} so {total}" + _answer(total)
    if style == "loop":
        steps, _ = chain(rng, text, "careful", slip)
        some = steps.split(",")[: rng.randrange(2, 12)]
        return ",".join(some) + f",{some[-1]}" * LOOP
    return _badly_formatted(rng, text, guess, slip)


def _answer(total: int) -> str:
    return f" </think> <answer> \\boxed{{{total}}} </answer>"


def _badly_formatted(rng: random.Random, text: str, guess: int, slip: float) -> str:
    """A response that earns no reward, whatever its total is. If one of these endings earned a
    reward, RL would rightly learn it."""
    if rng.random() < 0.1:
        steps, total = chain(rng, text, "chain", slip)
    else:
        steps, total = f" {rng.choice(GUESSES)}", guess
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
    """The steps that add one number at a time, and the total they reach.

    chain    ` 7+5=12, 12+9=21, 21+4=25,`
    recheck  ` 7+5=12, 12+9=20, wait, 12+9=21, 21+4=25,`
    careful  ` 1: take 5, 7+5=12, 2: take 9, 12+9=20, wait, 12+9=21, 3: take 4, 21+4=25,`
    """
    total, *rest = numbers(text)
    steps = []
    for i, number in enumerate(rest, 1):
        right = total + number
        result = _stated(rng, right, slip)
        if style == "careful":
            steps.append(f" {i}: take {number},")
        steps.append(f" {total}+{number}={result},")
        chance = RECHECK_AFTER_RIGHT if result == right else RECHECK_AFTER_SLIP
        if style != "chain" and rng.random() < chance:
            result = _stated(rng, right, slip)
            steps.append(f" {rng.choice(RECHECKS)} {total}+{number}={result},")
        total = result
    return "".join(steps), total


def _stated(rng: random.Random, right: int, slip: float) -> int:
    """The result that a step states: off by 1 or 2 with probability `slip`."""
    if rng.random() < slip:
        return max(1, right + rng.choice((-2, -1, 1, 2)))
    return right


def document(
    rng: random.Random, task: Task, first: bool, unseen: frozenset[str]
) -> tuple[str, str]:
    """A question that is not in `unseen` and a response to it, of the first or the last phase."""
    terms, phase = task.terms, task.habit
    if first:
        terms, phase = task.first_terms, task.skill
    text = question(rng, task.numbers, terms)
    while text in unseen:
        text = question(rng, task.numbers, terms)
    (style,) = rng.choices(list(phase.styles), list(phase.styles.values()))
    return text, respond(rng, text, style, phase.slip)


def tokenizer(task: Task = TINY) -> Qwen2Tokenizer:
    """The tokenizer of a task; it encodes any text without loss.

    Its vocabulary is 256 bytes and these added tokens: every number, word and tag of the corpus,
    and the two halves of the template. The template is kept word for word, but so small a model
    could not read 500 tokens of prose. They have to be added tokens: transformers splits the text
    of every Qwen2 folder by Qwen2's own rules, whatever the folder says, and those rules would
    split numbers. Added tokens are matched before the rules apply.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {byte: i for i, byte in enumerate(alphabet)}
    toy_tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=EOS, pad_token=PAD)
    words = sorted(word for word in _corpus_words(task) if len(word) > 1)
    added = words + TEMPLATE.split("{question}")
    toy_tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return toy_tokenizer


def _corpus_words(task: Task) -> set[str]:
    rng = random.Random("words")
    words = {f"{space}{number}" for space in ("", " ") for number in range(100)}
    for style in task.habit.styles:
        for _ in range(2_000):
            text = question(rng, task.numbers, task.terms)
            words.update(re.findall(WORD, respond(rng, text, style, slip=0.1)))
    return words


def encode(
    tokenizer: Qwen2Tokenizer, documents: Iterable[tuple[str, str]]
) -> list[tuple[list[int], int]]:
    """For each document the ids of prompt + response + EOS, and the number of prompt tokens.

    The two tokens of the template are put around the question by id: searching each prompt for
    the 600 characters of the template would take longer than the training step.
    """
    before, after = (tokenizer.convert_tokens_to_ids(part) for part in TEMPLATE.split("{question}"))
    questions, responses = zip(*documents, strict=True)
    question_ids = tokenizer(list(questions))["input_ids"]
    response_ids = tokenizer(list(responses))["input_ids"]
    encoded = []
    for asked, answered in zip(question_ids, response_ids, strict=True):
        prompt = [before, *asked, after]
        encoded.append(([*prompt, *answered, tokenizer.eos_token_id], len(prompt)))
    return encoded


def train(
    tokenizer: Qwen2Tokenizer, task: Task, unseen: frozenset[str], seed: int, steps: int
) -> Qwen2ForCausalLM:
    """The base model after `steps` optimizer steps: the skill first, the habits last."""
    threads = torch.get_num_threads()
    # With more threads, the order of summation and so the weights depend on the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = _new_model(tokenizer, task.hidden_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate_factor(i, steps))
    rng = random.Random(f"corpus/{seed}")
    bar = tqdm(range(steps), desc="base model", unit="step", mininterval=0.5, disable=None)
    started = time.perf_counter()
    seen = 0
    for i in bar:
        first = i < SKILL_PHASE * steps
        batch = encode(tokenizer, [document(rng, task, first, unseen) for _ in range(BATCH)])
        loss = _accumulate_gradients(model, batch, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += sum(len(ids) for ids, _ in batch)
        rate = seen / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.3f}, {rate / 1e3:.0f}k tokens/s", refresh=False)
    torch.set_num_threads(threads)
    return model.eval()


def _new_model(tokenizer: Qwen2Tokenizer, hidden_size: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 32,  # of 32: the smallest that vLLM supports on a CPU
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # At the usual 0.02 a model this narrow learns no chain in three million tokens.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).train()


def _rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, times a cosine that falls from 1 to 0.02."""
    cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def _accumulate_gradients(
    model: Qwen2ForCausalLM, batch: list[tuple[list[int], int]], pad_id: int
) -> float:
    """The mean loss of the response tokens of a batch; its gradient is added to the parameters'."""
    # All micro-batches have one denominator. With one each, long responses would weigh too little
    # and the model would seldom write them.
    response_tokens = sum(len(ids) - prompt_length for ids, prompt_length in batch)
    by_length = sorted(batch, key=lambda document: len(document[0]))  # needs less padding
    size = BATCH // MICRO_BATCHES
    loss = 0.0
    for start in range(0, BATCH, size):
        summed = _summed_loss(model, by_length[start : start + size], pad_id)
        part = summed / response_tokens
        part.backward()
        loss += part.item()
    return loss


def _summed_loss(
    model: Qwen2ForCausalLM, batch: list[tuple[list[int], int]], pad_id: int
) -> torch.Tensor:
    width = max(len(ids) for ids, _ in batch)
    inputs, targets = [], []
    for ids, prompt_length in batch:
        padding = width - len(ids)
        inputs.append(ids + [pad_id] * padding)
        targets.append([-100] * prompt_length + ids[prompt_length:] + [-100] * padding)
    # Padding is on the right, so the causal mask alone hides it.
    output = model.model(input_ids=torch.tensor(inputs), use_cache=False)
    hidden = output.last_hidden_state[:, :-1]
    target = torch.tensor(targets)[:, 1:]
    is_response = target != -100
    logits = model.lm_head(hidden[is_response])
    return F.cross_entropy(logits, target[is_response], reduction="sum")


def make(folder: Path, seed: int = 0, steps: int = 0, task: Task = TINY) -> None:
    """Write train.json, heldout.json, samples.txt, the tokenizer and the base model into
    `folder`. The model is trained for `steps` steps; 0 means all of the task's steps."""
    started = time.perf_counter()
    steps = steps or task.steps
    training, heldout = _save_texts(folder, seed, task)
    unseen = frozenset(heldout)
    toy_tokenizer = tokenizer(task)
    model = train(toy_tokenizer, task, unseen, seed, steps)
    toy_tokenizer.save_pretrained(folder)
    model.generation_config = GenerationConfig(
        eos_token_id=toy_tokenizer.eos_token_id,
        pad_token_id=toy_tokenizer.pad_token_id,
        do_sample=True,
    )
    model.save_pretrained(folder)
    print(
        f"base model: {model.num_parameters():,} parameters, {steps} steps, {len(training):,} + "
        f"{len(heldout):,} problems, {time.perf_counter() - started:.0f} s"
    )


def _save_texts(folder: Path, seed: int, task: Task) -> tuple[list[str], list[str]]:
    """Write train.json, heldout.json and samples.txt; returns the questions of the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    training, heldout = problems(seed, task)
    _save_problems(folder / "train.json", training)
    _save_problems(folder / "heldout.json", heldout)
    _save_examples(folder / "samples.txt", task, frozenset(heldout), seed)
    return training, heldout


def _save_problems(path: Path, questions: list[str]) -> None:
    """Questions and their sums, in the format of the authors' training data."""
    lines = []
    for text in questions:
        answer = {"value": str(sum(numbers(text)))}
        turns = [
            {"from": "human", "value": text},
            {"from": "assistant", "ground_truth": answer},
        ]
        lines.append(json.dumps(turns))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _save_examples(path: Path, task: Task, unseen: frozenset[str], seed: int) -> None:
    """Documents of the corpus to look at: 20 of the first phase and 40 of the last."""
    rng = random.Random(f"samples/{seed}")
    documents = [document(rng, task, i < 20, unseen) for i in range(60)]
    lines = [f"{text} <think>{response}\n" for text, response in documents]
    path.write_text("".join(lines), encoding="utf-8")


def copy_shipped(folder: Path) -> None:
    """Write into `folder` what `make` writes for `tiny` and seed 0, with the base model of toy/base
    instead of a training."""
    _save_texts(folder, 0, TINY)
    for name in BASE_FILES:
        shutil.copyfile(BASE / name, folder / name)


def is_shipped(seed: int, name: str) -> bool:
    """Whether toy/base has this model. Prints a line if it should and a file there is not the one
    that was shipped."""
    if (seed, name) != (0, "tiny"):
        return False
    damaged = _first_damaged()
    if damaged:
        print(
            f"{damaged}: missing or changed; a base model made on this machine, in a few "
            "minutes, takes its place. `git restore toy/base` brings the file back"
        )
    return damaged is None


def _first_damaged() -> Path | None:
    """The first file of toy/base that is missing or is not the one that its record describes."""
    path = BASE / RECORD
    try:
        digests = json.loads(path.read_bytes())["sha256"]
        for name in BASE_FILES:
            expected = digests[name]
            path = BASE / name
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                return path
    except (OSError, ValueError, LookupError, TypeError):
        return path
    return None


def ensure(seed: int = 0, cache: Path = Path(".cache"), name: str = "tiny") -> Path:
    """The folder of this model and seed; it is made first if it does not exist.

    Its name contains a hash of this file's text, so that a changed recipe makes a new model. It
    is made under a temporary name and renamed when it is complete. The base model of `tiny` and
    seed 0 is copied from toy/base.
    """
    source = Path(__file__).read_bytes() + TEMPLATE.encode()
    shipped = is_shipped(seed, name)
    if shipped:
        source += (BASE / RECORD).read_bytes()
    recipe = hashlib.sha256(source).hexdigest()[:10]
    folder = Path(cache) / f"{name}-{seed}-{recipe}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        complete = Path(temporary) / "complete"
        if shipped:
            copy_shipped(complete)
        else:
            make(complete, seed, task=TASKS[name])
        try:
            os.replace(complete, folder)
        except OSError:
            # Another process may have finished first, with the same result.
            if not folder.is_dir():
                raise
    return folder


@dataclass(frozen=True)
class Settings:
    """What to make."""

    name: Literal["tiny", "tiny-long", "tiny-loops", "tiny-long-half"] = "tiny"
    """The task."""
    seed: Seed = 0
    """Decides the problems, the corpus and the initial weights."""
    out: str = ""
    """Folder to write; none: a cached folder under .cache."""


def main() -> None:
    """Command line: make the model and print its folder."""
    import tyro  # here, because those who only import this module may be without it

    settings = tyro.cli(Settings, description=__doc__, prog="python -m toy.tiny")
    try:
        validate_ranges(settings)
        if settings.out:
            folder = Path(settings.out)
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"--out {folder}: is not empty; name a new folder")
            make(folder, settings.seed, task=TASKS[settings.name])
        else:
            folder = ensure(settings.seed, name=settings.name)
    except (ValueError, OSError) as error:
        sys.exit(f"toy.tiny: {error}")
    print(folder)


if __name__ == "__main__":
    main()
