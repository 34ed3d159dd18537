"""Problems, the prompt template, and a seeded order that needs no state.

file or hub ──load──▶ [Problem] ──tokenize──▶ [Problem with prompt_ids] ──take──▶ a step's problems
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from config import STOP
from curation import formats

# The wording the released models were trained with. The paper's Table 1 differs in a few words
# (TABLE_1 below); a model released by the authors answers best to theirs. The response begins after
# "<think>": the opening tag is given, the closing tag is the model's to find.
TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question, and the "
    "Assistant solves it. The Assistant first thinks about the reasoning process in the "
    "mind and then provides the User with the answer. The reasoning process is enclosed "
    "within <think> </think> and answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here "
    "</answer>. User: You must put your answer inside <answer> </answer> tags, i.e., "
    "<answer> answer here </answer>. And your final answer will be extracted automatically "
    "by the \\boxed{} tag.\n"
    "This is the problem:\n"
    "{question}\n"
    "Assistant: <think>"
)
TABLE_1 = (
    "A conversation between User and Assistant. The user asks a question, and the "
    "Assistant solves it. The assistant first thinks about the reasoning process in the "
    "mind and then provides the user with the answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: You "
    "must put your answer inside <answer> </answer> tags, i.e., <answer> answer here "
    "</answer>. And your final answer will be extracted automatically by the \\boxed{} tag. "
    "{question}\n"
    "Assistant: <think>"
)
TEMPLATES = {"authors": TEMPLATE, "paper": TABLE_1}
PROMPT_FILE = "prompt.json"  # in a model folder: what the model was trained with, a TrainedPrompt
# What the chat template of an export says to any other conversation.
ONE_QUESTION = (
    "this model was trained with one prompt: pass one user message of text, without a system "
    "message and without earlier turns"
)
ENCODED_AT_ONCE = 1024  # prompts that the tokenizer takes together, which lets it use all cores


@dataclass(frozen=True)
class Problem:
    """One training or evaluation problem.

    | field | meaning |
    |---|---|
    | source | where it came from, `file:row`, for error messages and logs |
    | question | the text that goes into the template |
    | answer | the gold answer as in the file (LaTeX or plain); "" where the answer is a program |
    | prompt_ids | token ids of the filled template, set by `tokenize` |
    | tests | of a programming problem: the fields of its row that hold what a program must pass |
    """

    source: str
    question: str
    answer: str
    prompt_ids: tuple[int, ...] = ()
    tests: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)


class TrainedPrompt(NamedTuple):
    """The prompt that a model was trained with: a template (its name or its text), and the stop
    strings."""

    template: str = "authors"
    stop: tuple[str, ...] = STOP


def template_text(template: str) -> str:
    """The text of a template that has a name; a text unchanged."""
    return TEMPLATES.get(template, template)


def trained_prompt_file(trained: TrainedPrompt) -> str:
    """The content of prompt.json, with the template's text."""
    record = {"template": template_text(trained.template), "stop": list(trained.stop)}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def trained_prompt(path: str) -> TrainedPrompt | None:
    """What the prompt.json of a model folder or a hub id says; None where there is no such file.
    Raises ValueError if it says anything else than `trained_prompt_file` writes, or if the hub
    fails to send it."""
    names = ("gated_repo", "missing_entries", "connection_errors")
    optional = {f"_raise_exceptions_for_{name}": False for name in names}
    try:
        found = cached_file(path, PROMPT_FILE, **optional)
    except Exception as error:  # of the client's network library, which transformers passes on
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--model {path}: its {PROMPT_FILE} cannot be read ({why})") from None
    if found is None:
        return None
    try:
        record = json.loads(Path(found).read_bytes())
        template, stop = record["template"], tuple(record["stop"])
        sound = template.count("{question}") == 1 and all(isinstance(s, str) for s in stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"--model {path}: its {PROMPT_FILE} is damaged; expected a template that has "
            "{question} once, and a list of stop strings"
        )
    names_of_texts = {text: name for name, text in TEMPLATES.items()}
    return TrainedPrompt(names_of_texts.get(template, template), stop)


def prompt(question: str, template: str = TEMPLATE) -> str:
    """The template with the question in its place (braces in the question are left alone)."""
    before, after = template.split("{question}")
    return before + question + after


def chat_template(tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> str:
    """The template in the form that tokenizers keep (Jinja): `apply_chat_template` of one user
    message is the training prompt, so that an exported model is asked the way it was trained. It
    refuses system messages, earlier turns and anything but text: the model has seen none of them.
    """
    before, after = template.split("{question}")
    # Literals of Jinja, so that braces and line ends of the template mean themselves.
    before = json.dumps((tokenizer.bos_token or "") + before, ensure_ascii=False)
    after = json.dumps(after, ensure_ascii=False)
    return (
        "{% if messages | length != 1 or messages[0]['role'] != 'user' "
        "or messages[0]['content'] is not string %}"
        f"{{{{ raise_exception({json.dumps(ONE_QUESTION)}) }}}}{{% endif %}}"
        f"{{{{ {before} + messages[0]['content'] + {after} }}}}"
    )


def load(source: str | Path, name: str = "") -> list[Problem]:
    """All problems of a file, a folder or a hub dataset, in any layout that curation/formats.py
    knows; with a `name`, they are called name:1, name:2 … instead of file:row.

    Raises ValueError naming file, row (from 1) and field at the first row that has none of them or
    repeats another's `id`; FileNotFoundError for a missing file.
    """
    problems: list[Problem] = []
    places: dict[str, str] = {}  # id → where it was seen
    for place, item in formats.rows(source):
        try:
            question, answer = formats.question_answer(item)
            formats.refuse_twice(item, place, places)
            tests = formats.tests(item)
        except ValueError as error:
            file, _, row = place.rpartition(":")
            folder = Path(source) if Path(source).is_dir() else Path(source).parent
            raise ValueError(f"{folder / file}: row {row}: {error}") from None
        source_name = f"{name}:{len(problems) + 1}" if name else place
        problems.append(Problem(source_name, question, answer, tests=tests))
    if not problems:
        raise ValueError(f"{source}: holds no problems")
    return problems


def tokenize(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template: str,
    drop: bool = False,
) -> list[Problem]:
    """Fill the template and encode. A prompt over `max_tokens` raises ValueError naming its row, or
    is left out with `drop`: cutting a prompt would cut off `Assistant: <think>`, and an engine
    would refuse the whole batch for it."""
    kept = []
    for start in range(0, len(problems), ENCODED_AT_ONCE):
        batch = problems[start : start + ENCODED_AT_ONCE]
        texts = [(tokenizer.bos_token or "") + prompt(p.question, template) for p in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        for problem, ids in zip(batch, encoded["input_ids"], strict=True):
            if len(ids) <= max_tokens:
                kept.append(replace(problem, prompt_ids=tuple(ids)))
            elif not drop:
                raise ValueError(
                    f"{problem.source}: prompt of {len(ids)} tokens is over --prompt-tokens "
                    f"{max_tokens}; raise the limit or pass --drop-bad-rows"
                )
    if not kept:
        raise ValueError(f"no prompt is within --prompt-tokens {max_tokens}")
    return kept


def take(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of one step: positions [step·count, (step+1)·count) of an endless sequence of
    shuffled epochs.

    The step number is the whole cursor, so a resumed run needs nothing else to continue in the same
    order, and no problem is dropped at the end of an epoch.
    """
    taken = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(problems))
        taken.append(problems[_order(len(problems), epoch, seed)[place]])
    return taken


@lru_cache(maxsize=2)
def _order(length: int, epoch: int, seed: int) -> list[int]:
    """The shuffled order of one epoch."""
    return random.Random(f"{seed}/{epoch}").sample(range(length), length)
