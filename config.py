"""Every setting of a run, with its meaning and its source; the command line is made from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """The values that a numeric setting may have: finite, from `low` to `high`; with `above`, `low`
    itself is excluded. It stands in the type of the setting's field."""

    low: float
    high: float
    above: bool = False


LARGE = 10**9  # above this a setting is a typing error, and some libraries overflow
Count = Annotated[int, Range(1, LARGE)]
CountOrNone = Annotated[int, Range(0, LARGE)]  # 0: off
Processes = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**63 - 1)]  # what torch takes
Positive = Annotated[float, Range(0, LARGE, above=True)]
NotNegative = Annotated[float, Range(0, LARGE)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
ShareOrNone = Share | None  # None: off
PositiveOrNone = Positive | None
Temperature = Annotated[float, Range(0.01, 100)]  # below, vLLM samples at 0.01
Seconds = Annotated[float, Range(0, 24 * 3600, above=True)]
Minutes = Annotated[float, Range(0, 365 * 24 * 60, above=True)]

Tracker = Literal["tensorboard", "wandb", "trackio", "none"]

STOP = ("User:", "Human:", "Assistant:", "</answer>")  # §3.1; a response is over after </answer>
STOP_LENGTH = 100  # characters of a stop string: as many tokens are searched for it
TEMPLATE_NAMES = ("authors", "paper")  # the texts are in data.py


@dataclass(frozen=True)
class Sampling:
    """What a sampler is asked for. The paper's values: T = 1, top-p 1, at most 8,000 tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = STOP


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled: the settings that all programs share."""

    seed: Seed = 0
    """Every random stream of the run derives from it (and, for `tiny`, the base model)."""
    temperature: Temperature = 1.0
    """Sampling temperature (§3.1)."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling mass (§3.1)."""
    response_tokens: Count = 8000
    """Longest response; one that reaches it is truncated and gets reward 0 (authors' code: 8,000;
    32B: 16k context)."""
    template: str = "authors"
    """Prompt: authors, the wording the released models were trained with; paper, its Table 1; or a
    text file of your own that has {question} once."""
    stop: tuple[str, ...] = STOP
    """Strings that end a response, which includes them (§3.1); none: only the end-of-sequence
    token ends it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the sampler; auto: bfloat16 on a GPU, float32 elsewhere. The trainer's weights
    are always float32."""

    @property
    def sampling(self) -> Sampling:
        """These settings as a request to a sampler."""
        return Sampling(self.response_tokens, self.temperature, self.top_p, self.stop)


@dataclass(frozen=True)
class BatchSettings(SamplingSettings):
    """How many responses are sampled and graded at once: shared by train.py and evaluate.py."""

    prompt_tokens: Count = 2048
    """Longest prompt; a longer one is an error and is never cut (authors' code: 2,048, cut)."""
    drop_bad_rows: bool = False
    """Leave out problems whose gold answer cannot be parsed or whose prompt is too long, instead of
    stopping."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples: vLLM in this process, or transformers with a key-value cache. auto: vLLM where
    there are a GPU and vLLM, otherwise transformers."""
    max_num_seqs: Count = 256
    """Sequences that the sampler decodes at once."""
    vllm_memory: PositiveShare = 0.4
    """Share of the GPU's memory that vLLM may take."""
    tensor_parallel: Count = 1
    """Ranks that share one vLLM engine."""
    require_boxed: bool = False
    """Accept only answers in \\boxed{} inside the answer tags, as the authors' code does."""
    grader_workers: Processes = 2
    """Processes that grade."""
    grader_seconds: Seconds = 3.0
    """Deadline per answer; an answer that takes longer counts as wrong and as a timeout."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads of this process; 0: torch's choice. One thread suits small matrices and leaves a
    core to the grader."""
    timeout_minutes: Minutes = 120.0
    """How long a rank waits for the others before it ends the run."""


@dataclass(frozen=True)
class Config(BatchSettings):
    """Settings of train.py. The defaults are the paper's (arXiv 2503.24290, §3.1); `--model` adds
    those of a size. Where the authors' code differs from the paper, the field says so."""

    model: str = "tiny"
    """Hugging Face folder or hub id, Qwen2.5-{0.5B,1.5B,7B,32B}, or `tiny`, whose base model
    is in toy/base for seed 0 and made in a few minutes for others; or a test bed of the
    experiments, see toy/tiny.py."""
    data: str = ""
    """Training problems: a file in the authors' form, JSON lines with question and answer, a hub
    id, or any other layout that curation/formats.py knows. `tiny` brings its own."""
    eval_data: tuple[str, ...] = ()
    """Held-out problems: files, or benchmarks by name (math500, aime2024 …, see evaluate.py); none:
    no evaluation."""
    name: str = ""
    """Name of the run; its folder is <runs>/<name>. Default: the model's name and the seed."""
    runs: str = "runs"
    """Folder of all runs."""
    overwrite: bool = False
    """Replace the run folder if it already holds a run."""

    steps: Count = 1000
    """Iterations of rollout and update. (The 32B run took 1,100, then 100 of annealing.)"""
    prompts: Count = 128
    """Problems per iteration (§3.1)."""
    samples: Count = 64
    """Responses per problem (§3.1)."""

    advantage: Literal["gae", "grpo"] = "gae"
    """gae: PPO with a critic, the paper's method. grpo: group-normalized rewards and no critic, its
    comparison."""
    gamma: Share = 1.0
    """Discount γ of GAE (§3.1; §3.3 shows why)."""
    lam: Share = 1.0
    """λ of GAE (§3.1; Fig. 7)."""
    lam_critic: ShareOrNone = None
    """λ of the value targets, where it is not that of the advantages (VC-PPO, arXiv 2503.01491: 1,
    beside 0.95 for the policy); none: --lam."""
    lam_adaptive: PositiveOrNone = None
    """α of a λ that grows with the response, for the advantages only: 1 − 1/(α l) for l tokens, at
    least 0 (VAPO, arXiv 2504.05118: α = 0.05); none: --lam."""
    clip_eps: Positive = 0.2
    """Clip range ε of Eq. 1; without effect on a strictly on-policy step."""
    policy_steps: Count = 1
    """Policy optimizer steps per iteration; 1 is strictly on-policy (§3.1; Fig. 12 has 8)."""
    critic_steps: Count = 12
    """Critic optimizer steps per iteration, each on its own mini-batch (§3.1)."""
    critic_only_steps: CountOrNone = 0
    """Iterations at the start, out of --steps, in which the critic learns and the policy stands
    still (VC-PPO, arXiv 2503.01491; VAPO: 50)."""
    policy_lr: PositiveShare = 1e-6
    """Learning rate of the policy (§3.1)."""
    critic_lr: PositiveShare = 5e-6
    """Learning rate of the critic (§3.1)."""
    policy_lr_warmup: CountOrNone = 50
    """Policy optimizer steps of linear learning-rate warm-up (§3.1)."""
    critic_lr_warmup: CountOrNone = 50
    """Critic optimizer steps of linear learning-rate warm-up (§3.1)."""
    anneal_steps: CountOrNone = 0
    """Anneal the policy's learning rate linearly over the run's first so many policy steps (the
    paper's last stage: 100, as a run of its own); 0: constant."""
    anneal_to: Share = 3e-7
    """Learning rate at the end of annealing (§3.1)."""
    max_grad_norm: Positive = 1.0
    """The gradient norm is clipped to it, for policy and critic separately (authors' code)."""
    value_clip: NotNegative = 0.0
    """0: the paper's squared error (Eq. 2); 0.2: the authors' clipped error."""
    value_head: Literal["authors", "paper", "zeros"] = "authors"
    """Initial value head: N(0, 1/(d+1)²), the paper's printed U(−√5, √5), or 0."""
    kl_loss: NotNegative = 0.0
    """Coefficient of a KL loss to the base model (the ablation of Fig. 8; the recipe has none)."""
    kl_reward: NotNegative = 0.0
    """Coefficient β of a KL penalty in the reward (the ablation of Fig. 8; the recipe has none)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of both KL terms."""
    tis_cap: NotNegative = 0.0
    """Cap of truncated importance sampling, which corrects for sampler-trainer mismatch; 0: off, as
    in the paper."""

    reward: str = ""
    """A reward of your own, module:function of (response, problem); none: the paper's, 1 for the
    right answer, else 0."""
    eval_every: CountOrNone = 0
    """Evaluate every so many iterations; 0: only before and after the training."""
    eval_samples: Count = 1
    """Responses per held-out problem (the paper's tables: 16)."""
    micro_tokens: Count = 16384
    """Input tokens of a packed micro-batch; changes memory, not results (authors' packing length at
    7B)."""
    max_logp_gap: NotNegative = 0.1
    """Refuse to start when sampler and trainer differ by more nats per token on average: the
    sampler is wrong."""
    keep_rollouts: CountOrNone = 16
    """Responses of each iteration that are written to rollouts.jsonl."""
    keep_tokens: CountOrNone = 4
    """How many of these keep V(s_t), Â_t and the log-probability of every token; the run's page
    colors them."""

    track: tuple[Tracker, ...] = ("tensorboard",)
    """Where metrics, settings and some transcripts go beside the run folder: to one or several of
    these; wandb and trackio must be installed."""

    init_critic: str = ""
    """Folder of a trained critic to start from (an export of ours, or one of the authors'); none:
    the base model."""
    critic_model: str = ""
    """Folder or hub id of a base model with the same tokenizer, whose weights the critic starts
    from: a smaller critic (AsyPPO, arXiv 2510.01656); none: --model."""
    activation_checkpointing: bool = False
    """Keep one hidden state per layer for the backward pass and recompute the rest: less memory, a
    third more work."""
    compile: bool = False
    """Compile the decoder layers of policy and critic (GPUs; a CPU needs a C++ compiler)."""
    offload: bool = False
    """Hold policy, critic and their optimizers in host memory except in their own phases (GPUs)."""
    replicas: Count = 1
    """Copies of the sharded models: each is sharded over ranks / replicas ranks, in rank order.
    With as many replicas as nodes, only gradients cross between nodes (hybrid sharding)."""
    checkpoint_every: CountOrNone = 20
    """Iterations between checkpoints; 0: none, except after a SIGTERM or SIGINT."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    resume: str = ""
    """auto: continue from the newest complete checkpoint of this run, if there is one; or a
    checkpoint folder."""
    save_rollouts: bool = False
    """Write every iteration's rollouts, token ids included, to the run's rollouts/ folder."""
    replay: str = ""
    """Train on the rollouts that --save-rollouts left in this folder; nothing is sampled, graded or
    evaluated."""
    plan: bool = False
    """Print memory and time of the run on --gpus GPUs of --gpu-memory GB, and stop."""
    gpus: CountOrNone = 8
    """Number of GPUs that --plan assumes."""
    gpu_memory: Positive = 80.0
    """Memory of one GPU in GB that --plan assumes."""

    @property
    def trained_roles(self) -> list[str]:
        """The models that train."""
        return ["policy", "critic"] if self.advantage == "gae" else ["policy"]

    def optimizer_steps(self, role: str, iterations: int) -> int:
        """Optimizer steps that a model has taken after so many iterations; learning rates are a
        function of them.

        >>> cfg = Config(critic_only_steps=5, critic_steps=12)
        >>> cfg.optimizer_steps("critic", 7), cfg.optimizer_steps("policy", 7)
        (84, 2)
        """
        if role == "critic":
            return iterations * self.critic_steps
        return max(0, iterations - self.critic_only_steps) * self.policy_steps


QWEN: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {"micro_tokens": 10048, "max_num_seqs": 128, "activation_checkpointing": True},
    "Qwen2.5-1.5B": {"micro_tokens": 10048, "max_num_seqs": 128, "activation_checkpointing": True},
    "Qwen2.5-7B": {"micro_tokens": 16384, "max_num_seqs": 128, "activation_checkpointing": True},
    "Qwen2.5-32B": {
        "response_tokens": 14000,
        "steps": 1100,
        "max_num_seqs": 128,
        "activation_checkpointing": True,
        "tensor_parallel": 4,
    },
}
TINY: dict[str, Any] = {
    "steps": 60,
    "prompts": 32,
    "samples": 8,
    "prompt_tokens": 64,
    "response_tokens": 160,
    "policy_lr": 5e-4,
    "critic_lr": 2e-3,
    "policy_lr_warmup": 10,
    "critic_lr_warmup": 20,
    "micro_tokens": 8192,
    "threads": 1,
}
LONG_MODELS = ("tiny-long", "tiny-loops", "tiny-long-half")
TASK_MODELS = ("tiny", *LONG_MODELS)  # those of toy/tiny.py, which bring their problems
TINY_LONG = TINY | {"steps": 40, "prompts": 16, "response_tokens": 192}
PRESETS = QWEN | {"tiny": TINY} | dict.fromkeys(LONG_MODELS, TINY_LONG)


def parse(argv: Sequence[str], description: str = "", prog: str | None = None) -> Config:
    """Command line → Config: first the preset of `--model`, then the flags given. An unknown flag
    is an error that names the nearest one; a bare size such as Qwen2.5-7B becomes its hub id, and
    the name of a template file its text. `description` and `prog`, the name of the program, are for
    --help and errors. Raises ValueError for a template that cannot be read."""
    import tyro  # here, because those who only import this module may be without it

    model = _flag(argv, "model") or "tiny"
    preset = PRESETS.get(model.removeprefix("Qwen/"), {})
    default = Config(**{"model": model} | preset)
    cfg = tyro.cli(Config, args=list(argv), default=default, description=description, prog=prog)
    name = cfg.name or f"{Path(cfg.model).name}-seed{cfg.seed}"
    cfg = replace(cfg, model=hub_id(cfg.model), critic_model=hub_id(cfg.critic_model), name=name)
    return replace(cfg, template=read_template(cfg.template))


def read_template(template: str) -> str:
    """What --template names: `authors` and `paper` as they are, otherwise the text of the file. One
    newline at its end is left out, since editors add it. What holds {question} is such a text
    already, that of an earlier call.

    Raises ValueError when there is no such file, and when its text has not {question} once.

    >>> read_template("paper"), read_template("Q: {question} A:")
    ('paper', 'Q: {question} A:')
    """
    if template in TEMPLATE_NAMES:
        return template
    text = template
    if "{question}" not in template:
        expected = "expected authors, paper or a text file"
        try:
            text = Path(template).read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name of a file
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"--template {template!r}: {expected} ({why})") from None
    count = text.count("{question}")
    if count != 1:
        shown = template if text != template else f"{template!r:.60}"
        raise ValueError(f"--template {shown}: has {{question}} {count} times; expected it once")
    return text


def validate_stop(stop: Sequence[str], template: str) -> None:
    """Refuse strings that cannot end a response to a prompt of this `template`, a text: ValueError
    with the string and what to change."""
    for i, text in enumerate(stop):
        why = ""
        if not text.strip():
            why = "is empty or blank, which would end a response where it has hardly begun"
        elif len(text) > STOP_LENGTH:
            why = f"has {len(text)} characters; expected at most {STOP_LENGTH}"
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            why = "is not text in UTF-8"
        elif text in stop[:i]:
            why = "is there twice; name it once"
        elif template.partition("{question}")[2].rstrip().endswith(text.rstrip()):
            why = "stands at the end of the template, before every response; pass --stop without it"
        if why:
            raise ValueError(f"--stop {text!r:.80}: {why}")


def validate_ranges(settings: Any) -> None:
    """Refuse numbers that a setting of any program cannot have: ValueError with flag and value."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        values = [getattr(settings, name)]
        if get_origin(hint) is tuple:  # of any length: the range is that of each value
            values, hint = values[0], get_args(hint)[0]
        if values == [None]:
            continue
        hint = without_none(hint)
        allowed = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
        for value in values if allowed else ():
            why = _outside(value, hint.__origin__, allowed[0])
            if why:
                raise ValueError(f"--{name.replace('_', '-')} {value}: {why}")


def without_none(hint: Any) -> Any:
    """The type of a setting that may be None, without None; any other type unchanged.

    >>> without_none(int | None), without_none(int)
    (<class 'int'>, <class 'int'>)
    """
    others = [kind for kind in get_args(hint) if kind is not NoneType]
    return others[0] if NoneType in get_args(hint) else hint


def _outside(value: float, kind: type, allowed: Range) -> str:
    """Why a value is not allowed; "" if it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    if not math.isfinite(value):
        return "must be a finite number"
    if kind is int and not isinstance(value, int):
        return "must be a whole number"
    if value < allowed.low or (allowed.above and value == allowed.low):
        if allowed.above or (kind is int and allowed.low == 1):
            return "must be above 0"
        return "must not be negative" if allowed.low == 0 else f"must be at least {allowed.low}"
    return "" if value <= allowed.high else f"must not be above {allowed.high}"


def hub_id(model: str) -> str:
    """A bare size such as Qwen2.5-7B as its hub id; anything else unchanged."""
    return f"Qwen/{model}" if model in QWEN else model


def _flag(argv: Sequence[str], name: str) -> str:
    """The value that a flag has on the command line, the last if it is there several times, as in
    tyro; "" if it is not there."""
    value = ""
    for i, arg in enumerate(argv):
        if arg == f"--{name}":
            value = argv[i + 1] if i + 1 < len(argv) else ""
        elif arg.startswith(f"--{name}="):
            value = arg.split("=", 1)[1]
    return value
