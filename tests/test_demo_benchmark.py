"""benchmarks/demo.py: it runs two checkouts in turn and pairs their runs by seed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended

from benchmarks import demo

TRAIN = """
import json, sys, time
from pathlib import Path
seed = int(sys.argv[sys.argv.index("--seed") + 1])
runs = Path(sys.argv[sys.argv.index("--runs") + 1])
if seed == 9:
    sys.exit("train.py: no weights")
(runs / "demo").mkdir(parents=True, exist_ok=True)
time.sleep(0.06)
print("held-out after 0 steps: accuracy 0.100", flush=True)
print("    0  0.082    15.2", flush=True)
time.sleep(0.15)
print("   10  0.682    15.2", flush=True)
with (runs / "demo" / "evaluations.jsonl").open("w") as file:
    for reward in (0.1, ACCURACY + seed / 100):
        print(json.dumps({"reward": reward, "length": 50.0}), file=file)
"""


def checkout(folder: Path, accuracy: float) -> Path:
    """A program that stands for a version of this one."""
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "tiny.py").write_text("")
    (folder / "train.py").write_text(TRAIN.replace("ACCURACY", f"{accuracy}"))
    return folder


def test_versions_take_turns_and_are_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ended]
) -> None:
    monkeypatch.setattr(demo, "HERE", checkout(tmp_path / "this", 0.8))
    kept = {}
    monkeypatch.setattr(demo, "record", lambda *parts: kept.update(rows=parts[2], notes=parts[3]))
    other = checkout(tmp_path / "other", 0.7)
    assert call(demo.main, "--seeds", 2, "--against", other).code == 0
    ran = [(row["seed"], row["version"], row["accuracy"]) for row in kept["rows"]]
    assert ran == [
        (0, "this", "0.800 (0.100)"),
        (0, "other", "0.700 (0.100)"),
        (1, "this", "0.810 (0.100)"),
        (1, "other", "0.710 (0.100)"),
    ]
    assert all(0 < row["first line s"] < row["all s"] for row in kept["rows"])
    (accuracy,) = (note for note in kept["notes"] if note.startswith("accuracy"))
    assert accuracy.endswith(": +0.100 [+0.100, +0.100].")


def test_a_failed_run_and_a_folder_without_the_program_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ended]
) -> None:
    monkeypatch.setattr(demo, "HERE", checkout(tmp_path / "this", 0.8))
    with pytest.raises(ValueError, match=r"this: the run of seed 9 failed: train.py: no weights"):
        demo.run_demo(demo.HERE, 9, tmp_path)
    ended = call(demo.main, "--against", tmp_path)
    assert ended.code == 1 and ended.err.strip().endswith("has no train.py; name a checkout")
