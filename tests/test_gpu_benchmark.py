"""benchmarks/gpu.py: every measurement works on a CPU, a failure stops no other one, and operations
are counted as tools/plan.py counts them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import CHECKPOINTING, TOY, Measurement
from benchmarks.record import Row
from config import Config
from tools import plan

LABELS = ("what", "model", "tokens", "setting")
WITH_MFU = ("product", "update", "pass", "attention", "head")  # last words of what they measure


def test_every_measurement_on_a_cpu(tmp_path: Path, call: Callable) -> None:
    ended = call(gpu.main, "--toy", "--out", tmp_path)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["rows"]
    expected = [m.labels for m in gpu.planned(TOY, tmp_path, Path)]
    labels = [{k: row[k] for k in LABELS if row[k] is not None} for row in rows]
    assert labels == expected
    assert not [row["note"] for row in rows if str(row["note"]).startswith("failed")]
    for row in rows:
        kind = row["what"].split()[-1]
        assert row["seconds"] > 0
        assert (row["MFU %"] is not None) == (kind in WITH_MFU), row
        assert row["MFU %"] is None or row["MFU %"] > 0
        assert (row["step seconds"] is not None) == (kind == "update")
        has_plan = kind in ("update", "head") or row["what"] == "value pass"
        assert (row["plan GB"] is not None) == has_plan
        assert row["peak GB"] is None  # of GPUs only
        if row["what"] in ("attention", "tiny end to end"):
            assert row["difference"] < 1e-4
    assert [row["MFU %"] for row in rows if row["what"] == "matrix product"] == [pytest.approx(100)]
    assert "## Training on one GPU" in ended.out
    assert len(result["notes"]) == 1


def test_without_a_gpu_it_says_so(call: Callable) -> None:
    ended = call(gpu.main)
    assert ended.code == 1
    assert "--toy" in ended.err


def test_a_failure_leaves_its_reason_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory.\nof which nothing is left")

    released = []
    monkeypatch.setattr(gpu, "release_models", lambda: released.append(True))
    measurements = [
        Measurement({"what": "a"}, broken, 0),
        Measurement({"what": "b"}, lambda: {"seconds": 1.0}, 0),
        Measurement({"what": "c"}, dict, 0),
        Measurement({"what": "long", "tokens": 5}, dict, 99),
    ]
    rows, left_out = gpu.run(measurements, budget=90)
    failed = {"what": "a", "note": "failed: OutOfMemoryError: CUDA out of memory."}
    assert rows == [failed, {"what": "b", "seconds": 1.0}, {"what": "c"}]
    assert left_out == ["long, 5"]
    assert released == [True]
    table, notes = gpu.finished(rows, left_out)
    assert all(tuple(row) == gpu.COLUMNS for row in table)
    assert notes[-1] == "No time was left for: long, 5."


def test_operations_are_those_of_the_plan(tmp_path: Path) -> None:
    """plan.work's, for sequences that all have its mean length."""
    response, count = 57, 4
    # The last token of a sequence is no input.
    micro = gpu.random_pack([response + 1] * count, TOY.prompt_tokens, 512)
    cfg = gpu.plan_settings(TOY, tmp_path, "toy", micro, CHECKPOINTING)
    cfg = replace(
        cfg,
        prompts=count,
        samples=1,
        prompt_tokens=TOY.prompt_tokens,
        response_tokens=int(response / plan.MEAN),
    )
    work, shape = plan.work(cfg), plan.shape(cfg.model)
    # There are as many actions as response tokens, one more per sequence than plan.work counts.
    head = 2 * shape.vocab * shape.hidden * count
    assert gpu.operations(shape, micro, "critic") == pytest.approx(work["values"][0])
    assert gpu.operations(shape, micro, "policy") - head == pytest.approx(work["policy"][0] / 4)


@pytest.mark.parametrize("tokens", [256, 300, 4096])
def test_a_pack_is_full_and_ragged(tokens: int) -> None:
    micro = gpu.make_pack(TOY, "toy", tokens)
    lengths = micro.layout.cu_seqlens_q.diff()
    assert int(lengths.sum()) == tokens == micro.input_ids.numel()
    assert lengths.min() > TOY.prompt_tokens
    assert len(lengths.unique()) > 1


def test_shapes_are_the_plans(tmp_path: Path) -> None:
    for name in gpu.FULL.models:
        gpu.model_config(gpu.FULL, name).save_pretrained(tmp_path / name)
        assert plan.shape(str(tmp_path / name)) == plan.shape(name)


def test_planned_memory_of_one_model() -> None:
    cfg = Config(model="Qwen2.5-7B", gpus=1, micro_tokens=16384, activation_checkpointing=True)
    parameters = plan.shape(cfg.model).policy
    passes = sum(plan.update(cfg, "policy").values())
    with_step = (16 * parameters + passes) / 1e9
    without_step = (8 * parameters + passes) / 1e9
    assert gpu.planned_gb(cfg, "policy", step=True) == pytest.approx(with_step)
    assert gpu.planned_gb(cfg, "policy", step=False) == pytest.approx(without_step)


def test_what_would_fill_the_gpu_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the optimizer's step, with the moments of an earlier pack; then everything."""

    def update() -> Row:
        return gpu.update(TOY, tmp_path, "toy", "policy", 256, CHECKPOINTING)

    both = update()
    _, optimizer = gpu.open_model(TOY, "toy", "policy", CHECKPOINTING)
    assert both["step seconds"] > 0
    assert optimizer.state
    monkeypatch.setattr(gpu, "memory_limit", lambda: 0.9 * both["plan GB"])
    passes = update()
    assert passes["seconds"] > 0
    assert "step seconds" not in passes
    assert not optimizer.state
    assert "no optimizer" in passes["note"]
    assert passes["plan GB"] < both["plan GB"]
    monkeypatch.setattr(gpu, "memory_limit", lambda: 0.9 * passes["plan GB"])
    assert update().keys() == {"plan GB", "note"}


def test_a_mask_of_blocks_attends_as_packs_do() -> None:
    micro = gpu.make_pack(TOY, "toy", 256)
    query, key, value = (torch.randn(1, heads, 256, 32) for heads in (2, 1, 1))
    expected = gpu.packed(micro, 0.2)(query, key, value)
    # On a CPU flex_attention has no backward pass.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        assert torch.allclose(gpu.flex(micro, 0.2)(query, key, value), expected, atol=1e-5)
