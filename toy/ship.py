"""Make the base model of `tiny` and seed 0 anew, measure it, and put it into toy/base.

    python -m toy.ship      # a few minutes on one core

It belongs to the recipe in toy/tiny.py: run this after a change there that changes the model. Other
processors give other weights of the same skill; tests/test_tiny.py compares the two.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import data
from config import TINY, Sampling
from grading.extract import extract
from hf_sampler import HFSampler
from reports.metrics import follows_format, mean
from rollout import sample_responses
from toy import tiny


def measure(folder: Path, samples: int = 1) -> dict[str, float]:
    """Accuracy, mean response tokens and share in the format on the held-out problems, with
    `samples` responses to each. The random streams are those of `make demo`: with one response the
    figures are those of its first line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampler = HFSampler(str(folder), tokenizer, [tokenizer.eos_token_id], "float32", "cpu", 256)
    problems = data.load(folder / "heldout.json")
    problems = data.tokenize(problems, tokenizer, TINY["prompt_tokens"], data.TEMPLATE)
    sampling = Sampling(TINY["response_tokens"])
    rollouts = sample_responses(sampler, tokenizer, problems, samples, sampling, "0/eval/0")
    finished = [r for r in rollouts if r.finish_reason == "stop"]
    right = [r for r in finished if extract(r.text) == r.problem.answer]
    return {
        "accuracy": round(len(right) / len(rollouts), 4),
        "length": round(mean([len(r.token_ids) for r in rollouts]), 2),
        "format": round(mean([float(follows_format(r.text)) for r in rollouts]), 4),
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(folder: Path) -> dict[str, Any]:
    """What toy/base/record.json says of the model in `folder`, which `tiny.make` has written."""
    return {
        "command": "python -m toy.ship",
        "task": "tiny",
        "seed": 0,
        "steps": tiny.TINY.steps,
        "corpus": digest(folder / "samples.txt"),  # 60 documents: they change with the recipe
        "heldout": measure(folder),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "sha256": {name: digest(folder / name) for name in tiny.BASE_FILES},
    }


def ship() -> None:
    """Make the model, and put it and its record into toy/base."""
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        tiny.make(made)
        described = json.dumps(record(made), indent=1) + "\n"
        tiny.BASE.mkdir(exist_ok=True)
        for name in tiny.BASE_FILES:
            shutil.copyfile(made / name, tiny.BASE / name)
        (tiny.BASE / tiny.RECORD).write_text(described)
    print(described, end="")


def main() -> None:
    """Command line."""
    import tyro  # here, because those who only import this module may be without it

    tyro.cli(ship, description=__doc__, prog="python -m toy.ship")


if __name__ == "__main__":
    main()
