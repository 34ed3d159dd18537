"""What would go wrong on GPUs alone, as far as a CPU can show it: process groups after vLLM's end,
their timeouts, the choice of attention kernels, graph breaks, devices of threads, and programs that
start without packages that a machine lacks."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from conftest import SMALL_RUN, Ended, random_rollouts, sums, write_orz
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import distributed
import evaluate
import packing
import ppo
import rollout
from checkpoint import Checkpoints
from config import Config
from critic import load_critic
from data import Problem
from distributed import Sharding
from policy import load_policy
from reports import log
from tools import ask

ROOT = Path(__file__).parent.parent
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"


def run(*words: object, **env: str) -> str:
    """Run Python with these words in a process of its own; returns what it prints. Its output is
    shown when it fails."""
    command = [sys.executable, *map(str, words)]
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── process groups ────────────────────────────────────────────────────────────────────────────────


def test_two_models_in_one_evaluation(
    tmp_path: Path, model_folder: Path, untied_folder: Path
) -> None:
    """vLLM destroys all process groups when the first model is done."""
    pytest.importorskip("vllm")
    data = write_orz(tmp_path / "two.json", [(p.question, p.answer) for p in sums()[:2]])
    torchrun = [*TORCHRUN.split(), 1, "evaluate.py"]
    models = ["--engine", "vllm", "--model", model_folder, untied_folder]
    flags = "--samples 1 --prompt-tokens 64 --response-tokens 8 --grader-workers 1".split()
    run(*torchrun, *models, *flags, "--benchmarks", f"two={data}", "--out", tmp_path / "out")
    results = [json.loads(file.read_text()) for file in tmp_path.glob("out/*/results.json")]
    assert [result["two"]["problems"] for result in results] == [2, 2]


@pytest.mark.slow
def test_training_with_vllm_ends_on_every_rank(tmp_path: Path, untied_folder: Path) -> None:
    """After the export vLLM is closed, and then rank 0 draws the run's figures."""
    pytest.importorskip("vllm")
    data = write_orz(tmp_path / "data.json", [(p.question, p.answer) for p in sums()])
    flags = ["--engine", "vllm", "--model", untied_folder, "--data", data, "--steps", 1]
    run(*TORCHRUN.split(), 2, "train.py", *SMALL_RUN, *flags, "--name", "x", "--runs", tmp_path)
    assert (tmp_path / "x" / "report.html").exists()


def test_every_group_waits_as_long_as_the_ranks_and_a_group_can_be_made_again(
    tmp_path: Path, model_folder: Path
) -> None:
    """Two ranks, each with a copy of the models: groups of ranks, of copies and of checkpoints."""
    run(*TORCHRUN.split(), 2, __file__, "groups", tmp_path, model_folder)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(seen["timeouts"]) >= 4 and set(seen["timeouts"]) == {7 * 60}
        assert seen["gone"] and seen["ranks"] == [0, 1]


def groups(out: Path, model_path: Path) -> None:
    """On two ranks: the timeouts of all process groups of a run with hybrid sharding, and whether
    the ranks reach each other after all groups have been destroyed."""
    distributed.start(7)
    policy = load_policy(str(model_path), Sharding(replicas=2))
    trained = {"policy": (policy, ppo.adamw(list(policy.parameters())))}
    Checkpoints(out, Config(), trained).thread.shutdown()
    found = [
        group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map
    ]
    timeouts = [backend.options._timeout.total_seconds() for backend in found]
    dist.destroy_process_group()
    gone = not dist.is_initialized()
    distributed.rejoin()
    ranks = distributed.all_gather_objects(distributed.rank())
    seen = {"timeouts": timeouts, "gone": gone, "ranks": ranks}
    (out / f"{ranks[distributed.rank()]}.json").write_text(json.dumps(seen))
    distributed.stop()


def test_an_evaluation_makes_no_group_of_its_own(
    tmp_path: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, too: with a group, vLLM would be started by a launcher that there is not."""
    started = []
    start = distributed.start

    def start_on_gpu(*minutes: float, **settings: bool) -> None:
        with monkeypatch.context() as gpu:
            gpu.setattr(torch.cuda, "is_available", lambda: True)
            gpu.setattr(torch.cuda, "set_device", lambda _: None)
            gpu.setattr(distributed, "_join", lambda: started.append(True))
            gpu.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 1)]))
            gpu.setattr(distributed, "_started", False)
            start(*minutes, **settings)
        distributed._group.clear()

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "start", start_on_gpu)
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text('{"response": "<answer>1</answer>", "gold": "1"}\n')
    assert call(evaluate.main, "--responses", recorded).code == 0
    assert not started
    with monkeypatch.context() as variables:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            variables.setenv(name, "")  # so that they are removed again
            variables.delenv(name)
        start_on_gpu(1)  # a trainer does make one
    assert started


# ── samplers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asleep", [True, False])
def test_arguments_of_vllm_on_a_gpu(asleep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are float32, and vLLM can sleep only where its caller wants that."""
    asked: dict[str, Any] = {}
    slept = []

    def fake_llm(**arguments: Any) -> SimpleNamespace:
        asked.update(arguments)
        return SimpleNamespace(sleep=lambda level: slept.append(level))

    fake = SimpleNamespace(LLM=fake_llm, SamplingParams=None, __spec__=ModuleSpec("vllm", None))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rollout, "_prepare_vllm", lambda on_gpu: None)
    cfg = Config(engine="vllm")
    rollout.open_sampler(cfg, "folder", None, [0], asleep=asleep)
    assert asked["dtype"] == "bfloat16" and asked["hf_overrides"] == {"head_dtype": "float32"}
    assert asked["enable_sleep_mode"] == asleep
    assert slept == [2] * asleep


def test_a_closed_vllm_frees_its_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one refuses a GPU whose memory is taken."""
    sampler = rollout.VllmSampler.__new__(rollout.VllmSampler)
    freed = []

    class Model:
        """Held by a cycle, as vLLM's is."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(True)

    core = SimpleNamespace(shutdown=lambda: None)
    sampler.llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core), model=Model())
    sampler.close()
    assert freed


def test_values_are_asked_in_the_samplers_dtype(
    tmp_path: Path,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """On a GPU that is bfloat16; the value head stays float32."""
    critic = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    critic.save_pretrained(tmp_path)
    loaded = []

    def load(path: str) -> Any:
        loaded.append(load_critic(path))
        return loaded[-1]

    monkeypatch.setattr(ask, "load_critic", load)
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        assert ask.torch_dtype("auto") == torch.bfloat16
    (response,) = random_rollouts(sums()[:1], 20, [5])
    ask.show_values(str(tmp_path), "bfloat16", tokenizer, response)
    assert "V(s_t)" in capsys.readouterr().out
    (critic,) = loaded
    assert {p.dtype for p in critic.model.base_model.parameters()} == {torch.bfloat16}
    assert critic.model.score.weight.dtype == torch.float32


# ── attention ─────────────────────────────────────────────────────────────────────────────────────


def test_every_program_turns_cudnn_attention_off() -> None:
    """Each in a fork of one process, since the switch is global."""
    print_switches = """if True:
        import importlib, os, torch, transformers
        assert torch.backends.cuda.cudnn_sdp_enabled()
        for name in "train evaluate tools.ask rollout packing benchmarks.gpu".split():
            if not os.fork():
                importlib.import_module(name)
                print(name, torch.backends.cuda.cudnn_sdp_enabled(), flush=True)
                os._exit(0)
            os.wait()
    """
    lines = run("-c", print_switches).splitlines()
    assert len(lines) == 6 and all(line.endswith("False") for line in lines)


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes, by its documentation and that of
    FlashAttention 2: queries (T, heads, d), keys and values (K, heads, d) → (T, heads, d), each
    segment by itself. Its last query stands at its last key; a query sees `window_size` keys to
    the left and right of its own place, where -1 is all."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    queries, keys = (list(pairwise(bounds.tolist())) for bounds in (cu_seq_q, cu_seq_k))
    assert max_q == max(end - start for start, end in queries)
    assert max_k == max(end - start for start, end in keys)
    outputs = []
    for (start_q, end_q), (start_k, end_k) in zip(queries, keys, strict=True):
        q = query[start_q:end_q].transpose(0, 1)
        k, v = (x[start_k:end_k].transpose(0, 1) for x in (key, value))
        groups = len(q) // len(k)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        to_the_left = place - torch.arange(k.shape[1])
        left, right = (1000 if size == -1 else size for size in window_size)
        sees = (to_the_left <= left) & (-to_the_left <= right)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("prompts", [1, 3, 6])
def test_the_kernel_for_packs_gives_what_unfolding_gives(
    window: int | None, kv_heads: int, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of six responses to so many prompts, through a stand-in for the kernel,
    which CPUs do not have."""
    torch.manual_seed(0)
    problems = [Problem("", "", "", tuple(range(k, 2 * k + 3))) for k in range(prompts)]
    rollouts = random_rollouts(problems, 9, [5, 1, 9, 3, 2, 8])
    (micro,) = packing.micro_batches(rollouts, range(6), 1000)
    sizes = [(1, heads, micro.input_ids.numel(), 32) for heads in (4, kv_heads, kv_heads)]
    states = [torch.randn(size, requires_grad=True) for size in sizes]
    known = {"layout": micro.layout, "sliding_window": window}

    def outputs_and_gradients() -> list[Tensor]:
        out, _ = packing.packed_attention(torch.nn.Identity(), *states, None, **known, scaling=0.3)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), states)]

    unfolded = outputs_and_gradients()
    monkeypatch.setattr(packing, "VARLEN", attend_one_by_one)
    assert all(map(torch.equal, unfolded, outputs_and_gradients()))  # a CPU goes on unfolding
    monkeypatch.setattr(packing, "_varlen_takes", lambda *_: True)
    by_kernel = outputs_and_gradients()
    for ours, expected in zip(by_kernel, unfolded, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_kernel_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on GPUs, head sizes that it has, keys and values of one size."""

    def states(size: int = 64, on_gpu: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
        return SimpleNamespace(is_cuda=on_gpu, dtype=dtype, shape=(1, 4, 10, size))

    assert packing._varlen_kernel() is None and not packing._varlen_takes(states(), states())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packing, "VARLEN", packing._varlen_kernel())
    assert packing.VARLEN.keywords == {"enable_gqa": True}  # in the version that is installed
    assert packing._varlen_takes(states(), states())
    assert not packing._varlen_takes(states(80), states(80))
    assert not packing._varlen_takes(states(192), states(128))
    assert not packing._varlen_takes(states(dtype=torch.float32), states(dtype=torch.float32))
    assert not packing._varlen_takes(states(on_gpu=False), states(on_gpu=False))
    older = SimpleNamespace(varlen_attn=attend_one_by_one)  # takes grouped heads without being told
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    assert packing._varlen_kernel() is attend_one_by_one
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert packing._varlen_kernel() is None


def test_a_compiled_layer_is_one_graph(tmp_path: Path) -> None:
    """Under FSDP even the numbers of heads are symbols to the compiler."""
    free_port = str(distributed._free_port())
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    seen = json.loads(run(__file__, "graphs", tmp_path, **alone, **address).splitlines()[-1])
    assert seen["breaks"] == 0
    assert seen["graphs"] == 1  # the layers share it, whatever the lengths


def graphs(out: Path) -> None:
    """Print how many graphs and graph breaks a compiled policy of two layers has under FSDP."""
    distributed.start(1)
    tokenizer_size = 64
    config = Qwen2Config(
        vocab_size=tokenizer_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(out)
    compiled = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable:
        compiled.append(graph)
        return graph.forward

    torch.compile = partial(torch.compile, backend=count)
    policy = load_policy(str(out), Sharding(compile=True))
    problem = Problem("", "", "", (1, 2, 3))
    for lengths in ([5, 2, 9], [7, 7, 2, 3], [12, 3]):
        (micro,) = packing.micro_batches(
            random_rollouts([problem], tokenizer_size, lengths), range(len(lengths)), 1000
        )
        with torch.no_grad():
            policy(micro)
    breaks = torch._dynamo.utils.counters["graph_break"]
    print(json.dumps({"graphs": len(compiled), "breaks": sum(breaks.values())}), flush=True)
    distributed.stop()


# ── threads and packages ──────────────────────────────────────────────────────────────────────────


def test_the_writer_of_checkpoints_uses_this_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.update({threading.get_ident(): device})
    )
    model = SimpleNamespace(config=SimpleNamespace())
    trained = {"policy": (SimpleNamespace(model=model), None)}
    writer = Checkpoints(Path(), Config(), trained).thread
    assert chosen.get(writer.submit(threading.get_ident).result()) == 3
    writer.shutdown()


LACKING = "vllm tyro math_verify latex2sympy2_extended antlr4 docstring_parser typeguard".split()


def test_the_gpu_benchmark_starts_without_packages_that_a_gpu_machine_lacks() -> None:
    """And so does whatever trains; only command lines and the grader's workers need them."""
    start = f"""if True:
        import runpy, sys
        for name in {LACKING}:
            sys.modules[name] = None  # importing it fails
        import train
        sys.argv[1:] = ["--help"]
        runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
    """
    assert "--toy" in run("-c", start)


def test_a_table_names_the_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "math-verify":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(log, "version", installed)
    assert log.versions() == dict.fromkeys(("torch", "transformers", "numpy"), "1.0")


if __name__ == "__main__":
    job, *paths = sys.argv[1:]
    {"groups": groups, "graphs": graphs}[job](*map(Path, paths))
