"""Shared fixtures: small models, rollouts to feed them, and a way to call a program's `main`."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The same tests run on every machine: none needs a GPU, and none may find one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

import data
from data import Problem
from rollout import Rollout
from toy import tiny

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # for the programs that tests start

# Flags of a training run that takes tenths of a second per step.
SMALL_RUN = """
    --prompts 4 --samples 4 --prompt-tokens 64 --response-tokens 24 --critic-steps 3
    --policy-lr 1e-3 --critic-lr 1e-3 --grader-workers 1
""".split()


# ── models ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


def random_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tied: bool,
    seed: int = 0,
    hidden_size: int = 64,
) -> Path:
    """A Qwen2 of random weights in `folder`. The weights are large, so that its distribution is far
    from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,  # wider than the tokenizer, as Qwen2.5's is
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A random model whose head is tied to the embedding."""
    return random_model(tmp_path_factory.mktemp("tied"), tokenizer, tied=True)


@pytest.fixture(scope="session")
def untied_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A random model with a head of its own."""
    return random_model(tmp_path_factory.mktemp("untied"), tokenizer, tied=False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model after a short training: its responses have the right format now and then,
    and making it is quick enough for a test."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.make(folder, seed=0, steps=60)
    return folder


# ── problems and rollouts ─────────────────────────────────────────────────────────────────────────


def sums() -> list[Problem]:
    """24 problems of the tiny task."""
    questions, _ = tiny.problems(0)
    problems = [
        Problem(f"test:{i}", question, str(sum(tiny.numbers(question))))
        for i, question in enumerate(questions[:24])
    ]
    return data.tokenize(problems, tiny.tokenizer(), 64, data.TEMPLATE)


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return sums()


def random_rollouts(
    problems: list[Problem], vocab: int, lengths: list[int], seed: int = 0
) -> list[Rollout]:
    """Responses of the given lengths, made of random tokens."""
    rng = random.Random(seed)
    rollouts = []
    for i, length in enumerate(lengths):
        token_ids = [rng.randrange(vocab) for _ in range(length)]
        problem = problems[i % len(problems)]
        rollouts.append(Rollout(problem, token_ids, [0.0] * length, "stop", ""))
    return rollouts


# ── programs ──────────────────────────────────────────────────────────────────────────────────────


class Ended(NamedTuple):
    """How a program that the fixture `call` called has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ended]:
    """Call a program's `main` in this process, with the given words as its command line."""

    def call_main(main: Callable[[], None], *words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        code, message = 0, ""
        try:
            main()
        except SystemExit as error:
            if isinstance(error.code, str):  # sys.exit(message) prints the message and exits with 1
                code, message = 1, f"{error.code}\n"
            else:
                code = error.code or 0
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err + message)

    return call_main


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def orz_data(*parts: str) -> Path:
    """A file of the real data, in the folder that the environment variable ORZ_DATA names. The test
    is skipped where there is no such file."""
    folder = os.environ.get("ORZ_DATA")
    if not folder:
        pytest.skip("set ORZ_DATA to a folder of real data to run this")
    path = Path(folder).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def load_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of each step of a run, without those that differ from run to run: times, rates
    and memory."""
    return [
        {k: v for k, v in step.items() if "second" not in k and k != "memory_gb"}
        for step in load_records(run / "metrics.jsonl")
    ]


def write_orz(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write (question, answer) rows in the layout of the authors' training data."""
    items = [
        [
            {"from": "human", "value": question},
            {"from": "assistant", "ground_truth": {"value": answer}},
        ]
        for question, answer in rows
    ]
    path.write_text(json.dumps(items))
    return path
