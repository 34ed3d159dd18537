"""Checkpoints that are complete or absent, resuming, and export to Hugging Face folders.

runs/<name>/checkpoints/step-20/      __*.distcp, .metadata    weights and AdamW moments (DCP)
                                      run.json                 settings, model, time spent; sizes
                                                               and checksums of these files and of
                                                               the run's records
                        step-40.tmp/    unfinished or abandoned: never loaded
                        step-60.aside/  damaged, or in the way: never loaded, never deleted

Nothing else needs saving. Random streams, the order of problems and learning rates are functions of
(seed, step). DCP is torch's format of distributed checkpoints.
"""

import json
import os
import re
import shutil
import signal
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import GenerationConfig, PreTrainedTokenizerBase

import distributed

warnings.filterwarnings(
    "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
)
ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
# Signals within so many seconds are one request: a scheduler signals torchrun and its ranks, and
# torchrun passes on what it got.
REPEATS = 5.0

# role ("policy" or "critic") → model and optimizer
Trained = Mapping[str, tuple[torch.nn.Module, torch.optim.Optimizer]]


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder, and the content of its run.json."""

    path: Path
    about: dict[str, Any]


# ── saving ────────────────────────────────────────────────────────────────────────────────────────


def named_tensors(trained: Trained) -> dict[str, Tensor]:
    """All that training changes, by name: `policy/model.norm.weight`,
    `policy/model.norm.weight/exp_avg`, … The tensors themselves, not copies. AdamW's state is
    created where there has been no step yet."""
    named = {}
    for role, (module, optimizer) in trained.items():
        for name, p in module.named_parameters():
            named[f"{role}/{name}"] = p.detach()
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                named[f"{role}/{name}/{key}"] = state[key].detach()
    return named


class Checkpoints:
    """Saves every few iterations, and after SIGTERM or SIGINT; use as a context manager.

    The loop waits only while tensors are copied to host memory. A background thread writes them to
    a temporary folder, all ranks together, then renames it, and only then removes older
    checkpoints.
    """

    def __init__(self, folder: Path, config: Any, trained: Trained, first_step: int = 0) -> None:
        self.folder = folder
        self.every = config.checkpoint_every
        self.keep = config.keep_checkpoints
        self.trained = trained
        self.saved = first_step  # iterations done at the newest checkpoint
        self.signal = 0  # the first that came
        self.signaled = 0.0  # when
        self.about = {
            "settings": asdict(config),
            "model": architecture(trained["policy"][0].model.config),
            "models": {role: architecture(m.model.config) for role, (m, _) in trained.items()},
            "roles": list(trained),
            "ranks": distributed.world_size(),
        }
        # Its collectives run beside the loop's, so they need a process group of their own.
        self.group = None
        if distributed.started():
            self.group = dist.new_group(backend="gloo", timeout=distributed.timeout())
        self.thread = _writer_thread()
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        signals = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {s: signal.signal(s, self._remember) for s in signals}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        if not self.signal:  # otherwise the process is about to end; a repeat must not kill it
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if failure is None:
            self.finish()
        self.thread.shutdown()

    def _remember(self, number: int, _: Any) -> None:
        """Remember the first signal for the end of the iteration; one that comes more than REPEATS
        seconds later acts at once."""
        now = time.monotonic()
        if not self.signal:
            self.signal = number
            self.signaled = now
        elif now - self.signaled > REPEATS:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def step(
        self,
        done: int,
        last: bool,
        records: Sequence[Path],
        spent: Mapping[str, Any] | None = None,
    ) -> None:
        """After `done` iterations: save if it is due. After a signal to any rank: save, and exit
        with 128 + its number. `records` are the run's files that grow, `spent` the time it took so
        far. Raises OSError when a checkpoint could not be written."""
        states = distributed.all_gather_objects((self.signal, self._failed()))
        stop = max(number for number, _ in states)
        if any(failed for _, failed in states):
            self.finish()
        if stop or (self.every and (last or done % self.every == 0)):
            self.save(done, records, spent)
        if stop or last:
            self.finish()
        if stop:
            if distributed.rank() == 0:
                message = f"stopped by signal {stop} after {done} iterations"
                print(f"{message}; --resume auto goes on from there", flush=True)
            raise SystemExit(128 + stop)

    def _failed(self) -> bool:
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def save(
        self, done: int, records: Sequence[Path], spent: Mapping[str, Any] | None = None
    ) -> None:
        """Copy everything to host memory; a thread writes the copy."""
        self.finish()
        if self.saved == done:
            return
        copy = {name: _host_copy(t) for name, t in named_tensors(self.trained).items()}
        sizes = {file: _sync_to_disk(file) for file in records if file.exists()}
        self.pending = self.thread.submit(self._write, done, copy, sizes, spent)
        self.saved = done

    def _write(
        self,
        done: int,
        copy: dict[str, Tensor],
        records: dict[Path, int],
        spent: Mapping[str, Any] | None,
    ) -> None:
        temporary = self.folder / f"step-{done}.tmp"
        try:
            dcp.save(
                copy, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None
            )
            checksums = self._checksums(temporary)
            if distributed.rank() > 0:  # rank 0 goes on when all ranks' shards are on the disk
                return
            about = {"step": done, **self.about, "spent": spent}
            about["records"] = {file.name: size for file, size in records.items()}
            about["record_crc32"] = {f.name: _crc32(f, size) for f, size in records.items()}
            about["files"] = {file.name: file.stat().st_size for file in temporary.iterdir()}
            about["crc32"] = checksums
            _write_about(temporary / "run.json", about)
        except BaseException:
            if distributed.rank() == 0:
                remove_tree(temporary)
            raise
        final = self.folder / f"step-{done}"
        if os.path.lexists(final):
            set_aside(final)
        temporary.rename(final)
        _sync_to_disk(self.folder)
        older = [path for path in by_step(self.folder) if step_of(path) < done]
        for path in older[: max(0, len(older) - (self.keep - 1))]:
            with suppress(OSError):  # the next start of the run tries again
                remove_tree(path.rename(path.with_suffix(".tmp")))

    def _checksums(self, folder: Path) -> dict[str, int]:
        """Checksums of the files of a checkpoint that is being written. Every rank reads its own
        shards; rank 0 returns all of them and those of the other files."""
        checksums: dict[str, int] = {}
        failure: OSError | None = None
        try:
            checksums = crc32_of_files(folder.glob(f"__{distributed.rank()}_*"))
        except OSError as error:
            failure = error
        if self.group is not None:
            outcomes: list[Any] = [None] * distributed.world_size()
            dist.all_gather_object(outcomes, (checksums, failure), group=self.group)
            checksums = {name: crc for of_rank, _ in outcomes for name, crc in of_rank.items()}
            failure = next((error for _, error in outcomes if error), None)
        if failure:
            raise failure
        if distributed.rank() == 0:
            rest = [path for path in folder.iterdir() if path.name not in checksums]
            checksums |= crc32_of_files(rest)
        return checksums

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises OSError, saying what is left, when
        it could not be written."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise OSError(
                f"checkpoint {self.folder / f'step-{self.saved}'} could not be written "
                f"({_cause(error)}); {newest_complete(self.folder)}"
            ) from error
        finally:
            self.pending = None


def _cause(error: BaseException) -> str:
    """One line that says why; of an error of DCP, what the first rank that failed said."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    why = (str(error) or repr(error)).splitlines()[0]
    if "enforce fail" in why:  # all that torch says when a file takes no more bytes
        return "a file could not be written whole; is the disk full?"
    return why


def _write_about(path: Path, about: dict[str, Any]) -> None:
    """Write run.json, with a checksum of what it says."""
    about = json.loads(json.dumps(about, default=str))
    about["run_crc32"] = _crc32_of_json(about)
    with path.open("w") as file:
        json.dump(about, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _writer_thread() -> ThreadPoolExecutor:
    """A thread that uses this rank's GPU. A new thread uses GPU 0, and torch's writer would make a
    CUDA context there for every rank."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1)
    own = (torch.cuda.current_device(),)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=own)


def _host_copy(t: Tensor) -> Tensor:
    return t.clone() if t.device.type == "cpu" else t.cpu()


def _sync_to_disk(path: Path) -> int:
    """Have a file's bytes, or a folder's names, written to the disk; returns the size."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    size = os.fstat(handle).st_size
    os.close(handle)
    return size


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────


_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


def step_of(path: Path) -> int | None:
    """The number of iterations in the name of a finished checkpoint; None for any other name.

    >>> step_of(Path("checkpoints/step-20")), step_of(Path("checkpoints/step-20-keep"))
    (20, None)
    """
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def by_step(folder: Path) -> list[Path]:
    """The folders in `folder` that are named as finished checkpoints, oldest first."""
    finished = [p for p in folder.glob("step-*") if step_of(p) is not None and p.is_dir()]
    return sorted(finished, key=step_of)


def read_checkpoint(path: Path, checksums: bool = True) -> Checkpoint:
    """The checkpoint in `path`. Raises ValueError saying what is wrong when it is not complete or,
    with `checksums`, when a file is not what was written."""
    try:
        about = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no complete checkpoint (run.json: {error})") from None
    expected = about.pop("run_crc32", None) if isinstance(about, dict) else None
    if expected not in (None, _crc32_of_json(about)):
        raise ValueError(f"{path} is damaged: run.json is not what was written")
    known = {"step", "settings", "model", "roles", "records", "files"}
    if not isinstance(about, dict) or not known <= about.keys():
        raise ValueError(f"{path} is no complete checkpoint (run.json is not one of a checkpoint)")
    if step_of(path) not in (None, about["step"]):
        raise ValueError(f"{path} is not what its name says: it holds step {about['step']}")
    for name, size in about["files"].items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != size:
            raise ValueError(f"{path} is damaged: {name} has {actual} of {size} bytes")
    if checksums:
        _verify_checksums(path, about.get("crc32", {}))  # early versions wrote none
    return Checkpoint(path, about)


def _verify_checksums(path: Path, expected: dict[str, int]) -> None:
    try:
        actual = crc32_of_files(path / name for name in expected)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    for name, crc in expected.items():
        if actual[name] != crc:
            raise ValueError(f"{path} is damaged: the bytes of {name} are not those written")


def _require_records(found: Checkpoint) -> None:
    """Raise ValueError when a record of the run does not begin with what it had at the checkpoint.
    The run would go on with lines missing or damaged."""
    checksums = found.about.get("record_crc32", {})
    for name, size in found.about["records"].items():
        record = found.path.parent.parent / name
        actual = record.stat().st_size if record.exists() else 0
        if actual < size:
            raise ValueError(
                f"{found.path} cannot be resumed: {record} has {actual} of the {size} bytes it had"
            )
        if name in checksums and _crc32(record, size) != checksums[name]:
            raise ValueError(f"{found.path} cannot be resumed: {record} was damaged or changed")


def find_checkpoint(resume: str, run: Path) -> Checkpoint | None:
    """What `--resume` asks for. auto: the newest checkpoint of the run folder `run` that is whole,
    None where there is none; otherwise the checkpoint in the folder named. Raises ValueError when
    that is damaged or would leave newer ones behind. Nothing is changed."""
    folder = run / "checkpoints"
    if resume == "auto":
        return _newest_whole(folder)
    named = read_checkpoint(Path(resume))
    _require_records(named)
    if folder.resolve() != named.path.parent.resolve():
        return named
    for path in reversed(by_step(folder)):
        if step_of(path) > named.about["step"] and not _why_not(path):
            raise ValueError(
                f"--resume {resume}: {path} is newer; remove it, or choose another --name to "
                "branch off"
            )
    return named


def _newest_whole(folder: Path) -> Checkpoint | None:
    reasons = []
    for path in reversed(by_step(folder)):
        reason = _why_not(path)
        if not reason:
            return read_checkpoint(path, checksums=False)
        reasons.append(reason)
        print(f"WARNING: {reason}; it is passed over", flush=True)
    others = [p for p in folder.glob("*") if p.suffix != ".tmp" and not p.name.startswith(".")]
    if others:
        names = ", ".join(sorted(p.name for p in others))
        why = f"{reasons[0]}; " if reasons else ""
        raise ValueError(
            f"{why}there is nothing to go on from in {folder}, which holds {names}; restore the "
            "files, or pass --overwrite to begin again"
        )
    return None


def _why_not(path: Path) -> str:
    """Why training cannot go on from the checkpoint in `path`; "" if it can."""
    try:
        _require_records(read_checkpoint(path))
    except ValueError as error:
        return str(error)
    return ""


def newest_complete(folder: Path) -> str:
    """What to tell a user whose run cannot go on: which checkpoint in `folder` is complete."""
    for path in reversed(by_step(folder)):
        with suppress(ValueError):
            read_checkpoint(path, checksums=False)
            return f"{path} is complete: fix the cause and pass --resume auto"
    return "there is no complete checkpoint"


def set_aside(path: Path) -> Path:
    """Rename what stands in the way of a checkpoint to <name>.aside, and return the new path."""
    for number in count(1):
        aside = path.with_name(f"{path.name}.aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            return path.rename(aside)
    raise AssertionError("unreachable")


def set_aside_newer(folder: Path, resume_from: Checkpoint) -> list[Path]:
    """Before a run goes on from `resume_from`: set aside what has the name of a checkpoint that
    will be written, all of it damaged; returns the new paths."""
    return [
        set_aside(path)
        for path in by_step(folder)
        if step_of(path) >= resume_from.about["step"]
        and path.resolve() != resume_from.path.resolve()
    ]


# What a checkpoint is of, and where this run has it from.
WHICH = {"policy": ("model", "--model"), "critic": ("critic", "this run's (--critic-model)")}


def require_same_models(resume_from: Checkpoint, configs: Mapping[str, Any], steps: int) -> None:
    """Raise ValueError when the checkpoint is of other models than this run's, whose `configs` are
    by role, of other roles, or past the end of this run."""
    path, about = resume_from
    roles = list(configs)
    # Early versions had one architecture for both.
    saved = about.get("models", dict.fromkeys(roles, about["model"]))
    for role, config in configs.items():
        now = architecture(config)
        for key, value in saved.get(role, {}).items():
            of_head = role == "critic" and key == "tie_word_embeddings"  # it has another head
            if now[key] != value and not of_head:
                what, which = WHICH[role]
                raise ValueError(
                    f"{path} is of another {what}: its {key} is {value}, {which} has {now[key]}"
                )
    if about["roles"] != roles:
        raise ValueError(
            f"{path} holds {' and '.join(about['roles'])}, this run has {' and '.join(roles)}"
        )
    if about["step"] > steps:
        raise ValueError(f"{path} is already past --steps {steps}")


def architecture(model_config: Any) -> dict[str, Any]:
    """What two models must share for one to take the other's weights."""
    return {key: getattr(model_config, key, None) for key in ARCHITECTURE}


def is_run_config(config: Any) -> bool:
    """Whether the content of a config.json is that of a run, and not of a model or anything else.

    >>> is_run_config({"model_type": "qwen2"})
    False
    """
    return isinstance(config, dict) and {"policy_lr", "critic_lr"} <= config.keys()


def changed_settings(resume_from: Checkpoint, config: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the checkpoint's: name → (then, now)."""
    then, now = (json.loads(json.dumps(asdict(c))) for c in (type(config)(), config))
    then |= resume_from.about["settings"]  # an early version's lack what was added since
    of_the_start = ("name", "runs", "overwrite", "resume")
    names = [f.name for f in fields(config) if f.name not in of_the_start and f.name in then]
    return {name: (then[name], now[name]) for name in names if then[name] != now[name]}


# Settings that only decide which weights a run begins with.
OF_THE_START = ("value_head", "init_critic")


def without_effect(resume_from: Checkpoint, config: Any) -> dict[str, str]:
    """Why settings that differ from the checkpoint's change nothing in a run that goes on from it:
    name → reason."""
    changed = changed_settings(resume_from, config)
    done = resume_from.about["step"]
    if done >= config.steps:
        return dict.fromkeys(changed, "nothing is left to train")
    reasons = dict.fromkeys((*OF_THE_START, "critic_model"), "the weights are the checkpoint's")
    if not (config.kl_loss or config.kl_reward):  # otherwise --model is the reference, too
        reasons["model"] = "the weights are the checkpoint's"
    for role in ("policy", "critic"):
        name = f"{role}_lr_warmup"
        if max(changed.get(name, (0,))) <= config.optimizer_steps(role, done):
            reasons[name] = "the warm-up is over"
    return {name: reason for name, reason in reasons.items() if name in changed}


def load_checkpoint(resume_from: Checkpoint | None, trained: Trained) -> int:
    """Fill weights and optimizer states, on any number of ranks, whatever number saved them.
    Returns the number of iterations done; 0 without a checkpoint. Raises OSError when the
    checkpoint cannot be loaded."""
    if resume_from is None:
        return 0
    tensors = named_tensors(trained)
    try:
        dcp.load(tensors, checkpoint_id=resume_from.path, no_dist=not distributed.started())
    except CheckpointException as error:
        raise OSError(f"{resume_from.path} cannot be loaded ({_cause(error)})") from error
    return resume_from.about["step"]


def load_weights(saved: Checkpoint, role: str, module: torch.nn.Module) -> None:
    """Give a model, in one process, the weights that a checkpoint has of its role, and no optimizer
    state. Raises OSError when they cannot be read, or when the run has removed the checkpoint
    meanwhile."""
    weights = {f"{role}/{name}": p.detach() for name, p in module.named_parameters()}
    try:
        (saved.path / ".metadata").stat()  # where it is gone, dcp would print a traceback
        dcp.load(weights, checkpoint_id=saved.path, no_dist=True)
    except (CheckpointException, OSError) as error:
        why = _cause(error)
        if not saved.path.exists():
            why = "the run has removed it meanwhile; call again for a newer one"
        raise OSError(f"{saved.path} cannot be loaded ({why})") from error


# ── files ─────────────────────────────────────────────────────────────────────────────────────────

CHUNK = 2**24  # bytes that are read at once


def _crc32(path: Path, size: int | None = None) -> int:
    """CRC-32 of a file, or of its first `size` bytes. It tells damage, not forgery."""
    crc = 0
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while chunk := file.read(min(left, CHUNK)):
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
    return crc


def crc32_of_files(paths: Iterable[Path]) -> dict[str, int]:
    """CRC-32 of each file by its name; several are read at once, each in a thread."""
    paths = list(paths)
    with ThreadPoolExecutor(4) as threads:
        return dict(zip((p.name for p in paths), threads.map(_crc32, paths), strict=True))


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def remove_tree(path: Path) -> None:
    """Delete a file or a folder, if it is there; of a symbolic link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ── export ────────────────────────────────────────────────────────────────────────────────────────


def export_model(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    generation: GenerationConfig | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a policy or critic as a Hugging Face folder: weights (safetensors) and the buffers that
    belong to them, configuration, tokenizer with chat template, for a policy generation settings,
    and the texts `files` by name; transformers and, for a policy, vLLM load it. Weights are
    gathered to rank 0, which writes to a temporary folder and renames it: `folder` is never half a
    model."""
    stored = dict(module.model.named_parameters())
    persistent = module.model.state_dict().keys()
    stored |= {name: b for name, b in module.model.named_buffers() if name in persistent}
    weights = {}
    for name, tensor in stored.items():
        whole = distributed.full_tensor(tensor, tensor.dtype)
        if distributed.rank() == 0:
            weights[name] = whole.cpu()
    if distributed.rank() > 0:
        return
    if generation is not None:
        module.model.generation_config = generation
    temporary = folder.with_name(folder.name + ".partial")
    remove_tree(temporary)
    try:
        module.model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except Exception as error:
        remove_tree(temporary)
        # safetensors and tokenizers report a full disk by exceptions of their own.
        if isinstance(error, OSError) or "os error" in str(error):
            saved = folder.parent / "checkpoints"
            left = f"; {newest_complete(saved)}" if saved.exists() else ""
            raise OSError(f"{folder} could not be written ({_cause(error)}){left}") from error
        raise
    move_export_aside(folder)
    temporary.rename(folder)
    remove_tree(earlier(folder))


def generation_settings(
    config: Any, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]
) -> GenerationConfig:
    """The generation settings of an exported policy: those it was sampled with.

    Stop strings are not among them: with them `generate` would need the tokenizer at every call,
    and raise without it. What can be said without them is said: a token that holds a whole stop
    string ends a sequence, as the end-of-sequence tokens do. Most tokenizers have none; the tiny
    model's has ` </answer>`.
    """
    token_ids = [[i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=False)
    stops = [i for i, text in enumerate(texts) if any(stop in text for stop in config.stop)]
    return GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.response_tokens,
        eos_token_id=sorted({*eos, *stops}),
        pad_token_id=tokenizer.pad_token_id,
    )


def earlier(folder: Path) -> Path:
    """Where an export is moved when the training goes on past it, until the next one is whole."""
    return folder.with_name(folder.name + ".earlier")


def move_export_aside(folder: Path) -> None:
    """Rename an export that is no longer the result of the run, if there is one."""
    if os.path.lexists(folder):
        remove_tree(earlier(folder))
        folder.rename(earlier(folder))
