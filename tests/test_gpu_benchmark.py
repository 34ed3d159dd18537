"""benchmarks/gpu.py: every measurement works on a CPU, fails alone, and counts operations as tools/plan.py does."""

import json
import time
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

NAMES = ("what", "model", "tokens", "setting")


def test_every_measurement_on_a_cpu(
    tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "BEGAN", time.perf_counter()
    )  # the module may have been imported long ago
    ended = call(gpu.main, "--toy", "--out", tmp_path)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows, labels = result["rows"], [m.labels for m in gpu.planned(TOY, tmp_path, Path)]
    assert [
        {k: v for k, v in row.items() if k in NAMES and v is not None} for row in rows
    ] == labels
    assert not [row["note"] for row in rows if str(row["note"]).startswith("failed")]
    assert all(row["seconds"] > 0 for row in rows)
    for row in rows:
        kind = row["what"].split()[-1]
        assert (row["MFU %"] is not None) == (
            kind in ("product", "update", "pass", "attention", "head")
        ), row
        assert row["MFU %"] is None or row["MFU %"] > 0
        assert (row["step seconds"] is not None) == (kind == "update")
        assert (row["plan GB"] is not None) == (
            kind in ("update", "head") or row["what"] == "value pass"
        )
        assert row["peak GB"] is None  # of GPUs only
    assert [row["MFU %"] for row in rows if row["what"] == "matrix product"] == [pytest.approx(100)]
    assert all(
        row["difference"] < 1e-4 for row in rows if row["what"] in ("attention", "tiny end to end")
    )
    assert "## Training on one GPU" in ended.out and len(result["notes"]) == 1


def test_without_a_gpu_it_says_so(call: Callable) -> None:
    ended = call(gpu.main)
    assert ended.code == 1 and "--toy" in ended.err


def test_a_failure_leaves_its_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory.\nof which nothing is left")

    released = []
    monkeypatch.setattr(gpu, "BEGAN", time.perf_counter())
    monkeypatch.setattr(gpu, "let_go", lambda: released.append(True))
    short = [("a", broken), ("b", lambda: {"seconds": 1.0}), ("c", dict)]
    measurements = [Measurement({"what": name}, measure, 0) for name, measure in short]
    rows, left_out = gpu.run(
        [*measurements, Measurement({"what": "long", "tokens": 5}, dict, 99)], budget=90
    )
    failed = {"what": "a", "note": "failed: OutOfMemoryError: CUDA out of memory."}
    assert rows == [failed, {"what": "b", "seconds": 1.0}, {"what": "c"}]
    assert left_out == ["long, 5"] and released == [True]
    table, notes = gpu.finished(rows, left_out)
    assert all(list(row) == gpu.COLUMNS for row in table)
    assert notes[-1] == "No time was left for: long, 5."


def test_operations_are_those_of_the_plan(tmp_path: Path) -> None:
    """plan.work's, for sequences that all have its mean length."""
    response, count = 57, 4
    micro = gpu.packed(
        [response + 1] * count, TOY.prompt, 512
    )  # the last token of a sequence is no input
    cfg = gpu.cfg_of(TOY, tmp_path, "toy", micro, CHECKPOINTING)
    cfg = replace(
        cfg,
        prompts=count,
        samples=1,
        prompt_tokens=TOY.prompt,
        response_tokens=int(response / plan.MEAN),
    )
    work, shape = plan.work(cfg), plan.shape(cfg.model)
    head = (
        2 * shape.vocab * shape.hidden * count
    )  # of the action that an input less does not take away
    assert gpu.operations(shape, micro, "critic") == pytest.approx(work["values"][0])
    assert gpu.operations(shape, micro, "policy") - head == pytest.approx(work["policy"][0] / 4)


@pytest.mark.parametrize("tokens", [256, 300, 4096])
def test_a_row_is_full_and_ragged(tokens: int) -> None:
    micro = gpu.row_of(TOY, "toy", tokens)
    lengths = micro.cu_seqlens.diff()
    assert int(lengths.sum()) == tokens == micro.input_ids.numel()
    assert lengths.min() > TOY.prompt and len(lengths.unique()) > 1


def test_shapes_are_the_plans(tmp_path: Path) -> None:
    for name in gpu.FULL.models:
        gpu.config(gpu.FULL, name).save_pretrained(tmp_path / name)
        assert plan.shape(str(tmp_path / name)) == plan.shape(name)


def test_what_the_plan_reckons_of_one_model(tmp_path: Path) -> None:
    cfg = Config(model="Qwen2.5-7B", gpus=1, micro_tokens=16384, activation_checkpointing=True)
    P = plan.shape(cfg.model).policy
    on_top = sum(plan.update(cfg, "policy").values())
    assert gpu.reckoned(cfg, "policy", step=True) == pytest.approx((16 * P + on_top) / 1e9)
    assert gpu.reckoned(cfg, "policy", step=False) == pytest.approx((8 * P + on_top) / 1e9)


def test_what_would_fill_the_gpu_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the optimizer's step, with the moments of an earlier row; then everything."""
    both = gpu.update(TOY, tmp_path, "toy", "policy", 256, CHECKPOINTING)
    _, optimizer = gpu.opened(TOY, "toy", "policy", CHECKPOINTING)
    assert both["step seconds"] > 0 and optimizer.state
    monkeypatch.setattr(gpu, "memory", lambda: 0.9 * both["plan GB"])
    passes = gpu.update(TOY, tmp_path, "toy", "policy", 256, CHECKPOINTING)
    assert passes["seconds"] > 0 and "step seconds" not in passes and not optimizer.state
    assert "no optimizer" in passes["note"] and passes["plan GB"] < both["plan GB"]
    monkeypatch.setattr(gpu, "memory", lambda: 0.9 * passes["plan GB"])
    assert gpu.update(TOY, tmp_path, "toy", "policy", 256, CHECKPOINTING).keys() == {
        "plan GB",
        "note",
    }


def test_a_mask_of_blocks_attends_as_packed_rows_do() -> None:
    micro = gpu.row_of(TOY, "toy", 256)
    q, k, v = (torch.randn(1, heads, 256, 32) for heads in (2, 1, 1))
    expected = gpu.unfolded(micro, 0.2)(q, k, v)
    with (
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
    ):  # on a CPU it has no backward pass
        assert torch.allclose(gpu.flex(micro, 0.2)(q, k, v), expected, atol=1e-5)
