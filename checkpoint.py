"""Checkpoints that are whole or absent, resuming, and export to Hugging Face folders.

runs/<name>/checkpoints/step-20/   __*.distcp, .metadata    every weight and AdamW moment, in shards (torch's DCP format)
                                   run.json                 settings, model, how long the run's records were, file sizes
                        step-40.tmp/                        being written, or abandoned: never read

Nothing else needs saving. Random streams, the order of problems and learning rates are functions of (seed, step).
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
ARCHITECTURE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip

Trained = Mapping[str, tuple[torch.nn.Module, torch.optim.Optimizer]]


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder, and run.json."""

    path: Path
    about: dict[str, Any]


def tensors(trained: Trained) -> dict[str, Tensor]:
    """All that training changes, by name: `policy/model.norm.weight`, `policy/model.norm.weight/exp_avg`, … The tensors
    themselves, not copies. AdamW's state is made where there has been no step yet."""
    named = {}
    for role, (module, optimizer) in trained.items():
        for name, p in module.named_parameters():
            named[f"{role}/{name}"] = p.detach()
            state = optimizer.state[p]
            if not state:
                step = torch.zeros((), device=p.device)
                state |= {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            for key in ("step", "exp_avg", "exp_avg_sq"):
                named[f"{role}/{name}/{key}"] = state[key].detach()
    return named


class Checkpoints:
    """Saves every few iterations, and at SIGTERM or SIGINT; use as a context manager.

    The loop stands still only while tensors are copied to host memory; a thread writes them, on all ranks together. The
    folder gets its name when everything is on the disk, and only then are older ones removed.
    """

    def __init__(self, folder: Path, config: Any, trained: Trained, first: int = 0) -> None:
        self.folder, self.every, self.keep = (
            folder,
            config.checkpoint_every,
            config.keep_checkpoints,
        )
        self.trained, self.saved, self.signal = trained, first, 0
        model = architecture(trained["policy"][0].model.config)
        self.about = {
            "settings": asdict(config),
            "model": model,
            "roles": list(trained),
            "ranks": distributed.world_size(),
        }
        # Its collectives run beside the loop's, so they need a group of their own.
        self.group = dist.new_group(backend="gloo") if distributed.started() else None
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        self.handlers = {s: signal.signal(s, self._noted) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if failure is None:
            self.finish()
        self.thread.shutdown()

    def _noted(self, number: int, _: Any) -> None:
        """Remember the signal for the end of the iteration; a second one acts at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])

    def step(self, done: int, last: bool, records: Sequence[Path]) -> None:
        """After `done` iterations: save if that is due. After a signal to any rank: save, and exit with 128 + its number.
        `records` are the run's files that grow. Raises OSError when a checkpoint could not be written."""
        stop, failed = map(
            max, zip(*distributed.all_gather_objects((self.signal, self._failed())), strict=True)
        )
        if failed:
            self.finish()
        if stop or (self.every and (last or done % self.every == 0)):
            self.save(done, records)
        if stop:
            self.finish()
            if distributed.rank() == 0:
                print(
                    f"stopped by signal {stop} after {done} iterations; --resume auto goes on from there",
                    flush=True,
                )
            raise SystemExit(128 + stop)

    def _failed(self) -> bool:
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def save(self, done: int, records: Sequence[Path]) -> None:
        """Copy to host memory and go on; the copy is written by a thread."""
        self.finish()
        if self.saved == done:
            return
        copy = {
            name: t.cpu() if t.device.type != "cpu" else t.clone()
            for name, t in tensors(self.trained).items()
        }
        sizes = {file.name: _on_disk(file) for file in records if file.exists()}
        self.pending, self.saved = (
            self.thread.submit(self._write, done, copy, self.about | {"records": sizes}),
            done,
        )

    def _write(self, done: int, copy: dict[str, Tensor], about: dict[str, Any]) -> None:
        final, beside = self.folder / f"step-{done}", self.folder / f"step-{done}.tmp"
        dcp.save(copy, checkpoint_id=beside, process_group=self.group, no_dist=self.group is None)
        if distributed.rank() > 0:  # rank 0 comes here when the shards of all ranks are on the disk
            return
        files = {file.name: file.stat().st_size for file in beside.iterdir()}
        with (beside / "run.json").open("w") as file:
            json.dump({"step": done, **about, "files": files}, file, indent=1, default=str)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(final)
        _on_disk(self.folder)
        for old in by_step(self.folder)[: -self.keep]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")), ignore_errors=True)

    def finish(self) -> None:
        """Wait for the checkpoint being written. Raises OSError, saying what is left, when it cannot be."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            causes = (
                [e for e, _ in error.failures.values()]
                if isinstance(error, CheckpointException)
                else [error]
            )
            if distributed.rank() == 0:
                shutil.rmtree(self.folder / f"step-{self.saved}.tmp", ignore_errors=True)
            kept = by_step(self.folder)
            left = (
                f"{kept[-1]} is complete: mend that and pass --resume auto"
                if kept
                else "there is no older one"
            )
            raise OSError(
                f"checkpoint step-{self.saved} could not be written ({causes[0]}); {left}"
            ) from error
        finally:
            self.pending = None


def _on_disk(path: Path) -> int:
    """Have a file's bytes, or a folder's names, written through to the disk; returns the size."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    size = os.fstat(handle).st_size
    os.close(handle)
    return size


def by_step(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if p.suffix != ".tmp"]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`. Raises ValueError saying what is wrong with one that is not whole."""
    try:
        about = json.loads((path / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no complete checkpoint (run.json: {error})") from None
    for name, size in about["files"].items():
        there = (path / name).stat().st_size if (path / name).exists() else 0
        if there != size:
            raise ValueError(f"{path} is damaged: {name} has {there} of {size} bytes")
    return Checkpoint(path, about)


def find(resume: str, run: Path) -> Checkpoint | None:
    """What `--resume` asks for: the newest complete checkpoint of the run folder `run` (auto; None where there is none), or
    the one in the folder named. Raises ValueError where that is damaged or would leave newer ones behind."""
    own = by_step(run / "checkpoints")
    if resume == "auto":
        for path in reversed(own):
            try:
                return read(path)
            except ValueError as error:
                print(f"WARNING: {error}; trying an older one", flush=True)
        if own:
            raise ValueError(
                f"no checkpoint in {run / 'checkpoints'} is whole; pass --overwrite to begin again"
            )
        return None
    found = read(Path(resume))
    if (
        own
        and found.path.parent.resolve() == own[0].parent.resolve()
        and found.path.name != own[-1].name
    ):
        raise ValueError(
            f"--resume {resume}: {own[-1]} is newer; name another --name to branch off, or remove it"
        )
    return found


def refuse_other(found: Checkpoint, model_config: Any, roles: Sequence[str], steps: int) -> None:
    """ValueError when the checkpoint is of another model, of other roles, or past the end of this run."""
    about = found.about
    mine = architecture(model_config)
    for key, value in about["model"].items():
        if mine[key] != value:
            raise ValueError(
                f"{found.path} is of another model: its {key} is {value}, --model has {mine[key]}"
            )
    if about["roles"] != list(roles):
        raise ValueError(
            f"{found.path} holds {' and '.join(about['roles'])}, this run has {' and '.join(roles)}"
        )
    if about["step"] > steps:
        raise ValueError(f"{found.path} is already past --steps {steps}")


def architecture(model_config: Any) -> dict[str, Any]:
    """What two models must share for one to take the other's weights."""
    return {key: getattr(model_config, key, None) for key in ARCHITECTURE}


def changed(found: Checkpoint, config: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the checkpoint's: name → (then, now)."""
    then, now = found.about["settings"], json.loads(json.dumps(asdict(config)))
    names = [
        f.name for f in fields(config) if f.name not in ("name", "runs", "overwrite", "resume")
    ]
    return {
        name: (then[name], now[name]) for name in names if name in then and then[name] != now[name]
    }


def load(found: Checkpoint | None, trained: Trained) -> int:
    """Fill weights and optimizer states, on any number of ranks, whatever number saved them. Returns the iterations done;
    without a checkpoint 0."""
    if found is None:
        return 0
    dcp.load(tensors(trained), checkpoint_id=found.path, no_dist=not distributed.started())
    return found.about["step"]


def export(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    generation: GenerationConfig | None = None,
) -> None:
    """Write a policy or critic as a Hugging Face folder: weights (safetensors), configuration, tokenizer with chat
    template and, for a policy, generation configuration; transformers and, for a policy, vLLM load it. Weights are gathered
    to rank 0, which writes beside and renames, so `folder` is never half a model."""
    weights = {}
    for name, p in module.model.named_parameters():
        whole = distributed.full_tensor(p)
        if distributed.rank() == 0:
            weights[name] = whole.cpu()
    if distributed.rank() > 0:
        return
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    if generation is not None:
        module.model.generation_config = generation
    module.model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
