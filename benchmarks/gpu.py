"""Measure one GPU: speed of training, memory beside tools/plan.py's figure, and cost of the parts.

    python -m benchmarks.gpu           one GPU, under eight minutes: Qwen2.5 0.5B, 1.5B and 7B
    python -m benchmarks.gpu --toy     every measurement with a toy model, also on a CPU

Models have random weights and are made as in training: float32 weights under FSDP2 that compute in
bfloat16. A pack holds sequences of about 1,000 tokens, of different lengths; 128 of the tokens are
the prompt. A measurement that fails leaves the reason in its row. Measurements for which no time is
left are named below the table. The table comes last; progress goes to stderr.

| what | one repetition |
|---|---|
| matrix product | the product of two large square matrices |
| policy, critic update | forward and backward pass of one pack; gradients add up, as in a step |
| log-prob, value pass | the forward pass without gradient |
| attention | forward and backward pass of one layer's attention on a pack |
| log-prob head | forward and backward pass of the vocabulary head, by logits held at once |
| offload | weights and moments to host memory and back |
| checkpoint | from the call until weights and moments are on the disk |
| tiny end to end | a step of train.py on the tiny model, without the first |

| column | meaning |
|---|---|
| seconds | median of the repetitions after a warm-up |
| step seconds | of the optimizer, with clipping: once an update, however many packs that has |
| TFLOP/s | operations as tools/plan.py counts them, without those that checkpointing repeats |
| MFU % | TFLOP/s / those of the faster matrix product |
| peak GB | most memory allocated |
| plan GB | tools/plan.py's figure for that model alone, without the sampler and CUDA itself |
| GB/s | of what is moved or written |
| difference | attention: largest difference of outputs and gradients to the first method's |

In "tiny end to end" the difference is the mean |Δ log-prob| of the first step.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

import distributed
import packing
import policy
import ppo
from benchmarks import record
from benchmarks.record import Row
from checkpoint import Checkpoints, named_tensors
from config import TINY, Config, Seconds, validate_ranges
from critic import Critic
from data import Problem
from distributed import Sharding
from packing import MicroBatch
from policy import Policy
from reports import log
from rollout import Rollout
from tools import plan
from toy import tiny

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
ROLES = ("policy", "critic")
CHECKPOINTING = Sharding(activation_checkpointing=True)
PLAIN = Sharding()
# A model with this suffix has one narrow layer between embedding and vocabulary head.
HEAD_ONLY = " head"
# Seconds that a run end to end may take. vLLM compiles and records CUDA graphs before it samples.
END_TO_END_SECONDS = 120
COLUMNS = (
    "what",
    "model",
    "tokens",
    "setting",
    "seconds",
    "step seconds",
    "tokens/s",
    "TFLOP/s",
    "MFU %",
    "peak GB",
    "plan GB",
    "GB/s",
    "difference",
    "note",
)

Trained = tuple[Policy | Critic, torch.optim.AdamW]
# query (1, heads, T, d), key and value with fewer heads → (1, T, heads, d)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Scale(NamedTuple):
    """Sizes of the measurements."""

    models: dict[str, tuple[int, ...]]  # name → sizes as in `plan.SHAPES`, the most important first
    tokens: tuple[int, ...]  # of a pack, the most important first
    prompt_tokens: int
    sequence_tokens: int  # mean number of input tokens
    squares: tuple[int, ...]  # sides of the matrices
    head_tokens: int
    chunks: tuple[int, ...]  # numbers of logits held at once
    train: dict[str, int]  # settings of the run end to end, beside those of the tiny model


FULL = Scale(
    models={name: plan.SHAPES[name] for name in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-0.5B")},
    tokens=(16384, 4096, 32768),
    prompt_tokens=128,
    sequence_tokens=1024,
    squares=(8192, 16384),
    head_tokens=8192,
    chunks=tuple(2**i for i in range(24, 30)),
    train={"steps": 10},
)
TOY = Scale(
    models={"toy": (64, 2, 2, 1, 128, 512, True)},
    tokens=(256, 512),
    prompt_tokens=8,
    sequence_tokens=64,
    squares=(256,),
    head_tokens=128,
    chunks=(2**13, 2**15),
    train={"steps": 2, "prompts": 2, "samples": 2, "response_tokens": 8, "critic_steps": 2},
)


# ── what is measured, in which order ──────────────────────────────────────────────────────────────


class Measurement(NamedTuple):
    """A row of the table that is not measured yet."""

    labels: Row  # the cells that name it
    measure: Callable[[], Row]  # returns the other cells
    needs: float = 5  # seconds that it may take


def planned(scale: Scale, folder: Path, base: Callable[[], Path]) -> list[Measurement]:
    """All measurements, the most important first. `base` waits for the tiny base model."""
    names = list(scale.models)
    main, larger = names[0], names[:2]
    tokens, *other_tokens = scale.tokens
    update = partial(update_measurement, scale, folder)
    found = [matrix_measurement(side) for side in scale.squares]
    for name, role in product(names, ROLES):
        found.append(update(name, role, tokens, CHECKPOINTING))
        found.append(pass_measurement(scale, folder, name, role, tokens))
    for name, method in product(larger, attention_methods()):
        found.append(attention_measurement(scale, name, tokens, method))
    found += [update(name, role, tokens, PLAIN) for name, role in product(names, ROLES)]
    found.append(update(main, "policy", tokens, CHECKPOINTING._replace(compile=True)))
    for name, chunk in product(larger, scale.chunks):
        found.append(head_measurement(scale, folder, name, chunk))
    found.append(end_to_end_measurement(scale, folder, base, "transformers"))
    if GPU and find_spec("vllm"):
        found.append(end_to_end_measurement(scale, folder, base, "vllm"))
    others = list(product(names, ROLES, other_tokens))
    found += [update(name, role, count, CHECKPOINTING) for name, role, count in others]
    what_moves = {"model": main, "setting": "policy and moments"}
    found.append(Measurement({"what": "offload"} | what_moves, partial(offload, scale, main), 20))
    save_main = partial(save, scale, folder, main)
    found.append(Measurement({"what": "checkpoint"} | what_moves, save_main, 60))
    found += [update(name, role, count, PLAIN) for name, role, count in others]
    return found


def matrix_measurement(side: int) -> Measurement:
    labels = {"what": "matrix product", "setting": f"{side:,} × {side:,}"}
    return Measurement(labels, partial(matrix_product, side))


def update_measurement(
    scale: Scale, folder: Path, name: str, role: str, tokens: int, sharding: Sharding
) -> Measurement:
    setting = "checkpointing" if sharding.activation_checkpointing else "no checkpointing"
    needs = 20
    if sharding.compile:
        setting += ", compiled" if GPU else ", compiled on GPUs only"
        needs = 60
    labels = {"what": f"{role} update", "model": name, "tokens": tokens, "setting": setting}
    return Measurement(labels, partial(update, scale, folder, name, role, tokens, sharding), needs)


def pass_measurement(scale: Scale, folder: Path, name: str, role: str, tokens: int) -> Measurement:
    what = {"policy": "log-prob pass", "critic": "value pass"}[role]
    labels = {"what": what, "model": name, "tokens": tokens}
    return Measurement(labels, partial(predict, scale, folder, name, role, tokens))


def attention_measurement(scale: Scale, name: str, tokens: int, method: str) -> Measurement:
    labels = {"what": "attention", "model": name, "tokens": tokens, "setting": method}
    return Measurement(labels, partial(attention, scale, name, tokens, method), 30)


def head_measurement(scale: Scale, folder: Path, name: str, chunk: int) -> Measurement:
    labels = {"what": "log-prob head", "model": name, "tokens": scale.head_tokens}
    labels["setting"] = f"{chunk:,} logits"
    return Measurement(labels, partial(head, scale, folder, name, chunk))


def end_to_end_measurement(
    scale: Scale, folder: Path, base: Callable[[], Path], engine: str
) -> Measurement:
    labels = {"what": "tiny end to end", "model": "tiny", "setting": engine}
    measure = partial(end_to_end, scale, folder, base, engine)
    return Measurement(labels, measure, END_TO_END_SECONDS)


def run(measurements: list[Measurement], budget: float) -> tuple[list[Row], list[str]]:
    """A row for each measurement, and the names of those for which no time was left."""
    began = time.perf_counter()
    rows: list[Row] = []
    left_out = []
    for labels, measure, needs in measurements:
        name = ", ".join(map(str, labels.values()))
        if time.perf_counter() - began + needs > budget:
            left_out.append(name)
            continue
        failed = False
        try:
            cells = measure()
        except Exception as error:
            failed = True
            reason = str(error).strip().partition("\n")[0]
            cells = {"note": f"failed: {type(error).__name__}: {reason}"}
        if failed:  # only now: inside the handler the exception's frames still hold tensors
            release_models()
        rows.append(labels | cells)
        progress = f"{time.perf_counter() - began:6.1f} s  {name}: {json.dumps(cells)}"
        print(progress, file=sys.stderr, flush=True)
    return rows, left_out


# ── time and memory ───────────────────────────────────────────────────────────────────────────────


def now() -> float:
    """Seconds since some moment, after the GPU has done what it was told to do."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object], repetitions: int = 3) -> float:
    """Median seconds of a call."""
    spans = []
    for _ in range(repetitions):
        start = now()
        call()
        spans.append(now() - start)
    return median(spans)


@contextmanager
def peak() -> Iterator[Row]:
    """Cells that get the most GPU memory allocated inside; none on a CPU."""
    cells: Row = {}
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    yield cells
    if GPU:
        cells["peak GB"] = torch.cuda.max_memory_allocated() / 1e9


def memory_limit() -> float:
    """GB of the GPU that tensors may take, with a margin for fragmentation; no limit on a CPU."""
    if not GPU:
        return float("inf")
    total = torch.cuda.get_device_properties(0).total_memory
    return 0.95 * (total - plan.CONTEXT) / 1e9


def planned_gb(cfg: Config, role: str, step: bool) -> float:
    """tools/plan.py's GB of one model in its update. Without an optimizer step it has no
    moments."""
    states = ["weights", "gradients"]
    if step:
        states.append("moments")
    items = [*(f"{role} {state}" for state in states), *plan.update(cfg, role)]
    return sum(plan.memory(cfg)[role][item] for item in items) / 1e9


def operations(shape: plan.Shape, micro: MicroBatch, role: str) -> float:
    """Operations of a forward pass, counted as plan.work counts them."""
    lengths = micro.layout.cu_seqlens_q.diff().double()
    linear = 2 * shape.layer * lengths
    attention = 2 * shape.heads * shape.head_size * lengths**2
    body = shape.layers * float((linear + attention).sum())
    if role == "critic":
        return body
    return body + 2 * shape.vocab * shape.hidden * len(micro.actions)


def rates(micro: MicroBatch, seconds: float, flops: float) -> Row:
    """The cells that follow from a time."""
    tokens = micro.input_ids.numel()
    return {
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "TFLOP/s": flops / seconds / 1e12,
    }


# ── models and packs ──────────────────────────────────────────────────────────────────────────────

# At most one model is in memory. Measurements of the same model follow each other.
OPEN: dict[tuple[str, str, Sharding], Trained] = {}


def open_model(scale: Scale, name: str, role: str, sharding: Sharding) -> Trained:
    """A policy or critic with random weights and its optimizer, made as in training."""
    key = (name, role, sharding)
    if key not in OPEN:
        release_models()
        auto_class = AutoModelForCausalLM
        if role == "critic":
            auto_class = AutoModelForSequenceClassification
        how = {"dtype": torch.float32, "attn_implementation": "packed"}
        with torch.device(distributed.device()):
            model = auto_class.from_config(model_config(scale, name), **how).eval()
        module = Policy(model) if role == "policy" else Critic(model)
        distributed.apply_fsdp(module, sharding, getattr(model, "score", None))
        OPEN[key] = module, ppo.adamw(list(module.parameters()))
    return OPEN[key]


def release_models() -> None:
    OPEN.clear()
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()


def model_config(scale: Scale, name: str) -> Qwen2Config:
    """Qwen2.5's configuration with the sizes of that name."""
    fields = [*plan.FIELDS, "tie_word_embeddings"]
    sizes = dict(zip(fields, scale.models[name.removesuffix(HEAD_ONLY)], strict=True))
    if name.endswith(HEAD_ONLY):
        sizes |= {"num_hidden_layers": 1, "intermediate_size": 64}
    return Qwen2Config(
        **sizes,
        num_labels=1,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def plan_settings(
    scale: Scale, folder: Path, name: str, micro: MicroBatch, sharding: Sharding
) -> Config:
    """Model and pack as settings of a run, for tools/plan.py."""
    model_config(scale, name).save_pretrained(folder / name)
    return Config(
        model=str(folder / name),
        gpus=int(GPU),
        micro_tokens=micro.input_ids.numel(),
        samples=1,  # `random_pack` shares no prompts
        activation_checkpointing=sharding.activation_checkpointing,
    )


def response_lengths(scale: Scale, tokens: int) -> list[int]:
    """Different lengths of responses whose sequences have `tokens` input tokens in all."""
    mean = scale.sequence_tokens
    count = tokens // mean
    offsets = [random.Random(i).randint(0, mean // 4) for i in range(count // 2)]
    inputs = [mean + offset for offset in offsets] + [mean - offset for offset in offsets]
    if count % 2:
        inputs.append(mean)
    inputs[-1] += tokens - sum(inputs)
    return [n + 1 - scale.prompt_tokens for n in inputs]


def random_pack(lengths: list[int], prompt_tokens: int, vocabulary: int) -> MicroBatch:
    """One pack of random sequences with responses of these lengths, each with a prompt of its own:
    what is measured is a token that is computed."""
    rng = random.Random(0)

    def token_ids(count: int) -> list[int]:
        return rng.choices(range(vocabulary), k=count)

    rollouts = []
    for n in lengths:
        problem = Problem("", "", "", tuple(token_ids(prompt_tokens)))
        rollouts.append(Rollout(problem, token_ids(n), [0.0] * n, "stop", ""))
    tokens = sum(lengths) + prompt_tokens * len(lengths)
    members = range(len(rollouts))
    (pack,) = packing.micro_batches(rollouts, members, tokens, distributed.device())
    return pack


def make_pack(scale: Scale, name: str, tokens: int) -> MicroBatch:
    """A pack of `tokens` input tokens for that model."""
    vocabulary = model_config(scale, name).vocab_size
    return random_pack(response_lengths(scale, tokens), scale.prompt_tokens, vocabulary)


# ── updates and passes ────────────────────────────────────────────────────────────────────────────


def forward_backward(module: Policy | Critic, micro: MicroBatch, advantages: Tensor) -> None:
    """Forward and backward pass of a pack, as in train.py."""
    if isinstance(module, Policy):
        logp, _ = module(micro)
        loss, _ = ppo.policy_loss(logp, logp.detach(), advantages)
    else:
        loss = ppo.value_loss(module(micro), targets=advantages)
    (loss / len(advantages)).backward()


def update(
    scale: Scale, folder: Path, name: str, role: str, tokens: int, sharding: Sharding
) -> Row:
    """The passes and the optimizer's step. What would fill the GPU by tools/plan.py is left out:
    the step, or everything."""
    micro = make_pack(scale, name, tokens)
    cfg = plan_settings(scale, folder, name, micro, sharding)
    whole_gb = planned_gb(cfg, role, step=True)
    with_step = whole_gb <= memory_limit()
    cells: Row = {"plan GB": whole_gb}
    if not with_step:
        cells["plan GB"] = planned_gb(cfg, role, step=False)
        cells["note"] = f"no optimizer: {whole_gb:.0f} GB by tools/plan.py"
        if cells["plan GB"] > memory_limit():
            cells["note"] = "too large by tools/plan.py, even without the optimizer"
            return cells
    module, optimizer = open_model(scale, name, role, sharding)
    if not with_step:
        optimizer.state.clear()  # moments that shorter packs left
    repetitions = 2 if "7B" in name else 3
    stance = "default" if GPU else "force_eager"  # a CPU would compile for a minute
    with torch.compiler.set_stance(stance):
        cells |= timed_update(module, optimizer, micro, with_step, repetitions)
    optimizer.zero_grad(set_to_none=True)
    flops = 3 * operations(plan.shape(cfg.model), micro, role)
    return cells | rates(micro, cells["seconds"], flops)


def timed_update(
    module: Policy | Critic,
    optimizer: torch.optim.AdamW,
    micro: MicroBatch,
    with_step: bool,
    repetitions: int,
) -> Row:
    """Seconds of the passes and of the optimizer's step, and the peak of both."""
    advantages = torch.randn(len(micro.actions), device=distributed.device())
    parameters = list(module.parameters())
    passes = partial(forward_backward, module, micro, advantages)
    gradients: list[Tensor | None] = []

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        ppo.optimizer_step(optimizer, lr=1e-6)

    passes()
    if with_step:
        ppo.optimizer_step(optimizer, lr=1e-6)  # makes the moments
    with peak() as cells:
        cells["seconds"] = timed(passes, repetitions)
        gradients += [parameter.grad for parameter in parameters]  # a step clears them
        if with_step:
            cells["step seconds"] = timed(step)
    return cells


def predict(scale: Scale, folder: Path, name: str, role: str, tokens: int) -> Row:
    """A forward pass without gradient. The moments are in memory if an update came before."""
    micro = make_pack(scale, name, tokens)
    cfg = plan_settings(scale, folder, name, micro, CHECKPOINTING)
    module, optimizer = open_model(scale, name, role, CHECKPOINTING)
    with torch.no_grad():
        module(micro)
        with peak() as cells:
            seconds = timed(partial(module, micro))
    if role == "critic":
        items = ["critic weights", "activations", "gathered weights"]
        if optimizer.state:
            items.append("critic moments")
        cells["plan GB"] = sum(plan.memory(cfg)["values"][item] for item in items) / 1e9
    return cells | rates(micro, seconds, operations(plan.shape(cfg.model), micro, role))


def matrix_product(side: int) -> Row:
    how = {"device": distributed.device(), "dtype": DTYPE}
    a, b = torch.randn(side, side, **how), torch.randn(side, side, **how)

    def ten() -> None:
        for _ in range(10):
            a @ b

    ten()
    seconds = timed(ten) / 10
    return {"seconds": seconds, "TFLOP/s": 2 * side**3 / seconds / 1e12}


def head(scale: Scale, folder: Path, name: str, chunk: int) -> Row:
    """The vocabulary head with `chunk` logits held at once. What the narrow layer below it takes
    counts as the head's."""
    name += HEAD_ONLY
    shape = model_config(scale, name)
    num_seqs = scale.head_tokens // scale.sequence_tokens
    micro = random_pack([scale.sequence_tokens] * num_seqs, 2, shape.vocab_size)
    advantages = torch.randn(len(micro.actions), device=distributed.device())
    module, _ = open_model(scale, name, "policy", PLAIN)
    passes = partial(forward_backward, module, micro, advantages)
    with logits_held(chunk):
        passes()
        with peak() as cells:
            seconds = timed(passes)
        cfg = plan_settings(scale, folder, name, micro, PLAIN)
        cells["plan GB"] = planned_gb(cfg, "policy", step=False)
    flops = 3 * 2 * shape.vocab_size * shape.hidden_size * len(advantages)
    return cells | rates(micro, seconds, flops)


@contextmanager
def logits_held(count: int) -> Iterator[None]:
    """Inside, policy.py holds `count` logits at once."""
    kind = torch.device(distributed.device()).type
    usual = policy.CHUNK[kind]
    policy.CHUNK[kind] = count
    try:
        yield
    finally:
        policy.CHUNK[kind] = usual


# ── attention ─────────────────────────────────────────────────────────────────────────────────────


def attention_methods() -> dict[str, Callable[[MicroBatch, float], Attention]]:
    """Every method of attention on a pack that works here: name → what prepares it for a pack, once
    for all layers. The first is the one that training uses."""
    methods = {"packed": packed, "SDPA, padded": padded, "SDPA with mask": masked}
    if GPU and find_spec("flash_attn"):
        methods["flash_attn"] = flash
    if GPU:
        methods["flex_attention"] = flex
    return methods


def packed(micro: MicroBatch, scaling: float) -> Attention:
    """What training uses: torch's kernel for packs, or where there is none the padded method."""
    how = {"layout": micro.layout, "scaling": scaling}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = packing.packed_attention(torch.nn.Identity(), query, key, value, None, **how)
        return out

    return attend


def padded(micro: MicroBatch, scaling: float) -> Attention:
    """The sequences of the pack as a padded batch."""
    lengths = micro.layout.cu_seqlens_q.diff().tolist()

    def padded_batch(x: Tensor) -> Tensor:  # (1, heads, T, d) → (S, heads, max_seqlen, d)
        sequences = tokens_first(x).split(lengths)
        return pad_sequence(list(sequences), batch_first=True).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = [padded_batch(x) for x in (query, key, value)]
        how = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        out = scaled_dot_product_attention(*states, **how).transpose(1, 2)
        real = [sequence[:length] for sequence, length in zip(out, lengths, strict=True)]
        return torch.cat(real)[None]

    return attend


def masked(micro: MicroBatch, scaling: float) -> Attention:
    """What transformers does without flash attention: a [T × T] mask, and keys and values repeated
    for every head."""
    sequence = sequence_numbers(micro)
    mask = (sequence[:, None] == sequence[None]).tril()[None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2)

    return attend


def flash(micro: MicroBatch, scaling: float) -> Attention:
    from flash_attn import flash_attn_varlen_func

    layout = micro.layout
    bounds = (layout.cu_seqlens_q, layout.cu_seqlens_k)
    longest = (layout.max_seqlen_q, layout.max_seqlen_k)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = [tokens_first(x) for x in (query, key, value)]
        return flash_attn_varlen_func(
            *states, *bounds, *longest, softmax_scale=scaling, causal=True
        )[None]

    return attend


def flex(micro: MicroBatch, scaling: float) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequence, T = sequence_numbers(micro), micro.input_ids.numel()

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (sequence[i] == sequence[j])

    mask = create_block_mask(visible, None, None, T, T, device=sequence.device)
    compiled = torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = compiled(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def sequence_numbers(micro: MicroBatch) -> Tensor:
    """(T,) which sequence a token belongs to."""
    lengths = micro.layout.cu_seqlens_q.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def tokens_first(x: Tensor) -> Tensor:
    """(1, heads, T, d) → (T, heads, d)."""
    return x[0].transpose(0, 1)


def attention(scale: Scale, name: str, tokens: int, method: str) -> Row:
    """One method, timed, and compared with the one that training uses."""
    micro = make_pack(scale, name, tokens)
    hidden, _, heads, kv_heads, *_ = scale.models[name]
    size = hidden // heads
    how = {"device": distributed.device(), "dtype": DTYPE}
    query, key, value = (
        torch.randn(1, tokens, count, size, **how).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    gradient = torch.randn(1, tokens, heads, size, **how)

    def outputs_and_gradients(attend: Attention) -> list[Tensor]:
        out = attend(query, key, value)
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), gradient)]

    scaling = size**-0.5
    expected = outputs_and_gradients(packed(micro, scaling))
    attend = attention_methods()[method](micro, scaling)
    pairs = zip(expected, outputs_and_gradients(attend), strict=True)
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    with peak() as cells:
        seconds = timed(partial(outputs_and_gradients, attend))
    pairs_attended = float((micro.layout.cu_seqlens_q.diff().double() ** 2).sum())
    flops = 3 * 2 * heads * size * pairs_attended
    return cells | rates(micro, seconds, flops) | {"difference": difference}


# ── memory to and fro, and a whole run ────────────────────────────────────────────────────────────


def offload(scale: Scale, name: str) -> Row:
    """`distributed.on_device`, as between the phases of a step with --offload."""
    module, optimizer = open_model(scale, name, "policy", CHECKPOINTING)
    tensors = named_tensors({"policy": (module, optimizer)}).values()
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    to_gpu, to_host = [], []
    for _ in range(3):
        start = now()
        with distributed.on_device(True, module, optimizer):
            loaded = now()
        to_gpu.append(loaded - start)
        to_host.append(now() - loaded)
    release_models()
    back, away = min(to_gpu[1:]), min(to_host[1:])  # at first everything was still on the GPU
    seconds = back + away
    note = f"to the host {away:.2g} s, to the GPU {back:.2g} s"
    return {"seconds": seconds, "GB/s": 2 * gigabytes / seconds, "note": note}


def save(scale: Scale, folder: Path, name: str) -> Row:
    """A checkpoint: training waits while tensors are copied, then a thread writes them."""
    trained = {"policy": open_model(scale, name, "policy", CHECKPOINTING)}
    start = now()
    with Checkpoints(folder / "checkpoints", Config(), trained) as checkpoints:
        checkpoints.save(1, [])
        copied = now() - start
    seconds = now() - start
    files = (folder / "checkpoints" / "step-1").iterdir()
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    note = f"{gigabytes:.3g} GB; training waits for {copied:.2g} s"
    return {"seconds": seconds, "GB/s": gigabytes / seconds, "note": note}


def end_to_end(scale: Scale, folder: Path, base: Callable[[], Path], engine: str) -> Row:
    """train.py with the settings of the tiny model, in a new process, without evaluation."""
    release_models()  # vLLM refuses a GPU of which less than its share is free
    path = base()
    settings = TINY | scale.train | {"model": path, "data": path / "train.json"}
    settings |= {"engine": engine, "name": engine, "runs": folder}
    command = [sys.executable, str(ROOT / "train.py")]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    # Without the variables of this process's own group.
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in group}
    env["HF_HUB_OFFLINE"] = "1"
    how = {"cwd": folder, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=END_TO_END_SECONDS, **how)
    if done.returncode:
        raise RuntimeError(f"train.py: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    with (folder / engine / "metrics.jsonl").open() as file:
        first, *steps = map(json.loads, file)
    return {
        "seconds": median(step["seconds"] for step in steps),
        "tokens/s": median(step["tokens_per_second"] for step in steps),
        "difference": first["logp_gap"],
    }


def raw_base(folder: Path) -> Path:
    """A tiny base model after one step of its training, and a few of its problems."""
    tiny.make(folder / "base", steps=1)
    file = folder / "base" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:16]))
    return folder / "base"


def finished_base(process: subprocess.Popen) -> Path:
    """The tiny base model, which that process makes or finds."""
    process.wait(timeout=120)
    return tiny.ensure(0, ROOT / ".cache")


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def finished(rows: list[Row], left_out: list[str]) -> tuple[list[Row], list[str]]:
    """The rows with MFU and all columns, and the notes."""
    products = [row.get("TFLOP/s", 0) for row in rows if row["what"] == "matrix product"]
    fastest = max(products, default=0)
    table = []
    for row in rows:
        share = {}
        if fastest and "TFLOP/s" in row:
            share = {"MFU %": 100 * row["TFLOP/s"] / fastest}
        table.append({column: (row | share).get(column) for column in COLUMNS})
    dtype = str(DTYPE).removeprefix("torch.")
    notes = [f"MFU is the share of {fastest:.3g} TFLOP/s, the faster matrix product ({dtype})."]
    if left_out:
        notes.append(f"No time was left for: {'; '.join(left_out)}.")
    return table, notes


def measure(toy: bool, budget: float, out: Path) -> None:
    """Measure everything for which there is time, and record the table in `out`."""
    if not (GPU or toy):
        sys.exit(
            "benchmarks.gpu: there is no GPU; --toy runs every measurement with a toy model on a "
            "CPU"
        )
    log.versions()  # for the record; a missing library should show now, not after the measurements
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if toy:
            base = partial(raw_base, folder)
        else:  # takes a CPU two minutes, while the GPU is measured
            command = [sys.executable, "-m", "toy.tiny"]
            process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
            base = partial(finished_base, process)
        distributed.start(timeout_minutes=10)
        rows, left_out = run(planned(TOY if toy else FULL, folder, base), budget)
    record.record("gpu", "Training on one GPU", *finished(rows, left_out), out)
    distributed.stop()


@dataclass(frozen=True)
class Settings:
    """The command line."""

    toy: bool
    budget: Seconds
    out: Path


def main() -> None:
    # Not tyro, as in the other programs: this one has to start on GPU machines that lack it.
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--toy", action="store_true", help="a toy model, also on a CPU")
    parser.add_argument(
        "--budget", type=float, default=440, help="seconds after which no measurement starts"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of gpu.json")
    settings = Settings(**vars(parser.parse_args()))
    try:
        validate_ranges(settings)
    except ValueError as error:
        sys.exit(f"benchmarks.gpu: {error}")
    measure(settings.toy, settings.budget, settings.out)


if __name__ == "__main__":
    main()
