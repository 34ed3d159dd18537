"""Shared fixtures: small random models under the tiny tokenizer, and rollouts to feed them."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # the same tests everywhere: none needs a GPU, and none may find one
)
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

import data
from data import Problem
from rollout import Rollout
from toy import tiny

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # for the command lines that tests start


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


def random_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tied: bool, seed: int = 0
) -> Path:
    """A Qwen2 of random weights in `folder`; peaked enough that its distribution is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,  # wider than the tokenizer, as Qwen2.5's is
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=1024, tie_word_embeddings=tied, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    return random_model(tmp_path_factory.mktemp("tied"), tokenizer, tied=True)


@pytest.fixture(scope="session")
def untied_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    return random_model(tmp_path_factory.mktemp("untied"), tokenizer, tied=False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model after a short training: good enough to be read, quick enough for a test."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.make(folder, seed=0, steps=60)
    return folder


def sums() -> list[Problem]:
    """24 problems of the tiny task."""
    questions = [
        Problem(f"test:{i}", q, str(sum(tiny.numbers(q))))
        for i, q in enumerate(tiny.problems(0)[0][:24])
    ]
    return data.tokenize(questions, tiny.tokenizer(), 64, data.TEMPLATE)


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return sums()


def random_rollouts(
    problems: list[Problem], vocab: int, lengths: list[int], seed: int = 0
) -> list[Rollout]:
    """Responses of the given lengths made of random tokens."""
    rng = random.Random(seed)
    return [
        Rollout(
            problems[i % len(problems)],
            [rng.randrange(vocab) for _ in range(n)],
            [0.0] * n,
            "stop",
            "",
        )
        for i, n in enumerate(lengths)
    ]


class Ended(NamedTuple):
    """How a program called by the fixture `call` ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ended]:
    """Call the `main` of a program with these words on its command line, in this process."""

    def called(main: Callable[[], None], *words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        code, message = 0, ""
        try:
            main()
        except SystemExit as ended:
            code, message = (
                (1, f"{ended.code}\n") if isinstance(ended.code, str) else (ended.code or 0, "")
            )
        seen = capsys.readouterr()
        return Ended(code, seen.out, seen.err + message)

    return called


def orz_data(*parts: str) -> Path:
    """A file of the real data, named by the environment variable ORZ_DATA; the test is skipped where it is absent."""
    folder = os.environ.get("ORZ_DATA")
    if not folder:
        pytest.skip("set ORZ_DATA to a folder of real data to run this")
    path = Path(folder).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def write_orz(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Problems in the authors' training form."""
    items = [
        [{"from": "human", "value": q}, {"from": "assistant", "ground_truth": {"value": a}}]
        for q, a in rows
    ]
    path.write_text(json.dumps(items))
    return path
