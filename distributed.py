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
from collections.abc import Callable, Iterator, Sequence
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

# cuDNN's attention, which torch prefers on newer GPUs, makes a plan for every new shape: seconds of
# each step. vLLM turns it off, too; so a run and its replay without vLLM have the same kernels.
torch.backends.cuda.enable_cudnn_sdp(False)

T = TypeVar("T")
_started = False
_group: dict[str, Any] = {}  # arguments of init_process_group, but for the store's prefix
_joins = 0  # how often this process has made its group


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


def start(timeout_minutes: float, alone: bool = True) -> None:
    """Join the process group that torchrun prepared; with `alone`, on a GPU without torchrun, make
    one of a single rank (FSDP needs one).

    A rank may wait `timeout_minutes` for another one that still samples or grades. Objects and
    checkpoints go over gloo, tensors of GPUs over nccl.
    """
    global _started
    on_gpu = torch.cuda.is_available()
    if on_gpu and alone and "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single | {"MASTER_PORT": str(_free_port())})
    if "RANK" not in os.environ:
        return
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(60 * timeout_minutes)))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "cpu:gloo"
    limit = timedelta(minutes=timeout_minutes)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
    _group.update(backend=backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    _join()
    _started = True


def _join() -> None:
    """Make the process group. The store may still hold the addresses of an earlier one (of ranks
    that torchrun has restarted, or of these ranks before `rejoin`), so each has its own prefix."""
    global _joins
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"{restarts}/{_joins}", _group["store"])
    dist.init_process_group(**_group | {"store": store})
    _joins += 1


def rejoin() -> None:
    """Make the ranks' process group again if it is gone: vLLM destroys all groups when it shuts
    down. Every rank calls it. Groups made from the old one (of sharded models, of checkpoints) stay
    gone."""
    if _started and not dist.is_initialized():
        _join()


def timeout() -> timedelta | None:
    """How long a rank waits for the others: for groups that are made beside the ranks' own, since
    torch does not pass it on. None without a process group."""
    return _group.get("timeout")


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


def load_pretrained(
    model_class: Any, path: str, other_head: Sequence[str] = (), **settings: Any
) -> PreTrainedModel:
    """`load_whole(model_class, path)` in float32 with packed attention, on rank 0. On the other
    ranks the same model, whose memory is reserved and never touched until `apply_fsdp` fills it:
    only rank 0 ever holds a whole model. `settings` go into the model's configuration.

    Raises ValueError, on all ranks, when the folder's weights are not the model's.
    """
    how = {"dtype": torch.float32, "attn_implementation": "packed"}
    loaded = []

    def load() -> None:
        loaded.append(load_whole(model_class, path, other_head, **settings, **how))

    on_rank0(load)
    if rank() == 0:
        return loaded[0]
    from_config = getattr(model_class, "from_config", None) or model_class._from_config
    with no_init_weights():
        model = from_config(AutoConfig.from_pretrained(path, **PLAIN_OUTPUT, **settings), **how)
    model.tie_weights()  # part of the initialization that was left out
    return model


# A model's output has these fields, whatever its configuration asks for.
PLAIN_OUTPUT = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def load_whole(
    model_class: Any, path: str, other_head: Sequence[str] = (), **settings: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(path, **settings)` on this rank: the one place that reads the
    weights of a model folder.

    Raises ValueError, in one line that names the weight, when the folder does not hold the model
    whole: a weight is missing, left over, of another shape or not finite, or the configuration ties
    two weights that differ. Only weights of the modules named `other_head` may be missing or left
    over.
    """
    lenient = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(path, **PLAIN_OUTPUT, **settings, **lenient)
    _require_all_weights(path, report, other_head)
    # transformers leaves out of its list the pairs that it found to differ.
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if name not in model.all_tied_weights_keys:
            raise ValueError(
                f"{path}: its config.json ties {name} to {other}, but its weights hold two that "
                'differ; set "tie_word_embeddings" to false there'
            )
    name = weight_not_finite(model)
    if name:
        raise ValueError(f"{path}: the weight {name} holds NaN or infinite numbers")
    return model


def _require_all_weights(path: str, report: dict[str, Any], other_head: Sequence[str]) -> None:
    """Raise ValueError when the folder lacks weights, which transformers would fill with random
    numbers, or holds weights that the model does not have."""
    problems = {
        "is missing": report["missing_keys"],
        "has another shape than the model's": [key for key, *_ in report["mismatched_keys"]],
        "is not part of the model": report["unexpected_keys"],
    }
    for problem, keys in problems.items():
        names = sorted(key for key in keys if key.split(".")[0] not in other_head)
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{path}: the weight {names[0]} {problem}{more}")


def weight_not_finite(module: torch.nn.Module) -> str:
    """The name of the first weight, or buffer stored with the weights, that holds NaN or infinite
    numbers; "" where all are finite. Of a sharded module, every rank must call it."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        whole = full_tensor(tensor)
        # The sum is not finite where any number is not; it is quicker, but it may overflow.
        if not (whole.sum().isfinite() or whole.isfinite().all()):
            return name
    return ""


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
    ranks = torch.arange(world_size()).view(replicas, -1)
    # init_device_mesh would make groups that wait for torch's default time.
    copies, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout())
    shards, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout())
    return DeviceMesh.from_group([copies, shards], kind, ranks, mesh_dim_names=("copy", "shard"))


def _sum_gradients(module: torch.nn.Module) -> None:
    """Sum gradients over ranks instead of averaging: losses are divided by global token counts."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and world_size() > 1:
            part.set_force_sum_reduction_for_comms(True)  # gloo's only way of not averaging
            part.set_gradient_divide_factor(1.0)


def _fill_shards(module: torch.nn.Module, whole: dict[str, Tensor]) -> None:
    """Distribute rank 0's whole parameters over the shards, one parameter at a time. Every rank
    gets rank 0's buffers: some are stored with the weights, and no rank but 0 has read them."""
    for name, p in module.named_parameters():
        if rank() == 0:
            source = whole.pop(name).to(p.device)
        else:
            source = torch.empty(p.shape, device=p.device)
        dist.broadcast(source, 0)
        with torch.no_grad():
            p.copy_(distribute_tensor(source, p.device_mesh, p.placements, src_data_rank=None))
    buffers = on_rank0(lambda: {name: b.cpu() for name, b in module.named_buffers()})
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


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
