"""Compare this program with TRL on a CPU: its critic PPO and its GRPO.

    python -m benchmarks.vs_trl [--lengths 8 64 256] [--episodes 640] [--seeds 5]
    python -m benchmarks.vs_trl --print      what the pages quote, from the recorded results

All programs train the same Qwen2 of 0.1M random weights on the same 256 prompts of 8 to 24 tokens,
with as many episodes, 32 an optimizer step, at the same learning rate. The reward is 1 if more than
half of a response's ids are odd. T = 1, top-p 1, γ = λ = 1, no KL, float32, one thread. PPO samples
one response to each of 32 prompts and takes one step of policy and critic. GRPO samples 8 responses
to each of 4 prompts. Only the end-of-sequence token or the length ends a response. What else is
alike in a pair, and what is not, is in benchmarks/vs_trl_worker.py.

Each seed has weights and prompts of its own. Each run is a new process, and programs take turns. A
finished run is kept under .cache/vs_trl, in a folder for this revision: the same command continues
where it was stopped. The releases of TRL are 1.12.0, the last that has a critic PPO, and 1.16.0 for
GRPO. On first use, each is installed into a virtual environment under .cache/peers, with the same
torch as here and transformers 5.24.0: with this program's 5.19.0, TRL's PPO cannot save.

| column | meaning |
|---|---|
| length, tokens | most tokens of a response, and their mean |
| loop s, CPU s | seconds of the training loop, and processor seconds in it, with children |
| process s | seconds of the whole process: imports, loading, loop, export |
| peak GB | peak memory of the process, and what its children hold at the end of the loop |
| reward | mean reward in the last quarter of the steps |
| sampling %, forward % | share of the loop that samples; of that, transformers' own passes |
| speed ×, memory × | episodes per second and peak memory / TRL's with the same seed |
| reward − TRL's | difference of the rewards with the same seed |
| low, high | the 95 % t-interval of the mean over seeds; of two seeds, both values |

Figures are means over the seeds. results/vs_trl.png shows speed and learning.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import AddedToken, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.record import RESULTS, record
from benchmarks.vs_trl_report import TITLES, Runs, draw, pages, rows
from benchmarks.vs_trl_worker import BATCH, PROMPT_END, RATE, Figures, Run
from config import Range, validate_ranges
from curation.files import write_atomically
from reports import log
from tools.lock import pin

ROOT = Path(__file__).resolve().parents[1]
WORKER = "vs_trl_worker"
KEPT = ROOT / ".cache" / "vs_trl"  # figures of finished runs
RESULT = RESULTS / "vs_trl.json"
TRANSFORMERS = "transformers==5.24.0"  # of TRL
RELEASES = {"trl-ppo": "1.12.0", "trl-grpo": "1.16.0"}
NUM_PROMPTS = 256
VOCABULARY = 1024
EOS = "<|endoftext|>"

# The model has 1,024 positions, and the longest prompt 24 tokens.
Length = Annotated[int, Range(1, 1000)]
Episodes = Annotated[int, Range(4 * BATCH, 10**6)]
Seeds = Annotated[int, Range(1, 100)]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    lengths: tuple[Length, ...] = (8, 64, 256)
    """Most tokens of a response; all programs run at each length."""
    episodes: Episodes = 640
    """Episodes of each run, a multiple of 32."""
    seeds: Seeds = 5
    """Number of runs of each program at each length, each with a seed of its own."""
    print: bool = False
    """Print what the pages quote of results/vs_trl.json, and run nothing."""


# ── what all programs train ───────────────────────────────────────────────────────────────────────


def make_tokenizer() -> Qwen2Tokenizer:
    """Its tokens are 256 bytes, EOS, and words that cannot form a stop string of this program."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token=EOS, pad_token=EOS)
    words = [AddedToken(f" w{i}", normalized=False) for i in range(len(tokenizer), VOCABULARY)]
    tokenizer.add_tokens(words)
    return tokenizer


def make_model(eos: int, seed: int) -> Qwen2ForCausalLM:
    """0.1M random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    return model


def prepare(folder: Path, seed: int) -> None:
    """Write the model, its tokenizer and the prompts."""
    folder.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer.eos_token_id, seed).save_pretrained(folder)
    rng = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(NUM_PROMPTS):
            letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=7 + i % 17)
            text = "".join(letters) + PROMPT_END
            print(json.dumps({"text": text, "ids": tokenizer.encode(text)}), file=file)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────


def install(release: str) -> str:
    """The interpreter of a virtual environment with this release of TRL, made if there is none. Its
    torch is this program's."""
    folder = ROOT / ".cache" / "peers" / f"trl-{release}"
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    packages = [pin("torch"), TRANSFORMERS, f"trl=={release}"]
    if not complete.exists() or complete.read_text().split() != packages:
        venv.create(folder, clear=True, with_pip=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        complete.write_text("\n".join(packages))
    return str(interpreter)


def start(run: Run) -> Figures:
    """One run in a new process: its figures, and the seconds of the process."""
    argument = json.dumps(run._asdict())
    if run.program in RELEASES:
        worker = str(ROOT / "benchmarks" / f"{WORKER}.py")
        # -P: TRL's libraries must not find this project's modules.
        command = [install(RELEASES[run.program]), "-P", worker, argument]
    else:
        command = [sys.executable, "-m", f"benchmarks.{WORKER}", argument]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"benchmarks.vs_trl: {run.name} ended with {done.returncode}\n{done.stderr.strip()}"
        )
    figures = json.loads(done.stdout.splitlines()[-1])
    figures["process"] = time.perf_counter() - began
    rate = run.episodes / figures["seconds"]
    progress = f"seed {run.seed}, length {run.length}: {TITLES[run.program]} {rate:.1f} episodes/s"
    print(progress, file=sys.stderr, flush=True)
    return figures


def finish(run: Run, kept: Path) -> Figures:
    """The figures of a run: those in the folder `kept`, or of the run that is started now."""
    file = kept / f"{run.name}.json"
    if not file.exists():
        write_atomically(file, [json.dumps(start(run))])
    return json.loads(file.read_text())


def measure(cfg: Settings) -> Runs:
    """All runs, seed by seed, so that a comparison is whole as early as possible."""
    runs: Runs = {(program, length): [] for length in cfg.lengths for program in TITLES}
    kept = KEPT / log.revision()
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(cfg.seeds):
            inputs = Path(folder, f"seed-{seed}")
            prepare(inputs, seed)
            for program, length in runs:
                run = Run(program, str(inputs), length, cfg.episodes, seed)
                runs[program, length].append(finish(run, kept))
    return runs


# ── the program ───────────────────────────────────────────────────────────────────────────────────


def validate(cfg: Settings) -> None:
    """Refuse settings with which nothing can be measured: ValueError."""
    validate_ranges(cfg)
    if not cfg.lengths:
        raise ValueError("--lengths: pass at least one")
    if len(set(cfg.lengths)) < len(cfg.lengths):
        raise ValueError(f"--lengths {' '.join(map(str, cfg.lengths))}: one of them occurs twice")
    if cfg.episodes % BATCH:
        raise ValueError(f"--episodes {cfg.episodes}: must be a multiple of {BATCH}")


def recorded_pages() -> str:
    """What the pages quote of the recorded result. Raises ValueError when there is none, or one
    from another version."""
    if not RESULT.exists():
        raise ValueError(f"--print: {RESULT} does not exist; run without --print first")
    try:
        return pages(json.loads(RESULT.read_text()))
    except KeyError as error:
        raise ValueError(f"--print: {RESULT} has no {error}; run without --print first") from None


def notes(cfg: Settings, runs: Runs) -> list[str]:
    """What the table does not say: settings, and the libraries of TRL's runs."""
    libraries = [
        f"{TITLES[program]}: trl {release}, {runs[program, cfg.lengths[0]][0]['versions']}"
        for program, release in RELEASES.items()
    ]
    return [
        f"{cfg.episodes} episodes a run, {BATCH} a step, learning rate {RATE}; means of "
        f"{cfg.seeds} seeds.",
        f"{'; '.join(libraries)}.",
    ]


def main() -> None:
    cfg = tyro.cli(Settings, description=__doc__, prog="python -m benchmarks.vs_trl")
    try:
        validate(cfg)
        if cfg.print:
            print(recorded_pages())
            return
    except ValueError as error:
        sys.exit(f"benchmarks.vs_trl: {error}")
    for release in RELEASES.values():
        install(release)
    runs = measure(cfg)
    draw(runs, RESULT.with_suffix(".png"))
    record("vs_trl", "Beside TRL's PPO and GRPO", rows(runs), notes(cfg, runs))


if __name__ == "__main__":
    main()
