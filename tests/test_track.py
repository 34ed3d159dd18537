"""--track: TensorBoard, W&B (offline) and Trackio (local), each with its own package. Tests of W&B
and Trackio skip where these are not installed: pip install '.[track]'."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import load_records, random_model, untimed_metrics, write_orz
from test_checkpoint import refusal, run, weights
from transformers import PreTrainedTokenizerBase

import distributed
from config import Config
from data import Problem
from reports import trackers
from reports.log import RunLog
from reports.trackers import RESPONSE, TOKEN, Sent, Tracked, Trackers, require_login
from toy import tiny

STEPS, LONGER = 4, 6  # of the run, and after it was resumed
EVERY_STEP = list(range(LONGER))
EVALUATED = [0, 2, 4, 6]
INSTALLED = [name for name in trackers.TRACKERS if trackers._is_installed(name)]


def reward(response: str, problem: Problem) -> float:
    """A reward that needs no grader."""
    return float(len(response) % 2 == 0)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> list:
    """A run of a tenth of a second a step that tracks nothing."""
    folder = tmp_path_factory.mktemp("track")
    model = random_model(folder / "model", tokenizer, tied=True)
    rows = [(question, str(sum(tiny.numbers(question)))) for question in tiny.problems(0)[0][:4]]
    data = write_orz(folder / "train.json", rows)
    text = f"--model {model} --data {data} --eval-data {data} --runs {folder / 'runs'} --eval-every"
    text += " 2 --reward test_track:reward --engine transformers --checkpoint-every 2 --steps"
    text += f" {STEPS} --prompts 2 --samples 2 --prompt-tokens 64 --response-tokens 8"
    text += " --critic-steps 2 --policy-lr 1e-3 --critic-lr 1e-3 --keep-tokens 2 --track none"
    return text.split()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B and Trackio without a network. Trackio reads its variable when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture(scope="module")
def tracked(flags: list[str], offline: None) -> Path:
    """A run in every tracker that is installed. It goes on from step 2 and repeats 2 and 3."""
    folder = run(flags, "--name", "tracked", "--track", *INSTALLED)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    more = ("--resume", "auto", "--steps", str(LONGER))
    return run(flags, "--name", "tracked", "--track", *INSTALLED, *more)


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """The same run without a tracker, in one piece."""
    return run(flags, "--name", "whole", "--steps", str(LONGER))


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a record that do not change from run to run."""
    untold = ("step", "memory_gb")
    return {
        name: float(value)
        for name, value in record.items()
        if "second" not in name and name not in untold and value == value
    }


# ── each tracker ──────────────────────────────────────────────────────────────────────────────────


def test_trackers_change_nothing(tracked: Path, whole: Path) -> None:
    assert untimed_metrics(tracked) == untimed_metrics(whole)
    assert weights(tracked) == weights(whole)
    assert not (whole / "tensorboard").exists()


def test_tensorboard_has_every_step_once(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    rewards = events.Scalars("reward")
    assert [event.step for event in rewards] == EVERY_STEP
    expected = [step["reward"] for step in load_records(tracked / "metrics.jsonl")]
    assert [event.value for event in rewards] == pytest.approx(expected)
    assert [event.step for event in events.Scalars("heldout/reward")] == EVALUATED


def require_same_numbers(rows: list[tuple[int, dict[str, Any]]], folder: Path) -> None:
    """Each step and each evaluation is there once, with the numbers of the run folder."""
    steps = [(step, row) for step, row in rows if "reward" in row]
    assert [step for step, _ in steps] == EVERY_STEP
    for (_, row), record in zip(steps, load_records(folder / "metrics.jsonl"), strict=True):
        numbers = {name: row[name] for name in record if name != "step"}
        assert untimed(numbers) == pytest.approx(untimed(record))
    evaluations = [(step, row) for step, row in rows if "heldout/reward" in row]
    assert [step for step, _ in evaluations] == EVALUATED
    assert len(steps) + len(evaluations) == len(rows)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is a log of LevelDB's form behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    at, record = 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no header fits into the rest of the block
            at += 2**15 - at % 2**15
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def test_wandb_goes_on_in_the_same_record(tracked: Path) -> None:
    pytest.importorskip("wandb")
    parts = sorted(tracked.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2
    records = [record for part in parts for record in wandb_records(part)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {item.run_id for item in runs} == {json.loads(sent(tracked, "wandb"))["id"]}
    assert {item.display_name for item in runs} == {"tracked"}
    assert all(item.resume for item in runs)  # by this `wandb sync` joins the parts
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["critic_steps"] == 2
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: item for item in record.history.item}
            rows.append({name: json.loads(item.value_json) for name, item in items.items()})
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))  # it would drop a row that comes late
    require_same_numbers([(row["step"], row) for row in rows], tracked)
    first = next(row for row in rows if "reward" in row)
    table = json.loads((parts[0].parent / "files" / first["transcripts.path"]).read_text())
    assert table["columns"] == list(RESPONSE)
    responses = load_records(tracked / "rollouts.jsonl")
    assert table["data"] == [[r[c] for c in RESPONSE] for r in responses if r["step"] == 0]
    tokens = json.loads((parts[0].parent / "files" / first["tokens.path"]).read_text())
    assert tokens["columns"] == list(TOKEN)
    V = [row[TOKEN.index("V")] for row in tokens["data"]]
    assert V == [v for r in responses if r["step"] == 0 for v in r.get("values", [])] != []


def sent(folder: Path, tracker: str) -> str:
    return (folder / f"track-{tracker}.json").read_text()


def test_trackio_goes_on_in_the_same_record(tracked: Path) -> None:
    pytest.importorskip("trackio")
    name = f"tracked-{json.loads(sent(tracked, 'trackio'))['id']}"
    database = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{trackers.PROJECT}.db")
    query = "select run_id, step, metrics from metrics where run_name = ? order by id"
    found = database.execute(query, [name]).fetchall()
    assert len({run_id for run_id, *_ in found}) == 1
    require_same_numbers([(step, json.loads(text)) for _, step, text in found], tracked)
    (settings,) = database.execute("select config from configs where run_name = ?", [name])
    assert json.loads(settings[0])["critic_steps"] == 2
    query = "select messages, metadata from traces where run_name = ? and step = 0 order by rowid"
    traces = [(json.loads(a), json.loads(b)) for a, b in database.execute(query, [name])]
    responses = [r for r in load_records(tracked / "rollouts.jsonl") if r["step"] == 0]
    for (messages, metadata), r in zip(traces, responses, strict=True):
        assert [m["content"] for m in messages] == [r["question"], r["response"]]
        assert metadata["reward"] == r["reward"]
        assert metadata.get("values") == r.get("values")
    assert sum("values" in metadata for _, metadata in traces) == 2
    tokens = json.loads(found[1][2])["tokens"]["_value"]
    assert [row["V"] for row in tokens] == [v for r in responses for v in r.get("values", [])]


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────


def test_a_run_begins_a_new_record_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    """A step counts as sent before it is: a process that is killed sends none twice."""
    first = Sent(tmp_path, "wandb")
    assert [first.is_new("step", step) for step in (0, 1, 1, 0)] == [True, True, False, False]
    assert first.is_new("evaluation", 0)
    resumed = Sent(tmp_path, "wandb")
    assert (resumed.id, resumed.rows) == (first.id, 3)
    assert [resumed.is_new("step", step) for step in (1, 2)] == [False, True]
    assert Sent(tmp_path, "trackio").id != first.id
    for content in ("{", "[]", '{"id": "a"}'):
        resumed.path.write_text(content)
        with pytest.raises(ValueError, match=r"track-wandb.json cannot be read; remove it"):
            Sent(tmp_path, "wandb")


def test_other_trackers_on_resume(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The record begins where the tracker came in."""
    run(flags, "--name", "later", "--steps", "2")
    more = ("--resume", "auto", "--steps", "3", "--track", "tensorboard")
    folder = run(flags, "--name", "later", *more)
    assert "track ['none'] → ['tensorboard']" in capsys.readouterr().out
    assert list(folder.glob("tensorboard/events*"))


def test_overwriting_begins_a_new_record(flags: list[str], tmp_path: Path) -> None:
    folder = run(flags, "--name", "again", "--steps", "1")
    (folder / "track-wandb.json").write_text('{"id": "old", "rows": 1, "step": 0}')
    (folder / "wandb").mkdir()
    run(flags, "--name", "again", "--steps", "1", "--overwrite")
    assert not (folder / "track-wandb.json").exists()
    assert not (folder / "wandb").exists()


# ── failures ──────────────────────────────────────────────────────────────────────────────────────


class Failing:
    """A tracker that fails in one of its calls."""

    at = ""

    def __init__(self, run: Tracked) -> None:
        self.calls("start")

    def calls(self, what: str) -> None:
        """Fail if it is time."""
        if what == self.at:
            raise RuntimeError("no network\nmore")

    def step(self, step: int, record: dict, kept: list) -> None:
        self.calls(f"step {step}")

    def evaluation(self, step: int, metrics: dict) -> None:
        self.calls("evaluation")

    def close(self, failed: bool) -> None:
        self.calls("close")


@pytest.mark.parametrize("at", ["start", "step 1", "evaluation", "close"])
def test_a_tracker_that_fails_is_one_line(
    at: str,
    flags: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Failing)
    monkeypatch.setattr(Failing, "at", at)
    name = at.replace(" ", "-")
    folder = run(flags, "--name", name, "--track", "tensorboard", "--steps", "2")
    said = capsys.readouterr().out
    line = "WARNING: --track tensorboard failed (no network); the run goes on without it"
    assert said.count(line) == said.count("--track") == 1
    assert untimed_metrics(folder) == untimed_metrics(whole)[:2]


def test_one_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    monkeypatch.setattr(Failing, "at", "step 0")
    said: list[str] = []
    both = Trackers(["wandb", "tensorboard"], Tracked(tmp_path, "x", {}, 0), said.append)
    both.step(0, {"reward": 1.0}, [])
    both.step(1, {"reward": 1.0}, [])
    assert list(both.trackers) == ["tensorboard"]
    assert len(said) == 1
    both.close(failed=False)


def test_only_the_first_rank_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("tracked")

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr("reports.log.Trackers", fails)
    with RunLog(tmp_path / "absent", Config()) as log:
        log.evaluation(0, {"reward": 0.0, "length": 1.0, "format": 0.0}, [])
    assert not (tmp_path / "absent").exists()


def test_what_cannot_track_is_refused_early(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal([*flags, "--track"]) == (
        "--track: names no tracker; pass --track none to track nothing"
    )
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "trackio")
    assert refusal([*flags, "--track", "tensorboard", "trackio"]) == (
        "--track trackio: trackio is not installed here; pip install trackio, or leave it out"
    )


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B makes a folder wandb where it is called: Python would import it."""
    (tmp_path / "nosuchtracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("nosuchtracker")


def test_wandb_without_a_login_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # it reads its variables once
    with pytest.raises(ValueError, match="--track wandb: not logged in; call wandb login, or set"):
        require_login(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    require_login(["wandb"])
    require_login(["tensorboard"])


DIES = """
import os, signal, subprocess, sys
from pathlib import Path
from reports.trackers import Tracked, Trackers

both = Trackers(["wandb"], Tracked(Path(sys.argv[1]), "x", {}, 0), print)
both.step(0, {"step": 0, "reward": 1.0}, [])
command = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
children = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
(core,) = [int(line.split()[0]) for line in children if "wandb-core" in line]
os.kill(core, signal.SIGKILL)
os.waitpid(core, 0)
for step in range(1, 100):
    both.step(step, {"step": step, "reward": 1.0}, [])
both.close(failed=False)
print("goes on")
"""


def test_wandb_may_die(tmp_path: Path) -> None:
    """Its own process may be killed, as by a lack of memory."""
    pytest.importorskip("wandb")
    quiet = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    other = ("WANDB_SERVICE",)  # the process of this one's runs
    done = subprocess.run(
        [sys.executable, "-c", DIES, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(trackers.__file__).parent.parent,
        env={k: v for k, v in os.environ.items() if k not in other} | quiet,
    )
    assert done.returncode == 0, done.stderr
    warning, last = done.stdout.splitlines()
    assert warning.startswith("WARNING: --track wandb failed (")
    assert warning.endswith("; the run goes on without it")
    assert last == "goes on"
