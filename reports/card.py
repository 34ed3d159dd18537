"""The model card of an export: README.md in the folder of a policy or a critic.

It says what the model was trained from, with which settings and on which data, how it scored before
and after, its prompt, and how to ask it: with transformers, with vLLM's server and with tools.ask.
Folders are named without the path to them, because a card is made to be published.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data
from config import TASK_MODELS, Config
from curation import hub
from curation.files import read_jsonl
from data import TrainedPrompt
from reports.log import in_one_line, revision, versions
from reports.metrics import comparable

# Settings that every card shows.
SHOWN = """steps prompts samples advantage policy_steps critic_steps policy_lr critic_lr temperature
    top_p prompt_tokens response_tokens seed""".split()
# Settings that a card shows where they are not the defaults: what else decides what is learned.
SHOWN_IF_CHANGED = """gamma lam lam_critic lam_adaptive clip_eps critic_only_steps policy_lr_warmup
    critic_lr_warmup anneal_steps anneal_to max_grad_norm value_clip value_head kl_loss kl_reward
    kl_estimator tis_cap reward require_boxed init_critic critic_model drop_bad_rows""".split()
OF_PATHS = ("init_critic", "critic_model")
MEASURED = {"reward": "accuracy", "length": "tokens", "format": "format", "truncated": "cut off"}
QUESTION = "How many positive divisors does 196 have?"


def policy_files(
    cfg: Config, base: str, run: Path, done: int, problems: int | None = None
) -> dict[str, str]:
    """README.md and prompt.json of a policy after `done` iterations of the run in the folder `run`.
    `base` is the folder of its base model, perhaps in the hub's cache; `problems` the number of
    training problems, if it is known."""
    base = hub.name_of(base)
    parts = [
        _front_matter(cfg, base),
        f"# {cfg.name}\n",
        _what(cfg, base, done),
        "## Recipe\n",
        _settings_table(cfg),
        f"Made with revision {revision()}, {_listed(versions())}.\n",
        "## Data\n",
        _data(cfg, problems),
        "## Results\n",
        _results(run, done),
        "## Prompt\n",
        _prompt(cfg),
        "## How to ask it\n",
        _how_to_ask(cfg),
    ]
    trained = TrainedPrompt(cfg.template, cfg.stop)
    return {"README.md": "\n".join(parts), data.PROMPT_FILE: data.trained_prompt_file(trained)}


def critic_files(cfg: Config, done: int) -> dict[str, str]:
    """README.md of a critic after `done` iterations of a run."""
    question = shlex.quote(_question(cfg))
    parts = [
        "---\nlibrary_name: transformers\ntags: [open-reasoner-zero, critic]\n---\n",
        f"# {cfg.name}: critic\n",
        f"The critic V(s_t) of the run {cfg.name} after {done} iterations. It estimates, at each "
        "token of a prompt and a response, the reward that the policy beside it will get. It is a "
        "sequence classifier with one label, whose `score` reads the last hidden state of every "
        "token.\n",
        f"    python -m tools.ask --model ../policy --critic . {question}\n",
    ]
    return {"README.md": "\n".join(parts)}


def _front_matter(cfg: Config, base: str) -> str:
    """What the hub reads. There is no license: the base model's and the data's decide it."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if not (Path(base).exists() or cfg.model in TASK_MODELS):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "tags: [open-reasoner-zero]", "---\n"])


def _what(cfg: Config, base: str, done: int) -> str:
    method = "PPO with a critic and GAE" if cfg.advantage == "gae" else "GRPO"
    reward = f"reward: `{cfg.reward}`" if cfg.reward else "reward 1 for the right answer, else 0"
    return (
        f"{_name(cfg, base)} after {done} of {cfg.steps} iterations of reinforcement learning as "
        f"in *Open-Reasoner-Zero* (arXiv 2503.24290): {method}; {reward}. It answers one question "
        "under one prompt, and has seen neither system messages nor earlier turns.\n"
    )


def _name(cfg: Config, base: str) -> str:
    if cfg.model in TASK_MODELS:
        return f"`{cfg.model}`"
    return Path(base).name if Path(base).exists() else base


def _settings_table(cfg: Config) -> str:
    """The settings that decide what is learned; those of the critic only where there is one."""
    names = SHOWN + [n for n in SHOWN_IF_CHANGED if getattr(cfg, n) != getattr(Config, n)]
    rows = ["| setting | value |", "|---|---|"]
    for name in names:
        if "critic" in name and "critic" not in cfg.trained_roles:
            continue
        value = getattr(cfg, name)
        value = Path(value).name if name in OF_PATHS else in_one_line(value)
        rows.append(f"| {name} | {str(value).replace('|', chr(92) + '|')} |")
    return "\n".join([*rows, "", "Every other setting that matters has its default.\n"])


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _data(cfg: Config, problems: int | None) -> str:
    if cfg.replay:
        return "Recorded rollouts (`--replay`); nothing was sampled.\n"
    source = _source(cfg.data) if cfg.data else f"the problems that `{cfg.model}` brings"
    count = "" if problems is None else f", {problems:,} problems"
    held_out = ", ".join(map(_source, cfg.eval_data)) or (
        f"those that `{cfg.model}` brings" if cfg.model in TASK_MODELS else "none"
    )
    return f"- Training: {source}{count}\n- Held-out: {held_out}\n"


def _source(source: str) -> str:
    """The name of a file, or a hub id."""
    return f"`{Path(source.rpartition('=')[2]).name if Path(source).exists() else source}`"


def _results(run: Path, done: int) -> str:
    """The first and the last evaluation that were made alike, up to `done` iterations."""
    try:
        lines = [line.value for line in read_jsonl(run / "evaluations.jsonl")]
        evaluations = comparable([e for e in lines if e["step"] <= done] or [{}])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"The run's evaluations could not be read ({error}).\n"
    if not evaluations[-1]:
        return "The run had no held-out problems.\n"
    chosen = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
    heads = [f"after {e['step']} iterations" for e in chosen]
    rows = [["held-out problems", *heads], ["---"] * (1 + len(chosen))]
    rows += [[title, *_numbers(chosen, name)] for name, title in MEASURED.items()]
    sets = [name for name in chosen[-1] if name.startswith("reward/")]
    rows += [[f"accuracy on {n.partition('/')[2]}", *_numbers(chosen, n)] for n in sets]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nMeans over {chosen[-1]['responses']:,} responses, sampled as in training. "
        "Accuracy: right and finished. Format: closes its thought, gives one answer in tags and "
        "ends there.\n"
    )


def _numbers(evaluations: Sequence[Mapping[str, Any]], name: str) -> Iterable[str]:
    form = ".1f" if name == "length" else ".3f"
    return [f"{e[name]:{form}}" if name in e else "–" for e in evaluations]


def _prompt(cfg: Config) -> str:
    template = data.template_text(cfg.template)
    fence = "```"
    while fence in template:
        fence += "`"
    if cfg.stop:
        ends = (
            f"A response ends with the first of the strings {_quoted(cfg.stop)}, which belongs to "
            "it, or with an end-of-sequence token. Most tokenizers have no token for such a "
            "string, so every call must name the strings: otherwise the model writes on."
        )
    else:
        ends = "A response ends with an end-of-sequence token alone."
    return (
        "The tokenizer's chat template is the prompt of the training, with the question in the "
        "place of `{question}`. It takes one user message, and refuses system messages and earlier "
        f"turns.\n\n{fence}text\n{template}\n{fence}\n\n{ends} `{data.PROMPT_FILE}` holds both.\n"
    )


def _literal(value: Any) -> str:
    """A text or a list of texts as it is written in Python and in JSON."""
    return json.dumps(value, ensure_ascii=False)


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join(f"`{_literal(text)}`" for text in texts)


def _question(cfg: Config) -> str:
    return "7+4+12+3+9+6+11=?" if cfg.model in TASK_MODELS else QUESTION


TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {question}}}], return_tensors="pt", return_dict=True
)
output = model.generate({stop})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
"""
CLIENT = """
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model={name},
    messages=[{{"role": "user", "content": {question}}}],{stop}
)
print(answer.choices[0].message.content)
"""


def _how_to_ask(cfg: Config) -> str:
    """Three snippets, for the folder that holds the card."""
    question, name, stop = map(_literal, (_question(cfg), cfg.name, list(cfg.stop)))
    of_generate = "**inputs"
    if cfg.stop:
        of_generate = f"\n    **inputs,\n    stop_strings={stop},\n    tokenizer=tokenizer,\n"
    of_client = f"\n    stop={stop},\n" if cfg.stop else ""
    of_client += '    extra_body={"include_stop_str_in_output": True},' if cfg.stop else ""
    local = TRANSFORMERS.format(question=question, stop=of_generate).strip()
    client = CLIENT.format(name=name, question=question, stop=of_client).strip()
    served = shlex.quote(cfg.name)
    return (
        f"With transformers:\n\n```python\n{local}\n```\n\n"
        f"With vLLM's server and any OpenAI client:\n\n"
        f"```sh\nvllm serve . --served-model-name {served}\n```\n\n```python\n{client}\n```\n\n"
        "In a checkout of the program that trained it; with `--critic`, V(s_t) is printed, too:\n\n"
        f"```sh\npython -m tools.ask --model . {shlex.quote(_question(cfg))}\n```\n"
    )
