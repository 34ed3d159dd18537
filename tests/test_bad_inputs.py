"""Bad inputs of every program: each ends in one line, a code above 0, and nothing half written.

A row is a program, its flags, and a part of the line that it must print. `damaged` makes the files
that the flags name. A word such as MODEL stands for a path, see `Bench`.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import Ended, write_orz
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    T5Config,
)

import config
import evaluate
import preflight
import train
from benchmarks import curate_scale, gpu, grader_fuzz, grader_speed, logprob, scaling, vs_trl
from config import Range
from curation import curate
from data import Problem
from evaluate import Evaluation
from experiments import run
from grading import programs
from grading.pool import Grader
from reports import figures, page
from rollout import Rollout, save_rollouts
from tools import ask, export, plan
from toy import tiny

PROGRAMS: dict[str, Callable[[], None]] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "ask": ask.main,
    "export": export.main,
    "plan": plan.main,
    "curate": lambda: curate.main(sys.argv[1:]),
    "figures": figures.main,
    "page": page.main,
    "run": run.main,
    "tiny": tiny.main,
    "vs_trl": vs_trl.main,
    "programs": programs.main,
    "curate_scale": curate_scale.main,
    "fuzz": grader_fuzz.main,
    "speed": grader_speed.main,
    "logprob": logprob.main,
    "scaling": scaling.main,
    "gpu": gpu.main,
}
# What its lines begin with.
NAMES = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "ask": "tools.ask",
    "export": "tools.export",
    "curate": "curation.curate",
    "figures": "reports.figures",
    "page": "reports.page",
    "run": "experiments.run",
    "tiny": "toy.tiny",
    "vs_trl": "benchmarks.vs_trl",
    "programs": "grading.programs",
    "curate_scale": "benchmarks.curate_scale",
    "fuzz": "benchmarks.grader_fuzz",
    "speed": "benchmarks.grader_speed",
    "logprob": "benchmarks.logprob",
    "scaling": "benchmarks.scaling",
    "gpu": "benchmarks.gpu",
}
# Flags that are right, to which a row adds its bad one.
RIGHT = {
    "train": "--model MODEL --data GOOD --prompts 4 --samples 4 --steps 2 --prompt-tokens 64 "
    "--response-tokens 24 --critic-steps 3 --micro-tokens 512 --engine transformers",
    "plan-a-run": "--model MODEL --plan --gpus 1 --gpu-memory 80 --prompt-tokens 64 "
    "--response-tokens 24 --prompts 4 --samples 4 --critic-steps 3 --micro-tokens 512",
    "evaluate": "--model MODEL --benchmarks GOOD --samples 2 --prompt-tokens 64 "
    "--response-tokens 24 --engine transformers",
    "responses": "--responses RECORDED",
    "ask": "1+1=? --model MODEL --response-tokens 4",
    "export": "RUN",
    "export-absent": "absent",
    "curate": "--workers 1 GOOD",
    "curate-generated": "--workers 1 --synthesize gcd:2",
}
# Keys of RIGHT that are other ways to call a program.
PROGRAM_OF = {"plan-a-run": "train", "responses": "evaluate", "curate-generated": "curate"}
PROGRAM_OF |= {"export-absent": "export"}


class Row(NamedTuple):
    """A bad input: the key of RIGHT or PROGRAMS, the bad flags, and a part of the line printed."""

    program: str
    flags: str
    line: str

    def id(self) -> str:
        return f"{self.program}: {self.flags}"


# ── the files that the flags name ─────────────────────────────────────────────────────────────────

SUM = {"question": "1+1?", "answer": "2"}
GRADED = {"problem": "a:1", "question": "1+1?", "gold": "2", "response": "<answer>2</answer>"}
GRADED |= {"answer": "2", "reward": 1.0, "finish": "stop", "tokens": 3, "timeout": False}
DEEP = "[" * 100_000


def lines(*items: Any) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


# Files of problems that no program may take: their content, and what must be said about them.
DATA: dict[str, tuple[str | bytes, str]] = {
    "empty.json": ("", "empty.json: expected a JSON list"),
    "empty.jsonl": ("", "holds no"),
    "empty.csv": ("", "holds no"),
    "empty-list.json": ("[]", "holds no"),
    "blank.jsonl": ("\n\n \n", "holds no"),
    "object.json": ("{}", "expected a JSON list of problems, found '{}'"),
    "number.json": ("3", "expected a JSON list of problems, found '3'"),
    "cut.json": ('[{"question": "1?", "answer": "1"}, {"ques', "not valid JSON"),
    "cut.jsonl": (lines(SUM) + '{"question": "1', "row 2: not valid JSON"),
    "two-lists.json": (json.dumps([SUM]) * 2, "expected nothing after the list"),
    "two-objects.jsonl": ((json.dumps(SUM) * 2) + "\n", "row 1: not valid JSON (Extra data)"),
    "after.json": (json.dumps([SUM]) + " oops", "expected nothing after the list"),
    "deep.json": (DEEP, "nested too deeply"),
    "deep.jsonl": (DEEP, "row 1: not valid JSON (nested too deeply)"),
    "digits.jsonl": ('{"question": "q", "answer": ' + "1" * 5000 + "}", "not valid JSON"),
    "python.json": ("[{'question': '1?'}]", "not valid JSON"),
    "numbers.json": ("[1, 2]", "expected a list (the authors' form) or an object, found int"),
    "text.jsonl": ('"q"\n', "found str"),
    "null.jsonl": ("null\n", "found NoneType"),
    "utf16.json": (json.dumps([SUM]).encode("utf-16"), "not UTF-8 text"),
    "latin.jsonl": ('{"question": "é?", "answer": "1"}'.encode("latin-1"), "not UTF-8 text"),
    "binary.jsonl": (bytes(range(256)), "not UTF-8 text"),
    "nul.jsonl": ("\0\0\0", "not valid JSON"),
    "no-answer.jsonl": (lines(SUM, {"question": "q"}), "field answer is missing"),
    "no-question.jsonl": (lines({"answer": "1"}), "field problem is missing"),
    "null-answer.jsonl": (lines({"question": "q", "answer": None}), "field answer"),
    "empty-answer.jsonl": (lines({"question": "q", "answer": " "}), "field answer"),
    "empty-question.jsonl": (lines({"question": "\n", "answer": "1"}), "field question"),
    "number-question.jsonl": (lines({"question": [], "answer": "1"}), "field question"),
    "nan.jsonl": ('{"question": "q", "answer": NaN}', "field answer: expected non-empty text"),
    "infinity.jsonl": ('{"question": "q", "answer": Infinity}', "found inf"),
    "true.jsonl": (lines({"question": "q", "answer": True}), "found True"),
    "true-question.jsonl": (lines({"question": False, "answer": "1"}), "found False"),
    "list-answer.jsonl": (lines({"question": "q", "answer": ["1"]}), "field answer"),
    "surrogate.jsonl": (lines({"question": "\ud800?", "answer": "1"}), "half of a surrogate"),
    "surrogate-gold.jsonl": (lines({"question": "q", "answer": "\udfff"}), "half of a surrogate"),
    "no-box.jsonl": (lines({"problem": "q", "solution": "five"}), "holds no \\boxed"),
    "empty-no-box.jsonl": (lines({"problem": "q", "answer": "", "solution": "5"}), "field answer"),
    "twice.jsonl": (lines({"id": 7} | SUM, {"id": 7} | SUM), "field id: 7 is also the id of"),
    "twice-text.jsonl": (lines({"id": 7} | SUM, {"id": "7"} | SUM), "is also the id of"),
    "letter.jsonl": (lines({"question": "q", "options": ["x", "y"], "answer": "C"}), "of AB"),
    "letter-true.jsonl": (
        lines({"question": "q", "options": ["x", "y"], "answer": True}),
        "expected a letter of AB or an index, found 'True'",
    ),
    "index.jsonl": (lines({"question": "q", "choices": ["x"], "answer": 4}), "found 'E'"),
    "options.jsonl": (
        lines({"question": "q", "choices": {"text": ["x"]}, "answer": "A"}),
        "field choices: expected a list",
    ),
    "options-text.jsonl": (lines({"question": "q", "options": "x, y", "answer": "A"}), "options"),
    "options-null.jsonl": (
        lines({"question": "q", "options": ["x", None], "answer": "A"}),
        "field options[1]",
    ),
    "many-options.jsonl": (
        lines({"question": "q", "options": ["x"] * 27, "answer": "A"}),
        "field options: expected a list",
    ),
    "messages.jsonl": (lines({"messages": "q", "ground_truth": "1"}), "field messages"),
    "messages-text.jsonl": (lines({"messages": ["q"], "ground_truth": "1"}), "field messages"),
    "messages-none.jsonl": (lines({"messages": [], "ground_truth": "1"}), "messages[0].content"),
    "no-last-question.jsonl": (
        lines({"messages": [{"role": "user", "content": "Question: \n"}], "ground_truth": "1"}),
        "the question is empty",
    ),
    "prompt.jsonl": (lines({"prompt": [], "final_answer": "1"}), "prompt[0].value is missing"),
    "authors.json": ('[[{"value": "q"}]]', "[1].ground_truth.value is missing"),
    "authors-text.json": ('[["q", "1"]]', "[0].value is missing"),
    "gpqa.jsonl": (lines({"Question": "q", "Correct Answer": "r"}), "Incorrect Answer 1"),
    "tests.jsonl": (
        lines({"question_content": "q", "public_test_cases": [1]}),
        "field public_test_cases: expected text",
    ),
    "header.csv": ("question,answer\n1+1?,2\n", "[0].value is missing"),
    "letter.csv": ("q,1,2,3,4,E\n", "expected a letter of ABCD"),
    "empty-question.csv": (",1,2,3,4,A\n", "field [0]"),
    "open-quote.csv": ('"' + "q" * 200_000, "not a readable csv file"),
    "text.parquet": ("not parquet", "text.parquet: not a readable parquet file"),
    "empty.parquet": ("", "empty.parquet: not a readable parquet file"),
    "text.zip": ("not a zip", "text.zip: not a readable zip file"),
    "a.txt": ("1+1?", "unknown ending '.txt'"),
    "no-ending": ("1+1?", "unknown ending ''"),
}


@dataclass
class Bench:
    """Folders with the files of all rows: those that are right and those that are damaged."""

    folder: Path
    model: Path

    def path(self, word: str) -> str:
        """A word of a row, with the capitals that name files replaced by their paths."""
        special = {"MODEL": self.model, "GOOD": self.folder / "good.json"}
        if word in special:
            return str(special[word])
        if word.isupper() and len(word) > 2:
            return str(self.folder / word.lower())
        for name in ("bad", "replay"):
            word = word.replace(f"{name.upper()}/", f"{self.folder}/{name}/")
        return word


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    write_orz(folder / "good.json", [(f"{k}+{k + 1}=?", str(2 * k + 1)) for k in range(8)])
    (folder / "bad").mkdir()
    for name, (content, _) in DATA.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / "bad" / name).write_bytes(content)
    make_containers(folder)
    make_problems(folder)
    make_recorded(folder)
    make_models(folder, model_folder, tokenizer)
    make_replays(folder)
    make_runs(folder)
    return Bench(folder, model_folder)


def make_containers(folder: Path) -> None:
    """Parquet and zip files, and folders, that cannot be read."""
    bad = folder / "bad"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SUM] * 50), bad / "cut.parquet")
    content = (bad / "cut.parquet").read_bytes()
    (bad / "cut.parquet").write_bytes(content[: len(content) // 2])
    content = bytearray(content)
    content[4:60] = b"\xff" * 56
    (bad / "damaged.parquet").write_bytes(content)
    for name, members in (("none.zip", ["a.txt"]), ("two.zip", ["a.json", "b.json"])):
        with zipfile.ZipFile(bad / name, "w") as archive:
            for member in members:
                archive.writestr(member, "[]")
    with zipfile.ZipFile(bad / "locked.zip", "w") as archive:
        archive.writestr("a.json", json.dumps([SUM]))
    content = bytearray((bad / "locked.zip").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1  # the flag that says it has a password
    (bad / "locked.zip").write_bytes(content)
    (bad / "folder").mkdir()
    (bad / "folder" / "a.txt").touch()
    (bad / "name.json").mkdir()
    (bad / "inside").mkdir()
    (bad / "inside" / "a.jsonl").write_text("{oops")
    (bad / "broken-link.jsonl").symlink_to(bad / "absent.jsonl")


def make_problems(folder: Path) -> None:
    """Problems that are well formed and that training or evaluation must refuse."""
    bad = folder / "bad"
    write_orz(bad / "few.json", [("1+1=?", "2")] * 3)
    write_orz(bad / "long.json", [("1+1=?", "2")] * 8 + [("1+" * 80 + "1=?", "81")])
    write_orz(bad / "gold.json", [("1+1=?", "2")] * 8 + [("Which?", "\\frac{")])
    write_orz(bad / "notfound.json", [("1+1=?", "2")] * 8 + [("Which?", "notfound")])
    write_orz(bad / "only-notfound.json", [("1+1=?", "notfound")] * 8)
    write_orz(bad / "proofs.json", [("Prove that $1 > 0$.", "1")])
    (bad / "other").mkdir()
    shutil.copy(folder / "good.json", bad / "other" / "good.json")


RECORDED: dict[str, tuple[Any, str]] = {
    "no-response": ({"gold": "4"}, "field response or pred: expected text, found None"),
    "no-gold": ({"response": "4"}, "field gold or answer: expected text, found None"),
    "empty-gold": ({"gold": " ", "pred": "4"}, "field gold or answer: expected text"),
    "number-gold": ({"gold": 4, "pred": "4"}, "field gold or answer: expected text, found 4"),
    "true-gold": ({"gold": True, "pred": "4"}, "field gold or answer: expected text"),
    "list-pred": ({"gold": "4", "pred": ["4"]}, "field response or pred: expected text"),
    "eos": ({"gold": "4", "pred": "4", "finish": "eos"}, "field finish: expected stop"),
    "abort": ({"gold": "4", "pred": "4", "finish": "abort"}, "found 'abort'"),
    "finish-true": ({"gold": "4", "pred": "4", "finish": True}, "field finish: expected stop"),
    "tokens-text": ({"gold": "4", "pred": "4", "tokens": "9"}, "field tokens: expected a whole"),
    "tokens-minus": ({"gold": "4", "pred": "4", "tokens": -9}, "field tokens: expected a whole"),
    "tokens-many": ({"gold": "4", "pred": "4", "tokens": 10**12}, "field tokens: expected"),
    "tokens-half": ({"gold": "4", "pred": "4", "tokens": 1.5}, "field tokens: expected a whole"),
    "label-text": ({"gold": "4", "pred": "4", "expected": "yes"}, "field expected: expected 0"),
    "label-two": ({"gold": "4", "pred": "4", "expected": 2}, "field expected: expected 0 or 1"),
    "label-nan": ({"gold": "4", "pred": "4", "expected": float("nan")}, "found nan"),
    "list": ([1, 2], "expected an object, found list"),
}


def make_recorded(folder: Path) -> None:
    (folder / "recorded").write_text("")
    for name, (item, _) in RECORDED.items():
        (folder / "bad" / f"recorded-{name}.jsonl").write_text(lines(item))
    (folder / "bad" / "graded.jsonl").write_text(lines(GRADED))
    (folder / "bad" / "ungraded.jsonl").write_text(lines({"question": "q", "reward": "high"}))
    nan = lines({"question": "q", "reward": float("nan")})
    (folder / "bad" / "nan-reward.jsonl").write_text(nan)


def make_models(folder: Path, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Folders that are no model, a damaged one, or another kind of model than is needed."""

    def copied(name: str, file: str = "", content: bytes | str = b"") -> Path:
        copy = Path(shutil.copytree(model, folder / name))
        if file:
            content = content.encode() if isinstance(content, str) else content
            (copy / file).write_bytes(content)
        return copy

    (folder / "empty").mkdir()
    copied("config-empty", "config.json", "")
    copied("config-list", "config.json", "[1]")
    copied("config-number", "config.json", "3")
    copied("config-cut", "config.json", '{"model_type": "qw')
    copied("config-none", "config.json", "{}")
    copied("config-unknown", "config.json", '{"model_type": "no_such_model"}')
    copied("tokenizer-empty", "tokenizer.json", "")
    copied("tokenizer-cut", "tokenizer.json", '{"version": "1.0", "model"')
    copied("tokenizer-list", "tokenizer.json", "[]")
    copied("weights-empty", "model.safetensors", b"")
    weights = (model / "model.safetensors").read_bytes()
    copied("weights-cut", "model.safetensors", weights[: len(weights) // 2])
    copied("weights-text", "model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    T5Config(d_model=32, num_layers=1, num_heads=1, d_ff=32).save_pretrained(folder / "t5-model")
    qwen = Qwen2ForCausalLM.from_pretrained(model).config
    wide = qwen.__class__(**{**qwen.to_dict(), "vocab_size": 64, "pad_token_id": None})
    wide.save_pretrained(copied("small-vocabulary"))
    qwen.num_labels = 1
    Qwen2ForSequenceClassification(qwen).save_pretrained(folder / "critic")
    gpt2 = GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=qwen.vocab_size, num_labels=1, pad_token_id=0
    )
    GPT2ForSequenceClassification(gpt2).save_pretrained(folder / "gpt2-critic")
    MambaForCausalLM(small(MambaConfig, tokenizer)).save_pretrained(folder / "mamba")
    small(MambaConfig, tokenizer).save_pretrained(folder / "mamba-critic")
    head = {"score.weight": torch.zeros(1, 64)}
    save_file(head, folder / "mamba-critic" / "model.safetensors")
    BertLMHeadModel(small(BertConfig, tokenizer)).save_pretrained(folder / "bert")
    falcon = small(FalconConfig, tokenizer)
    falcon.alibi = True
    FalconForCausalLM(falcon).save_pretrained(folder / "falcon")
    for name in ("critic", "mamba", "bert", "falcon"):
        tokenizer.save_pretrained(folder / name)
    save_file({"score.weight": torch.zeros(1, 32)}, copied("cut-head") / "model.safetensors")
    save_file({"score.weight": torch.zeros(1, 32)}, folder / "t5-model" / "model.safetensors")
    vocabulary = (model / "tokenizer.json").read_text()
    swapped = vocabulary.replace('"1":', '"?":', 1).replace('"2":', '"1":', 1)
    copied("other-tokens", "tokenizer.json", swapped.replace('"?":', '"2":', 1))
    (copied("no-weights") / "model.safetensors").unlink()
    make_wrong_weights(model, copied)
    make_wrong_settings(model, copied)
    (copied("no-eos") / "generation_config.json").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (folder / "no-eos" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": None})
    )


def make_wrong_weights(model: Path, copied: Callable[..., Path]) -> None:
    """Weights that are missing, left over, not finite, or tied by the configuration alone."""
    weights = load_file(model / "model.safetensors")
    norm, embedding = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
    changes = {
        "few-weights": {"model.norm.weight": None},
        "more-weights": {"model.layers.9.mlp.up_proj.weight": norm.clone()},
        "nan-weights": {"model.norm.weight": norm.index_fill(0, torch.tensor(3), torch.nan)},
        "infinite-weights": {"model.norm.weight": norm.index_fill(0, torch.tensor(3), torch.inf)},
        "two-heads": {"lm_head.weight": embedding.flip(0)},
    }
    for name, change in changes.items():
        changed = {key: tensor for key, tensor in (weights | change).items() if tensor is not None}
        save_file(changed, copied(name) / "model.safetensors", {"format": "pt"})


def make_wrong_settings(model: Path, copied: Callable[..., Path]) -> None:
    """Folders that lack a small file, or whose small files promise what the model does not have."""
    (copied("no-config") / "config.json").unlink()
    copied("a-run/policy")
    for file in copied("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    copied("generation-cut", "generation_config.json", "{")
    copied("prompt-cut", "prompt.json", '{"template": "Q: {question} A:"')
    copied("prompt-stop", "prompt.json", '{"template": "Q: {question} A:", "stop": [1]}')
    copied("prompt-no-question", "prompt.json", '{"template": "Q: A:", "stop": []}')
    for name, file, change in (
        ("eos-outside", "generation_config.json", {"eos_token_id": [1, 10**5]}),
        ("eos-text", "generation_config.json", {"eos_token_id": "</s>"}),
        ("quantized", "config.json", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    ):
        settings = json.loads((model / file).read_text()) | change
        copied(name, file, json.dumps(settings))


def small(config: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """A configuration of two small layers."""
    return config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer) + 3,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_replays(folder: Path) -> None:
    """Saved rollouts of two steps, whole and damaged: 16 of 4 problems in each."""
    problems = [Problem(f"a:{k}", f"{k}+1=?", str(k + 1), (1, 2)) for k in range(4)]
    rollouts = [
        Rollout(problem, [5, 6], [-1.0, -1.0], "stop", "x")
        for problem in problems
        for _ in range(4)
    ]
    changes: dict[str, dict[str, Any]] = {
        "whole": {},
        "no-ids": {"ids": None},
        "no-tokens": {"ids": [], "logprobs": []},
        "big-id": {"ids": [5, 10**6]},
        "text-id": {"ids": [5, "6"]},
        "few-logprobs": {"logprobs": [-1.0]},
        "nan-logprob": {"logprobs": [-1.0, float("nan")]},
        "nan-reward": {"reward": float("nan")},
        "text-reward": {"reward": "1"},
        "text-tokens": {"tokens": "two"},
        "above-zero": {"logprobs": [-1.0, 0.5]},
        "abort": {"finish": "abort"},
        "no-finish": {"finish": None},
        "list-response": {"response": ["x"]},
        "long": {"ids": [5] * 600, "logprobs": [-1.0] * 600, "tokens": 600},
    }
    for name, change in changes.items():
        replay = folder / "replay" / name
        replay.mkdir(parents=True)
        for step in range(2):
            save_rollouts(replay / f"step-{step}.jsonl", rollouts)
        *others, last = (replay / "step-1.jsonl").read_text().splitlines()
        record = json.loads(last) | change
        if change == {"ids": None}:
            del record["ids"]
        (replay / "step-1.jsonl").write_text("\n".join([*others, json.dumps(record)]) + "\n")
    for name, text in (("cut", '{"problem": "a'), ("list", "[1]\n"), ("deep", DEEP), ("void", "")):
        replay = Path(shutil.copytree(folder / "replay" / "whole", folder / "replay" / name))
        (replay / "step-1.jsonl").write_text(text)


def make_runs(folder: Path) -> None:
    """Run folders for figures and pages: whole, and with damaged files."""
    record = {"step": 0, "reward": 0.5, "length": 3.0}
    contents = {
        "run": {},
        "run-no-config": {"config.json": None},
        "run-config": {"config.json": "{oops"},
        "run-metrics": {"metrics.jsonl": "{oops\n" + lines(record)},
        "run-no-metrics": {"metrics.jsonl": None},
        "run-evaluations": {"evaluations.jsonl": "[1\n" + lines(record)},
        "run-rollouts": {"rollouts.jsonl": "{oops\n" + lines(GRADED)},
        "run-summary": {"summary.json": "{oops"},
    }
    for name, changed in contents.items():
        run_folder = folder / name
        run_folder.mkdir()
        files: dict[str, str | None] = {
            "config.json": json.dumps({"name": name, "seed": 0, "policy_lr": 1, "critic_lr": 1}),
            "metrics.jsonl": lines(record, record | {"step": 1}),
            "evaluations.jsonl": lines(record),
            "rollouts.jsonl": lines({"step": 0} | GRADED),
        }
        for file, content in (files | changed).items():
            if content is not None:
                (run_folder / file).write_text(content)


# ── the rows ──────────────────────────────────────────────────────────────────────────────────────

SETTINGS = {
    "train": config.Config,
    "evaluate": Evaluation,
    "ask": ask.Question,
    "export": export.Settings,
    "curate": curate.Recipe,
    "run": run.Options,
    "tiny": tiny.Settings,
    "vs_trl": vs_trl.Settings,
    "programs": programs.SelfTest,
    "fuzz": grader_fuzz.Settings,
    "speed": grader_speed.Settings,
    "logprob": logprob.Settings,
    "scaling": scaling.Settings,
    "gpu": gpu.Settings,
}


def numeric_rows() -> Iterator[Row]:
    """For each numeric setting of each program: what is below, above, and no number at all."""
    for program, settings in SETTINGS.items():
        for name, allowed in ranges(settings).items():
            kind = config.without_none(get_type_hints(settings)[name])
            flag = f"--{name.replace('_', '-')}"
            low = allowed.low if allowed.above else allowed.low - (1 if kind is int else 0.001)
            yield Row(program, f"{flag}={kind(low)}", f"{flag} {kind(low)}: must ")
            if kind is float:
                odd = "nan" if len(name) % 2 else "inf"
                yield Row(program, f"{flag} {odd}", f"{flag} {odd}: must be a finite number")
            elif program == "train":
                high = int(allowed.high) + 1
                line = f"{flag} {high}: must not be above {int(allowed.high)}"
                yield Row(program, f"{flag} {high}", line)


@cache
def ranges(settings: type) -> dict[str, Range]:
    """The numeric settings of a program, and their ranges."""
    found = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        for item in getattr(config.without_none(hint), "__metadata__", ()):
            if isinstance(item, Range):
                found[name] = item
    return found


def data_rows() -> Iterator[Row]:
    """Each damaged file of problems, given to the programs that read problems, in turn."""
    files = [(f"BAD/{name}", line) for name, (_, line) in DATA.items()] + [
        ("BAD/cut.parquet", "cut.parquet: not a readable parquet file"),
        ("BAD/damaged.parquet", "damaged.parquet: not a readable parquet file"),
        ("BAD/none.zip", "expected one .json, .jsonl or .csv file in it, found 0"),
        ("BAD/two.zip", "found 2"),
        ("BAD/locked.zip", "locked.zip: not a readable zip file"),
        ("BAD/folder", "holds no file with one of the endings"),
        ("BAD/name.json", "holds no file with one of the endings"),
        ("BAD/inside", "not valid JSON"),
        ("BAD/broken-link.jsonl", "no such file or folder"),
        ("BAD/absent.json", "no such file or folder"),
        ("absent/set", "no such file here, and the hub does not give it"),
        ("absent/set/a.jsonl", "no such file"),
        ("absent/set:main@test", "the hub does not give it"),
    ]
    programs = [("train", "--data"), ("evaluate", "--benchmarks"), ("curate", "--against")]
    for k, (file, line) in enumerate(files):
        program, flag = programs[k % 3]
        yield Row(program, f"{flag} {file}", line)
    for file, line in files[::6]:
        yield Row("train", f"--eval-data {file}", line)


ROWS = [
    # settings of a training that do not go together, or change nothing
    Row("train", "--prompts 1 --critic-steps 9", "1 prompts × 4 samples are only 4 responses"),
    Row("train", "--policy-steps 17", "--policy-steps 17: 4 prompts × 4 samples are only 16"),
    Row("train", "--micro-tokens 87", "--micro-tokens 87: cannot hold one sequence of"),
    Row("train", "--advantage grpo --samples 1", "it needs at least 2"),
    Row("train", "--advantage grpo --kl-reward 0.1", "--kl-reward 0.1: has no effect with"),
    Row("train", "--advantage grpo --gamma 0.9", "--gamma 0.9: has no effect with --advantage"),
    Row("train", "--advantage grpo --lam 0.9", "--lam 0.9: has no effect with --advantage grpo"),
    Row("train", "--advantage grpo --value-clip 0.2", "--value-clip 0.2: has no effect"),
    Row("train", "--advantage grpo --value-head zeros", "--value-head zeros: has no effect"),
    Row("train", "--advantage grpo --init-critic CRITIC", "has no effect with --advantage grpo"),
    Row("train", "--advantage grpo --lam-critic 0.9", "--lam-critic 0.9: has no effect with"),
    Row("train", "--advantage grpo --lam-adaptive 0.1", "--lam-adaptive 0.1: has no effect with"),
    Row("train", "--advantage grpo --critic-only-steps 1", "--critic-only-steps 1: has no effect"),
    Row("train", "--advantage grpo --critic-model GPT2", "has no effect with --advantage grpo"),
    Row("train", "--lam-critic 1", "--lam-critic 1.0: has no effect beside --lam 1.0, which the"),
    Row("train", "--lam 0.9 --lam-adaptive 0.1", "--lam 0.9: has no effect with --lam-adaptive"),
    Row(
        "train", "--lam-adaptive 0.04", "is above 0 for no response of --response-tokens 24; raise"
    ),
    Row("train", "--critic-only-steps 3", "--critic-only-steps 3: is above --steps 2, which"),
    Row("train", "--init-critic CRITIC --critic-model GPT2", "starts from; pass one"),
    Row("train", "--critic-model MODEL", "has no effect where it is --model"),
    Row("train", "--anneal-to 1e-9", "--anneal-to 1e-09: has no effect without --anneal-steps"),
    Row("train", "--kl-estimator k1", "--kl-estimator k1: has no effect without --kl-loss"),
    Row("train", "--clip-eps 0.3", "--clip-eps 0.3: has no effect without --policy-steps"),
    Row("train", "--init-critic CRITIC --value-head zeros", "has no effect with --init-critic"),
    Row("train", "--reward math:sqrt --require-boxed", "--require-boxed: has no effect with"),
    Row("train", "--reward math:sqrt --grader-seconds 1", "has no effect with --reward"),
    Row("train", "--vllm-memory 0.3", "--vllm-memory 0.3: has no effect with --engine"),
    Row("train", "--keep-rollouts 0 --keep-tokens 2", "--keep-tokens 2: has no effect with"),
    Row("train", "--checkpoint-every 0 --keep-checkpoints 3", "--keep-checkpoints 3: has no"),
    Row("train", "--offload", "--offload: has no effect without a GPU"),
    Row("train", "--gpus 4 --gpu-memory 40", "--gpus 4, --gpu-memory 40.0: have no effect without"),
    Row("train", "--eval-every 3", "--eval-every 3: has no effect without --eval-data"),
    Row("train", "--eval-samples 3", "--eval-samples 3: has no effect without --eval-data"),
    Row("train", "--replicas 2", "--replicas 2: does not divide the 1 ranks"),
    Row("train", "--tensor-parallel 3", "--tensor-parallel 3: only vLLM shares a model"),
    Row("train", "--engine auto --tensor-parallel 3", "--tensor-parallel 3: does not divide the 1"),
    Row("train", "--overwrite --resume auto", "pass one of them"),
    Row("train", "--track", "--track: names no tracker; pass --track none to track nothing"),
    Row("train", "--track none tensorboard", "--track none tensorboard: none stands alone"),
    Row("train", "--track tensorboard tensorboard", "names a tracker twice"),
    Row("train", "--reward none", "--reward none: expected module:function"),
    Row("train", "--reward no.such:thing", "--reward no.such:thing: expected module:function"),
    Row("train", "--reward math:pi", "--reward math:pi: is not a function"),
    Row("train", "--response-tokens 9000 --micro-tokens 9999", "over the 1024 positions"),
    Row("train", "--prompts 9", "8 problems are fewer than --prompts 9"),
    Row("train", "--prompt-tokens 3", "tokens is over --prompt-tokens 3"),
    Row("train", "--prompt-tokens 3 --drop-bad-rows", "no prompt is within --prompt-tokens 3"),
    Row("train", "--model tiny --model no/such", "--model no/such: not a folder or hub id"),
    # the prompt
    Row("train", "--template mine", "--template 'mine': expected authors, paper or a text file"),
    Row("evaluate", "--template mine", "--template 'mine': expected authors, paper or a text file"),
    Row("ask", "--template EMPTY", "--template '"),
    Row("train", "--template BAD/latin.jsonl", "a text file (not UTF-8 text)"),
    Row("train", "--template GOOD", "good.json: has {question} 0 times; expected it once"),
    Row("train", "--template {question}+{question}", "has {question} 2 times; expected it once"),
    Row("train", "--stop=", "--stop '': is empty or blank"),
    Row("ask", "--stop x x", "--stop 'x': is there twice; name it once"),
    Row("evaluate", "--stop <think>", "--stop '<think>': stands at the end of the template"),
    Row("train", f"--stop {'x' * 101}", "x: has 101 characters; expected at most 100"),
    Row("train", "--stop \udcff", "is not text in UTF-8"),
    Row("train", "--model PROMPT-CUT", "/prompt-cut: its prompt.json is damaged; expected a"),
    Row("evaluate", "--model PROMPT-STOP", "/prompt-stop: its prompt.json is damaged; expected a"),
    Row("ask", "--model PROMPT-NO-QUESTION", "its prompt.json is damaged; expected a template"),
    # problems that cannot be trained on
    Row("train", "--data BAD/few.json", "3 problems are fewer than --prompts 4"),
    Row("train", "--data BAD/long.json", "long.json:9: prompt of"),
    Row("train", "--data BAD/gold.json", "gold.json:9: Math-Verify cannot parse the gold answer"),
    Row("train", "--data BAD/notfound.json", "notfound.json:9: Math-Verify cannot parse"),
    Row("train", "--data BAD/only-notfound.json --drop-bad-rows", "no problem has a gold answer"),
    Row("train", "--eval-data a=x.json a=BAD/few.json", "two sets are called a"),
    Row("train", "--eval-data =BAD/few.json", "the name of a set is empty"),
    Row("train", "--eval-data a/b=BAD/few.json", "the name of a set is empty or has a /"),
    Row("evaluate", "--benchmarks BAD/gold.json", "Math-Verify cannot parse the gold answer"),
    Row("evaluate", "--benchmarks BAD/notfound.json", "Math-Verify cannot parse the gold answer"),
    Row("evaluate", "--benchmarks BAD/long.json", "long:9: prompt of"),
    Row("evaluate", "--benchmarks ../up=BAD/few.json", "the name of a set is empty or has a /"),
    Row("evaluate", "--benchmarks ..=BAD/few.json", "the name of a set is empty"),
    Row("evaluate", "--benchmarks math500", "the hub does not give it"),
    # models
    Row("train", "--model EMPTY", "not a folder or hub id with a readable model"),
    Row("train", "--model no/such-model", "--model no/such-model: not a folder or hub id"),
    Row("train", "--model GOOD", "not a folder or hub id with a readable model"),
    Row("train", "--model CONFIG-EMPTY", "not a folder or hub id with a readable model"),
    Row("train", "--model CONFIG-LIST", "not a folder or hub id with a readable model"),
    Row("evaluate", "--model CONFIG-NUMBER", "not a folder or hub id with a readable model"),
    Row("evaluate", "--model CONFIG-CUT", "not a folder or hub id with a readable model"),
    Row("ask", "--model CONFIG-NONE", "not a folder or hub id with a readable model"),
    Row("ask", "--model CONFIG-UNKNOWN", "not a folder or hub id with a readable model"),
    Row("train", "--model TOKENIZER-EMPTY", "its tokenizer cannot be read"),
    Row("evaluate", "--model TOKENIZER-CUT", "its tokenizer cannot be read"),
    Row("ask", "--model TOKENIZER-LIST", "its tokenizer cannot be read"),
    Row("train", "--model WEIGHTS-EMPTY", "its weights cannot be read"),
    Row("evaluate", "--model WEIGHTS-CUT", "its weights cannot be read"),
    Row("ask", "--model WEIGHTS-TEXT", "its weights cannot be read"),
    Row("train", "--model FEW-WEIGHTS", "the weight model.norm.weight is missing"),
    Row("evaluate", "--model FEW-WEIGHTS", "the weight model.norm.weight is missing"),
    Row("ask", "--model FEW-WEIGHTS", "the weight model.norm.weight is missing"),
    Row("evaluate", "--model MORE-WEIGHTS", "model.layers.9.mlp.up_proj.weight is not part of"),
    Row("ask", "--model MORE-WEIGHTS", "model.layers.9.mlp.up_proj.weight is not part of"),
    Row("train", "--model NAN-WEIGHTS", "the weight model.norm.weight holds NaN or infinite"),
    Row("evaluate", "--model NAN-WEIGHTS", "the weight model.norm.weight holds NaN or infinite"),
    Row("ask", "--model INFINITE-WEIGHTS", "the weight model.norm.weight holds NaN or infinite"),
    Row("train", "--model TWO-HEADS", "ties lm_head.weight to model.embed_tokens.weight, but"),
    Row("evaluate", "--model TWO-HEADS", "ties lm_head.weight to model.embed_tokens.weight, but"),
    Row("train", "--model NO-CONFIG", "(the folder has no config.json)"),
    Row("evaluate", "--model A-RUN", "(it is a run's folder; its model is "),
    Row("train", "--model NO-TOKENIZER", "its tokenizer turns '1+1=2' into ''; are its files"),
    Row("evaluate", "--model NO-TOKENIZER", "its tokenizer turns '1+1=2' into ''; are its files"),
    Row("ask", "--model NO-TOKENIZER", "its tokenizer turns '1+1=2' into ''; are its files"),
    Row("train", "--model EOS-OUTSIDE", "token 100000 is not one of the model's"),
    Row("evaluate", "--model EOS-OUTSIDE", "token 100000 is not one of the model's"),
    Row("ask", "--model EOS-TEXT", "token '</s>' is not one of the model's"),
    Row("train", "--model GENERATION-CUT", "its generation_config.json cannot be read"),
    Row("train", "--model QUANTIZED", "its weights are quantized (awq)"),
    Row("evaluate", "--model QUANTIZED", "its weights are quantized (awq)"),
    Row("ask", "--model QUANTIZED", "its weights are quantized (awq)"),
    Row("evaluate", "--model SMALL-VOCABULARY", "its tokenizer has"),
    Row("ask", "--model SMALL-VOCABULARY", "its tokenizer has"),
    Row("train", "--model NO-WEIGHTS", "no-weights"),
    Row("train", "--model T5-MODEL", "a t5 model is not a causal language model"),
    Row("evaluate", "--model T5-MODEL", "a t5 model is not a causal language model"),
    Row("ask", "--model T5-MODEL", "a t5 model is not a causal language model"),
    Row("train", "--model SMALL-VOCABULARY", "its tokenizer has"),
    Row("train", "--model CRITIC", "a critic or classifier, not a language model"),
    Row("evaluate", "--model CRITIC", "a critic or classifier, not a language model"),
    Row("ask", "--model CRITIC", "a critic or classifier, not a language model"),
    Row("train", "--init-critic MODEL", "holds no value head"),
    Row("train", "--init-critic CUT-HEAD", "holds a value head of 32 numbers; expected 64"),
    Row("train", "--init-critic T5-MODEL", "a t5 model is not a causal language model"),
    Row("train", "--init-critic GPT2-CRITIC", "/gpt2-critic: its tokenizer turns '1+1=2' into"),
    Row("train", "--init-critic WEIGHTS-CUT", "its weights cannot be read"),
    Row("train", "--init-critic absent", "--init-critic absent: holds no value head"),
    Row("train", "--critic-model CRITIC", "/critic: a critic or classifier, not a"),
    Row("train", "--critic-model OTHER-TOKENS", "the id of '1' is 17 in its tokenizer and 16"),
    Row("train", "--critic-model NO-TOKENIZER", "/no-tokenizer: its tokenizer turns"),
    Row("train", "--critic-model MAMBA", "/mamba: cannot train a mamba model: it"),
    Row("train", "--critic-model QUANTIZED", "/quantized: its weights are quantized"),
    Row("train", "--critic-model FEW-WEIGHTS", "the weight model.norm.weight is missing"),
    Row("train", "--critic-model absent", "--critic-model absent: not a folder or hub id"),
    Row("ask", "--critic MODEL", "holds no value head"),
    Row("ask", "--critic GPT2-CRITIC", "/gpt2-critic: its tokenizer turns '1+1=2' into"),
    Row("ask", "--critic absent", "--critic absent: holds no value head"),
    # replayed rollouts
    Row("train", "--replay REPLAY/whole --steps 3", "has no step-2.jsonl"),
    Row("train", "--replay absent", "--replay absent: has no step-0.jsonl"),
    Row("train", "--replay REPLAY/cut", "step-1.jsonl: line 1: not a saved rollout"),
    Row("train", "--replay REPLAY/list", "step-1.jsonl"),
    Row("train", "--replay REPLAY/deep", "step-1.jsonl: not saved rollouts"),
    Row("train", "--replay REPLAY/void", "step-1.jsonl holds only 0 rollouts"),
    Row("train", "--replay REPLAY/no-ids", "line 16: not a saved rollout (KeyError('ids'))"),
    Row("train", "--replay REPLAY/no-tokens", "line 16: has no prompt_ids or no ids"),
    Row("train", "--replay REPLAY/big-id", "line 16: has an id that is not one of"),
    Row("train", "--replay REPLAY/text-id", "line 16: has an id that is not one of"),
    Row("train", "--replay REPLAY/few-logprobs", "line 16: reward and logprobs must be"),
    Row("train", "--replay REPLAY/nan-logprob", "line 16: reward and logprobs must be"),
    Row("train", "--replay REPLAY/nan-reward", "line 16: reward and logprobs must be"),
    Row("train", "--replay REPLAY/text-reward", "line 16: reward and logprobs must be"),
    Row("train", "--replay REPLAY/text-tokens", "step-1.jsonl"),
    Row("train", "--replay REPLAY/above-zero", "line 16: has the log-probability 0.5; none is"),
    Row("train", "--replay REPLAY/abort", "finish: expected stop or length, found 'abort'"),
    Row("train", "--replay REPLAY/no-finish", "step-1.jsonl: line 16: finish: expected stop or"),
    Row("train", "--replay REPLAY/list-response", "line 16: problem, question, gold, response"),
    Row("train", "--replay REPLAY/long", "line 16: has 602 tokens, over --micro-tokens 512"),
    Row("train", "--replay REPLAY/whole --samples 8 --advantage grpo", "--samples 8"),
    Row("train", "--replay REPLAY/whole --samples 3 --advantage grpo", "--samples 3"),
    Row("train", "--replay REPLAY/whole --prompts 9 --critic-steps 20", "--critic-steps 20"),
    Row("train", "--replay REPLAY/whole --eval-data GOOD", "has no effect with --replay"),
    Row(
        "train",
        "--replay REPLAY/whole --eval-data GOOD --eval-every 2 --eval-samples 3",
        "--eval-every 2, --eval-samples 3: have no effect with --replay, which grades",
    ),
    Row("train", "--replay REPLAY/whole --reward math:sqrt", "--reward math:sqrt: has no effect"),
    Row("train", "--replay REPLAY/whole --require-boxed", "--require-boxed: has no effect with"),
    Row("train", "--replay REPLAY/whole --grader-seconds 1", "has no effect with --replay"),
    # --plan
    Row("plan-a-run", "--micro-tokens 1", "--micro-tokens 1: cannot hold one sequence"),
    Row("plan-a-run", "--gpu-memory nan", "--gpu-memory nan: must be a finite number"),
    Row("plan-a-run", "--gpus -1", "--gpus -1: must not be negative"),
    Row("plan-a-run", "--gpus 3 --replicas 2", "--replicas 2: does not divide the 3 GPUs"),
    Row("plan-a-run", "--model no/such-model", "not a folder or hub id with a readable model"),
    Row("plan-a-run", "--model EMPTY", "not a folder or hub id with a readable model"),
    Row("plan-a-run", "--model T5-MODEL", "a t5 model is not a causal language model"),
    Row("plan-a-run", "--critic-model CRITIC", "/critic: a critic or classifier, not a"),
    Row("plan-a-run", "--critic-model MAMBA", "/mamba: cannot train a mamba model: it"),
    Row("plan-a-run", "--init-critic absent", "--init-critic absent: not a folder or hub id with"),
    Row("plan-a-run", "--init-critic CRITIC --critic-model GPT2", "starts from; pass one"),
    Row("plan-a-run", "--model CRITIC", "a critic or classifier, not a language model"),
    Row("plan-a-run", "--response-tokens 1000 --micro-tokens 9999", "over the 1024 positions"),
    Row("plan-a-run", "--advantage grpo --samples 1", "it needs at least 2"),
    Row("plan-a-run", "--critic-steps 99", "are only 16 responses"),
    # evaluate.py
    Row("evaluate", "--engine auto --tensor-parallel 2", "does not divide the 1 ranks"),
    Row("evaluate", "--tensor-parallel 2", "--tensor-parallel 2: only vLLM shares a model"),
    Row("evaluate", "--vllm-memory 0.3", "--vllm-memory 0.3: has no effect with --engine"),
    Row("evaluate", "--model MAMBA", "cannot sample from a mamba model: it carries a state"),
    Row("evaluate", "--model FALCON", "cannot sample from this model: ValueError: too many"),
    Row("evaluate", "--model BERT", "--engine transformers cannot sample from this model"),
    Row("evaluate", "--model NO-WEIGHTS", "no-weights"),
    Row("responses", "--responses BAD/graded.jsonl --samples 4", "--samples 4: has no effect with"),
    Row(
        "responses",
        "--responses BAD/graded.jsonl --limit 5 --out x --overwrite",
        "--limit 5, --out x, --overwrite: have no effect with --responses",
    ),
    Row("evaluate", "--responses RECORDED", "leave out --model and --benchmarks"),
    Row("evaluate", "--response-tokens 9000", "over the 1024 positions"),
    Row("evaluate", "--model MODEL MODEL", "both write"),
    Row("responses", "--responses absent.jsonl", "absent.jsonl: no such file"),
    Row("responses", "--responses BAD/empty.jsonl", "holds no responses"),
    Row("responses", "--responses BAD/cut.jsonl", "expected text, found None"),
    Row("responses", "--responses BAD/deep.jsonl", "nested too deeply"),
    Row("responses", "--responses BAD/folder", "holds no file with one of the endings"),
    Row("responses", "--responses BAD/text.parquet", "not a readable parquet file"),
    Row("responses", "--responses BAD/latin.jsonl", "not UTF-8 text"),
    Row("responses", "--responses BAD/graded.jsonl --grader-seconds nan", "--grader-seconds nan"),
    Row("responses", "--responses BAD/graded.jsonl --grader-seconds inf", "--grader-seconds inf"),
    Row("responses", "--responses BAD/graded.jsonl --grader-seconds=-1", "--grader-seconds -1.0"),
    Row("responses", "--responses BAD/graded.jsonl --grader-workers 0", "must be above 0"),
    *[
        Row("responses", f"--responses BAD/recorded-{name}.jsonl", line)
        for name, (_, line) in RECORDED.items()
    ],
    # tools.ask
    Row("ask", "--temperature 0 --top-p 0.9", "--top-p 0.9: has no effect with --temperature 0"),
    Row("ask", "--temperature 0 --seed 3", "--seed 3: has no effect with --temperature 0"),
    Row("ask", "--model MAMBA --critic MAMBA-CRITIC", "cannot train a mamba model: it carries"),
    Row("ask", "--model NO-WEIGHTS", "no-weights"),
    Row("ask", "--model NO-EOS", "names an end-of-sequence token"),
    Row("ask", "--temperature 101", "--temperature 101.0: must not be above 100"),
    Row("ask", "--top-p 1.5", "--top-p 1.5: must not be above 1"),
    Row("ask", "--model absent/model", "not a folder or hub id with a readable model"),
    # tools.export
    Row("export-absent", "", "absent: not the folder of a run; expected runs/NAME"),
    Row("export", "", "/run has no complete checkpoint"),
    Row("export", "--step 3 --out x", "--step 3: "),
    # curation
    Row("curate", "GOOD", "inputs:"),
    Row("curate", "BAD/other/good.json", "has a file good.json, too; rename one"),
    Row("curate", "BAD/surrogate.jsonl", "surrogate.jsonl:1: field question: holds half"),
    Row("curate", "BAD/twice.jsonl", "is also the id of"),
    Row("curate", "BAD/nan.jsonl", "nan.jsonl:1: field answer"),
    Row("curate", "--out absent/b.jsonl", "not a file in a folder that exists"),
    Row("curate", "--out GOOD", "--out"),
    Row("curate", "--out removed.jsonl", "choose another name or folder"),
    Row("curate", "--out .", "not a file in a folder that exists"),
    Row("curate", "--embeddings absent", "--embeddings absent: no such folder"),
    Row("curate", "--cosine 0.5", "--cosine 0.5: has no effect without --embeddings"),
    Row("curate", "--count-of 4", "--count-of 4.0: has no effect without --count-field"),
    Row("curate", "--hard 4", "--hard 4: has no effect without --count-field or --rollouts"),
    Row("curate", "--hard-of 8", "--hard-of 8: has no effect without --hard"),
    Row("curate", "--min-rate 0.2", "--min-rate 0.2: has no effect without --count-field"),
    Row("curate", "--rollouts BAD/graded.jsonl --min-rate 1", "leave no rate between them"),
    Row("curate", "--rollouts BAD/ungraded.jsonl", "not a graded response"),
    Row("curate", "--rollouts BAD/nan-reward.jsonl", "not a graded response"),
    Row("curate", "--rollouts BAD/folder", "holds no *.jsonl files of rollouts"),
    Row("curate", "--rollouts absent.jsonl", "absent.jsonl: no such file"),
    Row("curate", "--count-field num_correct", "field num_correct: expected a number"),
    Row("curate", "--synthesize sudoku:3", "--synthesize sudoku:3: expected name:count"),
    Row("curate", "--synthesize gcd:0", "--synthesize gcd:0: expected name:count"),
    Row("curate", "--synthesize gcd:1 gcd:2", "name each task once"),
    Row("curate", "--against GOOD", "no problem stays; nothing is written"),
    Row("curate", "--rollouts BAD/graded.jsonl", "no response is to a question of the inputs"),
    Row("curate", "--seed 3", "--seed 3: has no effect without --synthesize"),
    Row("curate-generated", "--against GOOD", "--against: has no effect without inputs"),
    Row("curate-generated", "--no-exact", "--no-exact: has no effect without inputs"),
    # figures, pages, experiments, the toy
    Row("figures", "RUN --out x", "--out x: has no effect without a second run"),
    Row("tiny", "--out MODEL", "is not empty; name a new folder"),
    Row("tiny", "--out GOOD", "good.json"),
    Row("figures", "absent-run", "absent-run"),
    Row("figures", "RUN RUN-NO-CONFIG", "run-no-config: not a run folder, it has no config.json"),
    Row("figures", "RUN RUN-CONFIG", "config.json: not JSON"),
    Row("figures", "RUN-METRICS", "metrics.jsonl: line 1: not JSON"),
    Row("figures", "RUN-NO-METRICS", "run-no-metrics"),
    Row("page", "absent-run", "absent-run: not a run folder"),
    Row("page", "RUN-NO-CONFIG", "not a run folder"),
    Row("page", "RUN-CONFIG", "config.json: not JSON"),
    Row("page", "RUN-METRICS", "metrics.jsonl: line 1: not JSON"),
    Row("page", "RUN-EVALUATIONS", "evaluations.jsonl: line 1: not JSON"),
    Row("page", "RUN-ROLLOUTS", "rollouts.jsonl: line 1: not JSON"),
    Row("page", "RUN-SUMMARY", "summary.json: not JSON"),
    Row("vs_trl", "--lengths", "--lengths: pass at least one"),
    Row("vs_trl", "--lengths 8 0", "--lengths 0: must be above 0"),
    Row("vs_trl", "--lengths 8 1001", "--lengths 1001: must not be above 1000"),
    Row("vs_trl", "--lengths 8 8", "--lengths 8 8: one of them occurs twice"),
    Row("vs_trl", "--episodes 650", "--episodes 650: must be a multiple of 32"),
    Row("run", "", "expected all, or of"),
    Row("run", "nonsense", "found nonsense"),
    Row("run", "all nonsense", "found nonsense"),
    Row("curate_scale", "0", "--rows 0: must be above 0"),
    Row("curate_scale", "9000000000", "--rows 9000000000: must not be above 1000000000"),
    *numeric_rows(),
    *data_rows(),
]

# Flags that tyro itself refuses, in lines of its own.
USAGE = [
    ("train", "--steps two"),
    ("train", "--steps 1.5"),
    ("train", "--polcy-lr 1"),
    ("train", "--advantage ppo"),
    ("train", "--value-head random"),
    ("train", "--policy-lr"),
    ("train", "stray"),
    ("evaluate", "--samples many"),
    ("evaluate", "--engine llama"),
    ("ask", "--seed 0.5"),
    ("ask", "two questions"),
    ("curate", "--seed x"),
    ("curate", "--aginst b.jsonl"),
    ("plan", "--gpus 3"),
    ("figures", "--out"),
    ("page", "--out x"),
    ("run", "--workers two"),
    ("tiny", "--name huge"),
    ("tiny", "--seed one"),
]


def test_there_are_at_least_250_rows_and_none_is_there_twice() -> None:
    every = [row.id() for row in ROWS] + [f"{program}: {flags}" for program, flags in USAGE]
    assert len(set(every)) == len(every) >= 250, len(every)


def test_every_numeric_setting_has_a_range() -> None:
    for settings in SETTINGS.values():
        assert is_dataclass(settings)
        kinds = {n: config.without_none(hint) for n, hint in get_type_hints(settings).items()}
        numeric = {f.name for f in fields(settings) if kinds[f.name] in (int, float)}
        assert numeric == set(ranges(settings))


@pytest.fixture(scope="module")
def shared_grader() -> Iterator[Grader]:
    with Grader(workers=1) as grader:
        yield grader


@pytest.fixture
def refused(
    bench: Bench,
    call: Callable[..., Ended],
    shared_grader: Grader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], Ended]:
    """Call a program in an empty folder, and check that it leaves it as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in (preflight, evaluate, curate):
        monkeypatch.setattr(module, "Grader", partial(Borrowed, shared_grader))

    def refused(program: str, flags: str) -> Ended:
        before = contents(tmp_path)
        words = [bench.path(word) for word in f"{RIGHT.get(program, '')} {flags}".split()]
        done = call(PROGRAMS[PROGRAM_OF.get(program, program)], *words)
        assert done.code != 0, done.out
        assert contents(tmp_path) == before
        return done

    return refused


class Borrowed:
    """A grader whose workers are those of another one, and are not stopped."""

    def __init__(self, grader: Grader, *_: Any) -> None:
        self.grader = grader

    def __enter__(self) -> Grader:
        return self.grader

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grader, name)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("row", ROWS, ids=Row.id)
def test_a_bad_input_is_one_line_and_leaves_nothing(
    row: Row, refused: Callable[[str, str], Ended]
) -> None:
    done = refused(row.program, row.flags)
    (line,) = done.err.splitlines()
    program = PROGRAM_OF.get(row.program, row.program)
    assert line.startswith(f"{NAMES[program]}: ")
    assert row.line in line


def test_held_out_problems_that_are_trained_on_are_counted(
    refused: Callable[[str, str], Ended],
) -> None:
    """The run itself is refused for another reason, so that nothing is trained."""
    done = refused("train", "--eval-data GOOD --prompts 9")
    assert "good.json: 8 of its 8 problems are in --data" in done.out
    assert "WARNING" not in refused("train", "--eval-data BAD/few.json --prompts 9").out


def test_an_error_in_a_step_keeps_its_traceback(
    bench: Bench, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError that is no refusal is not printed as one."""

    def wrong(*_: object) -> None:
        raise ValueError("shapes differ")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "update_critic", wrong)
    words = [bench.path(word) for word in RIGHT["train"].split()]
    with pytest.raises(ValueError, match="shapes differ") as error:
        call(train.main, *words, "--steps", 1)
    assert not isinstance(error.value, train.Refusal)


def test_an_error_of_a_reward_of_your_own_says_so(
    bench: Bench, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OSError, too, which otherwise is about the run's own files. The traceback is of the
    function; the last line names it, the problem and the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reads.py").write_text("def f(response, problem):\n    open('absent')\n")

    def finished(*given: Any) -> list[Rollout]:
        return [replace(r, finish_reason="stop") for r in sample(*given)]

    sample = train.sample_responses
    monkeypatch.setattr(train, "sample_responses", finished)
    words = [bench.path(word) for word in RIGHT["train"].split()]
    done = call(train.main, *words, "--reward", "reads:f", "--runs", "runs")
    assert done.code == 1
    *before, last = done.err.splitlines()
    assert last.startswith("train.py: --reward reads:f raised FileNotFoundError: ")
    assert "good.json:" in last
    assert "    open('absent')" in before


def test_a_refused_run_leaves_the_folders_of_others(
    bench: Bench, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "other").mkdir(parents=True)
    words = [bench.path(word) for word in f"{RIGHT['train']} --prompts 9".split()]
    assert call(train.main, *words, "--runs", "a").code != 0
    assert call(train.main, *words, "--runs", "a/b/c").code != 0
    assert list(contents(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "a" / "other")]


@pytest.mark.parametrize(("program", "flags"), USAGE)
def test_flags_that_cannot_be_parsed(
    program: str, flags: str, refused: Callable[[str, str], Ended]
) -> None:
    done = refused(program, flags)
    assert done.code == 2
    assert "Traceback" not in done.err


# ── a handful as processes of their own ───────────────────────────────────────────────────────────

PROCESSES = [
    ("train.py", f"{RIGHT['train']} --data BAD/deep.json", "nested too deeply"),
    ("train.py", "--threads -1", "--threads -1: must not be negative"),
    ("evaluate.py", "--responses BAD/recorded-eos.jsonl", "field finish: expected stop"),
    ("curation.curate", "BAD/two-lists.json", "expected nothing after the list"),
    ("reports.page", "RUN-CONFIG", "config.json: not JSON"),
]


@pytest.mark.parametrize(("program", "flags", "expected"), PROCESSES)
def test_a_bad_input_to_a_process(
    program: str, flags: str, expected: str, bench: Bench, tmp_path: Path
) -> None:
    root = Path(train.__file__).parent
    start = [str(root / program)] if program.endswith(".py") else ["-m", program]
    words = [bench.path(word) for word in flags.split()]
    done = subprocess.run(
        [sys.executable, *start, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: ") and expected in line
    assert not contents(tmp_path)
