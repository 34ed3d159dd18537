"""distributed.py: the number of ranks changes nothing; samplers and sharded trainers agree; ranks
wait for each other and stop together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from config import Config
from packing import Size, assign_packs

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "critic_steps": 4,
    "policy_lr": 1e-4,
    "critic_lr": 1e-4,
    "policy_lr_warmup": 1,
    "critic_lr_warmup": 1,
    "micro_tokens": 250,
}
OF_CRITIC: dict[str, Any] = {"critic_only_steps": 1, "critic_model": "", "lam_adaptive": 0.2}


def on(ranks: int, job: str, out: Path, model_path: Path, **settings: Any) -> None:
    """Run a job of on_ranks.py under torchrun; its output is shown when it fails."""
    out.mkdir(parents=True, exist_ok=True)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    command = [sys.executable, *torchrun, on_ranks.__file__, job, str(out), str(model_path)]
    command.append(json.dumps(SETTINGS | settings))
    tests = Path(on_ranks.__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def same_updates(a: Path, b: Path) -> None:
    """Loss, gradients, values and updated weights to 1e-5 in float32."""
    x, y = (load_file(folder / "tensors.safetensors") for folder in (a, b))
    assert x.keys() == y.keys()
    assert sum(name.startswith("gradient") for name in x) > 50
    for name in x:
        assert float((x[name] - y[name]).norm()) <= 1e-5 * max(1.0, float(x[name].norm())), name
    one, other = (json.loads((folder / "stats.json").read_text()) for folder in (a, b))
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {}),
        (2, {"replicas": 2, "activation_checkpointing": True, "offload": True} | OF_CRITIC),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"replicas": 2}, marks=pytest.mark.slow),
    ],
)
def test_world_size_changes_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, ranks: int, settings: dict[str, Any]
) -> None:
    """Lengths are uneven. Some ranks have fewer packs than others, and with 4 mini-batches of 13
    responses on 4 ranks some have none. The head is tied, and with hybrid sharding it is not;
    there the critic is smaller, it learns alone in the first step, and λ is of each response."""
    model_path = random_model(tmp_path / "model", tokenizer, tied=not settings)
    (tmp_path / "1").mkdir()
    of_critic = {name: settings[name] for name in OF_CRITIC if name in settings}
    if "critic_model" in settings:
        small = random_model(tmp_path / "small", tokenizer, tied=True, hidden_size=32)
        of_critic["critic_model"] = str(small)
    on_ranks.updates(tmp_path / "1", model_path, Config(**SETTINGS | of_critic))
    on(ranks, "updates", tmp_path / "many", model_path, **settings | of_critic)
    same_updates(tmp_path / "1", tmp_path / "many")


@pytest.fixture
def no_leftover_shared_memory() -> None:
    """vLLM's CPU build does not remove the shared memory of a tensor-parallel engine, and cannot
    create it again while it is there."""
    for leftover in Path("/dev/shm").glob("*cpushm_*"):
        leftover.unlink()


@pytest.mark.usefixtures("no_leftover_shared_memory")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_samplers_beside_a_sharded_trainer(
    tmp_path: Path, model_folder: Path, tensor_parallel: int
) -> None:
    """Two ranks with two samplers or with one. Log-probabilities agree before an update, and after
    it once the weights are synced. All ranks refuse stale samplers, even when only one of two is
    wrong. Every rank ends up with every response."""
    pytest.importorskip("vllm")
    on(2, "samplers", tmp_path, model_folder, tensor_parallel=tensor_parallel, policy_lr=1e-2)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["gap before"] <= 1e-4
    assert seen["gap after"] <= 1e-4
    assert seen["logp_gap before"] <= 1e-5
    assert seen["gap stale"] > 0.1
    assert seen["logp_gap stale"] > 0.1  # the metric shows it as well
    assert seen["refused before"] == seen["refused after"] == [False, False]
    assert seen["refused stale"] == [True, True]
    assert seen["refused one wrong"] == [tensor_parallel == 1] * 2
    assert seen["all ranks hold the same"]
    assert seen["shares"] == ([11, 10] if tensor_parallel == 1 else [21, 0])
    assert len({str(ids) for ids in seen["ids"]}) > 15  # samplers do not repeat each other


def test_ranks_wait_for_a_late_one_and_stop_together(tmp_path: Path, model_folder: Path) -> None:
    on(2, "stop_together", tmp_path, model_folder)
    for rank in (0, 1):
        assert (tmp_path / f"stopped-{rank}").read_text() == "[0, 1] row 7 is bad"
    # A rank waits no longer than --timeout-minutes.
    with pytest.raises(AssertionError, match=r"[Tt]ime(d )?out"):
        on(2, "stop_together", tmp_path, model_folder, timeout_minutes=0.03)


def test_assign_packs_uses_every_sequence_once_and_balances_ranks() -> None:
    """All ranks get equally many packs of at most the limit and near-equal numbers of tokens, also
    with fewer sequences than ranks."""
    torch.manual_seed(0)
    lengths = torch.randint(10, 200, (301,)).tolist()
    sizes = {i: Size(i, length, 0) for i, length in enumerate(lengths)}  # each has its own prompt
    for ranks in (1, 2, 4, 7):
        packs = assign_packs(sizes, 1000, ranks)
        assert len({len(local_packs) for local_packs in packs}) == 1
        used = [i for local_packs in packs for pack in local_packs for i in pack]
        assert sorted(used) == list(sizes)
        tokens = [[sum(lengths[i] for i in pack) for pack in local] for local in packs]
        assert all(max(of_packs) <= 1000 for of_packs in tokens)
        by_rank = [sum(of_packs) for of_packs in tokens]
        assert max(by_rank) - min(by_rank) <= 200
    assert assign_packs({4: Size(0, 3, 0)}, 10, 3) == [[[4]], [[]], [[]]]
