"""Checkpoints that are complete or absent, resuming, and export to Hugging Face folders.

runs/<name>/checkpoints/step-20/      __*.distcp, .metadata    weights and AdamW moments (DCP)
                                      run.json                 settings, model, file sizes, lengths
                                                               of the run's records
                        step-40.tmp/  unfinished or abandoned: never loaded

Nothing else needs saving. Random streams, the order of problems and learning rates are functions of
(seed, step). DCP is torch's format of distributed checkpoints.
"""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
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
        self.signal = 0
        self.about = {
            "settings": asdict(config),
            "model": architecture(trained["policy"][0].model.config),
            "roles": list(trained),
            "ranks": distributed.world_size(),
        }
        # Its collectives run beside the loop's, so they need a process group of their own.
        self.group = dist.new_group(backend="gloo") if distributed.started() else None
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        signals = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {s: signal.signal(s, self._remember) for s in signals}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if failure is None:
            self.finish()
        self.thread.shutdown()

    def _remember(self, number: int, _: Any) -> None:
        """Remember the signal for the end of the iteration; a second one acts at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])

    def step(self, done: int, last: bool, records: Sequence[Path]) -> None:
        """After `done` iterations: save if it is due. After a signal to any rank: save, and exit
        with 128 + its number. `records` are the run's files that grow. Raises OSError when a
        checkpoint could not be written."""
        states = distributed.all_gather_objects((self.signal, self._failed()))
        stop = max(number for number, _ in states)
        if any(failed for _, failed in states):
            self.finish()
        if stop or (self.every and (last or done % self.every == 0)):
            self.save(done, records)
        if stop:
            self.finish()
            if distributed.rank() == 0:
                message = f"stopped by signal {stop} after {done} iterations"
                print(f"{message}; --resume auto goes on from there", flush=True)
            raise SystemExit(128 + stop)

    def _failed(self) -> bool:
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def save(self, done: int, records: Sequence[Path]) -> None:
        """Copy everything to host memory; a thread writes the copy."""
        self.finish()
        if self.saved == done:
            return
        copy = {name: _host_copy(t) for name, t in named_tensors(self.trained).items()}
        sizes = {file.name: _sync_to_disk(file) for file in records if file.exists()}
        about = self.about | {"records": sizes}
        self.pending = self.thread.submit(self._write, done, copy, about)
        self.saved = done

    def _write(self, done: int, copy: dict[str, Tensor], about: dict[str, Any]) -> None:
        final = self.folder / f"step-{done}"
        temporary = self.folder / f"step-{done}.tmp"
        dcp.save(
            copy, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None
        )
        if distributed.rank() > 0:  # rank 0 gets here when all ranks' shards are on the disk
            return
        files = {file.name: file.stat().st_size for file in temporary.iterdir()}
        with (temporary / "run.json").open("w") as file:
            json.dump({"step": done, **about, "files": files}, file, indent=1, default=str)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(final)
        _sync_to_disk(self.folder)
        for old in by_step(self.folder)[: -self.keep]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")), ignore_errors=True)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises OSError, saying what is left, when
        it could not be written."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            cause = error
            if isinstance(error, CheckpointException):
                cause, _ = next(iter(error.failures.values()))
            if distributed.rank() == 0:
                shutil.rmtree(self.folder / f"step-{self.saved}.tmp", ignore_errors=True)
            kept = by_step(self.folder)
            left = "there is no older one"
            if kept:
                left = f"{kept[-1]} is complete: fix the cause and pass --resume auto"
            raise OSError(
                f"checkpoint step-{self.saved} could not be written ({cause}); {left}"
            ) from error
        finally:
            self.pending = None


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


def by_step(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    finished = [p for p in folder.glob("step-*") if p.suffix != ".tmp"]
    return sorted(finished, key=lambda p: int(p.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`. Raises ValueError saying what is missing when it is not
    complete."""
    try:
        about = json.loads((path / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no complete checkpoint (run.json: {error})") from None
    for name, size in about["files"].items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != size:
            raise ValueError(f"{path} is damaged: {name} has {actual} of {size} bytes")
    return Checkpoint(path, about)


def find_checkpoint(resume: str, run: Path) -> Checkpoint | None:
    """What `--resume` asks for. auto: the newest complete checkpoint of the run folder `run`, None
    where there is none; otherwise the checkpoint in the folder named. Raises ValueError when that
    is damaged or would leave newer ones behind."""
    own = by_step(run / "checkpoints")
    if resume == "auto":
        for path in reversed(own):
            try:
                return read_checkpoint(path)
            except ValueError as error:
                print(f"WARNING: {error}; trying an older one", flush=True)
        if own:
            folder = run / "checkpoints"
            raise ValueError(
                f"no checkpoint in {folder} is complete; pass --overwrite to begin again"
            )
        return None
    named = read_checkpoint(Path(resume))
    is_own = bool(own) and named.path.parent.resolve() == own[0].parent.resolve()
    if is_own and named.path.name != own[-1].name:
        raise ValueError(
            f"--resume {resume}: {own[-1]} is newer; remove it, or choose another --name to branch "
            "off"
        )
    return named


def require_same_model(
    resume_from: Checkpoint, model_config: Any, roles: Sequence[str], steps: int
) -> None:
    """Raise ValueError when the checkpoint is of another model, of other roles, or past the end of
    this run."""
    path, about = resume_from
    now = architecture(model_config)
    for key, value in about["model"].items():
        if now[key] != value:
            raise ValueError(
                f"{path} is of another model: its {key} is {value}, --model has {now[key]}"
            )
    if about["roles"] != list(roles):
        raise ValueError(
            f"{path} holds {' and '.join(about['roles'])}, this run has {' and '.join(roles)}"
        )
    if about["step"] > steps:
        raise ValueError(f"{path} is already past --steps {steps}")


def architecture(model_config: Any) -> dict[str, Any]:
    """What two models must share for one to take the other's weights."""
    return {key: getattr(model_config, key, None) for key in ARCHITECTURE}


def changed_settings(resume_from: Checkpoint, config: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the checkpoint's: name → (then, now)."""
    then = resume_from.about["settings"]
    now = json.loads(json.dumps(asdict(config)))
    of_the_start = ("name", "runs", "overwrite", "resume")
    names = [f.name for f in fields(config) if f.name not in of_the_start and f.name in then]
    return {name: (then[name], now[name]) for name in names if then[name] != now[name]}


def load_checkpoint(resume_from: Checkpoint | None, trained: Trained) -> int:
    """Fill weights and optimizer states, on any number of ranks, whatever number saved them.
    Returns the number of iterations done; 0 without a checkpoint."""
    if resume_from is None:
        return 0
    tensors = named_tensors(trained)
    dcp.load(tensors, checkpoint_id=resume_from.path, no_dist=not distributed.started())
    return resume_from.about["step"]


# ── export ────────────────────────────────────────────────────────────────────────────────────────


def export_model(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    generation: GenerationConfig | None = None,
) -> None:
    """Write a policy or critic as a Hugging Face folder: weights (safetensors), configuration,
    tokenizer with chat template and, for a policy, generation settings; transformers and, for a
    policy, vLLM load it. Weights are gathered to rank 0, which writes to a temporary folder and
    renames it: `folder` is never half a model."""
    weights = {}
    for name, p in module.model.named_parameters():
        whole = distributed.full_tensor(p)
        if distributed.rank() == 0:
            weights[name] = whole.cpu()
    if distributed.rank() > 0:
        return
    temporary = folder.with_name(folder.name + ".partial")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    if generation is not None:
        module.model.generation_config = generation
    module.model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
