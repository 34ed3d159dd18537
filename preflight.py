"""Everything that is refused before a weight is loaded, and what a run needs besides weights."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import checkpoint
import data
import distributed
from checkpoint import Checkpoint
from config import (
    BatchSettings,
    Config,
    SamplingSettings,
    read_template,
    validate_ranges,
    validate_stop,
)
from critic import critic_class, value_head
from curation import formats, hub
from data import Problem, TrainedPrompt
from grading.pool import Grader
from packing import attention_windows
from reports.log import check_folder, claim_folder
from reports.trackers import require_login, validate_trackers
from reward import load_custom_reward, score
from rollout import Rollout, load_rollouts
from toy import tiny

Settings = TypeVar("Settings", bound=SamplingSettings)


class Inputs(NamedTuple):
    """What a run needs besides weights."""

    model_path: str  # a folder
    tokenizer: PreTrainedTokenizerBase
    eos: list[int]
    problems: list[Problem]
    eval_problems: list[Problem]
    resume_from: Checkpoint | None
    grader: Grader
    score: Callable[[list[Rollout]], list[Rollout]]  # sets R, see reward.score
    made: Sequence[Path] = ()  # the run's folder and its parents, as far as they are new
    critic_path: str = ""  # the folder of --critic-model


class _Files(NamedTuple):
    """What rank 0 reads and checks for all ranks."""

    model_path: str
    problems: list[Problem]
    eval_problems: list[Problem]
    resume_from: Checkpoint | None
    critic_path: str
    made: Sequence[Path] = ()


def prepare(cfg: Config) -> Inputs:
    """Refuse what cannot work, then load what is cheap.

    No weight is loaded here (`tiny` makes its model on first use); those of a model of the hub are
    downloaded when all else is checked. Rank 0 reads and checks files. Raises ValueError or OSError
    with a message of one line.
    """
    validate_settings(cfg)
    grader = Grader(0 if cfg.reward else cfg.grader_workers, cfg.grader_seconds, cfg.require_boxed)
    custom_reward = load_custom_reward(cfg.reward)
    files = distributed.on_rank0(lambda: _read_files(cfg, grader))
    model_path = on_this_machine("--model", cfg.model, files.model_path)
    vocab_size = model_config(model_path).vocab_size
    tokenizer = load_tokenizer(model_path, vocab_size)
    tokenizer.chat_template = data.chat_template(tokenizer, data.template_text(cfg.template))
    return Inputs(
        model_path=model_path,
        tokenizer=tokenizer,
        eos=eos_ids(model_path, tokenizer, vocab_size),
        problems=files.problems,
        eval_problems=files.eval_problems,
        resume_from=files.resume_from,
        grader=grader,
        score=partial(score, grader=grader, custom_reward=custom_reward),
        made=files.made,
        critic_path=on_this_machine("--critic-model", cfg.critic_model, files.critic_path),
    )


# ── settings ──────────────────────────────────────────────────────────────────────────────────────


def validate_settings(cfg: Config) -> None:
    """Refuse settings that cannot work or that would have no effect: ValueError with the flag, its
    value and what to change."""
    validate_numbers(cfg)
    validate_stop(cfg.stop, data.template_text(cfg.template))
    validate_sampler(cfg)
    ranks = distributed.world_size()
    why = f"does not divide the {ranks} ranks; start with torchrun"
    _require(ranks % cfg.replicas == 0, cfg, "replicas", why)
    _validate_effects(cfg)
    _validate_choices(cfg)


def validate_numbers(cfg: Config) -> None:
    """Refuse numbers that are out of range or that do not go together; --plan calls this, too."""
    validate_ranges(cfg)
    responses = cfg.prompts * cfg.samples
    few = f"{cfg.prompts} prompts × {cfg.samples} samples are only {responses} responses"
    for role in cfg.trained_roles:
        name = f"{role}_steps"
        _require(getattr(cfg, name) <= responses, cfg, name, f"{few}; lower it or raise those")
    if cfg.advantage == "grpo":
        why = "--advantage grpo compares the samples of a problem; it needs at least 2"
        _require(cfg.samples > 1, cfg, "samples", why)
    longest = cfg.prompt_tokens + cfg.response_tokens
    parts = f"--prompt-tokens {cfg.prompt_tokens} + --response-tokens {cfg.response_tokens}"
    why = f"cannot hold one sequence of {parts}"
    _require(cfg.micro_tokens >= longest, cfg, "micro_tokens", why)
    why = f"is above --steps {cfg.steps}, which include them"
    _require(cfg.critic_only_steps <= cfg.steps, cfg, "critic_only_steps", why)
    if cfg.lam_adaptive is not None:
        above_zero = cfg.lam_adaptive * cfg.response_tokens > 1
        why = (
            f"λ = 1 − 1/(α l) is above 0 for no response of --response-tokens {cfg.response_tokens}"
        )
        _require(above_zero, cfg, "lam_adaptive", f"{why}; raise it")


def validate_sampler(cfg: BatchSettings) -> None:
    """Refuse a sampler that is not installed, or that the ranks cannot share; evaluate.py, too."""
    ranks = distributed.world_size()
    if cfg.tensor_parallel > 1 and cfg.engine == "transformers":
        raise ValueError(
            f"--tensor-parallel {cfg.tensor_parallel}: only vLLM shares a model over ranks; pass "
            "--engine vllm or --tensor-parallel 1"
        )
    why = f"does not divide the {ranks} ranks; start with torchrun"
    _require(ranks % cfg.tensor_parallel == 0, cfg, "tensor_parallel", why)
    if cfg.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed here; install it, or pass --engine transformers"
        )


def _require(condition: bool, cfg: BatchSettings, name: str, why: str) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {why}")


# Without a critic, GAE or the reward that it spreads over the tokens, these change nothing.
NEEDS_CRITIC = (
    "gamma",
    "lam",
    "lam_critic",
    "lam_adaptive",
    "critic_only_steps",
    "kl_reward",
    "value_clip",
    "value_head",
    "init_critic",
    "critic_model",
)
# A replay grades and evaluates nothing.
NEEDS_GRADING = (
    "eval_data",
    "eval_every",
    "eval_samples",
    "reward",
    "require_boxed",
    "grader_seconds",
)


def _validate_effects(cfg: Config) -> None:
    """Refuse settings that a user would believe in and that change nothing beside the others.

    Accepted without an effect is what two runs that are compared may share: without a critic the
    number and the learning rate of its steps; in a replay the problems and the sampler of the run
    that saved the rollouts.
    """
    refuse = partial(refuse_without_effect, cfg, Config())
    if cfg.advantage == "grpo":
        instead = "; use --kl-loss" if cfg.kl_reward else ""
        refuse(NEEDS_CRITIC, f"with --advantage grpo, which has no critic and no GAE{instead}")
    if cfg.replay:
        refuse(NEEDS_GRADING, "with --replay, which grades and evaluates nothing")
    if cfg.reward:
        refuse(("require_boxed", "grader_seconds"), "with --reward, which calls no grader")
    if cfg.engine == "transformers":
        refuse(("vllm_memory",), "with --engine transformers")
    if cfg.init_critic:
        refuse(("value_head",), "with --init-critic, which has one")
    if cfg.critic_model == cfg.model:
        refuse(("critic_model",), "where it is --model")
    if cfg.lam_adaptive is not None:
        refuse(("lam",), "with --lam-adaptive; λ of the value targets is --lam-critic")
    elif cfg.lam_critic == cfg.lam:
        refuse(("lam_critic",), f"beside --lam {cfg.lam}, which the value targets have, too")
    if cfg.policy_steps == 1:
        refuse(("clip_eps",), "without --policy-steps: one step is strictly on-policy")
    if not cfg.anneal_steps:
        refuse(("anneal_to",), "without --anneal-steps")
    if not (cfg.kl_loss or cfg.kl_reward):
        refuse(("kl_estimator",), "without --kl-loss or --kl-reward")
    if not (cfg.eval_data or cfg.model in tiny.TASKS):
        refuse(("eval_every", "eval_samples"), "without --eval-data")
    if not cfg.keep_rollouts:
        refuse(("keep_tokens",), "with --keep-rollouts 0")
    if not cfg.checkpoint_every:
        refuse(("keep_checkpoints",), "with --checkpoint-every 0")
    if not torch.cuda.is_available():
        refuse(("offload",), "without a GPU")
    if not cfg.plan:
        refuse(("gpus", "gpu_memory"), "without --plan")


def refuse_without_effect(settings: Any, default: Any, names: Sequence[str], why: str) -> None:
    """Raise ValueError when some of these settings are not the default's: the message names all of
    them with their values, and says that they have no effect `why`."""
    given = []
    for name in names:
        value = getattr(settings, name)
        if value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else [value]
            given.append(flag if value is True else " ".join([flag, *map(str, values)]))
    if given:
        verb = "has" if len(given) == 1 else "have"
        raise ValueError(f"{', '.join(given)}: {verb} no effect {why}; leave it out")


def _validate_choices(cfg: Config) -> None:
    """Refuse flags that need something that is missing, or that exclude each other."""
    if cfg.overwrite and cfg.resume:
        raise ValueError("--overwrite would remove what --resume goes on from; pass one of them")
    validate_one_critic(cfg)
    validate_trackers(cfg.track)
    if cfg.model not in tiny.TASKS and not (cfg.data or cfg.replay):
        raise ValueError(
            "--data is missing: JSON in the authors' form, or JSONL with question and answer"
        )
    for step in range(cfg.steps if cfg.replay else 0):
        if not (Path(cfg.replay) / f"step-{step}.jsonl").is_file():
            raise ValueError(
                f"--replay {cfg.replay}: has no step-{step}.jsonl; lower --steps or save more"
            )


def validate_one_critic(cfg: Config) -> None:
    """Refuse two critics to start from; --plan calls this, too."""
    if cfg.init_critic and cfg.critic_model:
        raise ValueError(
            "--init-critic and --critic-model both say what the critic starts from; pass one"
        )


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def _read_files(cfg: Config, grader: Grader) -> _Files:
    """Take the run folder for this process; then find the checkpoint, and read and check the
    model's files and problems. A refusal leaves no folder that was not there before."""
    folder = _run_folder(cfg)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with claim_folder(folder):
            return _read_files_for(cfg, grader)._replace(made=made)
    except BaseException:
        remove_empty(made)
        raise


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of these folders that are empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # not empty: this run or another one has begun there
            folder.rmdir()


def _read_files_for(cfg: Config, grader: Grader) -> _Files:
    require_login(cfg.track)
    resume_from = _checkpoint_to_resume(cfg)
    train_source, eval_sources = cfg.data, cfg.eval_data
    if cfg.model in tiny.TASKS:
        folder = tiny.ensure(cfg.seed, name=cfg.model)
        train_source = train_source or str(folder / "train.json")
        eval_sources = eval_sources or (str(folder / "heldout.json"),)
    model_path = model_folder("--model", model_name(cfg.model, cfg.seed))
    critic_path = model_folder("--critic-model", cfg.critic_model)
    tokenizer = _check_model_files(cfg, model_path, resume_from, critic_path)
    if cfg.replay:
        _check_replay(cfg, model_config(model_path).vocab_size)
        _fetch_weights(cfg, model_path, critic_path)
        return _Files(model_path, [], [], resume_from, critic_path)
    problems = _read_problems(cfg, tokenizer, grader, train_source)
    eval_problems = []
    for name, source in formats.named(eval_sources).items():
        of_set = _read_problems(cfg, tokenizer, grader, source, name)
        _warn_of_overlap(problems, of_set, train_source, source)
        eval_problems += of_set
    if len(problems) < cfg.prompts:
        raise ValueError(
            f"{train_source}: {len(problems)} problems are fewer than --prompts {cfg.prompts}"
        )
    _fetch_weights(cfg, model_path, critic_path)
    return _Files(model_path, problems, eval_problems, resume_from, critic_path)


def _fetch_weights(cfg: Config, model_path: str, critic_path: str) -> None:
    """Download the weights of models of the hub, when all else is known to be right."""
    given = (("--model", cfg.model, model_path), ("--critic-model", cfg.critic_model, critic_path))
    for flag, model, folder in given:
        commit = hub.commit_of(folder)
        if commit:
            model_folder(flag, model, weights=True, commit=commit)


def _run_folder(cfg: Config) -> Path:
    """The folder of the run. Raises ValueError when the name is not one part of a path."""
    is_part = cfg.name.strip(" .") and cfg.name.isprintable() and not set(cfg.name) & set("/\\")
    if not is_part:
        raise ValueError(
            f"--name {cfg.name!r}: must be the name of a folder in --runs, without separators"
        )
    return Path(cfg.runs) / cfg.name


def _checkpoint_to_resume(cfg: Config) -> Checkpoint | None:
    """The checkpoint that --resume asks for. Raises ValueError when this run may not write in its
    folder, or would remove something that it needs."""
    run = _run_folder(cfg)
    resume_from = checkpoint.find_checkpoint(cfg.resume, run) if cfg.resume else None
    exports = [run / "policy", run / "policy.earlier"]
    if cfg.resume == "auto" and resume_from is None and any(map(os.path.lexists, exports)):
        raise ValueError(
            f"{run} is a finished run without checkpoints; nothing to go on from: choose another "
            "--name"
        )
    same_run = bool(resume_from) and resume_from.path.parent.parent.resolve() == run.resolve()
    check_folder(run, cfg.overwrite, resume=cfg.resume == "auto", same_run=same_run)
    replaced = [run / "policy", run / "critic"] if same_run else [run]
    _require_inputs_outside(cfg, replaced)
    if resume_from:
        _validate_changes(cfg, resume_from)
    return resume_from


def _validate_changes(cfg: Config, resume_from: Checkpoint) -> None:
    """Refuse settings that only count at the start of a run, where they differ from the
    checkpoint's. `reports.log` says which others have no effect."""
    changes = checkpoint.changed_settings(resume_from, cfg)
    changed = changes.keys()
    why = f"with --resume: the critic is that of {resume_from.path}"
    refuse_without_effect(cfg, Config(), sorted(changed & checkpoint.OF_THE_START), why)
    done = resume_from.about["step"]
    is_over = 0 < cfg.anneal_steps <= cfg.optimizer_steps("policy", done)
    why = f"counts from step 0 and is over at {resume_from.path}; pass --policy-lr instead"
    _require(not (is_over and "anneal_steps" in changed), cfg, "anneal_steps", why)
    # The policy's learning rate counts from the end of the critic-only steps.
    then, now = changes.get("critic_only_steps", (done, done))
    why = f"counts from step 0 and is over at {resume_from.path}; pass {then} as before"
    _require(min(then, now) >= done, cfg, "critic_only_steps", why)


def _require_inputs_outside(cfg: Config, replaced: list[Path]) -> None:
    """Raise ValueError when an input of the run is in one of the folders that it replaces."""
    names = ("model", "data", "replay", "init_critic", "critic_model")
    given = {name: [getattr(cfg, name)] for name in names}
    given["eval_data"] = list(formats.named(cfg.eval_data).values())
    for name, sources in given.items():
        for source in sources:
            if any(_is_inside(source, folder) for folder in replaced):
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} {source}: is in the run's own folder, which this run replaces; "
                    "move it, or choose another --name"
                )


def _is_inside(source: str, folder: Path) -> bool:
    """Whether a source is a file or folder at or below `folder`, by its path or by its links."""
    if not source or not os.path.lexists(source):
        return False
    by_path = Path(os.path.abspath(source)).is_relative_to(os.path.abspath(folder))
    return by_path or Path(source).resolve().is_relative_to(folder.resolve())


def _check_model_files(
    cfg: Config, model_path: str, resume_from: Checkpoint | None, critic_path: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that this run can train. Raises ValueError if it cannot, or if the
    model of --critic-model, in `critic_path`, cannot be its critic."""
    config = model_config(model_path)
    longest = cfg.prompt_tokens + cfg.response_tokens
    require_trainable(config, longest, model_path, with_critic="critic" in cfg.trained_roles)
    tokenizer = load_tokenizer(model_path, config.vocab_size)
    eos_ids(model_path, tokenizer, config.vocab_size)
    _warn_of_another_prompt(cfg, model_path)
    validate_length(longest, config, model_path)
    critic_config = config
    if cfg.init_critic:
        critic_config = check_critic("--init-critic", cfg.init_critic, config, tokenizer, longest)
    if critic_path:
        critic_config = _check_critic_model(critic_path, tokenizer, longest)
    validate_length(longest, critic_config, cfg.init_critic or critic_path or model_path)
    if resume_from:
        configs = {"policy": config, "critic": critic_config}
        of_roles = {role: configs[role] for role in cfg.trained_roles}
        checkpoint.require_same_models(resume_from, of_roles, cfg.steps)
    return tokenizer


def check_critic(
    flag: str, path: str, policy_config: Any, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Any:
    """The configuration of the trained critic in `path`, which reads the tokens of the policy and
    its `tokenizer`. Raises ValueError if it has no value head, reads other tokens, or cannot be
    trained on sequences of `longest` tokens."""
    head = _stored_value_head(flag, path)
    if head is None:
        raise ValueError(f"{flag} {path}: holds no value head")
    config = read_config(flag, path)
    _require_causal(config, path, flag)
    if head.numel() != config.hidden_size:
        holds = f"a value head of {head.numel()} numbers; expected {config.hidden_size}"
        raise ValueError(f"{flag} {path}: holds {holds}")
    shared = ("model_type", "hidden_size", "vocab_size")
    if any(getattr(config, name, None) != getattr(policy_config, name, None) for name in shared):
        _require_same_tokens(flag, path, config, tokenizer)
    require_trainable(config, longest, path, flag=flag)
    return config


def _check_critic_model(path: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> Any:
    """The configuration of the base model that --critic-model names. Raises ValueError if it is no
    language model, reads other tokens than the policy, or cannot be trained as a critic."""
    flag = "--critic-model"
    config = model_config(path, flag)
    _require_same_tokens(flag, path, config, tokenizer)
    require_trainable(config, longest, path, flag=flag)
    return config


def _require_same_tokens(
    flag: str, path: str, config: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError unless the tokenizer in `path` has the policy's tokens with the same ids.
    How many rows the models have does not matter: Qwen2.5-7B has more than Qwen2.5-0.5B."""
    ids = tokenizer.get_vocab()
    ids_there = load_tokenizer(path, config.vocab_size, flag).get_vocab()
    different = {token for token, _ in ids.items() ^ ids_there.items()}
    if different:
        token = min(different)
        raise ValueError(
            f"{flag} {path}: the id of {token!r} is {ids_there.get(token, 'absent')} in its "
            f"tokenizer and {ids.get(token, 'absent')} in the policy's; take a model with the same"
        )


def _read_problems(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, grader: Grader, source: str, name: str = ""
) -> list[Problem]:
    template = data.template_text(cfg.template)
    problems = data.load(source, name)
    problems = data.tokenize(
        problems, tokenizer, cfg.prompt_tokens, template, drop=cfg.drop_bad_rows
    )
    return problems if cfg.reward else gradable(problems, grader, cfg.drop_bad_rows, source)


def _warn_of_overlap(
    problems: Sequence[Problem], of_set: Sequence[Problem], train_source: str, source: str
) -> None:
    """Say so where the problems of a held-out set are trained on, too; spaces may differ."""
    trained = {" ".join(p.question.split()) for p in problems}
    count = sum(" ".join(p.question.split()) in trained for p in of_set)
    if count:
        print(
            f"WARNING: --eval-data {source}: {count} of its {len(of_set)} problems are in --data "
            f"{train_source}, too: accuracy on them is not of held-out problems",
            flush=True,
        )


def _check_replay(cfg: Config, vocab_size: int) -> None:
    """Raise ValueError for rollouts that `cfg` cannot train on: damaged ones, fewer than an update
    has steps, or, for GRPO, groups of --samples that answer different problems. `vocab_size` is the
    model's, which may be wider than the tokenizer's: such ids are sampled, too."""
    for step in range(cfg.steps):
        path = Path(cfg.replay) / f"step-{step}.jsonl"
        try:
            rollouts = load_rollouts(path)
        except (TypeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not saved rollouts ({error})") from None
        for number, r in enumerate(rollouts, 1):
            why = _unusable(r, cfg.micro_tokens, vocab_size)
            if why:
                raise ValueError(f"{path}: line {number}: {why}")
        for role in cfg.trained_roles:
            few = f"{path} holds only {len(rollouts)} rollouts; lower it"
            _require(getattr(cfg, f"{role}_steps") <= len(rollouts), cfg, f"{role}_steps", few)
        asked = [(r.problem.source, r.problem.question) for r in rollouts]
        groups = [set(asked[i : i + cfg.samples]) for i in range(0, len(asked), cfg.samples)]
        whole = len(asked) % cfg.samples == 0 and all(len(group) == 1 for group in groups)
        why = f"{path} was sampled with another number of responses per problem"
        _require(whole or cfg.advantage != "grpo", cfg, "samples", why)


ROUNDING = 1e-4  # what a kernel's log-probability of a certain token may be above 0


def _unusable(r: Rollout, micro_tokens: int, vocab_size: int) -> str:
    """Why a saved rollout cannot be trained on; "" if it can."""
    ids = [*r.problem.prompt_ids, *r.token_ids]
    if not (r.problem.prompt_ids and r.token_ids):
        return "has no prompt_ids or no ids"
    if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        return f"has an id that is not one of the model's {vocab_size}"
    if len(r.logprobs) != len(r.token_ids) or not all(map(_is_finite, [r.reward, *r.logprobs])):
        return "reward and logprobs must be finite numbers, one log-probability for each id"
    if max(r.logprobs) > ROUNDING:
        return f"has the log-probability {max(r.logprobs)}; none is above 0"
    if r.finish_reason not in ("stop", "length"):
        return f"finish: expected stop or length, found {r.finish_reason!r:.60}"
    texts = (r.problem.source, r.problem.question, r.problem.answer, r.text, r.answer)
    if not all(isinstance(text, str) for text in texts):
        return "problem, question, gold, response and answer must be texts"
    if len(ids) > micro_tokens:
        return f"has {len(ids)} tokens, over --micro-tokens {micro_tokens}"
    return ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def gradable(
    problems: list[Problem], grader: Grader, drop: bool, source: str = ""
) -> list[Problem]:
    """Problems whose gold answer the grader can parse, or that have tests. Raises ValueError at any
    other problem, or leaves it out with `drop`; and if none of `source` is left."""
    good = [bool(p.tests) for p in problems]
    if not all(good):
        parsed = grader.are_gradable([p.answer for p in problems])
        usable = [not formats.is_placeholder(p.answer) for p in problems]
        good = [a or (b and c) for a, b, c in zip(good, parsed, usable, strict=True)]
    for problem, ok in zip(problems, good, strict=True):
        if not ok and not drop:
            raise ValueError(
                f"{problem.source}: Math-Verify cannot parse the gold answer {problem.answer!r}: "
                "no response could be right; fix the row or pass --drop-bad-rows"
            )
    kept = [p for p, ok in zip(problems, good, strict=True) if ok]
    if not kept:
        raise ValueError(f"{source}: no problem has a gold answer that can be graded")
    return kept


# ── models ────────────────────────────────────────────────────────────────────────────────────────


def model_name(model: str, seed: int) -> str:
    """Folder or hub id of a model; `tiny` is made on first use."""
    return str(tiny.ensure(seed, name=model)) if model in tiny.TASKS else model


def model_folder(flag: str, model: str, weights: bool = False, commit: str | None = None) -> str:
    """The folder of a model: of a hub id the one in the hub's cache, with its configuration and
    tokenizer and, with `weights`, these, too; of anything else the name itself. Raises ValueError
    if the hub does not give it."""
    if not hub.is_model(model):
        return model
    try:
        return hub.model_folder(model, weights, commit)
    except OSError as error:
        raise ValueError(
            f"{flag} {model}: not a folder or hub id with a readable model ({error})"
        ) from None


def fetch_model(model: str, weights: bool = False) -> str:
    """`model_folder` of --model; every rank calls it, and rank 0 downloads first."""
    folder = distributed.on_rank0(lambda: model_folder("--model", model, weights))
    return on_this_machine("--model", model, folder, weights)


def on_this_machine(flag: str, model: str, folder: str, weights: bool = True) -> str:
    """The `folder` of a model that rank 0 has; every rank calls it. A rank on another machine has
    a cache of its own, and downloads the same commit of a model of the hub. Raises ValueError, on
    all ranks, if the hub does not give it there."""
    why = ""
    commit = hub.commit_of(folder)
    if commit:
        try:
            folder = model_folder(flag, model, weights, commit)
        except ValueError as error:
            why = str(error)
    reasons = [reason for reason in distributed.all_gather_objects(why) if reason]
    if reasons:
        raise ValueError(reasons[0])
    return folder


def with_prompt(settings: Settings, path: str) -> Settings:
    """The settings with the template and the stop strings for the model in `path`: those given, and
    for `--template auto` and no `--stop` those that it was trained with, see `data.trained_prompt`,
    or the paper's. Raises ValueError for a prompt that cannot be used."""
    trained = data.trained_prompt(path) or TrainedPrompt()
    template, stop = settings.template, settings.stop
    template = trained.template if template == "auto" else read_template(template)
    stop = trained.stop if stop is None else stop
    validate_stop(stop, data.template_text(template))
    return replace(settings, template=template, stop=stop)


def _warn_of_another_prompt(cfg: Config, path: str) -> None:
    """Say so where the model was trained with another prompt than this run's."""
    trained = data.trained_prompt(path)
    if trained and trained != (cfg.template, cfg.stop):
        print(
            f"WARNING: --model {path} was trained with another prompt, see its {data.PROMPT_FILE}; "
            "--template and --stop of this run are used",
            flush=True,
        )


def validate_length(longest: int, config: Any, path: str) -> None:
    """Raise ValueError when the longest sequence has more tokens than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ValueError(
            f"--prompt-tokens + --response-tokens is {longest}, over the {positions} positions of "
            f"{path}; pass smaller ones"
        )


def model_config(path: str, flag: str = "--model") -> Any:
    """The configuration of a causal language model. Raises ValueError for anything else."""
    config = read_config(flag, path)
    _require_causal(config, path, flag)
    classes = " ".join(config.architectures or ())
    if "Classification" in classes or _stored_value_head(flag, path) is not None:
        raise ValueError(f"{flag} {path}: a critic or classifier, not a language model")
    return config


def _require_causal(config: Any, path: str, flag: str) -> None:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ValueError(
            f"{flag} {path}: a {config.model_type} model is not a causal language model"
        )


def read_config(flag: str, path: str) -> Any:
    folder, why = Path(path), ""
    if folder.is_file():
        why = "it is a file"
    elif (folder / "policy" / "config.json").is_file():
        why = f"it is a run's folder; its model is {folder / 'policy'}"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        why = "the folder has no config.json"
    if why:
        raise ValueError(f"{flag} {path}: not a folder or hub id with a readable model ({why})")
    try:
        return AutoConfig.from_pretrained(path, **distributed.PLAIN_OUTPUT)
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise ValueError(
            f"{flag} {path}: not a folder or hub id with a readable model ({first_line(error)})"
        ) from None


def require_unquantized(config: Any, path: str, flag: str = "--model") -> None:
    """Raise ValueError for a model whose configuration says that its weights are quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "of an unknown kind")
        raise ValueError(
            f"{flag} {path}: its weights are quantized ({method}); take the model in bfloat16 or "
            "float32 (evaluate.py --engine vllm leaves them to vLLM)"
        )


def load_tokenizer(path: str, vocab_size: int, flag: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model with `vocab_size` tokens. Raises ValueError with one line if it
    cannot be read or is not the model's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(
            f"{flag} {path}: its tokenizer cannot be read ({first_line(error)})"
        ) from None
    # Where files are missing, transformers makes an empty tokenizer.
    text = "1+1=2"
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if "".join(decoded.split()) != text:
        raise ValueError(
            f"{flag} {path}: its tokenizer turns {text!r} into {decoded!r}; are its files "
            "(tokenizer.json, tokenizer_config.json) in the folder?"
        )
    needed = 1 + max(tokenizer.get_vocab().values())
    if needed > vocab_size:
        raise ValueError(
            f"{flag} {path}: its tokenizer has {needed} tokens, the model {vocab_size}"
        )
    return tokenizer


def _stored_value_head(flag: str, path: str) -> Any:
    try:
        return value_head(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{flag} {path}: its weights cannot be read ({first_line(error)})"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message; its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
SPARSE_LAYERS = {"indexed_attention", "compressed_sparse_attention", "minimax_m3_sparse"}


def require_samplable(config: Any, path: str) -> None:
    """Raise ValueError, which names the type and the reason, for models that the transformers
    sampler would sample from wrongly: it pads prompts on the left, and gives the model a key-value
    cache; and for quantized ones. `evaluate.check_sampler` sees the rest when the weights are
    loaded."""
    require_unquantized(config, path)
    layers = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    why = ""
    if layers - SPARSE_LAYERS or AutoModelForCausalLM._model_mapping[type(config)]._is_stateful:
        why = "it carries a state from token to token, also from the padding before a prompt"
    elif layers:
        why = f"its layers of type {', '.join(sorted(layers))} need a cache of their own"
    if why:
        raise ValueError(
            f"--model {path}: --engine transformers cannot sample from a {config.model_type} "
            f"model: {why}"
        )


def require_trainable(
    config: Any, longest: int, path: str, with_critic: bool = True, flag: str = "--model"
) -> None:
    """Raise ValueError, which names the type and the reason, when packed sequences of up to
    `longest` tokens of this model cannot be trained. It needs the configuration only; what it
    cannot see, `policy.check_logprobs` sees when the weights are loaded. docs/models.md lists which
    types work."""

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{flag} {path}: cannot train a {config.model_type} model: {why}")

    require_unquantized(config, path, flag)

    parts = set(type(config).sub_configs) - {"attn_config", "ffn_config"}
    if parts:
        refuse(f"it has parts beside a language model ({', '.join(sorted(parts))})")
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    layer_types = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if model_class._is_stateful or layer_types - SPARSE_LAYERS:
        refuse("it carries a state from token to token, also across the sequences of a pack")
    if layer_types:
        refuse(f"its layers of type {', '.join(sorted(layer_types))} are not supported")
    if not model_class._supports_attention_backend:
        refuse("its attention cannot be exchanged for that of packed sequences")
    _require_length_independence(config, longest, refuse)
    try:
        _run_without_weights(config, longest)
        if with_critic and not hasattr(_without_weights(critic_class(config), config), "score"):
            raise ValueError("its sequence classifier has no linear value head")
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        refuse(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _require_length_independence(config: Any, longest: int, refuse: Callable) -> None:
    """Refuse models that treat a token of a short sequence otherwise when a long one is in the same
    pack, and attention in chunks shorter than a sequence."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and chunk < longest:
        refuse(f"it attends in chunks of {chunk} tokens, shorter than sequences of {longest}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    for kind in kinds:
        original = kind.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", longest
        )
        if kind.get("rope_type") == "longrope" and original < longest:
            refuse(
                f"its LongRoPE changes at {original} tokens for all sequences of a pack; lower "
                f"--prompt-tokens + --response-tokens from {longest}"
            )


def _without_weights(model_class: Any, config: Any) -> PreTrainedModel:
    """A model whose weights have shapes and no numbers (torch's device "meta")."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model = build(copy.deepcopy(config), attn_implementation="packed", dtype=torch.float32)
    return model.eval()


def _run_without_weights(config: Any, longest: int) -> None:
    """Run the policy's forward pass on shapes alone, as far as they lead: routing to experts needs
    numbers. Raises what the pass raises, and ValueError when a layer does not tell its window."""
    model = _without_weights(AutoModelForCausalLM, config)
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise ValueError("it has no linear vocabulary head")
    windows = attention_windows(model)
    layer_types = getattr(config, "layer_types", None) or []
    for layer_type, window in zip(layer_types, windows, strict=False):
        if layer_type == "sliding_attention" and window is None and config.sliding_window < longest:
            raise ValueError("its attention does not tell its sliding window")


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The tokens that end a sequence: the tokenizer's, and those of the model's generation
    settings. Raises ValueError if there are none, if one is not a token of the model, and if the
    generation settings cannot be read."""
    listed = None
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, TypeError, ValueError, AttributeError) as error:
        # A folder need not have generation settings.
        if (Path(path) / "generation_config.json").exists():
            raise ValueError(
                f"--model {path}: its generation_config.json cannot be read ({first_line(error)})"
            ) from None
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ids = [token_id for token_id in ids if token_id is not None]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"--model {path}: its end-of-sequence token {token_id!r} is not one of the model's "
                f"{vocab_size}; correct eos_token_id in generation_config.json"
            )
    if not ids:
        raise ValueError(
            f"--model {path}: neither tokenizer nor generation config names an end-of-sequence "
            "token"
        )
    return sorted(set(ids))
