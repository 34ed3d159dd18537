"""Ranks: sharded models, offloading, and the few things that ranks tell each other.

    torchrun --nproc-per-node 8 train.py …      8 ranks, one GPU each
    python train.py …                           one process; on a CPU without a process group

Every rank runs the same loop and knows every rollout of the step. What is computed from rollouts
alone (advantages, mini-batches, denominators, metrics) is computed by every rank and needs no
communication. The work on models is divided: a rank samples its share of the responses, grades
them, and takes its packs of every mini-batch (`packing.assign_packs`). Gradients are *sums* over
ranks, of losses divided by global token counts, so that world size changes nothing but rounding.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

T = TypeVar("T")
_started = False


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


def start(timeout_minutes: float) -> None:
    """Join the process group that torchrun prepared; on a GPU without torchrun, make one of a
    single rank.

    A rank may wait `timeout_minutes` for another one that still samples or grades. Objects and
    checkpoints go over gloo, tensors of GPUs over nccl.
    """
    global _started
    on_gpu = torch.cuda.is_available()
    if on_gpu and "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    if "RANK" not in os.environ:
        return
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(60 * timeout_minutes)))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "cpu:gloo"
    limit = timedelta(minutes=timeout_minutes)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
    # When torchrun restarts ranks, its store still holds the addresses of those that are gone.
    attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=ranks, timeout=limit)
    _started = True


def started() -> bool:
    """Whether `start` made a process group. (vLLM alone in a process makes one of its own.)"""
    return _started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop() -> None:
    """End the process at once, if it is one of several; the last call of a rank that has finished.
    The interpreter is not shut down: a gloo thread may hold the last collective's tensor a little
    longer, and freeing it during the shutdown would abort the process."""
    if started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """This process's number, from 0; rank 0 writes the files."""
    return dist.get_rank() if started() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if started() else 1


def device() -> str:
    """Where this rank computes."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


# ── collectives ───────────────────────────────────────────────────────────────────────────────────


def on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank. What it raises is raised on
    every rank: all of them stop with one message, and none waits for a rank that is gone."""
    if not started():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def all_gather_objects(local_object: T) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    if world_size() == 1:
        return [local_object]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, local_object)
    return objects


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(value: float) -> float:
    """Maximum over ranks."""
    return max(all_gather_objects(value))


# ── models ────────────────────────────────────────────────────────────────────────────────────────


class Sharding(NamedTuple):
    """How models are distributed over the ranks; see the settings of the same names."""

    replicas: int = 1
    activation_checkpointing: bool = False
    offload: bool = False
    compile: bool = False


def load_pretrained(auto_class: Any, path: str, **settings: Any) -> PreTrainedModel:
    """`auto_class.from_pretrained(path)` in float32 with packed attention, on rank 0. On the other
    ranks the same model, whose memory is reserved and never touched until `apply_fsdp` fills it:
    only rank 0 ever holds a whole model. `settings` go into the model's configuration."""
    how = {"dtype": torch.float32, "attn_implementation": "packed"}
    if rank() == 0:
        return auto_class.from_pretrained(path, **settings, **how)
    with no_init_weights():
        model = auto_class.from_config(AutoConfig.from_pretrained(path, **settings), **how)
    model.tie_weights()  # part of the initialization that was left out
    return model


def apply_fsdp(
    module: torch.nn.Module, sharding: Sharding, head: torch.nn.Module | None = None
) -> None:
    """Put `module` (a policy or critic) where and how it trains: FSDP2 over the ranks, and the
    compilation, activation checkpointing and offloading that `sharding` asks for.

    Each rank keeps 1/shards of every parameter. A decoder layer is gathered when it computes and
    freed afterwards. Weights, gradients and their sums are float32; on GPUs the gathered layers
    compute in bfloat16. Embedding, final norm and vocabulary head are one group, at the root.
    `head`, if given, is a group of its own that computes in float32 (the value head). Without a
    process group the module stays whole.
    """
    # transformers lists here the classes of a model that must stay whole: its decoder layers.
    layer_names = module.model._no_split_modules or ()
    layers = [m for m in module.modules() if type(m).__name__ in layer_names]
    for layer in layers:
        if sharding.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if sharding.activation_checkpointing:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    if not started():
        module.to(device())
        return
    whole = {name: p.detach() for name, p in module.named_parameters()}
    mesh = _mesh(sharding.replicas)
    compute_dtype = torch.bfloat16 if torch.cuda.is_available() else None
    mixed_precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed_precision)
    if head is not None:
        fully_shard(head, mesh=mesh)
    fully_shard(module, mesh=mesh, mp_policy=mixed_precision, reshard_after_forward=True)
    _sum_gradients(module)
    _fill_shards(module, whole)
    if sharding.offload:
        _move(module, None, "cpu")


def _mesh(replicas: int) -> DeviceMesh:
    """The ranks as one group of shards, or as `replicas` groups that each hold a copy."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if replicas == 1:
        return init_device_mesh(kind, (world_size(),))
    shape = (replicas, world_size() // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))


def _sum_gradients(module: torch.nn.Module) -> None:
    """Sum gradients over ranks instead of averaging: losses are divided by global token counts."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and world_size() > 1:
            part.set_force_sum_reduction_for_comms(True)  # gloo's only way of not averaging
            part.set_gradient_divide_factor(1.0)


def _fill_shards(module: torch.nn.Module, whole: dict[str, Tensor]) -> None:
    """Distribute rank 0's whole parameters over the shards, one parameter at a time."""
    for name, p in module.named_parameters():
        if rank() == 0:
            source = whole.pop(name).to(p.device)
        else:
            source = torch.empty(p.shape, device=p.device)
        dist.broadcast(source, 0)
        with torch.no_grad():
            p.copy_(distribute_tensor(source, p.device_mesh, p.placements, src_data_rank=None))


def full_tensor(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole of a sharded parameter in `dtype`; every rank must call it."""
    cast = parameter.detach().to(dtype)
    return cast.full_tensor() if isinstance(cast, DTensor) else cast


@contextmanager
def on_device(
    enabled: bool, module: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Offloading (§3.1): with `enabled`, module and optimizer state are on this rank's device
    inside the context, and in host memory outside of it."""
    if not enabled or module is None:
        yield
        return
    _move(module, optimizer, device())
    yield
    _move(module, optimizer, "cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _move(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, where: str) -> None:
    module.to(where)
    if optimizer is None:
        return
    for state in optimizer.state.values():
        state.update({name: value.to(where) for name, value in state.items()})
