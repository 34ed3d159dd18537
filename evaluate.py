"""Scores of any model on the paper's benchmarks, or of recorded responses.

    python evaluate.py --model Qwen2.5-7B --benchmarks aime2024 aime2025 math500 --samples 16
    python evaluate.py --model runs/demo/policy --benchmarks mine.jsonl math500=copies/math500.json
    python evaluate.py --responses recorded.jsonl

    problems ──sample k each──▶ responses ──score──▶ R ──summary──▶ avg@k ± 95 %, pass@k, maj@k, …
                                    └─▶ <out>/<model>/<benchmark>.jsonl   └─▶ results.json there

Sampler and grader are those of the training, and so are template and stop strings: an exported
folder says what its own were (prompt.json), any other model gets the authors'. The paper's numbers
are avg@16 (§3.1). It does not state temperature and length; here they are training's, 1 and 8,000
tokens, unless told otherwise. A call that was interrupted continues where it stopped when it is
made again.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import data
import distributed
import preflight
from checkpoint import crc32_of_files
from config import (
    LARGE,
    STOP,
    TEMPLATE_NAMES,
    BatchSettings,
    Config,
    Count,
    CountOrNone,
    PositiveShare,
    Sampling,
    hub_id,
    validate_ranges,
)
from curation import formats, hub
from curation.files import progress_bar, write_atomically
from data import Problem
from distributed import load_whole
from grading import sandbox
from grading.pool import Grader
from hf_sampler import HFSampler
from reports.log import in_one_line
from reports.metrics import mean, rollout_metrics, summary
from reward import score
from rollout import (
    Rollout,
    VllmSampler,
    gather_rollouts,
    open_sampler,
    sample_responses,
    transcript,
    uses_vllm,
)

MAX_LOGP_GAP = Config.max_logp_gap  # as in training
FINISH_REASONS = ("stop", "length")  # another one would count as cut off, with reward 0


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
    samples: Count = 16
    """Responses per problem (§3.1: 16)."""
    template: str = "auto"
    """auto: the prompt that the model was trained with, which an exported folder keeps in its
    prompt.json; without one, authors. Otherwise as for train.py."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response; none: those that the model was trained with, as for
    --template."""
    limit: CountOrNone = 0
    """Only so many problems of each set, evenly spaced; 0: all."""
    out: str = "evals"
    """Folder of results: <out>/<model>/ holds settings, every response and results.json."""
    overwrite: bool = False
    """Begin again where there are results under other settings."""
    vllm_memory: PositiveShare = 0.85
    """Share of the GPU's memory that vLLM may take; no model trains beside it."""


# The settings of --responses.
OF_RESPONSES = """responses require_boxed grader_workers grader_seconds threads
    timeout_minutes""".split()


def main() -> None:
    """Command line. What can be refused before a model is loaded is refused in one line."""
    cfg = tyro.cli(Evaluation, description=__doc__, prog="evaluate.py")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        validate_ranges(cfg)
        torch.set_num_threads(cfg.threads or torch.get_num_threads())
        distributed.start(cfg.timeout_minutes, alone=False)  # samplers need no group of their own
        validate_settings(cfg)
        width = None if sys.stdout.isatty() else 120  # a file has no width of its own
        quiet = distributed.rank() > 0
        console = Console(highlight=False, soft_wrap=True, quiet=quiet, width=width)
        with Grader(cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed) as grader:
            if cfg.responses:
                console.print(grade_recorded(cfg, grader))
            else:
                run_benchmarks(cfg, grader, console)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}" if distributed.rank() == 0 else 1)
    distributed.stop()


def validate_settings(cfg: Evaluation) -> None:
    """Refuse what cannot work: ValueError with the flag, its value and what to change."""
    if cfg.responses:
        if cfg.model or cfg.benchmarks:
            raise ValueError(
                "--responses grades without a model; leave out --model and --benchmarks"
            )
        names = [field.name for field in fields(cfg) if field.name not in OF_RESPONSES]
        why = "with --responses, which only grades"
        preflight.refuse_without_effect(cfg, Evaluation(), names, why)
        return
    if not cfg.model or not cfg.benchmarks:
        raise ValueError("pass --model and --benchmarks, or --responses; --help explains them")
    preflight.validate_sampler(cfg)
    if cfg.engine == "transformers":
        why = "with --engine transformers"
        preflight.refuse_without_effect(cfg, Evaluation(), ("vllm_memory",), why)
    if len(cfg.model) > 1 and distributed.world_size() > 1:
        raise ValueError(
            "--model: under torchrun one model a call; calls with one --out share a table"
        )
    folders: dict[Path, str] = {}
    for model in cfg.model:
        folder = _folder(cfg, model)
        if folder in folders:
            raise ValueError(
                f"--model {folders[folder]} and {model}: both write {folder}; evaluate them with "
                "different --out"
            )
        folders[folder] = model


# ── models on benchmarks ──────────────────────────────────────────────────────────────────────────


def run_benchmarks(cfg: Evaluation, grader: Grader, console: Console) -> None:
    """Every model on every benchmark; prints one table of all results under `out`."""
    named = formats.named(cfg.benchmarks)
    sets = distributed.on_rank0(lambda: {name: data.load(s, name) for name, s in named.items()})
    if any(p.tests for problems in sets.values() for p in problems):
        why = sandbox.unavailable()
        if why:
            raise ValueError(f"programs cannot be run here: {why}")
    _load_results(cfg.out)
    names = [preflight.model_name(hub_id(model), cfg.seed) for model in cfg.model]
    for name in names:
        _check_model_files(cfg, preflight.fetch_model(name))
    paths = [preflight.fetch_model(name, weights=True) for name in names]
    for model, path in zip(cfg.model, paths, strict=True):
        _evaluate_model(cfg, model, path, sets, grader, console)
    console.print(
        f"avg@k ± half the 95 % interval over problems; T = {cfg.temperature:g}, top-p "
        f"{cfg.top_p:g}, at most {cfg.response_tokens} tokens"
    )
    console.print(results_table(_load_results(cfg.out)))


def _load_results(out: str) -> dict[str, dict[str, dict[str, float]]]:
    """The results of every model under `out`. Raises ValueError for a file that holds anything
    else."""
    results = {}
    for file in sorted(Path(out).glob("*/results.json")):
        found = _load_object(file)
        for name, result in found.items():
            try:
                _cells(result)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{file}: {name} is not a result of evaluate.py") from None
        results[file.parent.name] = found
    return results


def _load_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it holds anything else."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: damaged, it holds no JSON object; pass another --out")
    return found


def _check_model_files(cfg: Evaluation, path: str) -> None:
    """Raise ValueError when a model's small files show that it cannot be evaluated."""
    config = preflight.model_config(path)
    if not uses_vllm(cfg):
        preflight.require_samplable(config, path)
    preflight.with_prompt(cfg, path)
    preflight.validate_length(cfg.prompt_tokens + cfg.response_tokens, config, path)
    tokenizer = preflight.load_tokenizer(path, config.vocab_size)
    preflight.eos_ids(path, tokenizer, config.vocab_size)


class _Asked(NamedTuple):
    """One benchmark as it is asked: the sampler, and problems with prompts."""

    name: str
    problems: list[Problem]
    sampler: VllmSampler | HFSampler
    tokenizer: PreTrainedTokenizerBase


def _evaluate_model(
    cfg: Evaluation,
    model: str,
    path: str,
    sets: dict[str, list[Problem]],
    grader: Grader,
    console: Console,
) -> None:
    config = preflight.model_config(path)
    cfg = preflight.with_prompt(cfg, path)
    tokenizer = preflight.load_tokenizer(path, config.vocab_size)
    eos = preflight.eos_ids(path, tokenizer, config.vocab_size)
    chosen = {name: _spaced(problems, cfg.limit) for name, problems in sets.items()}
    fitting = {name: _usable(cfg, p, name, tokenizer, grader) for name, p in chosen.items()}
    folder = _folder(cfg, model)
    # Where the hub's cache is does not tell one model from another.
    settings = asdict(cfg) | {"model": hub.name_of(path), "stop": list(cfg.stop)}
    settings["files"] = distributed.on_rank0(lambda: fingerprint(path))
    distributed.on_rank0(lambda: _check_folder(folder, settings, cfg.overwrite))
    prompts = [problem.prompt_ids for problems in fitting.values() for problem in problems]
    sampler = _open_checked_sampler(cfg, path, tokenizer, eos, prompts)
    distributed.on_rank0(lambda: _prepare_folder(folder, settings, cfg.overwrite))
    console.print(f"{model}: {_described_prompt(cfg)}; responses and results in {folder}")
    for name, problems in fitting.items():
        asked = _Asked(name, problems, sampler, tokenizer)
        rollouts = _answer(cfg, asked, folder / f"{name}.jsonl", grader, console)
        if distributed.rank() == 0:
            result = summary(rollouts, grader.equal)
            result["left_out"] = len(chosen[name]) - len(problems)
            _record(folder / "results.json", name, result)
    sampler.close()


def _described_prompt(cfg: Evaluation) -> str:
    """The prompt of a model in a few words."""
    named = cfg.template in TEMPLATE_NAMES
    template = f"template {cfg.template}" if named else f"template {cfg.template!r:.60}"
    return template if cfg.stop == STOP else f"{template}, stop strings {list(cfg.stop)}"


def _open_checked_sampler(
    cfg: Evaluation,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    prompts: Sequence[Sequence[int]],
) -> VllmSampler | HFSampler:
    """The sampler of a model. Raises ValueError for weights that are not the model's, and for a
    model that the transformers sampler samples from wrongly."""
    if uses_vllm(cfg):
        distributed.on_rank0(lambda: _check_weights(path))
        return open_sampler(cfg, path, tokenizer, eos)
    sampler = open_sampler(cfg, path, tokenizer, eos)
    check_sampler(sampler, path, prompts, min(16, cfg.response_tokens))
    return sampler


def _check_weights(path: str) -> None:
    """Read the weights into host memory and check them: vLLM takes NaN, and a head that the
    configuration ties and the weights do not. Quantized weights are left to vLLM."""
    if getattr(preflight.model_config(path), "quantization_config", None) is None:
        load_whole(AutoModelForCausalLM, path, dtype="auto")


@torch.inference_mode()
def check_sampler(
    sampler: HFSampler, path: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> None:
    """Sample at most `max_tokens` after the shortest and the longest prompt together, and compare
    their log-probabilities with the model's own, one sequence at a time and without a cache. Raises
    ValueError when they differ: the padding of the shorter prompt changes its response."""
    both = [min(prompts, key=len), max(prompts, key=len)]
    refusal = f"--model {path}: --engine transformers cannot sample from this model: "
    try:
        responses = sampler.generate(both, [0, 1], Sampling(max_tokens))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"{refusal}{type(error).__name__}: {preflight.first_line(error)}"
        ) from error
    gaps = []
    for prompt, sampled in zip(both, responses, strict=True):
        count = len(sampled.token_ids)
        ids = torch.tensor([[*prompt, *sampled.token_ids]], device=sampler.device)
        logits = sampler.model(ids, use_cache=False, logits_to_keep=count + 1).logits
        own = logits[0, -count - 1 : -1].float().log_softmax(-1).gather(-1, ids[0, -count:, None])
        gaps.append(own.flatten().cpu() - torch.tensor(sampled.logprobs))
    gap = float(torch.cat(gaps).abs().mean())
    if math.isnan(gap):
        raise ValueError(
            f"--model {path}: its log-probabilities are NaN, though its weights are not: numbers "
            "between its layers are too large for --dtype"
        )
    if gap > MAX_LOGP_GAP:
        raise ValueError(
            f"{refusal}in a batch its log-probabilities differ by {gap:.3g} nats per token (limit "
            f"{MAX_LOGP_GAP})"
        )


def _folder(cfg: Evaluation, model: str) -> Path:
    return Path(cfg.out) / "-".join(Path(model).parts[-2:])


def _usable(
    cfg: Evaluation,
    problems: list[Problem],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
) -> list[Problem]:
    """The problems with prompts; those that cannot be asked or graded are left out with
    --drop-bad-rows, and refused without."""
    template = data.template_text(cfg.template)
    fitting = data.tokenize(problems, tokenizer, cfg.prompt_tokens, template, cfg.drop_bad_rows)
    drop = cfg.drop_bad_rows
    return distributed.on_rank0(lambda: preflight.gradable(fitting, grader, drop, name))


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
    "stop",
    "require_boxed",
    "grader_seconds",
    "seed",
    "dtype",
    "model",
    "files",
)

# The files that make a model what it is.
MODEL_FILES = """config.json generation_config.json *.safetensors *.safetensors.index.json
    pytorch_model*.bin pytorch_model.bin.index.json tokenizer* special_tokens_map.json
    added_tokens.json vocab* merges.txt""".split()


def fingerprint(path: str) -> dict[str, Any]:
    """What tells a model from another one under the same name: the checksum of each of its files,
    or the commit of a model of the hub."""
    commit = hub.commit_of(path)
    if commit:
        return {"commit": commit}
    found = {file for pattern in MODEL_FILES for file in Path(path).glob(pattern)}
    return crc32_of_files(sorted(file for file in found if file.is_file()))


def _check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise ValueError when the model's folder has results under other settings, or holds what is
    not an evaluation's."""
    now = {name: settings[name] for name in SETTINGS}
    file = folder / "settings.json"
    if not file.exists() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not an evaluation's; pass another --out")
    if file.exists() and not overwrite:
        # An early version of this program had no other stop strings than the paper's, and of the
        # model's files it kept nothing; any other setting that it did not keep had no other value.
        then = now | {"files": None, "stop": list(STOP)} | _load_object(file)
        changed = [name for name in SETTINGS if then[name] != now[name]]
        if changed:
            differs = ", ".join(_difference(name, then[name], now[name]) for name in changed)
            raise ValueError(
                f"{folder} has results under other settings ({differs}); pass another --out or "
                "--overwrite"
            )


def _difference(name: str, then: Any, now: Any) -> str:
    """How a setting differs, in a few words."""
    if name != "files":
        return f"{name} {in_one_line(then)} → {in_one_line(now)}"
    if not isinstance(then, dict):
        return "the model's files were not recorded"
    changed = sorted(file for file in {*then, *now} if then.get(file) != now.get(file))
    more = f" and {len(changed) - 1} more of its files" if len(changed) > 1 else ""
    return f"the model's {changed[0]}{more} changed"


def _prepare_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the model's folder, or keep what `_check_folder` accepted."""
    file = folder / "settings.json"
    if file.exists() and not overwrite:
        return
    now = {name: settings[name] for name in SETTINGS}
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
    answered = distributed.on_rank0(lambda: _load_earlier(file, problems, cfg.samples, grader))
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
            _require_numbers(asked.name, piece)
            for r in piece:
                out.write(_stored_line(r))
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


def _require_numbers(name: str, rollouts: Sequence[Rollout]) -> None:
    """Raise ValueError when a sampler gave log-probabilities that are no numbers."""
    for r in rollouts:
        if any(map(math.isnan, r.logprobs)):
            raise ValueError(
                f"{name}: a response to {r.problem.source} has log-probabilities that are NaN: "
                "numbers in the model are too large for --dtype"
            )


def _load_earlier(
    file: Path, problems: list[Problem], samples: int, grader: Grader
) -> list[Rollout]:
    """The responses that an earlier call left, cut back to whole problems: what is half written is
    sampled again. Where the gold answer or the tests of a problem have changed since, its responses
    are graded again and the file is replaced."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines) // samples * samples
    if not whole:
        file.unlink(missing_ok=True)
        return []
    stored = [_stored_rollout(f"{file}: line {i}", line) for i, line in enumerate(lines[:whole], 1)]
    outdated = []
    for i, (r, criterion) in enumerate(stored):
        known = i < len(problems) * samples
        if not known or r.problem.question != problems[i // samples].question:
            raise ValueError(
                f"{file}: line {i + 1} answers a problem that the set no longer has there; pass "
                "--overwrite"
            )
        r.problem = problems[i // samples]
        if criterion != _criterion(r.problem):
            outdated.append(r)
    rollouts = [r for r, _ in stored]
    if outdated:
        score(outdated, grader)
        write_atomically(file, map(_stored_line, rollouts))
    else:
        os.truncate(file, sum(map(len, lines[:whole])))
    return rollouts


def _stored_line(r: Rollout) -> str:
    """A graded response as a line of <benchmark>.jsonl."""
    record = transcript(r)
    if r.problem.tests:
        record["tests"] = _criterion(r.problem)[1]
    return json.dumps(record, ensure_ascii=False) + "\n"


def _criterion(problem: Problem) -> tuple[str, str]:
    """What responses to a problem are graded against: the gold answer, and a hash of the tests."""
    if not problem.tests:
        return problem.answer, ""
    tests = json.dumps(dict(problem.tests), sort_keys=True).encode()
    return problem.answer, hashlib.blake2b(tests, digest_size=8).hexdigest()


def _stored_rollout(place: str, line: bytes) -> tuple[Rollout, tuple[str, str]]:
    """A response of an earlier call, and what it was graded against. Raises ValueError with the
    place for a damaged line."""
    try:
        record = json.loads(line)
        problem = Problem(record["problem"], record["question"], record["gold"])
        token_ids = [0] * record["tokens"]
        texts = [record[name] for name in ("question", "gold", "response", "answer")]
        sound = all(isinstance(text, str) for text in texts)
        finish = record["finish"]
        r = Rollout(problem, token_ids, [], finish, record["response"], record["answer"])
        r.reward, r.timeout = float(record["reward"]), bool(record["timeout"])
        sound = sound and finish in FINISH_REASONS and math.isfinite(r.reward)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{place}: damaged, not a graded response; pass --overwrite")
    return r, (problem.answer, record.get("tests", ""))


def _record(file: Path, name: str, result: dict[str, float]) -> None:
    """Add the result of one benchmark to results.json."""
    results = _load_object(file) if file.exists() else {}
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


class _Recorded(NamedTuple):
    """A recorded response, the name of its set, and its label, NaN where it has none."""

    group: str
    rollout: Rollout
    label: float


def grade_recorded(cfg: Evaluation, grader: Grader) -> Table:
    """Accuracy of recorded responses by set, beside that of their labels where they have any
    (`expected`, 0 or 1)."""
    stem = Path(cfg.responses).stem
    recorded = [_recorded(place, row, stem) for place, row in formats.rows(cfg.responses)]
    if not recorded:
        raise ValueError(f"{cfg.responses}: holds no responses")
    score([item.rollout for item in recorded], grader)
    groups: dict[str, list[_Recorded]] = defaultdict(list)
    for item in recorded:
        groups[item.group].append(item)
    table = Table(box=SIMPLE)
    for heading in ("set", "responses", "accuracy", "labelled", "agree", "format", "timeout"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name in sorted(groups):
        table.add_row(name, *_recorded_cells(groups[name]))
    table.add_row("all sets" if "all" in groups else "all", *_recorded_cells(recorded))
    return table


def _recorded_cells(recorded: Sequence[_Recorded]) -> list[str]:
    rollouts = [item.rollout for item in recorded]
    metrics = rollout_metrics(rollouts)
    labelled = [(x.rollout.reward, x.label) for x in recorded if not math.isnan(x.label)]
    accuracy = mean([label for _, label in labelled])
    agree = mean([float(reward == label) for reward, label in labelled])
    percent = [f"{100 * x:.2f}" for x in (metrics["reward"], accuracy, agree)]
    rest = [f"{metrics['format']:.3f}", f"{metrics['timeout']:.3f}"]
    return [f"{len(rollouts)}", *percent, *rest]


def _recorded(place: str, row: Any, stem: str) -> _Recorded:
    """A recorded response as a rollout without ids. Raises ValueError naming place and field."""

    def refuse(field: str, expected: str, found: Any) -> NoReturn:
        raise ValueError(f"{place}: field {field}: expected {expected}, found {found!r:.60}")

    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
    texts = []
    for names in (("response", "pred"), ("gold", "answer")):
        text = next((row[name] for name in names if name in row), None)
        if not isinstance(text, str) or (names[0] == "gold" and not text.strip()):
            refuse(" or ".join(names), "text", text)
        texts.append(text)
    response, gold = texts
    finish, tokens, label = (row.get(name) for name in ("finish", "tokens", "expected"))
    if finish is not None and finish not in FINISH_REASONS:
        refuse("finish", "stop (ended by itself) or length (cut off)", finish)
    if tokens is not None and not (type(tokens) is int and 0 <= tokens <= LARGE):
        refuse("tokens", "a whole number", tokens)
    if label is not None and label not in (0, 1):
        refuse("expected", "0 or 1", label)
    problem = Problem(str(row.get("problem", row.get("problem_id", place))), "", gold)
    named = [str(row[field]) for field in ("set", "fmt") if row.get(field) is not None]
    return _Recorded(
        group=" ".join(named) or stem,
        rollout=Rollout(problem, [0] * (tokens or 0), [], finish or "stop", response),
        label=math.nan if label is None else float(label),
    )


if __name__ == "__main__":
    main()
