"""Scores of any model on the paper's benchmarks, or of recorded responses.

    python evaluate.py --model Qwen2.5-7B --benchmarks aime2024 aime2025 math500 --samples 16
    python evaluate.py --model runs/demo/policy --benchmarks mine.jsonl math500=copies/math500.json
    python evaluate.py --responses recorded.jsonl

    problems ──sample k each──▶ responses ──score──▶ R ──summary──▶ avg@k ± 95 %, pass@k, maj@k, …
                                    └─▶ <out>/<model>/<benchmark>.jsonl   └─▶ results.json there

Template, sampler, stop strings and grader are those of the training. The paper's numbers are avg@16
(§3.1). It does not state temperature and length; here they are training's, 1 and 8,000 tokens,
unless told otherwise. A call that was interrupted continues where it stopped when it is made again.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import data
import distributed
import preflight
from config import BatchSettings, hub_id
from curation import formats
from curation.files import progress_bar, write_atomically
from data import Problem
from grading import sandbox
from grading.pool import Grader
from hf_sampler import HFSampler
from reports.metrics import mean, rollout_metrics, summary
from reward import score
from rollout import (
    Rollout,
    VllmSampler,
    gather_rollouts,
    load_rollouts,
    open_sampler,
    sample_responses,
    transcript,
)


@dataclass(frozen=True)
class Evaluation(BatchSettings):
    """Settings of evaluate.py."""

    model: tuple[str, ...] = ()
    """Hugging Face folders or hub ids, Qwen2.5-{0.5B,1.5B,7B,32B}, or `tiny`; one after the
    other."""
    benchmarks: tuple[str, ...] = ()
    """aime2024, aime2025, math500, gpqa_diamond, mmlu, mmlu_pro, livecodebench, fetched from the
    hub by their public ids; your own file (`python -m pydoc curation.formats` lists the layouts);
    NAME=FILE takes a named set from a file."""
    responses: str = ""
    """Grade these recorded responses instead: rows with a response (response, pred) and a gold
    answer (gold, answer), and optionally problem, set, finish, tokens and a label to compare with
    (expected)."""
    samples: int = 16
    """Responses per problem (§3.1: 16)."""
    limit: int = 0
    """Only so many problems of each set, evenly spaced; 0: all."""
    out: str = "evals"
    """Folder of results: <out>/<model>/ holds settings, every response and results.json."""
    overwrite: bool = False
    """Begin again where there are results under other settings."""
    vllm_memory: float = 0.85
    """Share of the GPU's memory that vLLM may take; no model trains beside it."""


def main() -> None:
    """Command line. What can be refused before a model is loaded is refused in one line."""
    cfg = tyro.cli(Evaluation, description=__doc__, prog="evaluate.py")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.start(cfg.timeout_minutes, alone=False)  # samplers need no group of their own
    grader = Grader(cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed)
    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    quiet = distributed.rank() > 0
    console = Console(highlight=False, soft_wrap=True, quiet=quiet, width=width)
    try:
        with grader:
            if cfg.responses:
                console.print(grade_recorded(cfg, grader))
            else:
                validate_settings(cfg)
                run_benchmarks(cfg, grader, console)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}" if distributed.rank() == 0 else 1)
    distributed.stop()


POSITIVE = (
    "samples",
    "temperature",
    "top_p",
    "prompt_tokens",
    "response_tokens",
    "max_num_seqs",
    "tensor_parallel",
)


def validate_settings(cfg: Evaluation) -> None:
    """Refuse what cannot work: ValueError with the flag, its value and what to change."""
    for name in POSITIVE:
        if getattr(cfg, name) <= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(cfg, name)}: must be above 0")
    if not cfg.model or not cfg.benchmarks:
        raise ValueError("pass --model and --benchmarks, or --responses; --help explains them")
    if len(cfg.model) > 1 and distributed.world_size() > 1:
        raise ValueError(
            "--model: under torchrun one model a call; calls with one --out share a table"
        )


# ── models on benchmarks ──────────────────────────────────────────────────────────────────────────


def run_benchmarks(cfg: Evaluation, grader: Grader, console: Console) -> None:
    """Every model on every benchmark; prints one table of all results under `out`."""
    named = formats.named(cfg.benchmarks)
    sets = distributed.on_rank0(lambda: {name: data.load(s, name) for name, s in named.items()})
    if any(p.tests for problems in sets.values() for p in problems):
        why = sandbox.unavailable()
        if why:
            raise ValueError(f"programs cannot be run here: {why}")
    for model in cfg.model:
        _evaluate_model(cfg, model, sets, grader, console)
    console.print(
        f"avg@k ± half the 95 % interval over problems; T = {cfg.temperature:g}, top-p "
        f"{cfg.top_p:g}, at most {cfg.response_tokens} tokens, {cfg.template}' template"
    )
    files = sorted(Path(cfg.out).glob("*/results.json"))
    console.print(results_table({f.parent.name: json.loads(f.read_text()) for f in files}))


class _Asked(NamedTuple):
    """One benchmark as it is asked: the sampler, and problems with prompts."""

    name: str
    problems: list[Problem]
    sampler: VllmSampler | HFSampler
    tokenizer: PreTrainedTokenizerBase


def _evaluate_model(
    cfg: Evaluation,
    model: str,
    sets: dict[str, list[Problem]],
    grader: Grader,
    console: Console,
) -> None:
    path = preflight.model_path(hub_id(model), cfg.seed)
    longest = cfg.prompt_tokens + cfg.response_tokens
    preflight.validate_length(longest, preflight.model_config(path), path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chosen = {name: _spaced(problems, cfg.limit) for name, problems in sets.items()}
    template = data.TEMPLATES[cfg.template]
    fitting = {
        name: data.tokenize(problems, tokenizer, cfg.prompt_tokens, template, cfg.drop_bad_rows)
        for name, problems in chosen.items()
    }
    folder = Path(cfg.out) / "-".join(Path(model).parts[-2:])
    settings = asdict(cfg) | {"model": path}
    distributed.on_rank0(lambda: _prepare_folder(folder, settings, cfg.overwrite))
    sampler = open_sampler(cfg, path, tokenizer, preflight.eos_ids(path, tokenizer))
    console.print(f"{model}: responses and results in {folder}")
    for name, problems in fitting.items():
        asked = _Asked(name, problems, sampler, tokenizer)
        rollouts = _answer(cfg, asked, folder / f"{name}.jsonl", grader, console)
        if distributed.rank() == 0:
            result = summary(rollouts, grader.equal)
            result["left_out"] = len(chosen[name]) - len(problems)
            _record(folder / "results.json", name, result)
    sampler.close()


def _spaced(problems: list[Problem], limit: int) -> list[Problem]:
    if not 0 < limit < len(problems):
        return problems
    return [problems[i * len(problems) // limit] for i in range(limit)]


# Results under different values of these settings are different results.
SETTINGS = (
    "samples",
    "limit",
    "temperature",
    "top_p",
    "prompt_tokens",
    "drop_bad_rows",
    "response_tokens",
    "template",
    "require_boxed",
    "seed",
    "dtype",
    "model",
)


def _prepare_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the model's folder, or accept one that was made under the same settings."""
    now = {name: settings[name] for name in SETTINGS}
    file = folder / "settings.json"
    if file.exists() and not overwrite:
        then = json.loads(file.read_text())
        changed = [name for name in SETTINGS if then.get(name) != now[name]]
        if changed:
            differs = ", ".join(f"{name} {then.get(name)} → {now[name]}" for name in changed)
            raise ValueError(
                f"{folder} has results under other settings ({differs}); pass another --out or "
                "--overwrite"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.jsonl"), folder / "results.json"]:
        old.unlink(missing_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n")


def _answer(
    cfg: Evaluation, asked: _Asked, file: Path, grader: Grader, console: Console
) -> list[Rollout]:
    """Graded responses to a whole benchmark; those that are in `file` already are loaded from it.
    The rest is sampled some problems at a time, enough to keep the sampler busy, and each such
    piece is on the disk before the next one is sampled."""
    problems = asked.problems
    answered = distributed.on_rank0(lambda: _load_earlier(file, problems, cfg.samples))
    done = len(answered)
    began = time.perf_counter()
    piece_size = max(1, 4 * cfg.max_num_seqs * distributed.world_size() // cfg.samples)
    output = file if distributed.rank() == 0 else Path(os.devnull)
    progress = progress_bar(console, TextColumn("{task.fields[so_far]}"))
    with progress, output.open("a") as out:
        total = len(problems) * cfg.samples
        bar = progress.add_task(f"{file.stem:<14}", total=total, completed=done, so_far="")
        for first in range(done // cfg.samples, len(problems), piece_size):
            local_rollouts = sample_responses(
                asked.sampler,
                asked.tokenizer,
                problems[first : first + piece_size],
                cfg.samples,
                cfg.sampling,
                f"{cfg.seed}/{asked.name}",
                first,
            )
            piece = gather_rollouts(score(local_rollouts, grader))
            for r in piece:
                print(json.dumps(transcript(r), ensure_ascii=False), file=out)
            out.flush()
            answered += piece
            rate = (len(answered) - done) / (time.perf_counter() - began)
            so_far = f"avg {mean([r.reward for r in answered]):.3f}, {rate:.1f} responses/s"
            progress.update(bar, completed=len(answered), so_far=so_far)
            if not console.is_terminal:
                left = (total - len(answered)) / rate / 60
                count = f"{len(answered)}/{total}"
                console.print(f"{file.stem} {count}: {so_far}, {left:.0f} min left")
    return answered


def _load_earlier(file: Path, problems: list[Problem], samples: int) -> list[Rollout]:
    """The responses that an earlier call left, cut back to whole problems: what is half written is
    sampled again."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines) // samples * samples
    if not whole:
        file.unlink(missing_ok=True)
        return []
    os.truncate(file, sum(map(len, lines[:whole])))
    rollouts = load_rollouts(file, with_ids=False)
    for i, r in enumerate(rollouts):
        known = i < len(problems) * samples
        if not known or r.problem.question != problems[i // samples].question:
            raise ValueError(
                f"{file}: line {i + 1} answers a problem that the set no longer has there; pass "
                "--overwrite"
            )
        r.problem = problems[i // samples]
    return rollouts


def _record(file: Path, name: str, result: dict[str, float]) -> None:
    """Add the result of one benchmark to results.json."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = {k: v for k, v in result.items() if math.isfinite(v)}
    write_atomically(file, [json.dumps(results, indent=1) + "\n"])


HEADINGS = "benchmark model problems k avg@k ± pass@k maj@k length format truncated timeout".split()


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """One row for each benchmark and model."""
    table = Table(box=SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("benchmark", "model") else "right")
    for name in dict.fromkeys(name for sets in results.values() for name in sets):
        for model, sets in results.items():
            if name in sets:
                table.add_row(name, model, *_cells(sets[name]))
    return table


def _cells(result: dict[str, float]) -> list[str]:
    problems = f"{result['problems']}"
    if result["left_out"]:
        problems += f" (−{result['left_out']})"
    k = result["samples"]
    half = (result["high"] - result["low"]) / 2
    shares = [result["reward"], half, result[f"pass@{k}"], result[f"maj@{k}"]]
    rest = [f"{result[name]:.3f}" for name in ("format", "truncated", "timeout")]
    percent = [f"{100 * share:.1f}" for share in shares]
    return [problems, f"{k}", *percent, f"{result['length']:.0f}", *rest]


# ── recorded responses ────────────────────────────────────────────────────────────────────────────


def grade_recorded(cfg: Evaluation, grader: Grader) -> Table:
    """Accuracy of recorded responses by set, beside that of their labels where they have any
    (`expected`, 0 or 1)."""
    groups: dict[str, list[Rollout]] = defaultdict(list)
    labels: dict[str, list[float]] = defaultdict(list)
    for place, row in formats.rows(cfg.responses):
        r = _recorded_rollout(place, row)
        named = [str(row[field]) for field in ("set", "fmt") if field in row]
        for group in (" ".join(named) or Path(cfg.responses).stem, "all"):
            groups[group].append(r)
            labels[group].append(float(row.get("expected", math.nan)))
    if not groups:
        raise ValueError(f"{cfg.responses}: holds no responses")
    score(groups["all"], grader)
    table = Table(box=SIMPLE)
    for heading in ("set", "responses", "accuracy", "labelled", "agree", "format", "timeout"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name in [*sorted(groups.keys() - {"all"}), "all"]:
        table.add_row(name, *_recorded_cells(groups[name], labels[name]))
    return table


def _recorded_cells(rollouts: Sequence[Rollout], labels: Sequence[float]) -> list[str]:
    metrics = rollout_metrics(rollouts)
    rewards = [r.reward for r in rollouts]
    labelled = [(R, y) for R, y in zip(rewards, labels, strict=True) if not math.isnan(y)]
    accuracy = mean([label for _, label in labelled])
    agree = mean([float(reward == label) for reward, label in labelled])
    percent = [f"{100 * x:.2f}" for x in (metrics["reward"], accuracy, agree)]
    rest = [f"{metrics['format']:.3f}", f"{metrics['timeout']:.3f}"]
    return [f"{len(rollouts)}", *percent, *rest]


def _recorded_rollout(place: str, row: Any) -> Rollout:
    """A recorded response as a rollout without ids. Raises ValueError naming place and field."""
    texts = []
    for names in (("response", "pred"), ("gold", "answer")):
        text = None
        if isinstance(row, dict):
            text = next((row[name] for name in names if name in row), None)
        if not isinstance(text, str):
            fields = " or ".join(names)
            raise ValueError(f"{place}: field {fields}: expected text, found {text!r:.60}")
        texts.append(text)
    response, gold = texts
    problem = Problem(str(row.get("problem", row.get("problem_id", place))), "", gold)
    return Rollout(
        problem, [0] * int(row.get("tokens", 0)), [], row.get("finish", "stop"), response
    )


if __name__ == "__main__":
    main()
