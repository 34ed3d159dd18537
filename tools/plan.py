"""What a run needs, reckoned before a weight is loaded: memory per GPU by item and phase, and the time of a step.

    python train.py --model Qwen2.5-7B --plan --gpus 8 --gpu-memory 80     one setting
    python -m tools.plan                                                         what fits where, as a Markdown table

GB = 10⁹ bytes. `--gpus 0` stands for a CPU, whose memory is then `--gpu-memory`. What is allocated is counted; what an
allocator loses between its blocks is not, and has the few percent that an "80 GB" GPU holds above 80·10⁹ bytes.

A parameter that trains takes 4 bytes of float32 weight, 8 of moments and, from backward pass to optimizer step, 4 of
gradient, over the GPUs that share a model; with --offload in the phases of its model only. vLLM is awake in sample and sync.
"""

from bisect import bisect_left
from dataclasses import fields, replace
from functools import cache
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import policy
from config import QWEN, Config

Items = dict[str, float]  # what takes memory → bytes on one GPU
GB = 1e9
CONTEXT = 1.5 * GB  # CUDA context, NCCL's and cuBLAS's buffers of one process
GRAPHS = 1.0 * GB  # vLLM's CUDA graphs; it keeps them asleep
FLOPS, MFU = (
    989e12,
    0.35,
)  # bfloat16 peak of an H100, and the share of it that a good packed update reaches
HBM, HBM_SHARE = (
    3.35e12,
    0.65,
)  # bytes/s of an H100's memory, and the share of it that decoding reaches
COPY = 10e9  # bytes/s between a GPU and pageable host memory; also of weights passed to vLLM one at a time
PROMPT = 256  # tokens of a mean prompt: the template has about 150
MEAN = 1 / 8  # mean response over the longest: 1,000 of 8,000 tokens
ASSUMED = f"H100s, {MFU:.0%} of {FLOPS / 1e12:.0f} TFLOP/s, {HBM_SHARE:.0%} of {HBM / 1e12} TB/s, communication hidden"

FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
SHAPES: dict[
    str, tuple[int, ...]
] = {  # the models known without a network; last: is the head the embedding?
    "tiny": (64, 2, 2, 1, 128, 468, True),
    "tiny-long": (64, 2, 2, 1, 128, 469, True),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
}


class Shape(NamedTuple):
    """Sizes of a decoder; its parameters are counted on a model without memory."""

    hidden: int  # H
    layers: int  # L
    heads: int
    kv_heads: int
    head_size: int
    width: int  # I, of the MLP
    vocab: int  # V
    tied: bool
    layer: int  # parameters of one decoder layer
    policy: int  # all parameters
    critic: int  # likewise; its head is H numbers


@cache
def shape(model: str) -> Shape:
    """Sizes of a model known by name, or of a folder or hub id from its config.json."""
    if known := SHAPES.get(model.removeprefix("Qwen/")):
        config = Qwen2Config(**dict(zip([*FIELDS, "tie_word_embeddings"], known, strict=True)))
    else:
        config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    one_layer = next(m for m in whole.modules() if type(m).__name__ in whole._no_split_modules)
    layer, parameters = (sum(p.numel() for p in m.parameters()) for m in (one_layer, whole))
    hidden, layers, heads, kv_heads, width, vocab = (
        getattr(config, f, config.num_attention_heads) for f in FIELDS
    )
    size, tied = getattr(config, "head_dim", None) or hidden // heads, config.tie_word_embeddings
    critic = parameters - (0 if tied else vocab * hidden) + hidden
    return Shape(
        hidden, layers, heads, kv_heads, size, width, vocab, tied, layer, parameters, critic
    )


def shards(cfg: Config) -> int:
    """GPUs that share one copy of a model."""
    return max(1, cfg.gpus // cfg.replicas)


def update(cfg: Config, role: str) -> Items:
    """What the update of a policy or critic takes beside weights, moments and gradients, at its worst moment.

    Bytes that autograd keeps per token and decoder layer; Q and K are the widths of all query and of all key heads, b is 2
    (bfloat16), on a CPU 4:

    | two norms | 2·(4 + 2b)·H | input in float32; normalised; times the norm's weight |
    |---|---|---|
    | attention | b·(3Q + 2K) + 4·heads | q, k, v unfolded by sequence; output, and folded back; log-sum-exp |
    | MLP | 4b·I | gate, SiLU(gate), up, their product |

    With activation checkpointing b·H stay, and one layer at a time has all of it again. A step has several micro-batches, so
    that gradients are there from the beginning.
    """
    s, tokens, b = shape(cfg.model), cfg.micro_tokens, 2 if cfg.gpus else 4
    is_policy, parameters = role == "policy", getattr(s, role)
    Q, K, stream = s.heads * s.head_size, s.kv_heads * s.head_size, tokens * b * s.hidden
    norm = tokens * 4 * s.hidden + 2 * stream
    layer = 2 * norm + tokens * (b * (3 * Q + 2 * K) + 4 * s.heads + 4 * b * s.width)
    kept, again = (
        (s.layers * stream, layer) if cfg.activation_checkpointing else (s.layers * layer, 0)
    )
    last = norm + (
        0 if is_policy else tokens * 4 * s.hidden - stream
    )  # the value head reads the final norm in float32

    logits = (
        min(
            tokens * s.vocab,
            max(policy.CHUNK["cuda" if cfg.gpus else "cpu"], policy.LEAST * s.vocab),
        )
        * is_policy
    )
    embedding = (
        b * s.vocab * s.hidden
    )  # a vocabulary head's gradient is as large, and summed in float32
    wide = 4 + b * (cfg.gpus > 0)  # bytes of a gradient in float32 and, on GPUs, as it is handed on
    head = embedding * (
        is_policy and (cfg.gpus > 0 or s.tied)
    )  # it waits for the embedding's, or for its FSDP group's
    if cfg.gpus:  # FSDP gathers what is in no layer for a whole pass, and two layers at a time; it sums in float32
        always = b * (parameters - s.layers * s.layer)
        gathered, of_layer = always + 2 * b * s.layer, wide * s.layer
        of_root = (wide + 4 / shards(cfg)) * (parameters - s.layers * s.layer) + 4 * s.layer
    else:
        always = gathered = of_layer = of_root = 0
    names = ("activations", "logits", "gathered weights", "whole gradients")
    moments = [
        (kept + last + stream, 8 * logits, gathered, 0),  # logits and their exponentials
        (
            kept + last + 2 * stream,
            (4 + wide) * logits,
            gathered,
            4 * s.vocab * s.hidden * is_policy,
        ),
        (kept + last + 2 * stream, 0, gathered, wide * s.vocab * s.hidden * is_policy),
        (
            kept + last + tokens * 20 * s.hidden,
            0,
            gathered,
            head,
        ),  # backward through the final norm, in float32
        (
            kept + again + tokens * 2 * b * s.width + stream,
            0,
            gathered,
            head + of_layer,
        ),  # through a layer's MLP
        (stream, 0, always, head + embedding + of_layer),  # through the embedding
        (0, 0, 0, of_root),  # what is in no layer is summed over the ranks
    ]
    return dict(zip(names, max(moments, key=sum), strict=True))


def sampler(cfg: Config) -> Items:
    """The awake engine. vLLM's cache is what its share of a GPU has left; transformers' holds the longest responses."""
    s, longest = shape(cfg.model), cfg.prompt_tokens + cfg.response_tokens
    if not cfg.gpus:
        rows = min(cfg.max_num_seqs, cfg.prompts * cfg.samples)
        weights, busy, cached = 4 * s.policy, 24 * rows * s.vocab, rows * longest * kv_bytes(cfg)
    else:
        weights = 2 * s.policy / cfg.tensor_parallel
        prompts = max(longest, 8192) * 2 * (3 * s.width + 2 * s.hidden) / cfg.tensor_parallel
        busy = prompts + 12 * cfg.max_num_seqs * s.vocab + GRAPHS
        cached = cfg.vllm_memory * cfg.gpu_memory * GB - weights - busy
    return {"sampler weights": weights, "sampler at work": busy, "key-value cache": cached}


def kv_bytes(cfg: Config) -> float:
    """Bytes of a token's keys and values on one GPU."""
    s = shape(cfg.model)
    return (
        2 * s.layers * ceil(s.kv_heads / cfg.tensor_parallel) * s.head_size * (2 if cfg.gpus else 4)
    )


def memory(cfg: Config) -> dict[str, Items]:
    """Bytes on one GPU by phase and item, every phase at its worst moment."""
    s, b, phases, offload = shape(cfg.model), 2 if cfg.gpus else 4, {}, cfg.offload and cfg.gpus > 0
    for phase in ("sample", "values", "critic", "policy", "sync"):
        if phase in ("values", "critic") and "critic" not in cfg.roles:
            continue
        items: Items = {}
        for role in cfg.roles:
            here, passing = (
                not offload or role == phase,
                (role, phase) in (("critic", "values"), ("policy", "sync")),
            )
            states = {
                "weights": 4 * (here or passing),
                "moments": 8 * here,
                "gradients": 4 * (role == phase),
            }
            items |= {
                f"{role} {name}": n * getattr(s, role) / shards(cfg)
                for name, n in states.items()
                if n
            }
        if phase in cfg.roles:
            items |= update(cfg, phase)
        if phase == "values":  # without gradient: the MLP of one layer at a time
            items["activations"] = cfg.micro_tokens * b * (3 * s.width + 4 * s.hidden)
            items["gathered weights"] = b * (s.critic - (s.layers - 3) * s.layer) if cfg.gpus else 0
        if cfg.kl_loss or cfg.kl_reward:
            items["reference weights"] = 4 * s.policy / shards(cfg)
        asleep = {"sampler at work": GRAPHS} if cfg.gpus else {"sampler weights": 4 * s.policy}
        items |= sampler(cfg) if phase in ("sample", "sync") else asleep
        phases[phase] = items | ({"CUDA, NCCL": CONTEXT} if cfg.gpus else {})
    return phases


def peak(cfg: Config) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    return max(
        ((phase, sum(items.values())) for phase, items in memory(cfg).items()), key=lambda x: x[1]
    )


def obstacles(cfg: Config) -> list[str]:
    """Why the run cannot work; empty if it fits."""
    (phase, need), longest, found = peak(cfg), cfg.prompt_tokens + cfg.response_tokens, []
    if need > cfg.gpu_memory * GB:
        found.append(f"{phase} needs {need / GB:.1f} of {cfg.gpu_memory:g} GB")
    if sampler(cfg)["key-value cache"] < longest * kv_bytes(cfg):
        found.append(
            f"vLLM's {cfg.vllm_memory * cfg.gpu_memory:.1f} GB cannot hold one sequence of {longest:,} tokens"
        )
    if max(1, cfg.gpus) % cfg.tensor_parallel or shape(cfg.model).heads % cfg.tensor_parallel:
        found.append(
            f"--tensor-parallel {cfg.tensor_parallel} does not divide the GPUs and the attention heads"
        )
    return found


def largest_micro_tokens(cfg: Config) -> int:
    """The largest --micro-tokens that fits; 0 if none does."""
    return bisect_left(
        range(1, 2**24), True, key=lambda tokens: bool(obstacles(replace(cfg, micro_tokens=tokens)))
    )


def remedy(cfg: Config) -> Config | None:
    """The setting nearest to `cfg` that fits: changed is first what costs no time, last what costs most."""
    options: dict[str, list[Any]] = {
        "vllm_memory": [i / 20 for i in range(2, 19)], "micro_tokens": [cfg.prompt_tokens + cfg.response_tokens],
        "rows": [16], "tensor_parallel": [1, 2, 4, 8], "activation_checkpointing": [True], "offload": [True],
    }  # fmt: skip

    def cost(other: Config) -> tuple[int, float]:
        changed = sum(
            2**i for i, name in enumerate(options) if getattr(other, name) != getattr(cfg, name)
        )
        return changed, abs(other.vllm_memory - cfg.vllm_memory)

    values = product(*({getattr(cfg, name), *more} for name, more in options.items()))
    variants = sorted(
        (replace(cfg, **dict(zip(options, chosen, strict=True))) for chosen in values), key=cost
    )
    return next((variant for variant in variants if not obstacles(variant)), None)


def work(cfg: Config) -> dict[str, tuple[float, float]]:
    """Phase of a step → floating-point operations, and seconds if the GPUs were H100s; `show` says what is assumed.

    Forward, a token costs 2 operations per weight and, attention being causal, 2·Q per layer and token of its sequence;
    backward twice that, and activation checkpointing once more, as always for logits. The critic's mini-batches together
    use every response once, so that policy and critic read the same tokens.
    """
    s, gpus, count = shape(cfg.model), max(1, cfg.gpus), cfg.prompts * cfg.samples
    prompt, response = min(PROMPT, cfg.prompt_tokens), cfg.response_tokens * MEAN
    length = prompt + response
    body = count * length * s.layers * (2 * s.layer + 2 * s.heads * s.head_size * length)
    whole = body + count * response * 2 * s.vocab * s.hidden
    passes, old = (
        4 if cfg.activation_checkpointing else 3,
        whole * (cfg.policy_steps > 1),
    )  # log π_old: a pass of its own
    update = passes * body + 4 * (whole - body)  # logits are computed twice in any case
    flops = {
        "sample": whole,
        "values": body,
        "critic": passes * body,
        "policy": update + old,
        "sync": 0.0,
    }
    seconds = {phase: f / (gpus * FLOPS * MFU) for phase, f in flops.items()}

    # An engine decodes `rows` sequences at once; for every token it reads its weights, and keys and values of all of them.
    responses = count * cfg.tensor_parallel / gpus
    rows = max(
        1.0,
        min(cfg.max_num_seqs, responses, sampler(cfg)["key-value cache"] / kv_bytes(cfg) / length),
    )
    weights = 2 * s.policy / cfg.tensor_parallel / (HBM * HBM_SHARE)
    read = weights + rows * (prompt + response / 2) * kv_bytes(cfg) / (HBM * HBM_SHARE)
    seconds["sample"] = max(
        seconds["sample"], responses / rows * response * read, cfg.response_tokens * weights
    )
    seconds["sync"] = 2 * s.policy / COPY
    if cfg.offload:
        moved = {
            "values": 4 * s.critic,
            "critic": 12 * s.critic,
            "policy": 12 * s.policy,
            "sync": 4 * s.policy,
        }
        seconds |= {
            phase: seconds[phase] + 2 * moved[phase] / shards(cfg) / COPY for phase in moved
        }
    return {phase: (flops[phase], seconds[phase]) for phase in memory(cfg)}


def show(cfg: Config) -> str:
    """The plan as text."""
    place = (
        f"{cfg.gpus} × {cfg.gpu_memory:g} GB" if cfg.gpus else f"a CPU with {cfg.gpu_memory:g} GB"
    )
    text = [
        f"{cfg.model} ({shape(cfg.model).policy:,} parameters) on {place}; computed, not measured"
    ]
    settings = {
        f"with{'' if o else 'out'} --offload": replace(cfg, offload=o)
        for o in (False, True)[: 1 + bool(cfg.gpus)]
    }
    scale, unit = (GB, "GB") if peak(cfg)[1] > GB else (1e6, "MB")
    for title, setting in settings.items():
        phases = memory(setting)
        names = dict.fromkeys(name for items in phases.values() for name in items)
        rows = [
            [name, *(items.get(name, 0) / scale for items in phases.values())] for name in names
        ]
        rows = [
            *sorted(rows, key=lambda row: -max(row[1:])),
            ["sum", *(sum(p.values()) / scale for p in phases.values())],
        ]
        text += _grid([f"{unit} {title}", *phases], rows, ".1f")
        text += [
            f"most in {peak(setting)[0]}; the largest --micro-tokens that fits is {largest_micro_tokens(setting):,}"
        ]
    if cfg.gpus:
        rows = [["PFLOP", *(flops / 1e15 for flops, _ in work(cfg).values())]]
        rows += [
            [f"seconds {title}", *(seconds for _, seconds in work(o).values())]
            for title, o in settings.items()
        ]
        text += _grid(["a step", *work(cfg), "all"], [[*row, sum(row[1:])] for row in rows], ",.0f")
        host = (
            12
            * sum(getattr(shape(cfg.model), role) for role in cfg.roles)
            * cfg.replicas
            / ceil(cfg.gpus / 8)
            / GB
        )
        prompt, response = min(PROMPT, cfg.prompt_tokens), cfg.response_tokens * MEAN
        text += [f"assumed: {ASSUMED}; mean prompt {prompt} tokens, mean response {response:,.0f}"]
        text += [f"host memory that --offload fills on a node: {host:.0f} GB"]
    return "\n".join([*text, "", verdict(cfg)])


def _grid(header: list[str], rows: list[list[Any]], form: str) -> list[str]:
    cells = [
        header,
        *([row[0], *(f"{x:{form}}" if x else "" for x in row[1:])] for row in rows if any(row[1:])),
    ]
    return ["", *(f"{first:25}" + "".join(f"{cell:>9}" for cell in rest) for first, *rest in cells)]


def verdict(cfg: Config) -> str:
    """Whether it fits, and if not, what to change."""
    if not (why := obstacles(cfg)):
        return "It fits."
    doubled = (replace(cfg, gpus=cfg.gpus * 2**i) for i in range(10 if cfg.gpus else 1))
    better = next(filter(None, map(remedy, doubled)), None)
    hope = (
        f"It fits with {flags(better, cfg)}."
        if better
        else "No setting helps: take a smaller model or more memory."
    )
    return f"It does not fit: {'; '.join(why)}. {hope}"


def flags(cfg: Config, base: Config) -> str:
    """The flags that make `base` into `cfg`."""
    changed = {
        f.name: getattr(cfg, f.name)
        for f in fields(cfg)
        if getattr(cfg, f.name) != getattr(base, f.name)
    }
    return " ".join(
        f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
        for name, value in changed.items()
    )


def hardware_table() -> str:
    """Which Qwen2.5 fits where, and the flags it takes beside the preset's; Markdown."""
    places = {f"{n} × {size} GB": (n, size) for n, size in ((1, 24), (1, 40), (1, 80), (8, 80))}
    places["2 × 8 × 80 GB"] = (16, 80)
    lines = [f"| | {' | '.join(places)} |", "|---" * (1 + len(places)) + "|"]
    for model, preset in QWEN.items():
        cfgs = [
            Config(**{"model": model, "gpus": n, "gpu_memory": size} | preset)
            for n, size in places.values()
        ]
        pairs = [(cfg, remedy(cfg)) for cfg in cfgs]
        cells = [
            "–" if not best else f"`{flags(best, cfg)}`" if best != cfg else "yes"
            for cfg, best in pairs
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(hardware_table())
