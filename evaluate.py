"""Scores: of held-out problems while training, and of any model on the paper's benchmarks.

    python evaluate.py --model Qwen2.5-7B --benchmarks aime2024 aime2025 math500 gpqa_diamond --samples 16
    python evaluate.py --model runs/demo/policy --benchmarks mine.jsonl math500=copies/math500.json
    python evaluate.py --responses recorded.jsonl

    problems ──sample k each──▶ responses ──score──▶ R ∈ {0, 1} ──summary──▶ avg@k ± 95 %, pass@k, maj@k, length …
                                    └─▶ <out>/<model>/<benchmark>.jsonl          └─▶ <out>/<model>/results.json

Same template, engine, stop strings and grader as in training. The paper's numbers are avg@16 (§3.1); it does not state
temperature and length, here they are training's, 1 and 8,000 tokens, unless told otherwise. A call that is cut off goes on
where it was when it is made again.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import AutoTokenizer

import data
import distributed
import preflight
import rollout
from config import hub_id
from curation import formats
from data import Problem
from grading import sandbox
from grading.pool import Grader
from hf_sampler import Sampling, open_sampler
from reports.metrics import describe, mean, summary
from reward import score
from rollout import Rollout, gather_rollouts


@dataclass(frozen=True)
class Evaluation:
    """Scores of models on benchmarks, or of recorded responses."""

    model: tuple[str, ...] = ()
    """Hugging Face folders or hub ids, Qwen2.5-{0.5B,1.5B,7B,32B}, or `tiny`; one after the other."""
    benchmarks: tuple[str, ...] = ()
    """aime2024, aime2025, math500, gpqa_diamond, mmlu, mmlu_pro, livecodebench, fetched from the hub by their public ids; a
    file of one's own (see `python -m pydoc curation.formats`); NAME=FILE takes a named set from a file."""
    responses: str = ""
    """Grade these recorded responses instead: rows with a response (response, pred), a gold answer (gold, answer), and, if
    they have them, problem, set, finish, tokens and a label to compare with (expected)."""
    samples: int = 16
    """Responses per problem (§3.1: 16)."""
    limit: int = 0
    """Only so many problems of each set, evenly spaced; 0: all."""
    out: str = "evals"
    """Folder of results: <out>/<model>/ holds settings, every response and results.json."""
    overwrite: bool = False
    """Begin anew where there are results under other settings."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    prompt_tokens: int = 2048
    """Longest prompt; a longer one is an error."""
    drop_bad_rows: bool = False
    """Leave out problems whose prompt is too long, and say how many, instead of stopping."""
    response_tokens: int = 8000
    """Longest response; one that reaches it is truncated and gets 0 (32B: 14,000 in a context of 16k)."""
    template: Literal["authors", "paper"] = "authors"
    """Prompt wording, as in training."""
    require_boxed: bool = False
    """Accept only answers in \\boxed{} inside the answer tags, as the authors' code does."""
    seed: int = 0
    """Every random stream derives from it."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples, as in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the sampler, as in training."""
    max_num_seqs: int = 256
    """Sequences the sampler holds at once."""
    vllm_memory: float = 0.85
    """Share of the GPU's memory that vLLM may take."""
    tensor_parallel: int = 1
    """Ranks that share one vLLM engine; start with torchrun."""
    grader_workers: int = 2
    """Processes that grade."""
    grader_seconds: float = 3.0
    """Deadline per answer."""
    threads: int = 0
    """CPU threads of this process; 0: torch's choice."""
    timeout_minutes: float = 120.0
    """How long a rank waits for the others."""


def main() -> None:
    """Command line. What can be refused before a model is loaded is refused in one line."""
    cfg = tyro.cli(Evaluation, description=__doc__, prog="evaluate.py")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.start(cfg.timeout_minutes)
    grader = Grader(cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed)
    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    console = Console(highlight=False, soft_wrap=True, quiet=distributed.rank() > 0, width=width)
    try:
        with grader:
            if cfg.responses:
                console.print(recorded(cfg, grader))
            else:
                check(cfg)
                benchmark(cfg, grader, console)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}" if distributed.rank() == 0 else 1)
    distributed.stop()


def check(cfg: Evaluation) -> None:
    """Refuse what cannot work: ValueError with the flag, its value and what to change."""
    for name in (
        "samples",
        "temperature",
        "top_p",
        "prompt_tokens",
        "response_tokens",
        "max_num_seqs",
        "tensor_parallel",
    ):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0")
    if not cfg.model or not cfg.benchmarks:
        raise ValueError("pass --model and --benchmarks, or --responses; --help explains them")
    if len(cfg.model) > 1 and distributed.world_size() > 1:
        raise ValueError(
            "--model: under torchrun one model a call; results of calls with one --out share a table"
        )


def benchmark(cfg: Evaluation, grader: Grader, console: Console) -> None:
    """Every model on every benchmark; prints one table of all results under `out`."""
    sets = distributed.on_rank0(
        lambda: {n: data.load(s, n) for n, s in formats.named(cfg.benchmarks).items()}
    )
    if any(p.tests for problems in sets.values() for p in problems) and (
        why := sandbox.unavailable()
    ):
        raise ValueError(f"programs cannot be run here: {why}")
    for model in cfg.model:
        _one_model(cfg, model, sets, grader, console)
    how = f"T = {cfg.temperature:g}, top-p {cfg.top_p:g}, at most {cfg.response_tokens} tokens, {cfg.template}' template"
    console.print(f"avg@k ± half the 95 % interval over problems; {how}")
    console.print(
        table(
            {
                f.parent.name: json.loads(f.read_text())
                for f in sorted(Path(cfg.out).glob("*/results.json"))
            }
        )
    )


def _one_model(
    cfg: Evaluation, model: str, sets: dict[str, list[Problem]], grader: Grader, console: Console
) -> None:
    path = preflight.model_path(hub_id(model), cfg.seed)
    preflight.check_length(
        cfg.prompt_tokens + cfg.response_tokens, preflight.model_config(path), path
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    fitting = (tokenizer, cfg.prompt_tokens, data.TEMPLATES[cfg.template], cfg.drop_bad_rows)
    chosen = {name: _spaced(problems, cfg.limit) for name, problems in sets.items()}
    asked = {name: data.tokenize(problems, *fitting) for name, problems in chosen.items()}
    folder = Path(cfg.out) / "-".join(Path(model).parts[-2:])
    distributed.on_rank0(lambda: _settle(folder, asdict(cfg) | {"model": path}, cfg.overwrite))
    engine = open_sampler(cfg, path, tokenizer, preflight.eos_ids(path, tokenizer))
    sampling = Sampling(cfg.response_tokens, cfg.temperature, cfg.top_p)

    console.print(f"{model}: responses and results in {folder}")
    for name, problems in asked.items():

        def sample(
            piece: Sequence[Problem], first: int, stream: str = f"{cfg.seed}/{name}"
        ) -> list[Rollout]:
            return rollout.sample_responses(
                engine, tokenizer, piece, cfg.samples, sampling, stream, first
            )

        answered = _answered(cfg, folder / f"{name}.jsonl", problems, sample, grader, console)
        if distributed.rank() == 0:
            left_out = len(chosen[name]) - len(problems)
            _record(
                folder / "results.json",
                name,
                summary(answered, grader.equal) | {"left_out": left_out},
            )
    engine.close()


def _spaced(problems: list[Problem], limit: int) -> list[Problem]:
    return (
        [problems[i * len(problems) // limit] for i in range(limit)]
        if 0 < limit < len(problems)
        else problems
    )


def _settle(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the model's folder, or accept one that was made under the same settings."""
    names = ("samples", "limit", "temperature", "top_p", "prompt_tokens", "drop_bad_rows", "response_tokens", "template",
             "require_boxed", "seed", "dtype", "model")  # fmt: skip
    settings, file = {name: settings[name] for name in names}, folder / "settings.json"
    if file.exists() and not overwrite:
        then = json.loads(file.read_text())
        if differs := ", ".join(
            f"{n} {then.get(n)} → {settings[n]}" for n in names if then.get(n) != settings[n]
        ):
            raise ValueError(
                f"{folder} has results under other settings ({differs}); pass another --out or --overwrite"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.jsonl"), folder / "results.json"]:
        old.unlink(missing_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def _answered(
    cfg: Evaluation, file: Path, problems: list[Problem], sample: Callable[[Sequence[Problem], int], list[Rollout]],
    grader: Grader, console: Console,
) -> list[Rollout]:  # fmt: skip
    """Responses to a whole benchmark, graded; those in `file` already are read from there. They are sampled some problems
    at a time, enough to keep the engine's rows busy, and each such piece is on the disk before the next is sampled."""
    answered = distributed.on_rank0(lambda: _earlier(file, problems, cfg.samples))
    done, total, began = len(answered), len(problems) * cfg.samples, time.perf_counter()
    size = max(1, 4 * cfg.max_num_seqs * distributed.world_size() // cfg.samples)
    columns = (TextColumn(f"{file.stem:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    writes = file if distributed.rank() == 0 else Path(os.devnull)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        writes.open("a") as out,
    ):
        bar = progress.add_task("", total=total, completed=done)
        for first in range(done // cfg.samples, len(problems), size):
            piece = gather_rollouts(score(sample(problems[first : first + size], first), grader))
            for r in piece:
                print(json.dumps(rollout.transcript(r), ensure_ascii=False), file=out)
            out.flush()
            answered += piece
            rate = (len(answered) - done) / (time.perf_counter() - began)
            so_far = f"avg {mean([r.reward for r in answered]):.3f}, {rate:.1f} responses/s"
            progress.update(bar, completed=len(answered), description=so_far)
            if not console.is_terminal:
                left = (total - len(answered)) / rate / 60
                console.print(f"{file.stem} {len(answered)}/{total}: {so_far}, {left:.0f} min left")
    return answered


def _earlier(file: Path, problems: list[Problem], samples: int) -> list[Rollout]:
    """The responses that an earlier call left, cut back to whole problems: what is half written is sampled again."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines) // samples * samples
    if not whole:
        file.unlink(missing_ok=True)
        return []
    os.truncate(file, sum(map(len, lines[:whole])))
    found = rollout.load_rollouts(file, ids=False)
    for i, r in enumerate(found):
        if i >= len(problems) * samples or r.problem.question != problems[i // samples].question:
            raise ValueError(
                f"{file}: line {i + 1} answers a problem that the set no longer has there; pass --overwrite"
            )
        r.problem = problems[i // samples]
    return found


def _record(file: Path, name: str, result: dict[str, float]) -> None:
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = {k: v for k, v in result.items() if math.isfinite(v)}
    file.with_suffix(".tmp").write_text(json.dumps(results, indent=1) + "\n")
    file.with_suffix(".tmp").replace(file)


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """One row for each benchmark and model."""
    shown = Table(box=SIMPLE)
    for (
        heading
    ) in "benchmark model problems k avg@k ± pass@k maj@k length format truncated timeout".split():
        shown.add_column(heading, justify="left" if heading in ("benchmark", "model") else "right")
    for name in dict.fromkeys(name for sets in results.values() for name in sets):
        for model, sets in results.items():
            if r := sets.get(name):
                problems = f"{r['problems']}" + (f" (−{r['left_out']})" if r["left_out"] else "")
                k, half = r["samples"], (r["high"] - r["low"]) / 2
                scores = [
                    f"{100 * x:.1f}" for x in (r["reward"], half, r[f"pass@{k}"], r[f"maj@{k}"])
                ]
                rest = [
                    f"{r['length']:.0f}",
                    *(f"{r[m]:.3f}" for m in ("format", "truncated", "timeout")),
                ]
                shown.add_row(name, model, problems, f"{k}", *scores, *rest)
    return shown


# ── recorded responses ───────────────────────────────────────────────────────────────────────────────────────────────


def recorded(cfg: Evaluation, grader: Grader) -> Table:
    """Accuracy of recorded responses by set, beside that of their labels where they have any (`expected`, 0 or 1)."""
    groups: dict[str, list[Rollout]] = defaultdict(list)
    labels: dict[str, list[float]] = defaultdict(list)
    for place, row in formats.rows(cfg.responses):
        r = _recorded(place, row)
        name = " ".join(str(row[n]) for n in ("set", "fmt") if n in row) or Path(cfg.responses).stem
        for group in (name, "all"):
            groups[group].append(r)
            labels[group].append(float(row.get("expected", math.nan)))
    if not groups:
        raise ValueError(f"{cfg.responses}: holds no responses")
    score(groups["all"], grader)
    shown = Table(box=SIMPLE)
    for heading in "set responses accuracy labelled agree format timeout".split():
        shown.add_column(heading, justify="left" if heading == "set" else "right")
    for name in [*sorted(groups.keys() - {"all"}), "all"]:
        d = describe(groups[name])
        judged = [
            (r.reward, label)
            for r, label in zip(groups[name], labels[name], strict=True)
            if not math.isnan(label)
        ]
        agree = mean([float(reward == label) for reward, label in judged])
        scores = [
            f"{100 * x:.2f}" for x in (d["reward"], mean([label for _, label in judged]), agree)
        ]
        shown.add_row(
            name, f"{len(groups[name])}", *scores, f"{d['format']:.3f}", f"{d['timeout']:.3f}"
        )
    return shown


def _recorded(place: str, row: Any) -> Rollout:
    """A recorded response as a rollout without ids; ValueError naming place and field."""
    texts = []
    for names in (("response", "pred"), ("gold", "answer")):
        text = (
            next((row[name] for name in names if name in row), None)
            if isinstance(row, dict)
            else None
        )
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: field {' or '.join(names)}: expected text, found {text!r:.60}"
            )
        texts.append(text)
    problem = Problem(str(row.get("problem", row.get("problem_id", place))), "", texts[1])
    return Rollout(
        problem, [0] * int(row.get("tokens", 0)), [], row.get("finish", "stop"), texts[0]
    )


if __name__ == "__main__":
    main()
