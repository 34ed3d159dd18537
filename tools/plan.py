"""Compute what a run needs, before a weight is loaded: memory per GPU and the time of a step.

    python train.py --model Qwen2.5-7B --plan --gpus 8 --gpu-memory 80     the plan of one run
    python -m tools.plan                      which model fits on which GPUs, as a Markdown table

GB is 10⁹ bytes. `--gpus 0` means a CPU with `--gpu-memory` GB. The plan counts what is allocated.
It does not count what the allocator loses to fragmentation: for that there are the few percent
that an "80 GB" GPU has above 80·10⁹ bytes.

A trained parameter takes 4 bytes of float32 weight, 8 bytes of Adam's moments and, from the
backward pass to the optimizer step, 4 bytes of gradient. The GPUs that share a model divide these
bytes. With --offload they are on the GPU only in the phases of their model. vLLM is awake in the
phases sample and sync.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import packing
import policy
import preflight
from config import LONG_MODELS, QWEN, Config

Items = dict[str, float]  # what takes memory → bytes on one GPU
PHASES = ("sample", "values", "critic", "policy", "sync")
GB = 1e9
CONTEXT = 1.5 * GB  # CUDA context, buffers of NCCL and cuBLAS, in one process
GRAPHS = 1.0 * GB  # vLLM's CUDA graphs, which it keeps while it sleeps
FLOPS = 989e12  # bfloat16 operations per second of an H100, at its peak
MFU = 0.35  # the share of them that a good packed update reaches
HBM = 3.35e12  # bytes per second of an H100's memory
HBM_SHARE = 0.65  # the share of them that decoding reaches
# Bytes per second between a GPU and pageable host memory; also of weights passed to vLLM.
COPY = 10e9
PROMPT = 256  # tokens of a mean prompt; the template has about 150
MEAN = 1 / 8  # mean response / longest response: 1,000 of 8,000 tokens
ASSUMED = (
    f"H100s, {MFU:.0%} of {FLOPS / 1e12:.0f} TFLOP/s, {HBM_SHARE:.0%} of {HBM / 1e12} TB/s, "
    "communication hidden"
)

FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
# The models known without a network: FIELDS, and whether the vocabulary head is the embedding.
SHAPES: dict[str, tuple[int, ...]] = {
    "tiny": (64, 2, 2, 1, 128, 468, True),
    "tiny-long": (64, 2, 2, 1, 128, 469, True),
    "tiny-loops": (64, 2, 2, 1, 128, 469, True),
    "tiny-long-half": (32, 2, 1, 1, 64, 469, True),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
}
POSITIONS = dict.fromkeys(("tiny", *LONG_MODELS), 512) | {"Qwen2.5-0.5B": 32768}
POSITIONS_OF_OTHERS = 131072


# ── the model ─────────────────────────────────────────────────────────────────────────────────────


class Shape(NamedTuple):
    """Sizes of a decoder."""

    hidden: int  # H
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    width: int  # I, of the MLP
    vocab: int  # V
    tied: bool  # the vocabulary head is the embedding
    layer: int  # parameters of one decoder layer
    policy: int  # all parameters of the policy
    critic: int  # all parameters of the critic; its head has H


@cache
def shape(model: str, flag: str = "--model") -> Shape:
    """Sizes of a model in SHAPES; of another folder or hub id, from its config.json. The parameters
    are counted on a model that has no memory."""
    config = _config(model, flag)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    split = set(whole._no_split_modules or ())
    one_layer = next((m for m in whole.modules() if type(m).__name__ in split), None)
    if one_layer is None:
        raise ValueError(f"{flag} {model}: a {config.model_type} model has no layers to plan for")
    parameters = sum(p.numel() for p in whole.parameters())
    hidden, heads = config.hidden_size, config.num_attention_heads
    tied = config.tie_word_embeddings
    head_parameters = 0 if tied else config.vocab_size * hidden
    return Shape(
        hidden=hidden,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", heads),
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        width=_mlp_width(config),
        vocab=config.vocab_size,
        tied=tied,
        layer=sum(p.numel() for p in one_layer.parameters()),
        policy=parameters,
        critic=parameters - head_parameters + hidden,
    )


def shape_of(cfg: Config, role: str) -> Shape:
    """Sizes of the model that the policy or the critic starts from."""
    model, flag = _start(cfg, role)
    return shape(model, flag)


def _start(cfg: Config, role: str) -> tuple[str, str]:
    """The model that the policy or the critic starts from, and the flag that names it."""
    if role == "critic" and cfg.init_critic:
        return cfg.init_critic, "--init-critic"
    if role == "critic" and cfg.critic_model:
        return cfg.critic_model, "--critic-model"
    return cfg.model, "--model"


def _config(model: str, flag: str) -> Any:
    """The configuration of a model. Raises ValueError if it is not a causal language model, or
    with --init-critic if it cannot be read."""
    if flag == "--init-critic":
        return preflight.read_config(flag, model)
    name = model.removeprefix("Qwen/")
    if name not in SHAPES:
        return preflight.model_config(preflight.model_folder(flag, model), flag)
    sizes = dict(zip([*FIELDS, "tie_word_embeddings"], SHAPES[name], strict=True))
    return Qwen2Config(**sizes, max_position_embeddings=POSITIONS.get(name, POSITIONS_OF_OTHERS))


def _mlp_width(config: Any) -> int:
    """Numbers between the two matrices of an MLP, for one token: of a mixture of experts, those of
    all experts that see the token."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    given = (getattr(config, name, None) for name in names)
    width = next((value for value in given if value), 4 * config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return width
    of_expert = getattr(config, "moe_intermediate_size", None) or width
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return (experts + (getattr(config, "n_shared_experts", None) or 0)) * of_expert + shared


def check(cfg: Config) -> None:
    """Raise ValueError for settings that cannot work and for models that cannot be trained, as the
    run itself would."""
    preflight.validate_numbers(cfg)
    preflight.validate_one_critic(cfg)
    if cfg.gpus and cfg.gpus % cfg.replicas:
        raise ValueError(f"--replicas {cfg.replicas}: does not divide the {cfg.gpus} GPUs")
    longest = cfg.prompt_tokens + cfg.response_tokens
    with_critic = "critic" in cfg.trained_roles
    for model, flag in dict.fromkeys(_start(cfg, role) for role in cfg.trained_roles):
        config = _config(model, flag)
        preflight.require_trainable(config, longest, model, with_critic, flag)
        preflight.validate_length(longest, config, model)


def shards(cfg: Config) -> int:
    """GPUs that share one copy of a model."""
    return max(1, cfg.gpus // cfg.replicas)


def number_bytes(cfg: Config) -> int:
    """Bytes of a number in a computation: bfloat16 on GPUs, float32 on a CPU."""
    return 2 if cfg.gpus else 4


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


def phases(cfg: Config) -> list[str]:
    """The phases of a step."""
    absent = () if "critic" in cfg.trained_roles else ("values", "critic")
    return [phase for phase in PHASES if phase not in absent]


def memory(cfg: Config) -> dict[str, Items]:
    """Bytes on one GPU by phase and item, at the peak of each phase."""
    return {phase: _phase_memory(cfg, phase) for phase in phases(cfg)}


def _phase_memory(cfg: Config, phase: str) -> Items:
    sizes = shape(cfg.model)
    items: Items = {}
    for role in cfg.trained_roles:
        items |= _states(cfg, role, phase)
    if phase in cfg.trained_roles:
        items |= update(cfg, phase)
    if phase == "values":
        items |= _prediction(cfg)
    if cfg.kl_loss or cfg.kl_reward:
        items["reference weights"] = 4 * sizes.policy / shards(cfg)
    if phase in ("sample", "sync"):
        items |= sampler(cfg)
    elif cfg.gpus:
        items["sampler at work"] = GRAPHS
    else:
        items["sampler weights"] = 4 * sizes.policy
    if cfg.gpus:
        items["CUDA, NCCL"] = CONTEXT
    return items


def _states(cfg: Config, role: str, phase: str) -> Items:
    """Weights, Adam's moments and gradients of a model."""
    here = role == phase or not (cfg.offload and cfg.gpus)
    passing = (role, phase) in (("critic", "values"), ("policy", "sync"))  # needs its weights only
    bytes_each = {
        "weights": 4 * (here or passing),
        "moments": 8 * here,
        "gradients": 4 * (role == phase),
    }
    parameters = getattr(shape_of(cfg, role), role)
    return {
        f"{role} {state}": count * parameters / shards(cfg)
        for state, count in bytes_each.items()
        if count
    }


def _prediction(cfg: Config) -> Items:
    """What the critic's forward pass takes without gradient: one layer at a time, and of that the
    MLP or the attention."""
    sizes, b = shape_of(cfg, "critic"), number_bytes(cfg)
    gathered = b * (sizes.critic - (sizes.layers - 3) * sizes.layer)
    wider = max(3 * sizes.width, _attention_numbers(cfg, "critic", mini_batches=1))
    return {
        "activations": cfg.micro_tokens * b * (wider + 4 * sizes.hidden),
        "gathered weights": gathered if cfg.gpus else 0,
    }


def update(cfg: Config, role: str) -> Items:
    """What the update of a policy or critic takes at its peak, beside weights, moments and
    gradients.

    A step has several micro-batches, so the gradients exist from the beginning.
    """
    peak_stage = max(_stages(cfg, role), key=sum)
    return {
        "activations": peak_stage.activations,
        "logits": peak_stage.logits,
        "gathered weights": peak_stage.weights,
        "whole gradients": peak_stage.gradients,
    }


class Stage(NamedTuple):
    """Bytes at one stage of an update."""

    activations: float
    logits: float
    weights: float  # gathered by FSDP
    gradients: float  # whole, and apart from those that are kept until the optimizer step


def _stages(cfg: Config, role: str) -> Iterator[Stage]:
    """The stages of an update that can be its peak."""
    sizes, b = shape_of(cfg, role), number_bytes(cfg)
    stream = cfg.micro_tokens * b * sizes.hidden  # the hidden states between two layers
    kept, recomputed, last = _activations(cfg, role)
    gathered = _gathered(cfg, role)
    wide = gradient_bytes(cfg)
    logits = head = waiting = 0
    if role == "policy":
        logits = _logits(cfg)
        head = sizes.vocab * sizes.hidden
        # The head's gradient waits for the embedding's, or on GPUs for the rest of its FSDP group.
        waiting = b * head if cfg.gpus or sizes.tied else 0

    # Logits and their exponentials.
    yield Stage(kept + last + stream, 8 * logits, gathered.weights, 0)
    # Backward through the logits, on GPUs with a bfloat16 copy; the head's gradient in float32.
    yield Stage(kept + last + 2 * stream, (4 + wide) * logits, gathered.weights, 4 * head)
    # The head's gradient, on GPUs with a bfloat16 copy.
    yield Stage(kept + last + 2 * stream, 0, gathered.weights, wide * head)
    # Backward through the final norm, in float32.
    norm = cfg.micro_tokens * 20 * sizes.hidden
    yield Stage(kept + last + norm, 0, gathered.weights, waiting)
    # Backward through the MLP of a layer.
    mlp = cfg.micro_tokens * 2 * b * sizes.width + stream
    yield Stage(kept + recomputed + mlp, 0, gathered.weights, waiting + gathered.layer_gradients)
    # Backward through the embedding.
    embedding = b * sizes.vocab * sizes.hidden
    gradients = waiting + embedding + gathered.layer_gradients
    yield Stage(stream, 0, gathered.root_weights, gradients)
    # The sum over the ranks of the gradients of what is in no layer.
    yield Stage(0, 0, 0, gathered.root_gradients)


def gradient_bytes(cfg: Config) -> int:
    """Bytes of a number of a gradient: in float32 and, on GPUs, also in bfloat16."""
    return 4 + number_bytes(cfg) if cfg.gpus else 4


def _activations(cfg: Config, role: str) -> tuple[float, float, float]:
    """What autograd keeps: of all decoder layers, of the one layer that is being recomputed, and of
    the final norm and the value head.

    Bytes per token and decoder layer, with H the hidden size, I the width of the MLP, Q and K the
    widths of all query and of all key heads, and b the bytes of a number (2, on a CPU 4):

    | two norms | 2·(4 + 2b)·H | input in float32; normalized; times the norm's weight |
    |---|---|---|
    | attention | b·(3Q + 2K) + 4·heads | q, k, v by sequence; output, also repacked; log-sum-exp |
    | MLP | 4b·I | gate, SiLU(gate), up, their product |

    Where responses share a prompt, attention has more: `_attention_numbers`. With activation
    checkpointing b·H of them stay, and one layer at a time has all of them again.
    """
    sizes, b, tokens = shape_of(cfg, role), number_bytes(cfg), cfg.micro_tokens
    stream = tokens * b * sizes.hidden
    norm = tokens * 4 * sizes.hidden + 2 * stream
    steps = cfg.critic_steps if role == "critic" else cfg.policy_steps
    attention = b * _attention_numbers(cfg, role, steps) + 4 * sizes.heads
    layer = 2 * norm + tokens * (attention + 4 * b * sizes.width)
    last = norm
    if role == "critic":  # the value head reads the final norm in float32
        last += tokens * 4 * sizes.hidden - stream
    if cfg.activation_checkpointing:
        return sizes.layers * stream, layer, last
    return sizes.layers * layer, 0, last


def _attention_numbers(cfg: Config, role: str, mini_batches: int) -> float:
    """Numbers that autograd keeps of a layer's attention for a token of a pack: 3Q + 2K. Every
    response has its prompt's keys and values once more; on a CPU also its queries and outputs,
    where `packing.queries_alone` says no."""
    sizes = shape_of(cfg, role)
    Q = sizes.heads * sizes.head_size
    K = sizes.kv_heads * sizes.head_size
    prompt, response = _mean_tokens(cfg)
    meeting = responses_that_meet(cfg, mini_batches)
    repeated = 1.0
    if meeting > 1:
        repeated += meeting * prompt / (prompt + meeting * response)
    queries = 1.0 if cfg.gpus or packing.queries_alone(prompt, response) else repeated
    return Q * (2 * queries + 1) + 2 * K * repeated


def responses_that_meet(cfg: Config, mini_batches: int) -> float:
    """Mean number of responses that share their prompt in a pack, at least 1: those that the
    mini-batch has, or those that the pack holds."""
    prompt, response = _mean_tokens(cfg)
    of_mini_batch = cfg.samples / mini_batches
    of_pack = (cfg.micro_tokens - prompt) / response
    return max(1.0, min(of_mini_batch, of_pack))


def _logits(cfg: Config) -> int:
    """How many logits are held at once; policy.py splits the tokens into chunks."""
    vocab = shape(cfg.model).vocab
    chunk = max(policy.CHUNK["cuda" if cfg.gpus else "cpu"], policy.LEAST * vocab)
    return min(cfg.micro_tokens * vocab, chunk)


class Gathered(NamedTuple):
    """Bytes of the weights that FSDP gathers, and of gradients before it sums them over the ranks.
    The root holds what is in no layer."""

    root_weights: float = 0
    weights: float = 0  # the root's and those of two layers
    layer_gradients: float = 0
    root_gradients: float = 0


def _gathered(cfg: Config, role: str) -> Gathered:
    """FSDP gathers the root for a whole pass and two layers at a time. It sums in float32."""
    if not cfg.gpus:
        return Gathered()
    sizes, b, wide = shape_of(cfg, role), number_bytes(cfg), gradient_bytes(cfg)
    root = getattr(sizes, role) - sizes.layers * sizes.layer  # parameters
    return Gathered(
        root_weights=b * root,
        weights=b * root + 2 * b * sizes.layer,
        layer_gradients=wide * sizes.layer,
        root_gradients=(wide + 4 / shards(cfg)) * root + 4 * sizes.layer,
    )


def sampler(cfg: Config) -> Items:
    """The sampler while it is awake. vLLM's cache is the rest of its share of a GPU; that of
    transformers holds the longest responses."""
    sizes = shape(cfg.model)
    longest = cfg.prompt_tokens + cfg.response_tokens
    if cfg.gpus:
        weights = 2 * sizes.policy / cfg.tensor_parallel
        widths = 3 * sizes.width + 2 * sizes.hidden
        prompts = max(longest, 8192) * 2 * widths / cfg.tensor_parallel
        busy = prompts + 12 * cfg.max_num_seqs * sizes.vocab + GRAPHS
        cached = cfg.vllm_memory * cfg.gpu_memory * GB - weights - busy
    else:
        sequences = min(cfg.max_num_seqs, cfg.prompts * cfg.samples)
        weights = 4 * sizes.policy
        busy = 24 * sequences * sizes.vocab
        cached = sequences * longest * kv_bytes(cfg)
    return {"sampler weights": weights, "sampler at work": busy, "key-value cache": cached}


def kv_bytes(cfg: Config) -> float:
    """Bytes of a token's keys and values on one GPU."""
    sizes = shape(cfg.model)
    kv_heads = ceil(sizes.kv_heads / cfg.tensor_parallel)
    return 2 * sizes.layers * kv_heads * sizes.head_size * number_bytes(cfg)


def peak(cfg: Config) -> tuple[str, float]:
    """The phase that needs most memory, and its bytes."""
    needs = {phase: sum(items.values()) for phase, items in memory(cfg).items()}
    most = max(needs, key=needs.__getitem__)
    return most, needs[most]


# ── does it fit, and what to change ───────────────────────────────────────────────────────────────


def obstacles(cfg: Config) -> list[str]:
    """Why the run cannot work; empty if it fits."""
    found = []
    phase, need = peak(cfg)
    if need > cfg.gpu_memory * GB:
        found.append(f"{phase} needs {need / GB:.1f} of {cfg.gpu_memory:g} GB")
    longest = cfg.prompt_tokens + cfg.response_tokens
    if sampler(cfg)["key-value cache"] < longest * kv_bytes(cfg):
        share = cfg.vllm_memory * cfg.gpu_memory
        found.append(f"vLLM's {share:.1f} GB cannot hold one sequence of {longest:,} tokens")
    if max(1, cfg.gpus) % cfg.tensor_parallel or shape(cfg.model).heads % cfg.tensor_parallel:
        found.append(
            f"--tensor-parallel {cfg.tensor_parallel} does not divide the GPUs and the attention "
            "heads"
        )
    return found


def largest_micro_tokens(cfg: Config) -> int:
    """The largest --micro-tokens that fits; 0 if none does."""

    def too_large(tokens: int) -> bool:
        return bool(obstacles(replace(cfg, micro_tokens=tokens)))

    # The index of the first that is too large is the one before it, as the range begins with 1.
    return bisect_left(range(1, 2**24), True, key=too_large)


def remedy(cfg: Config) -> Config | None:
    """The setting nearest to `cfg` that fits. What costs no time is changed first, what costs most
    last."""
    options: dict[str, list[Any]] = {  # cheapest first
        "vllm_memory": [i / 20 for i in range(2, 19)],
        "micro_tokens": [cfg.prompt_tokens + cfg.response_tokens],
        "max_num_seqs": [16],
        "tensor_parallel": [1, 2, 4, 8],
        "activation_checkpointing": [True],
        "offload": [True],
    }

    def cost(other: Config) -> tuple[int, float]:
        changed = [getattr(other, name) != getattr(cfg, name) for name in options]
        weight = sum(2**i for i, is_changed in enumerate(changed) if is_changed)
        return weight, abs(other.vllm_memory - cfg.vllm_memory)

    values = [{getattr(cfg, name), *others} for name, others in options.items()]
    variants = [
        replace(cfg, **dict(zip(options, chosen, strict=True))) for chosen in product(*values)
    ]
    for variant in sorted(variants, key=cost):
        if not obstacles(variant):
            return variant
    return None


def verdict(cfg: Config) -> str:
    """Whether it fits, and if not, what to change."""
    why = "; ".join(obstacles(cfg))
    if not why:
        return "It fits."
    for doublings in range(10 if cfg.gpus else 1):
        better = remedy(replace(cfg, gpus=cfg.gpus * 2**doublings))
        if better:
            return f"It does not fit: {why}. It fits with {flags(better, cfg)}."
    return f"It does not fit: {why}. No setting helps: use a smaller model or more memory."


def flags(cfg: Config, base: Config) -> str:
    """The flags that make `base` into `cfg`."""
    words = []
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if value == getattr(base, field.name):
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return " ".join(words)


# ── time ──────────────────────────────────────────────────────────────────────────────────────────


def work(cfg: Config) -> dict[str, tuple[float, float]]:
    """Phase of a step → floating-point operations, and seconds if the GPUs were H100s. `show`
    prints what is assumed."""
    flops = _operations(cfg)
    seconds = {phase: count / (max(1, cfg.gpus) * FLOPS * MFU) for phase, count in flops.items()}
    seconds["sample"] = max(seconds["sample"], _decoding_seconds(cfg))
    seconds["sync"] = 2 * shape(cfg.model).policy / COPY
    if cfg.offload:
        for phase, count in _offloaded_bytes(cfg).items():
            seconds[phase] += 2 * count / shards(cfg) / COPY
    return {phase: (flops[phase], seconds[phase]) for phase in phases(cfg)}


def _mean_tokens(cfg: Config) -> tuple[int, float]:
    """Tokens of a mean prompt and of a mean response."""
    return min(PROMPT, cfg.prompt_tokens), cfg.response_tokens * MEAN


def _operations(cfg: Config) -> dict[str, float]:
    """Floating-point operations of each phase.

    A backward pass costs twice a forward pass. Activation checkpointing adds a forward pass, and
    the logits are computed again in any case. The sampler is counted as if it read each response's
    prompt by itself.
    """
    sizes = shape(cfg.model)
    count = cfg.prompts * cfg.samples
    _, response = _mean_tokens(cfg)
    logits = count * response * 2 * sizes.vocab * sizes.hidden
    values = count * _forward(cfg, "critic", responses_that_meet(cfg, 1))
    critic = count * _forward(cfg, "critic", responses_that_meet(cfg, cfg.critic_steps))
    policy = count * _forward(cfg, "policy", responses_that_meet(cfg, cfg.policy_steps))
    passes = 4 if cfg.activation_checkpointing else 3
    policy_update = passes * policy + 4 * logits
    if cfg.policy_steps > 1:  # log π_old takes a forward pass of its own
        policy_update += count * _forward(cfg, "policy", responses_that_meet(cfg, 1)) + logits
    return {
        "sample": count * _forward(cfg, "policy", 1) + logits,
        "values": values,
        "critic": passes * critic,
        "policy": policy_update,
        "sync": 0.0,
    }


def _forward(cfg: Config, role: str, meeting: float) -> float:
    """Operations of a forward pass through the layers of a policy or critic for one response, when
    `meeting` responses share their prompt: 2 per weight and token, and 4·Q per layer and pair of
    query and key, with Q the width of all query heads. A response attends to its prompt and,
    causally, to itself; the prompt is read and attends to itself once for all."""
    sizes = shape_of(cfg, role)
    prompt, response = _mean_tokens(cfg)
    tokens = response + prompt / meeting
    pairs = response * prompt + response**2 / 2 + prompt**2 / 2 / meeting
    attention = 4 * sizes.heads * sizes.head_size * pairs
    return sizes.layers * (2 * sizes.layer * tokens + attention)


def _decoding_seconds(cfg: Config) -> float:
    """How long decoding takes if memory bandwidth limits it.

    vLLM decodes `max_num_seqs` sequences at once. For every token it reads its weights, and the
    keys and values of all these sequences.
    """
    sizes = shape(cfg.model)
    prompt, response = _mean_tokens(cfg)
    responses = cfg.prompts * cfg.samples * cfg.tensor_parallel / max(1, cfg.gpus)
    in_cache = sampler(cfg)["key-value cache"] / kv_bytes(cfg) / (prompt + response)
    sequences = max(1.0, min(cfg.max_num_seqs, responses, in_cache))
    weights = 2 * sizes.policy / cfg.tensor_parallel / (HBM * HBM_SHARE)
    caches = sequences * (prompt + response / 2) * kv_bytes(cfg) / (HBM * HBM_SHARE)
    every_response = responses / sequences * response * (weights + caches)
    longest_response = cfg.response_tokens * weights
    return max(every_response, longest_response)


def _offloaded_bytes(cfg: Config) -> dict[str, int]:
    """Bytes that --offload moves to the GPUs for a phase, and back after it."""
    policy, critic = shape_of(cfg, "policy").policy, shape_of(cfg, "critic").critic
    return {
        "values": 4 * critic,
        "critic": 12 * critic,
        "policy": 12 * policy,
        "sync": 4 * policy,
    }


# ── as text ───────────────────────────────────────────────────────────────────────────────────────


def show(cfg: Config) -> str:
    """The plan as text, with and without --offload. Raises ValueError for a run that cannot
    start."""
    check(cfg)
    place = f"a CPU with {cfg.gpu_memory:g} GB"
    variants = {"without --offload": replace(cfg, offload=False)}
    if cfg.gpus:
        place = f"{cfg.gpus} × {cfg.gpu_memory:g} GB"
        variants["with --offload"] = replace(cfg, offload=True)
    named = f"{cfg.model} ({shape(cfg.model).policy:,} parameters)"
    if "critic" in cfg.trained_roles and _start(cfg, "critic") != _start(cfg, "policy"):
        critic, _ = _start(cfg, "critic")
        named += f" with the critic {critic} ({shape_of(cfg, 'critic').critic:,})"
    lines = [f"{named} on {place}; computed, not measured"]
    in_gb = peak(cfg)[1] > GB
    for title, variant in variants.items():
        lines += _memory_table(variant, title, in_gb)
    if cfg.gpus:
        lines += _time_table(variants)
    return "\n".join([*lines, "", verdict(cfg)])


def _memory_table(cfg: Config, title: str, in_gb: bool) -> list[str]:
    scale, unit = (GB, "GB") if in_gb else (1e6, "MB")
    needs = memory(cfg)
    names = dict.fromkeys(name for items in needs.values() for name in items)
    rows = [[name, *(items.get(name, 0) / scale for items in needs.values())] for name in names]
    rows.sort(key=lambda row: -max(row[1:]))
    rows.append(["sum", *(sum(items.values()) / scale for items in needs.values())])
    largest = largest_micro_tokens(cfg)
    return [
        *_grid([f"{unit} {title}", *needs], rows, ".1f"),
        f"most in {peak(cfg)[0]}; the largest --micro-tokens that fits is {largest:,}",
    ]


def _time_table(variants: dict[str, Config]) -> list[str]:
    cfg = variants["without --offload"]
    rows = [["PFLOP", *(flops / 1e15 for flops, _ in work(cfg).values())]]
    for title, variant in variants.items():
        rows.append([f"seconds {title}", *(seconds for _, seconds in work(variant).values())])
    for row in rows:
        row.append(sum(row[1:]))
    parameters = sum(getattr(shape_of(cfg, role), role) for role in cfg.trained_roles)
    host = 12 * parameters * cfg.replicas / ceil(cfg.gpus / 8) / GB
    prompt, response = _mean_tokens(cfg)
    return [
        *_grid(["a step", *work(cfg), "all"], rows, ",.0f"),
        f"assumed: {ASSUMED}; mean prompt {prompt} tokens, mean response {response:,.0f}",
        f"host memory that --offload fills on a node: {host:.0f} GB",
    ]


def _grid(header: list[str], rows: list[list[Any]], form: str) -> list[str]:
    """A table in columns, after an empty line; zeros stay blank, and rows of zeros are left out."""
    lines = [header]
    for name, *numbers in rows:
        if any(numbers):
            lines.append([name, *(f"{number:{form}}" if number else "" for number in numbers)])
    return ["", *(f"{first:25}" + "".join(f"{cell:>9}" for cell in rest) for first, *rest in lines)]


def hardware_table() -> str:
    """Which Qwen2.5 fits where, and the flags that it needs beside the preset's; Markdown."""
    places = {
        "1 × 24 GB": (1, 24),
        "1 × 40 GB": (1, 40),
        "1 × 80 GB": (1, 80),
        "8 × 80 GB": (8, 80),
        "2 × 8 × 80 GB": (16, 80),
    }
    lines = [f"| | {' | '.join(places)} |", "|---" * (1 + len(places)) + "|"]
    for model, preset in QWEN.items():
        cells = []
        for gpus, gigabytes in places.values():
            settings = {"model": model, "gpus": gpus, "gpu_memory": gigabytes} | preset
            cells.append(_hardware_cell(Config(**settings)))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _hardware_cell(cfg: Config) -> str:
    best = remedy(cfg)
    if best is None:
        return "–"
    return "yes" if best == cfg else f"`{flags(best, cfg)}`"


def print_hardware_table() -> None:
    """Print which model fits where."""
    print(hardware_table())


def main() -> None:
    """Command line; it takes no options."""
    import tyro  # here, because those who only import this module may be without it

    tyro.cli(print_hardware_table, description=__doc__, prog="python -m tools.plan")


if __name__ == "__main__":
    main()
