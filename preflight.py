"""What a run needs besides weights, and every check that can be made before one is loaded."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import checkpoint
import data
import distributed
from checkpoint import Checkpoint
from config import Config, check
from critic import value_head
from curation import formats
from data import Problem
from grading.pool import Grader
from reports.log import prepare_folder
from reward import Reward, own
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
    check(cfg)
    grader = Grader(0 if cfg.reward else cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed)
    reward = own(cfg.reward)
    path, problems, heldout, found = distributed.once(lambda: _read(cfg, grader))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = data.chat_template(tokenizer, data.TEMPLATES[cfg.template])
    return Inputs(path, tokenizer, eos_ids(path, tokenizer), problems, heldout, found, grader, reward)


def _read(cfg: Config, grader: Grader) -> tuple[str, list[Problem], list[Problem], Checkpoint | None]:
    run = Path(cfg.runs) / cfg.name
    found = checkpoint.find(cfg.resume, run) if cfg.resume else None
    if cfg.resume == "auto" and found is None and (run / "policy").exists():
        raise ValueError(f"{run} is a finished run without checkpoints; nothing to go on from: choose another --name")
    same = found is not None and found.path.parent.parent.resolve() == run.resolve()
    prepare_folder(run, cfg.overwrite, resume=same or cfg.resume == "auto")
    path, train_file, sets = cfg.model, cfg.data, cfg.eval_data
    if cfg.model in tiny.TASKS:
        folder = tiny.ensure(cfg.seed, name=cfg.model)
        path = str(folder)
        train_file, sets = train_file or str(folder / "train.json"), sets or (str(folder / "heldout.json"),)
    config = model_config(path)
    if found:
        checkpoint.refuse_other(found, config, cfg.roles, cfg.steps)
    if cfg.init_critic:
        head = value_head(cfg.init_critic)
        if head is None or head.numel() != config.hidden_size:
            holds = "no value head" if head is None else f"a value head of {head.numel()} numbers"
            raise ValueError(f"--init-critic {cfg.init_critic}: holds {holds}; expected {config.hidden_size}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"--model {path}: its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    check_length(cfg.prompt_tokens + cfg.response_tokens, config, path)

    def read(source: str, name: str = "") -> list[Problem]:
        rows = data.load(source, name)
        rows = data.tokenize(rows, tokenizer, cfg.prompt_tokens, data.TEMPLATES[cfg.template], cfg.drop_bad_rows)
        return rows if cfg.reward else _gradable(rows, grader, cfg.drop_bad_rows)

    if cfg.replay:
        return path, [], [], found
    problems = read(train_file)
    heldout = [problem for name, source in formats.named(sets).items() for problem in read(source, name)]
    if len(problems) < cfg.prompts:
        raise ValueError(f"{train_file}: {len(problems)} problems are fewer than --prompts {cfg.prompts}")
    return path, problems, heldout, found


def _gradable(problems: list[Problem], grader: Grader, drop: bool) -> list[Problem]:
    good = [bool(p.tests) for p in problems]
    if not all(good):
        good = [a or b for a, b in zip(good, grader.check_golds([p.answer for p in problems]), strict=True)]
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
        raise ValueError(f"--prompt-tokens + --response-tokens is {longest}, over the {positions} positions of {path}")


def model_config(path: str) -> Any:
    """The configuration of a causal language model; ValueError for anything else."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as wrong:
        why = str(wrong).splitlines()[0]
        raise ValueError(f"--model {path}: not a folder or hub id with a readable model ({why})") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ValueError(f"--model {path}: a {config.model_type} model is not a causal language model")
    return config


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a sequence: the tokenizer's, and those of the model's generation settings."""
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        listed = None  # a folder need not have a generation config; the tokenizer then says
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not ids:
        raise ValueError(f"--model {path}: neither tokenizer nor generation config names an end-of-sequence token")
    return sorted(ids)
