"""How fast one GPU trains, how much memory it takes beside tools/plan.py's figure, and what the parts cost.

    python -m benchmarks.gpu           one GPU, under eight minutes: Qwen2.5 0.5B, 1.5B and 7B with random weights
    python -m benchmarks.gpu --toy     every measurement with a toy model, on a CPU too, to see that it works

Models are made as in training: float32 weights under FSDP2 that compute in bfloat16. A row holds ragged sequences of about
1,000 tokens, 128 of them a prompt. A measurement that fails leaves its reason; those for which no time is left (`--budget`
seconds) are named below the table, which comes last. Progress goes to stderr.

| what | a repetition |
|---|---|
| matrix product | of two large squares |
| policy, critic update | forward and backward pass of one packed row; gradients add up, as in a step of many rows |
| log-prob, value pass | the forward pass without gradient |
| attention | forward and backward pass of one layer's heads on a packed row |
| log-prob head | forward and backward pass of the vocabulary head, by how many logits are alive at once |
| offload | weights and moments to host memory and back |
| checkpoint | from the call until weights and moments are on the disk |
| tiny end to end | an iteration of train.py on the tiny model, but not the first |

| column | meaning |
|---|---|
| seconds | median of the repetitions after a warm-up |
| step seconds | of the optimizer, clipping included: once per update, however many rows that has |
| TFLOP/s | operations as tools/plan.py counts them, without those that activation checkpointing repeats |
| peak GB, plan GB | most memory allocated; what tools/plan.py reckons for that model alone, without sampler and CUDA itself |
| GB/s | of what is moved or written |
| difference | attention: of outputs and gradients from the first way, largest; end to end: \\|Δ log p\\| of step 0, mean |
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
from functools import partial
from importlib.util import find_spec
from inspect import signature
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

import checkpoint
import distributed
import packing
import policy
import ppo
from benchmarks import record
from benchmarks.record import Row
from config import TINY, Config
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
BEGAN = time.perf_counter()
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
CHECKPOINTING, PLAIN = Sharding(activation_checkpointing=True), Sharding()
HEAD = " head"  # a model of that surname has one narrow layer between embedding and vocabulary head
START = 120  # seconds that a run end to end may take; vLLM compiles and records CUDA graphs before it samples
COLUMNS = ["what", "model", "tokens", "setting", "seconds", "step seconds", "tokens/s", "TFLOP/s", "MFU %", "peak GB",
           "plan GB", "GB/s", "difference", "note"]  # fmt: skip
Trained = tuple[Policy | Critic, torch.optim.AdamW]
Attention = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # q (1, heads, T, d), k and v of fewer heads → (1, T, heads, d)


class Scale(NamedTuple):
    """How large everything is."""

    models: dict[str, tuple[int, ...]]  # name → sizes as in `plan.SHAPES`, the most important first
    tokens: tuple[int, ...]  # of a packed row, likewise
    prompt: int  # tokens
    sequence: int  # mean input tokens
    squares: tuple[int, ...]
    head_tokens: int
    chunks: list[int]  # logits alive
    train: dict[str, int]  # settings of the run end to end, beside those of the tiny model


MODELS = {name: plan.SHAPES[name] for name in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-0.5B")}
CHUNKS = [2**i for i in range(24, 30)]
FULL = Scale(MODELS, (16384, 4096, 32768), 128, 1024, (8192, 16384), 8192, CHUNKS, {"steps": 10})
FEW = {"steps": 2, "prompts": 2, "samples": 2, "response_tokens": 8, "critic_steps": 2}
TOY = Scale(
    {"toy": (64, 2, 2, 1, 128, 512, True)}, (256, 512), 8, 64, (256,), 128, [2**13, 2**15], FEW
)


class Measurement(NamedTuple):
    """A row to come: the cells that name it, what returns the others, and the seconds that it may take."""

    labels: Row
    measure: Callable[[], Row]
    needs: float


def planned(scale: Scale, folder: Path, base: Callable[[], Path]) -> list[Measurement]:
    """All measurements, the most important first. `base` waits for the tiny base model."""
    found: list[Measurement] = []
    names, roles, (tokens, *others) = list(scale.models), ("policy", "critic"), scale.tokens
    main, larger = names[0], names[:2]

    def add(what: str, measure: Callable[[], Row], needs: float = 5, **labels: str | int) -> None:
        found.append(Measurement({"what": what, **labels}, measure, needs))

    def add_update(name: str, role: str, tokens: int, sharding: Sharding) -> None:
        setting = ("" if sharding.activation_checkpointing else "no ") + "checkpointing"
        setting += (", compiled" if GPU else ", compiled on GPUs only") * sharding.compile
        measure = partial(update, scale, folder, name, role, tokens, sharding)
        add(
            f"{role} update",
            measure,
            60 if sharding.compile else 20,
            model=name,
            tokens=tokens,
            setting=setting,
        )

    for side in scale.squares:
        add("matrix product", partial(matrix_product, side), setting=f"{side:,} × {side:,}")
    for name, role in product(names, roles):
        add_update(name, role, tokens, CHECKPOINTING)
        what = {"policy": "log-prob pass", "critic": "value pass"}[role]
        add(what, partial(predict, scale, folder, name, role, tokens), model=name, tokens=tokens)
    for name, way in product(larger, ways()):
        add(
            "attention",
            partial(attention, scale, name, tokens, way),
            30,
            model=name,
            tokens=tokens,
            setting=way,
        )
    for name, role in product(names, roles):
        add_update(name, role, tokens, PLAIN)
    add_update(main, "policy", tokens, CHECKPOINTING._replace(compile=True))
    for name, chunk in product(larger, scale.chunks):
        labels = {"model": name, "tokens": scale.head_tokens, "setting": f"{chunk:,} logits"}
        add("log-prob head", partial(head, scale, folder, name, chunk), **labels)
    for engine in ("transformers", *["vllm"] * (GPU and find_spec("vllm") is not None)):
        add(
            "tiny end to end",
            partial(end_to_end, scale, folder, base, engine),
            START,
            model="tiny",
            setting=engine,
        )
    for name, role, count in product(names, roles, others):
        add_update(name, role, count, CHECKPOINTING)
    add("offload", partial(offload, scale, main), 20, model=main, setting="policy and moments")
    add(
        "checkpoint",
        partial(save, scale, folder, main),
        60,
        model=main,
        setting="policy and moments",
    )
    for name, role, count in product(names, roles, others):
        add_update(name, role, count, PLAIN)
    return found


def run(measurements: list[Measurement], budget: float) -> tuple[list[Row], list[str]]:
    """A row of each measurement, and the names of those for which no time was left."""
    rows: list[Row] = []
    left_out, failed = [], False
    for labels, measure, needs in measurements:
        name = ", ".join(map(str, labels.values()))
        if time.perf_counter() - BEGAN + needs > budget:
            left_out.append(name)
            continue
        try:
            if failed:  # not in the handler, where the exception's frames still hold on to tensors
                let_go()
            failed, row = False, measure()
        except Exception as error:
            failed, row = (
                True,
                {
                    "note": f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                },
            )
        rows.append(labels | row)
        print(
            f"{time.perf_counter() - BEGAN:6.1f} s  {name}: {json.dumps(row)}",
            file=sys.stderr,
            flush=True,
        )
    return rows, left_out


def now() -> float:
    """Seconds since some moment; what a GPU was told to do is done."""
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
    """A row that gets the most GPU memory allocated inside."""
    row: Row = {}
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    yield row
    if GPU:
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9


OPEN: dict[
    tuple[str, str, Sharding], Trained
] = {}  # one at most: measurements of one model follow each other


def opened(scale: Scale, name: str, role: str, sharding: Sharding) -> Trained:
    """A policy or critic of random weights and its optimizer, made as in training."""
    if (name, role, sharding) not in OPEN:
        let_go()
        auto = AutoModelForCausalLM if role == "policy" else AutoModelForSequenceClassification
        with torch.device(distributed.device()):
            model = auto.from_config(
                config(scale, name), dtype=torch.float32, attn_implementation="packed"
            ).eval()
        module = Policy(model) if role == "policy" else Critic(model)
        distributed.apply_fsdp(module, sharding, getattr(model, "score", None))
        OPEN[name, role, sharding] = module, ppo.adamw(list(module.parameters()))
    return OPEN[name, role, sharding]


def let_go() -> None:
    OPEN.clear()
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()


def config(scale: Scale, name: str) -> Qwen2Config:
    """Qwen2.5's configuration in the sizes of that name."""
    sizes = dict(
        zip(
            [*plan.FIELDS, "tie_word_embeddings"],
            scale.models[name.removesuffix(HEAD)],
            strict=True,
        )
    )
    narrow = {"num_hidden_layers": 1, "intermediate_size": 64} if name.endswith(HEAD) else {}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2Config(
        **sizes | narrow, num_labels=1, max_position_embeddings=32768, rope_parameters=rope
    )


def cfg_of(scale: Scale, folder: Path, name: str, micro: MicroBatch, sharding: Sharding) -> Config:
    """The same as settings of a run, for tools/plan.py."""
    config(scale, name).save_pretrained(folder / name)
    known = {
        "micro_tokens": micro.input_ids.numel(),
        "activation_checkpointing": sharding.activation_checkpointing,
    }
    return Config(model=str(folder / name), gpus=int(GPU), **known)


def responses(scale: Scale, tokens: int) -> list[int]:
    """Lengths of ragged responses, whose sequences together have `tokens` input tokens."""
    mean, count = scale.sequence, tokens // scale.sequence
    apart = [random.Random(i).randint(0, mean // 4) for i in range(count // 2)]
    inputs = [mean + d for d in apart] + [mean - d for d in apart] + [mean] * (count % 2)
    inputs[-1] += tokens - sum(inputs)
    return [n + 1 - scale.prompt for n in inputs]


def packed(lengths: list[int], prompt: int, vocabulary: int) -> MicroBatch:
    """One row of random sequences with responses of these lengths."""
    rng = random.Random(0)
    problem = Problem("", "", "", tuple(rng.choices(range(vocabulary), k=prompt)))
    rollouts = [
        Rollout(problem, rng.choices(range(vocabulary), k=n), [0.0] * n, "stop", "")
        for n in lengths
    ]
    tokens = sum(lengths) + prompt * len(lengths)
    (row,) = packing.micro_batches(rollouts, range(len(rollouts)), tokens, distributed.device())
    return row


def row_of(scale: Scale, name: str, tokens: int) -> MicroBatch:
    return packed(responses(scale, tokens), scale.prompt, config(scale, name).vocab_size)


def operations(shape: plan.Shape, micro: MicroBatch, role: str) -> float:
    """Of a forward pass, as plan.work counts them."""
    length = micro.cu_seqlens.diff().double()
    body = (
        shape.layers
        * (2 * shape.layer * length + 2 * shape.heads * shape.head_size * length**2).sum()
    )
    return float(body) + 2 * shape.vocab * shape.hidden * len(micro.actions) * (role == "policy")


def rates(micro: MicroBatch, seconds: float, flops: float) -> Row:
    return {
        "seconds": seconds,
        "tokens/s": micro.input_ids.numel() / seconds,
        "TFLOP/s": flops / seconds / 1e12,
    }


def reckoned(cfg: Config, role: str, step: bool) -> float:
    """tools/plan.py's GB of one model in its update; before the first step there are no moments."""
    states = ("weights", "gradients", *["moments"] * step)
    items = [*(f"{role} {state}" for state in states), *plan.update(cfg, role)]
    return sum(plan.memory(cfg)[role][item] for item in items) / 1e9


def memory() -> float:
    """GB that tensors may take of the GPU, with a margin for what the allocator loses between them; on a CPU no limit."""
    return (
        0.95 * (torch.cuda.get_device_properties(0).total_memory - plan.CONTEXT) / 1e9
        if GPU
        else float("inf")
    )


def passes(module: Policy | Critic, micro: MicroBatch, A: Tensor) -> None:
    """Forward and backward pass of a row, as in train.py."""
    if isinstance(module, Policy):
        logp, _ = module(micro)
        loss, _ = ppo.policy_loss(logp, logp.detach(), A)
    else:
        loss = ppo.value_loss(module(micro), A)
    (loss / len(A)).backward()


def update(
    scale: Scale, folder: Path, name: str, role: str, tokens: int, sharding: Sharding
) -> Row:
    """The passes, and the optimizer's step. What by tools/plan.py would fill the GPU is left out: the step, or all."""
    micro = row_of(scale, name, tokens)
    cfg = cfg_of(scale, folder, name, micro, sharding)
    whole, without = (reckoned(cfg, role, step) for step in (True, False))
    if without > memory():
        return {
            "plan GB": without,
            "note": "too large by tools/plan.py, even without the optimizer",
        }
    module, optimizer = opened(scale, name, role, sharding)
    A, parameters = (
        torch.randn(len(micro.actions), device=distributed.device()),
        list(module.parameters()),
    )
    once, with_step = partial(passes, module, micro, A), whole <= memory()
    if not with_step:
        optimizer.state.clear()  # moments that shorter rows left

    def step() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        ppo.optimizer_step(optimizer, lr=1e-6)

    with torch.compiler.set_stance(
        "default" if GPU else "force_eager"
    ):  # a CPU would compile for a minute
        once()
        if with_step:
            ppo.optimizer_step(optimizer, lr=1e-6)  # makes the moments
        with peak() as row:
            span = timed(once, 2 if "7B" in name else 3)
            gradients = [p.grad for p in parameters]  # a step clears them
            row |= {"step seconds": timed(step)} if with_step else {}
    optimizer.zero_grad(set_to_none=True)
    row |= (
        {"plan GB": whole}
        if with_step
        else {"plan GB": without, "note": f"no optimizer: {whole:.0f} GB by tools/plan.py"}
    )
    return row | rates(micro, span, 3 * operations(plan.shape(cfg.model), micro, role))


def predict(scale: Scale, folder: Path, name: str, role: str, tokens: int) -> Row:
    """A forward pass without gradient; the moments are in memory if an update came before."""
    micro = row_of(scale, name, tokens)
    cfg = cfg_of(scale, folder, name, micro, CHECKPOINTING)
    module, optimizer = opened(scale, name, role, CHECKPOINTING)
    with torch.no_grad():
        module(micro)
        with peak() as row:
            span = timed(partial(module, micro))
    if role == "critic":
        items = ["critic weights", "activations", "gathered weights"] + ["critic moments"] * bool(
            optimizer.state
        )
        row["plan GB"] = sum(plan.memory(cfg)["values"][item] for item in items) / 1e9
    return row | rates(micro, span, operations(plan.shape(cfg.model), micro, role))


def matrix_product(side: int) -> Row:
    a, b = (torch.randn(side, side, device=distributed.device(), dtype=DTYPE) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            a @ b

    ten()
    span = timed(ten) / 10
    return {"seconds": span, "TFLOP/s": 2 * side**3 / span / 1e12}


def ways() -> dict[str, Callable[[MicroBatch, float], Attention]]:
    """Attention on a packed row in every way there is here: name → what prepares a row, once for all layers."""
    found = {"packed": unfolded, "SDPA with mask": masked}
    if GPU and find_spec("torch.nn.attention.varlen"):
        found["varlen_attn"] = varlen
    if GPU and find_spec("flash_attn"):
        found["flash_attn"] = flash
    return found | ({"flex_attention": flex} if GPU else {})


def unfolded(micro: MicroBatch, scaling: float) -> Attention:
    """What training uses."""
    known = {"cu_seqlens": micro.cu_seqlens, "longest": micro.max_seqlen, "scaling": scaling}
    return lambda q, k, v: packing.packed_attention(None, q, k, v, None, **known)[0]


def masked(micro: MicroBatch, scaling: float) -> Attention:
    """What transformers does without flash attention: a [T × T] mask, and keys and values repeated for every head."""
    of = sequence_of(micro)
    mask = (of[:, None] == of[None]).tril()[None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2)

    return attend


def varlen(micro: MicroBatch, scaling: float) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    causal: dict[str, object] = {"scale": scaling, "window_size": (-1, 0)}
    if (
        "enable_gqa" in signature(varlen_attn).parameters
    ):  # releases without it take fewer heads of keys unasked
        causal["enable_gqa"] = True
    at = (micro.cu_seqlens, micro.cu_seqlens, micro.max_seqlen, micro.max_seqlen)
    return lambda q, k, v: varlen_attn(*tokens_first(q, k, v), *at, **causal)[None]


def flash(micro: MicroBatch, scaling: float) -> Attention:
    from flash_attn import flash_attn_varlen_func

    at = (micro.cu_seqlens, micro.cu_seqlens, micro.max_seqlen, micro.max_seqlen)
    return lambda q, k, v: flash_attn_varlen_func(
        *tokens_first(q, k, v), *at, softmax_scale=scaling, causal=True
    )[None]


def flex(micro: MicroBatch, scaling: float) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    of, T = sequence_of(micro), micro.input_ids.numel()
    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (of[i] == of[j]), None, None, T, T, device=of.device
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(
        q, k, v, block_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def sequence_of(micro: MicroBatch) -> Tensor:
    """(T,) which sequence a token belongs to."""
    lengths = micro.cu_seqlens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x[0].transpose(0, 1) for x in tensors]


def attention(scale: Scale, name: str, tokens: int, way: str) -> Row:
    """One way, timed, and compared with the one that training uses."""
    micro, (hidden, _, heads, kv_heads, *_) = row_of(scale, name, tokens), scale.models[name]
    size, how = hidden // heads, {"device": distributed.device(), "dtype": DTYPE}
    q, k, v = (
        torch.randn(1, tokens, n, size, **how).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    g = torch.randn(1, tokens, heads, size, **how)

    def both(attend: Attention) -> list[Tensor]:
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]

    first, this = (prepare(micro, size**-0.5) for prepare in (unfolded, ways()[way]))
    pairs = zip(both(first), both(this), strict=True)
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    with peak() as row:
        span = timed(partial(both, this))
    flops = 3 * 2 * heads * size * float((micro.cu_seqlens.diff().double() ** 2).sum())
    return row | rates(micro, span, flops) | {"difference": difference}


def head(scale: Scale, folder: Path, name: str, chunk: int) -> Row:
    """The vocabulary head with `chunk` logits alive; what the narrow layer below it takes counts as the head's."""
    name, count = name + HEAD, scale.head_tokens // scale.sequence
    shape = config(scale, name)
    micro = packed([scale.sequence] * count, 2, shape.vocab_size)
    A = torch.randn(len(micro.actions), device=distributed.device())
    module, _ = opened(scale, name, "policy", PLAIN)
    with mock.patch.dict(policy.CHUNK, {A.device.type: chunk}):
        passes(module, micro, A)
        with peak() as row:
            span = timed(partial(passes, module, micro, A))
        row["plan GB"] = reckoned(cfg_of(scale, folder, name, micro, PLAIN), "policy", step=False)
    return row | rates(micro, span, 3 * 2 * shape.vocab_size * shape.hidden_size * len(A))


def offload(scale: Scale, name: str) -> Row:
    """`distributed.on_device`, as between the phases of a step with --offload."""
    module, optimizer = opened(scale, name, "policy", CHECKPOINTING)
    size = (
        sum(
            t.numel() * t.element_size()
            for t in checkpoint.tensors({"policy": (module, optimizer)}).values()
        )
        / 1e9
    )
    spans = []
    for _ in range(3):
        start = now()
        with distributed.on_device(True, module, optimizer):
            loaded = now()
        spans.append((loaded - start, now() - loaded))
    let_go()
    back, there = (
        min(span) for span in zip(*spans[1:], strict=True)
    )  # at first all was on the GPU still
    note = f"to the host {there:.2g} s, to the GPU {back:.2g} s"
    return {"seconds": back + there, "GB/s": 2 * size / (back + there), "note": note}


def save(scale: Scale, folder: Path, name: str) -> Row:
    """`checkpoint.Checkpoints`: the loop stands still while tensors are copied, and a thread writes them."""
    module, optimizer = opened(scale, name, "policy", CHECKPOINTING)
    start = now()
    with checkpoint.Checkpoints(
        folder / "checkpoints", Config(), {"policy": (module, optimizer)}
    ) as checkpoints:
        checkpoints.save(1, [])
        copied = now() - start
    written = now() - start
    size = sum(file.stat().st_size for file in (folder / "checkpoints" / "step-1").iterdir()) / 1e9
    return {
        "seconds": written,
        "GB/s": size / written,
        "note": f"{size:.3g} GB; the loop stands still for {copied:.2g} s",
    }


def end_to_end(scale: Scale, folder: Path, base: Callable[[], Path], engine: str) -> Row:
    """train.py with the settings of the tiny model, in a process of its own; no evaluation."""
    let_go()  # vLLM refuses a GPU that has less than its share left
    path = base()
    flags = TINY | scale.train | {"model": path, "data": path / "train.json"}
    flags |= {"engine": engine, "name": engine, "runs": folder}
    command = [sys.executable, str(ROOT / "train.py")]
    command += [
        word
        for name, value in flags.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    ours = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )  # of this process's group
    env = {name: value for name, value in os.environ.items() if name not in ours} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=START
    )
    if done.returncode:
        raise RuntimeError(f"train.py: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    first, *steps = map(json.loads, (folder / engine / "metrics.jsonl").open())
    names = {"seconds": "seconds", "tokens/s": "tokens_per_second"}
    return {key: median(step[name] for step in steps) for key, name in names.items()} | {
        "difference": first["logp_gap"]
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


def finished(rows: list[Row], left_out: list[str]) -> tuple[list[Row], list[str]]:
    """The rows with MFU and all columns, and the notes."""
    rate = max(
        (row.get("TFLOP/s", 0) for row in rows if row["what"] == "matrix product"), default=0
    )
    shares = [
        {"MFU %": 100 * row["TFLOP/s"] / rate} if rate and "TFLOP/s" in row else {} for row in rows
    ]
    table = [
        {column: (row | share).get(column) for column in COLUMNS}
        for row, share in zip(rows, shares, strict=True)
    ]
    kind = str(DTYPE).removeprefix("torch.")
    notes = [f"MFU is the share of {rate:.3g} TFLOP/s, the faster matrix product ({kind})."]
    return table, notes + [f"No time was left for: {'; '.join(left_out)}."] * bool(left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy model, on a CPU too")
    parser.add_argument(
        "--budget", type=float, default=440, help="seconds after which nothing more is begun"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of gpu.json")
    args = parser.parse_args()
    if not (GPU or args.toy):
        sys.exit(
            "benchmarks/gpu.py: there is no GPU; --toy runs every measurement with a toy model on a CPU"
        )
    log.versions()  # part of the record; what is missing should show now, and not after all measurements
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.toy:
            base = partial(raw_base, folder)
        else:  # two minutes of a CPU, while the GPU is measured
            base = partial(
                finished_base,
                subprocess.Popen([sys.executable, "-m", "toy.tiny"], cwd=ROOT, stdout=sys.stderr),
            )
        distributed.start(timeout_minutes=10)
        rows, left_out = run(planned(TOY if args.toy else FULL, folder, base), args.budget)
    record.record("gpu", "Training on one GPU", *finished(rows, left_out), args.out)
    distributed.stop()


if __name__ == "__main__":
    main()
