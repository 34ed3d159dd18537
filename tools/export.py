"""Write the policy and the critic of any checkpoint of a run as Hugging Face folders.

    python -m tools.export runs/NAME                 the newest complete checkpoint
    python -m tools.export runs/NAME --step 40 --out best

The run may be going on, or may have been killed; nothing of it is changed. One process on a CPU
does it, whatever number of ranks saved the checkpoint, with one model in memory at a time. The
folders are like those that a finished run leaves: with a model card, its prompt, and the training
prompt as chat template.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import transformers
import tyro
from transformers import AutoModelForCausalLM

import data
import preflight
from checkpoint import (
    Checkpoint,
    architecture,
    by_step,
    export_model,
    generation_settings,
    load_weights,
    read_checkpoint,
    require_same_models,
    step_of,
)
from config import LARGE, Config, Count, hub_id, validate_ranges
from critic import HEADS, Critic, critic_class
from distributed import load_pretrained
from policy import Policy
from reports import card
from reports.log import is_run


@dataclass(frozen=True)
class Settings:
    """What is exported, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run, runs/NAME."""
    step: Count | None = None
    """Iterations done at the checkpoint; none: the newest complete one."""
    model: str = ""
    """The base model, if it is no longer where the run found it: its configuration, tokenizer and
    fixed buffers are needed."""
    out: str = ""
    """New folder for policy/ and critic/; none: exports/step-N in the folder of the run."""


def main() -> None:
    """Command line. An error is printed in one line."""
    settings = tyro.cli(Settings, description=__doc__, prog="python -m tools.export")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        validate_ranges(settings)
        out = export(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"tools.export: {error}")
    print(f"{out} holds {' and '.join(sorted(path.name for path in out.iterdir()))}")


def export(settings: Settings) -> Path:
    """Export what `settings` ask for; returns the folder. Raises ValueError or OSError when the
    run, the checkpoint or the base model cannot be used, or a file cannot be written."""
    run = Path(settings.run)
    found = find(run, settings.step)
    step = found.about["step"]
    out = Path(settings.out) if settings.out else run / "exports" / f"step-{step}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; remove it, or name another --out")
    cfg = settings_of(found)
    name = preflight.model_name(hub_id(settings.model or cfg.model), cfg.seed)
    base = preflight.model_folder("--model", name, weights=True)
    config = preflight.model_config(base)
    tokenizer = preflight.load_tokenizer(base, config.vocab_size)
    tokenizer.chat_template = data.chat_template(tokenizer, data.template_text(cfg.template))
    eos = preflight.eos_ids(base, tokenizer, config.vocab_size)
    configs = {"policy": config}
    if "critic" in found.about["roles"]:
        source = critic_source(cfg, found, config)
        source = preflight.model_folder("--critic-model", source, weights=True) or base
        configs["critic"] = preflight.read_config("--critic-model", source)
    require_same_models(found, configs, LARGE)
    out.mkdir(parents=True, exist_ok=True)
    policy = Policy(load_pretrained(AutoModelForCausalLM, base).eval())
    load_weights(found, "policy", policy)
    generation = generation_settings(cfg, tokenizer, eos)
    files = card.policy_files(cfg, base, run, step)
    export_model(policy, tokenizer, out / "policy", generation, files)
    del policy  # the critic takes its place
    if "critic" in configs:
        model_class = critic_class(configs["critic"])
        critic = Critic(load_pretrained(model_class, source, HEADS, num_labels=1).eval())
        load_weights(found, "critic", critic)
        export_model(critic, tokenizer, out / "critic", files=card.critic_files(cfg, step))
    return out


def find(run: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a run after `step` iterations, or the newest complete one. Raises
    ValueError when there is none, with those that there are."""
    if not is_run(run):
        raise ValueError(f"{run}: not the folder of a run; expected runs/NAME")
    reasons = []
    for path in reversed(by_step(run / "checkpoints")):
        if step is None or step_of(path) == step:
            try:
                return read_checkpoint(path)
            except ValueError as error:
                reasons.append(str(error))
    there = ", ".join(str(step_of(path)) for path in by_step(run / "checkpoints")) or "none"
    why = f" ({reasons[0]})" if reasons else ""
    if step is None:
        raise ValueError(f"{run} has no complete checkpoint{why}")
    raise ValueError(f"--step {step}: {run} has no complete checkpoint of it{why}; it has: {there}")


def settings_of(found: Checkpoint) -> Config:
    """The settings of the run that saved a checkpoint. What an early version did not have is the
    default; what this version does not have is left out."""
    saved: Mapping[str, Any] = found.about["settings"]
    known = {field.name for field in fields(Config)} & saved.keys()
    values = {name: saved[name] for name in known}
    return Config(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def critic_source(cfg: Config, found: Checkpoint, policy_config: Any) -> str:
    """The folder of a model with the critic's architecture; "" where it is the policy's. All
    weights come from the checkpoint."""
    of_critic = found.about.get("models", {}).get("critic", {})
    of_policy = architecture(policy_config)
    differs = {k for k, v in of_critic.items() if v != of_policy.get(k)} - {"tie_word_embeddings"}
    return cfg.init_critic or cfg.critic_model if differs else ""


if __name__ == "__main__":
    main()
