"""What a run needs besides weights, and every check that can be made before one is loaded."""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import checkpoint
import data
import distributed
from checkpoint import Checkpoint
from config import Config
from critic import value_head
from curation import formats
from data import Problem
from grading.pool import Grader
from reports.log import prepare_folder
from reward import Reward, load_custom_reward
from toy import tiny


class Inputs(NamedTuple):
    """What a run needs besides weights."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    eos: list[int]
    problems: list[Problem]
    heldout: list[Problem]
    found: Checkpoint | None
    grader: Grader
    reward: Reward | None


def prepare(cfg: Config) -> Inputs:
    """Refuse what cannot work, then load what is cheap.

    No weight is loaded here (`tiny` makes its model on first use). Files are read and checked by rank 0. Raises ValueError
    or OSError in one clear line.
    """
    validate_settings(cfg)
    grader = Grader(0 if cfg.reward else cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed)
    reward = load_custom_reward(cfg.reward)
    path, problems, heldout, found = distributed.on_rank0(lambda: _read(cfg, grader))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = data.chat_template(tokenizer, data.TEMPLATES[cfg.template])
    return Inputs(
        path, tokenizer, eos_ids(path, tokenizer), problems, heldout, found, grader, reward
    )


def validate_settings(cfg: Config) -> None:
    """Refuse numbers that cannot work: ValueError with the flag, its value and what to change."""
    responses = cfg.prompts * cfg.samples

    def require(fine: bool, name: str, why: str) -> None:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {why}")

    positive = """steps prompts samples prompt_tokens response_tokens temperature top_p policy_steps critic_steps policy_lr
        critic_lr max_grad_norm grader_workers grader_seconds eval_samples micro_tokens max_num_seqs replicas tensor_parallel
        timeout_minutes keep_checkpoints gpus gpu_memory""".split()
    for name in positive:
        require(getattr(cfg, name) > 0, name, "must be above 0")
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        require(
            not isinstance(value, int | float) or value >= 0, field.name, "must not be negative"
        )
    for name in ("gamma", "lam", "top_p"):
        require(getattr(cfg, name) <= 1, name, "must not be above 1")
    for name in ("policy_steps", "critic_steps"):
        few = f"{cfg.prompts} prompts × {cfg.samples} samples are only {responses} responses; lower it or raise those"
        require(getattr(cfg, name) <= responses, name, few)
    if cfg.advantage == "grpo":
        require(
            cfg.samples > 1,
            "samples",
            "--advantage grpo compares the samples of a problem; it needs at least 2",
        )
    longest = cfg.prompt_tokens + cfg.response_tokens
    why = f"cannot hold one sequence of --prompt-tokens {cfg.prompt_tokens} + --response-tokens {cfg.response_tokens}"
    require(cfg.micro_tokens >= longest, "micro_tokens", why)
    if cfg.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed here; install it, or pass --engine transformers"
        )
    ranks = distributed.world_size()
    for name in ("replicas", "tensor_parallel"):
        require(
            ranks % getattr(cfg, name) == 0,
            name,
            f"does not divide the {ranks} ranks; start with torchrun",
        )
    if cfg.overwrite and cfg.resume:
        raise ValueError("--overwrite would remove what --resume goes on from; pass one of them")
    if cfg.replay:
        missing = [
            s for s in range(cfg.steps) if not (Path(cfg.replay) / f"step-{s}.jsonl").is_file()
        ]
        require(
            not missing,
            "replay",
            f"has no step-{missing[0] if missing else 0}.jsonl; lower --steps or save more",
        )
    if cfg.model not in ("tiny", "tiny-long") and not (cfg.data or cfg.replay):
        raise ValueError(
            "--data is missing: JSON in the authors' form, or JSONL with question and answer"
        )


def _read(
    cfg: Config, grader: Grader
) -> tuple[str, list[Problem], list[Problem], Checkpoint | None]:
    run = Path(cfg.runs) / cfg.name
    found = checkpoint.find(cfg.resume, run) if cfg.resume else None
    if cfg.resume == "auto" and found is None and (run / "policy").exists():
        raise ValueError(
            f"{run} is a finished run without checkpoints; nothing to go on from: choose another --name"
        )
    same = found is not None and found.path.parent.parent.resolve() == run.resolve()
    prepare_folder(run, cfg.overwrite, resume=same or cfg.resume == "auto")
    path, train_file, sets = cfg.model, cfg.data, cfg.eval_data
    if cfg.model in tiny.TASKS:
        folder = tiny.ensure(cfg.seed, name=cfg.model)
        path = str(folder)
        train_file, sets = (
            train_file or str(folder / "train.json"),
            sets or (str(folder / "heldout.json"),),
        )
    config = model_config(path)
    if found:
        checkpoint.refuse_other(found, config, cfg.roles, cfg.steps)
    if cfg.init_critic:
        head = value_head(cfg.init_critic)
        if head is None or head.numel() != config.hidden_size:
            holds = "no value head" if head is None else f"a value head of {head.numel()} numbers"
            raise ValueError(
                f"--init-critic {cfg.init_critic}: holds {holds}; expected {config.hidden_size}"
            )
    tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--model {path}: its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        )
    check_length(cfg.prompt_tokens + cfg.response_tokens, config, path)

    def read(source: str, name: str = "") -> list[Problem]:
        rows = data.load(source, name)
        rows = data.tokenize(
            rows, tokenizer, cfg.prompt_tokens, data.TEMPLATES[cfg.template], cfg.drop_bad_rows
        )
        return rows if cfg.reward else _gradable(rows, grader, cfg.drop_bad_rows)

    if cfg.replay:
        return path, [], [], found
    problems = read(train_file)
    heldout = [
        problem for name, source in formats.named(sets).items() for problem in read(source, name)
    ]
    if len(problems) < cfg.prompts:
        raise ValueError(
            f"{train_file}: {len(problems)} problems are fewer than --prompts {cfg.prompts}"
        )
    return path, problems, heldout, found


def _gradable(problems: list[Problem], grader: Grader, drop: bool) -> list[Problem]:
    good = [bool(p.tests) for p in problems]
    if not all(good):
        good = [
            a or b
            for a, b in zip(good, grader.check_golds([p.answer for p in problems]), strict=True)
        ]
    for problem, ok in zip(problems, good, strict=True):
        if not ok and not drop:
            raise ValueError(
                f"{problem.source}: Math-Verify cannot parse the gold answer {problem.answer!r}, so no response could "
                "ever be right; mend the row or pass --drop-bad-rows"
            )
    return [p for p, ok in zip(problems, good, strict=True) if ok]


def model_path(model: str, seed: int) -> str:
    """Folder or hub id of a model; `tiny` is made on first use."""
    return str(tiny.ensure(seed, name=model)) if model in tiny.TASKS else model


def check_length(longest: int, config: Any, path: str) -> None:
    """ValueError when the longest sequence has more tokens than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ValueError(
            f"--prompt-tokens + --response-tokens is {longest}, over the {positions} positions of {path}"
        )


def model_config(path: str) -> Any:
    """The configuration of a causal language model; ValueError for anything else."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"--model {path}: not a folder or hub id with a readable model ({why})"
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ValueError(
            f"--model {path}: a {config.model_type} model is not a causal language model"
        )
    return config


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a sequence: the tokenizer's, and those of the model's generation settings."""
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        listed = None  # a folder need not have a generation config; the tokenizer then says
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not ids:
        raise ValueError(
            f"--model {path}: neither tokenizer nor generation config names an end-of-sequence token"
        )
    return sorted(ids)
