"""Run folders that are damaged, cut, copied, filled or used twice: a run then gives the result of
the uninterrupted run, or one true line, and nothing good is deleted."""

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import random_model, untimed_metrics, write_orz
from test_checkpoint import refusal, run, weights
from transformers import PreTrainedTokenizerBase

import checkpoint
import train
from checkpoint import by_step, find_checkpoint, read_checkpoint
from config import Config, parse
from data import Problem
from preflight import prepare
from reports import page
from reports.log import clear_folder, is_run
from toy import tiny

STEPS = 4  # of the run that is damaged
LONGER = 6  # of the run that goes on from it
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
TRAIN = Path(__file__).parent.parent / "train.py"


def reward(response: str, problem: Problem) -> float:
    """A reward that needs no grader: whether the response has an even number of characters."""
    return float(len(response) % 2 == 0)


def other_reward(response: str, problem: Problem) -> float:
    """Another one."""
    return float(len(response) % 3 == 0)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> list:
    """A run of a tenth of a second a step, with held-out problems and a checkpoint a step."""
    folder = tmp_path_factory.mktemp("faults")
    model = random_model(folder / "model", tokenizer, tied=True)
    rows = [(question, str(sum(tiny.numbers(question)))) for question in tiny.problems(0)[0][:8]]
    data = write_orz(folder / "train.json", rows)
    heldout = write_orz(folder / "heldout.json", rows[:4])
    text = f"--model {model} --data {data} --eval-data {heldout} --runs {folder / 'runs'}"
    text += " --engine transformers --reward test_faults:reward --checkpoint-every 1"
    text += " --prompts 2 --samples 2 --prompt-tokens 64 --response-tokens 8 --critic-steps 2"
    text += f" --policy-lr 1e-3 --critic-lr 1e-3 --steps {STEPS} --eval-every 2"
    return text.split()


@pytest.fixture(scope="module")
def short(flags: list[str]) -> Path:
    """The run that is damaged; use `damaged` for a copy of it."""
    return run(flags, "--name", "short")


@pytest.fixture(scope="module")
def longer(flags: list[str]) -> Path:
    """The result that it must come to: never interrupted."""
    return run(flags, "--name", "longer", "--steps", str(LONGER))


@pytest.fixture
def damaged(short: Path) -> Path:
    folder = short.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(short, folder)
    return folder


def go_on(flags: list[str], *more: str) -> Path:
    return run(flags, "--name", "damaged", "--resume", "auto", "--steps", str(LONGER), *more)


def same(a: Path, b: Path) -> None:
    """Every line of every record but the times, and every bit of the weights."""
    assert untimed_metrics(a) == untimed_metrics(b)
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert weights(a) == weights(b)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def shards(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keep", ["1", "2"])
def test_a_damaged_newest_checkpoint_is_set_aside(
    flags: list[str], damaged: Path, longer: Path, keep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the one before, writes its own, and never deletes the last good one."""
    flip(shards(damaged / "checkpoints" / "step-4"))
    bytes_of_damaged = contents(damaged / "checkpoints" / "step-4")
    same(go_on(flags, "--keep-checkpoints", keep), longer)
    said = capsys.readouterr().out
    assert "step-4 is damaged: the bytes of __0_0.distcp are not those written" in said
    assert f"going on from {damaged / 'checkpoints' / 'step-3'}" in said
    expected = ["step-4.aside", "step-6"] if keep == "1" else ["step-4.aside", "step-5", "step-6"]
    assert names(damaged) == expected
    assert contents(damaged / "checkpoints" / "step-4.aside") == bytes_of_damaged
    for path in by_step(damaged / "checkpoints"):
        read_checkpoint(path)


def test_every_byte_of_a_checkpoint_is_verified(damaged: Path) -> None:
    """Same-size corruption of any file, its first and last byte included, and a missing file."""
    folder = damaged / "checkpoints" / "step-4"
    for name in contents(folder):
        whole = (folder / name).read_bytes()
        for place in (0.0, 0.3, 1.0):
            flip(folder / name, place)
            with pytest.raises(ValueError, match=r"step-4 is (damaged|no complete|not what)"):
                read_checkpoint(folder)
            (folder / name).write_bytes(whole)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=r"step-4 is (damaged|no complete)"):
            read_checkpoint(folder)
        (folder / name).write_bytes(whole)
    read_checkpoint(folder)
    for text in ("{}", "[]", "3", '{"files": 3}', "\ud800"):
        (folder / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match="is no complete checkpoint") as wrong:
            read_checkpoint(folder)
        assert "\n" not in str(wrong.value)


def test_checkpoints_without_checksums_can_be_resumed(
    flags: list[str], damaged: Path, longer: Path
) -> None:
    """Those of early versions, which recorded sizes only and no time."""
    for path in by_step(damaged / "checkpoints"):
        about = json.loads((path / "run.json").read_text())
        for name in ("crc32", "record_crc32", "run_crc32", "spent"):
            del about[name]
        (path / "run.json").write_text(json.dumps(about))
    same(go_on(flags), longer)
    assert json.loads((damaged / "summary.json").read_text())["seconds"] > 0


def test_other_names_in_the_checkpoints_folder(
    flags: list[str], damaged: Path, longer: Path
) -> None:
    """Copies, files and links are no checkpoints: they are neither resumed, counted nor deleted."""
    folder, elsewhere = damaged / "checkpoints", damaged.parent / "elsewhere"
    shutil.copytree(folder / "step-4", elsewhere, dirs_exist_ok=True)
    shutil.copytree(folder / "step-4", folder / "step-4-keep")
    shutil.copytree(folder / "step-4", folder / "step-9")  # its run.json says 4
    (folder / "step-5").write_text("a file")
    (folder / "step-8.tmp").symlink_to(elsewhere)
    (folder / "backup.tmp").symlink_to(elsewhere)
    keep, outside = contents(folder / "step-4-keep"), contents(elsewhere)
    same(go_on(flags), longer)
    left = ["backup.tmp", "step-4-keep", "step-5", "step-5.aside", "step-6", "step-9.aside"]
    assert names(damaged) == left
    assert contents(folder / "step-4-keep") == keep == contents(folder / "step-9.aside")
    assert (folder / "step-5.aside").read_text() == "a file"
    assert contents(elsewhere) == outside
    for path in by_step(folder):
        shutil.rmtree(path)
    said = refusal(flags, "--name", "damaged", "--resume", "auto")
    assert said.startswith("there is nothing to go on from")
    assert "step-4-keep" in said
    same(
        run(flags, "--name", "damaged", "--steps", "6", "--resume", f"{folder}/step-4-keep"), longer
    )


def test_an_older_checkpoint_by_name(flags: list[str], damaged: Path, longer: Path) -> None:
    """Refused while a newer one is good, as that would be lost; not while it is damaged."""
    older = ("--name", "damaged", "--resume", str(damaged / "checkpoints" / "step-3"))
    assert "step-4 is newer" in refusal(flags, *older)
    flip(shards(damaged / "checkpoints" / "step-4"))
    same(run(flags, *older, "--steps", str(LONGER)), longer)
    assert "step-4.aside" in names(damaged)


# ── records ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RECORDS)
def test_a_cut_record_is_never_padded(
    flags: list[str], damaged: Path, longer: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that lost what an older checkpoint does not need: the older one is taken."""
    about = read_checkpoint(damaged / "checkpoints" / "step-4").about
    os.truncate(damaged / name, about["records"][name] - 1)
    newest = damaged / "checkpoints" / "step-4"
    assert f"{name} has {about['records'][name] - 1} of the" in refusal(
        flags, "--name", "branch", "--resume", str(newest)
    )
    same(go_on(flags), longer)
    said = capsys.readouterr().out
    assert f"step-4 cannot be resumed: {damaged / name} has" in said
    assert b"\0" not in (damaged / name).read_bytes()
    os.truncate(damaged / name, 10)
    before = contents(damaged)
    said = refusal(flags, "--name", "damaged", "--resume", "auto")
    last = damaged / "checkpoints" / f"step-{LONGER}"
    assert said.startswith(f"{last} cannot be resumed: {damaged / name} has 10 of the")
    assert "there is nothing to go on from" in said
    assert contents(damaged) == before


def test_a_changed_record_is_noticed(flags: list[str], damaged: Path) -> None:
    flip(damaged / "metrics.jsonl", 0.0)
    before = contents(damaged)
    said = refusal(flags, "--name", "damaged", "--resume", "auto")
    assert f"{damaged / 'metrics.jsonl'} was damaged or changed; there is nothing to" in said
    assert contents(damaged) == before


def test_time_adds_up_over_resumes(flags: list[str], damaged: Path) -> None:
    def summary() -> dict:
        return json.loads((damaged / "summary.json").read_text())

    path = damaged / "checkpoints" / "step-4" / "run.json"
    about = json.loads(path.read_text())
    assert 0 < about["spent"]["seconds"] < summary()["seconds"]
    assert about["spent"]["stages"]["critic"]["seconds"] > 0
    about["spent"]["seconds"] += 1000
    about["spent"]["stages"]["critic"]["seconds"] += 100
    del about["run_crc32"]
    path.write_text(json.dumps(about))
    go_on(flags)
    assert 1000 < summary()["seconds"] < 1060
    assert 100 < summary()["stages"]["critic"]["seconds"] < 130


# ── full disks ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on file sizes stands for the full disk: writing fails in the same places. What is
    printed goes to memory, as it may go to a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full(flags: list[str], size: int, *more: str) -> str:
    cfg = parse([*flags, *more])
    inputs = prepare(cfg)
    with largest_file(size), pytest.raises(OSError) as wrong:
        train.train(cfg, inputs)
    assert "\n" not in str(wrong.value)
    folder = Path(cfg.runs) / cfg.name
    assert not [p for p in folder.rglob("*") if p.suffix in (".tmp", ".partial")]
    return str(wrong.value)


def test_a_full_disk_names_the_file_and_what_is_complete(
    flags: list[str], damaged: Path, longer: Path
) -> None:
    more = ("--name", "damaged", "--resume", "auto", "--steps", str(LONGER))
    metrics_size = (damaged / "metrics.jsonl").stat().st_size
    said = disk_full(flags, metrics_size + 100, *more)
    complete = f"{damaged / 'checkpoints' / 'step-4'} is complete: fix the cause and pass"
    assert f"{damaged / 'metrics.jsonl'} could not be written (File too large); {complete}" in said
    said = disk_full(flags, 200_000, *more)
    assert f"{damaged / 'checkpoints' / 'step-5'} could not be written" in said
    assert complete in said
    same(go_on(flags), longer)


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_full_disk_at_the_export(
    flags: list[str], damaged: Path, longer: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exported before stays until the new export is whole."""
    real = checkpoint.export_model

    def export(module: object, tokenizer: object, folder: Path, *rest: object) -> None:
        with largest_file(5_000 if folder.name == role else resource.RLIM_INFINITY):
            real(module, tokenizer, folder, *rest)

    policy = contents(damaged / "policy")
    monkeypatch.setattr(train, "export_model", export)
    with pytest.raises(OSError, match=f"{role} could not be written .*; .*step-6 is complete"):
        go_on(flags)
    assert not list(damaged.glob("*.partial"))
    if role == "policy":
        assert contents(damaged / "policy.earlier") == policy
        assert not (damaged / "policy").exists()
    monkeypatch.undo()
    same(go_on(flags), longer)
    assert not list(damaged.glob("*.earlier"))


# ── held-out sets that change, and results of earlier attempts ────────────────────────────────────


def without(flags: list[str], flag: str) -> list[str]:
    """The flags, but for one and its value."""
    at = flags.index(flag)
    return flags[:at] + flags[at + 2 :]


def changed_sets(flags: list[str]) -> dict[str, list[str]]:
    data = Path(flags[3])
    items = json.loads(data.read_text())
    other = data.with_name("other.json")
    other.write_text(json.dumps(items[2:7]))
    new = data.with_name("new.json")
    new.write_text(json.dumps(items[6:]))
    no_sets = without(flags, "--eval-data")
    return {
        "none": without(no_sets, "--eval-every"),
        "other": [*no_sets, "--eval-data", str(other)],
        "new": [*no_sets, "--eval-data", str(new)],
        "samples": [*flags, "--eval-samples", "2"],
    }


@pytest.mark.parametrize("change", ["none", "other", "new", "samples"])
def test_resuming_with_other_held_out_problems(
    flags: list[str],
    damaged: Path,
    longer: Path,
    change: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The models are exported, and what was answered at both times is compared."""
    capsys.readouterr()
    for _ in range(2):  # again when nothing is left to train
        go_on(changed_sets(flags)[change])
        said = capsys.readouterr().out
        assert weights(damaged) == weights(longer)
        assert ("before" in said and "accuracy" in said) == (change in ("other", "samples"))
        if change in ("other", "new"):
            both = 2 if change == "other" else 0
            assert f"other held-out problems than at the start; {both} in both" in said
    train.draw_run(damaged)
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("every", ["1", "2"])
def test_the_closing_table_begins_where_the_reward_changed(
    flags: list[str], damaged: Path, every: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run resumed after step 4, evaluated after 5 and 6, or only after 6."""
    capsys.readouterr()
    go_on(flags, "--reward", "test_faults:other_reward", "--eval-every", every)
    said = capsys.readouterr().out
    changed = "since the start reward 'test_faults:reward' → 'test_faults:other_reward': "
    shown = "before is after 5 steps" if every == "1" else "nothing to compare with"
    assert changed + shown in said
    assert ("before" in said.replace(shown, "")) == (every == "1")


def test_a_damaged_held_out_file_is_only_said(
    flags: list[str], damaged: Path, longer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(damaged / "heldout-0.jsonl", 100)
    same(go_on(flags), longer)
    assert "no comparison of before and after: " in capsys.readouterr().out


def test_an_earlier_export_does_not_look_final(
    flags: list[str], damaged: Path, longer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on past it and fails: it is there under another name, and summary.json, which
    a finished run has, is not of the earlier attempt."""
    policy = contents(damaged / "policy")

    def fails(*_: object) -> None:
        raise FloatingPointError("policy loss is nan")

    monkeypatch.setattr(train, "update_policy", fails)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            go_on(flags)
        assert not (damaged / "policy").exists()
        assert not (damaged / "critic").exists()
        assert contents(damaged / "policy.earlier") == policy
    monkeypatch.undo()
    same(go_on(flags), longer)
    assert not list(damaged.glob("*.earlier"))


def test_the_export_comes_before_tables_and_figures(
    flags: list[str], damaged: Path, longer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError(0)

    monkeypatch.setattr(train.RunLog, "print_before_after", fails)
    with pytest.raises(KeyError):
        go_on(flags)
    assert weights(damaged) == weights(longer)


def test_figures_that_cannot_be_drawn_are_a_warning(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(damaged / "metrics.jsonl", 0.0)
    train.draw_run(damaged)
    assert "WARNING: the run is complete, but not its figures and page" in capsys.readouterr().out


# ── folders ───────────────────────────────────────────────────────────────────────────────────────


def test_other_peoples_folders_are_left_alone(
    flags: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, call: Callable
) -> None:
    """A model has a config.json, too; so have others."""
    model = random_model(tmp_path / "hf", tokenizer, tied=True)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"policy_lr": 1, "crit')
    before = contents(tmp_path)
    for name in ("hf", "list", "cut"):
        for more in (["--overwrite"], ["--resume", "auto"], []):
            said = refusal(flags, "--runs", str(tmp_path), "--name", name, *more)
            assert "not a run's" in said or "is not empty" in said
        assert not is_run(tmp_path / name)
    ended = call(page.main, model)
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == (
        f"reports.page: {model}: not a run folder, its config.json is not a run's; "
        "expected runs/NAME"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", ".", " ", "a\\b", "a\nb", "a\0b"])
def test_a_name_is_one_part_of_a_path(flags: list[str], name: str, tmp_path: Path) -> None:
    said = refusal(flags, "--runs", str(tmp_path / "runs"), "--name", name)
    assert said.startswith(f"--name {name!r}: must be the name of a folder in --runs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [("--overwrite",), ("--resume", "auto")])
def test_inputs_in_the_run_folder_are_refused(
    flags: list[str], damaged: Path, how: tuple[str, ...], tmp_path: Path
) -> None:
    """A fresh start would remove them, or what is beside them."""
    shutil.copy(flags[3], damaged / "mine.json")
    (damaged / "link.json").symlink_to(flags[3])
    (tmp_path / "back").symlink_to(damaged)
    if how[0] == "--resume":  # with a checkpoint it would go on; without, it begins again
        for name in ("checkpoints", "policy"):
            shutil.rmtree(damaged / name)
    shutil.copytree(flags[1], damaged / "model")
    rollouts = damaged / "rollouts"
    rollouts.mkdir()
    given = {
        "--model": [damaged / "model", tmp_path / "back" / "model"],
        "--data": [damaged / "mine.json", damaged / "link.json"],
        "--eval-data": [damaged / "mine.json", f"x={damaged / 'mine.json'}"],
        "--init-critic": [damaged / "critic"],
        "--critic-model": [damaged / "model"],
    }
    before = contents(damaged)
    for flag, sources in given.items():
        for source in sources:
            said = refusal(flags, "--name", "damaged", *how, flag, str(source))
            assert said.startswith(f"{flag} ")
            assert "is in the run's own folder, which this run replaces" in said
    assert contents(damaged) == before


def test_rollouts_to_replay_in_the_run_folder_are_refused(flags: list[str]) -> None:
    folder = run(flags, "--name", "saved", "--save-rollouts", "--steps", "1")
    before = contents(folder)
    for flag in ("--reward", "--eval-data", "--eval-every"):  # of no effect with --replay: refused
        flags = without(flags, flag)
    more = ("--overwrite", "--steps", "1", "--replay", str(folder / "rollouts"))
    assert "is in the run's own folder" in refusal(flags, "--name", "saved", *more)
    assert contents(folder) == before


def test_the_exports_of_a_run_that_goes_on_are_no_inputs(flags: list[str], damaged: Path) -> None:
    more = ("--name", "damaged", "--resume", "auto")
    said = refusal(flags, *more, "--model", str(damaged / "policy"))
    assert "is in the run's own folder" in said


def test_overwriting_follows_no_links_and_takes_only_what_a_run_wrote(
    flags: list[str], damaged: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it")
    (damaged / "notes.txt").write_text("mine")
    (damaged / "link").symlink_to(tmp_path / "precious")
    (damaged / "dangling.png").symlink_to(tmp_path / "nowhere")
    (damaged / "checkpoints" / "link").symlink_to(tmp_path / "precious")
    shutil.rmtree(damaged / "policy")
    (damaged / "policy").symlink_to(tmp_path / "precious")
    fresh = run(flags, "--name", "damaged", "--overwrite", "--steps", "1")
    assert len(untimed_metrics(fresh)) == 1
    assert contents(tmp_path) == {"precious/thesis.tex": b"all of it"}
    assert (damaged / "notes.txt").read_text() == "mine"
    assert (damaged / "link").is_symlink()
    assert not (damaged / "policy").is_symlink()
    assert names(damaged) == ["step-1"]
    assert not os.path.lexists(damaged / "dangling.png")
    assert not (damaged / ".removed").exists()


def test_a_deletion_that_is_interrupted_leaves_nothing_that_looks_whole(
    flags: list[str], damaged: Path, longer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the first, second … file or folder that is moved or deleted."""

    class Killed(BaseException):
        pass

    def clear(at: int) -> None:
        left = [at]

        def counted(real: Callable) -> Callable:
            def call(*given: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*given, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            clear_folder(damaged)

    for at in range(0, 40, 3):
        with pytest.raises(Killed):
            clear(at)
        assert is_run(damaged)
        found = find_checkpoint("auto", damaged)
        assert found is None or (damaged / "metrics.jsonl").exists()
        if at:
            assert found is None
        shutil.rmtree(damaged)
        shutil.copytree(longer.with_name("short"), damaged)
    with pytest.raises(Killed):
        clear(20)
    same(go_on(flags), longer)


# ── two at a time ─────────────────────────────────────────────────────────────────────────────────

LOCKED = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("taken", flush=True)
else:
    print("free", flush=True)
    sys.stdin.read()
"""


class Other(NamedTuple):
    """Another process that tries to lock a folder, and holds the lock until it is told to end."""

    process: subprocess.Popen

    @classmethod
    def on(cls, folder: Path) -> "Other":
        command = [sys.executable, "-c", LOCKED, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return cls(subprocess.Popen(command, text=True, **pipes))

    def found(self) -> str:
        return self.process.stdout.readline().strip()

    def ends(self) -> None:
        self.process.communicate("")


def test_a_folder_in_use_is_refused_before_anything_is_read_or_removed(
    flags: list[str], damaged: Path
) -> None:
    flip(shards(damaged / "checkpoints" / "step-4"))
    other = Other.on(damaged)
    assert other.found() == "free"
    before = contents(damaged)
    for how in (["--resume", "auto"], ["--overwrite"], []):
        with pytest.raises(OSError, match="damaged is in use by another process") as wrong:
            prepare(parse([*flags, "--name", "damaged", *how]))
        assert "\n" not in str(wrong.value)
    other.ends()
    assert contents(damaged) == before


def test_the_lock_is_held_from_the_first_check_to_the_end(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = parse([*flags, "--name", "locked", "--steps", "1"])
    folder = Path(cfg.runs) / "locked"
    seen: list[str] = []

    def look() -> None:
        other = Other.on(folder)
        seen.append(other.found())
        other.ends()

    real = train.load_models
    monkeypatch.setattr(train, "load_models", lambda *given: (look(), real(*given))[1])
    train.train(cfg, prepare(cfg))
    look()  # figures and page
    assert seen == ["taken", "taken"]


def test_a_refused_start_leaves_no_folder_and_no_lock(flags: list[str]) -> None:
    more = ("--name", "refused", "--model", str(Path(flags[1]).parent / "nothing"))
    folder = Path(flags[flags.index("--runs") + 1]) / "refused"
    assert "--model" in refusal(flags, *more)
    assert not folder.exists()
    folder.mkdir()
    assert "--model" in refusal(flags, *more)
    other = Other.on(folder)
    assert other.found() == "free"
    other.ends()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_starts_of_one_name(flags: list[str], longer: Path) -> None:
    """At the same time, on a folder that is there or not: one trains, the other says one line."""
    for attempt in range(5):
        name = f"race-{attempt}"
        how = ["--resume", "auto"] if attempt % 2 else []
        command = [sys.executable, str(TRAIN), *flags, "--name", name, "--steps", str(LONGER), *how]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        both = [subprocess.Popen(command, text=True, env=env, **pipes) for _ in range(2)]
        ended = sorted((p.communicate()[1], p.returncode) for p in both)
        codes = sorted(code for _, code in ended)
        refused = [err for err, code in ended if code]
        if codes == [0, 0]:  # the first had ended
            assert how
        else:
            assert codes == [0, 1]
            last = refused[0].strip().splitlines()[-1]
            assert "is in use by another process" in last or "is not empty" in last
        same(longer.with_name(name), longer)


# ── at random ─────────────────────────────────────────────────────────────────────────────────────


def a_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size])


def cut(rng: random.Random, run_folder: Path) -> str:
    path = a_file(rng, run_folder)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return f"cut {path.name}"


def corrupt(rng: random.Random, run_folder: Path) -> str:
    path = a_file(rng, rng.choice([run_folder, run_folder / "checkpoints" / "step-4"]))
    flip(path, rng.random())
    return f"corrupt {path}"


def delete(rng: random.Random, run_folder: Path) -> str:
    path = a_file(rng, run_folder)
    path.unlink()
    return f"delete {path}"


def copy(rng: random.Random, run_folder: Path) -> str:
    source = run_folder / "checkpoints" / rng.choice(["step-3", "step-4"])
    name = rng.choice(["step-4-keep", "step-5", "step-5.tmp", "step-6", "step-7", "mine", "step-x"])
    shutil.copytree(source, source.with_name(name), dirs_exist_ok=True)
    return f"copy {source.name} to {name}"


def link(rng: random.Random, run_folder: Path) -> str:
    inside = ("", "checkpoints/", "tensorboard/")
    path = run_folder / (rng.choice(inside) + rng.choice(["step-5", "step-5.tmp", "link", "a.png"]))
    path.unlink(missing_ok=True)
    path.symlink_to(run_folder.parent / "precious")
    return f"link {path}"


def fill(rng: random.Random, run_folder: Path) -> str:
    return "fill"  # while it trains; see `attempt`


def attempt(flags: list[str], size: int | None, *how: str) -> str:
    """Go on, with files of at most `size` bytes; returns the one line of a refusal, or ""."""
    cfg: Config = parse([*flags, "--name", "damaged", "--steps", str(LONGER), *how])
    try:
        inputs = prepare(cfg)
        with largest_file(size or resource.RLIM_INFINITY):
            train.train(cfg, inputs)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        assert str(Path(cfg.runs) / "damaged") in str(error)  # it says where
        return str(error)
    return ""


def good(run_folder: Path) -> dict[str, dict[str, bytes]]:
    """The checkpoints that are whole, by the step in them, wherever they have been moved."""
    found = {}
    for path in sorted((run_folder / "checkpoints").iterdir()):
        if path.suffix != ".tmp" and not path.is_symlink():
            try:
                about = checkpoint.read_checkpoint(path).about
            except ValueError:
                continue
            found.setdefault(f"{about['step']}", contents(path))
    return found


def newest(found: dict[str, dict[str, bytes]]) -> int:
    return max(map(int, found), default=0)


def one_story(flags: list[str], longer: Path, folder: Path, seed: int) -> bool:
    """Faults, and then starts until the run is finished or refused; returns whether it finished."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(longer.with_name("short"), folder)
    precious = folder.parent / "precious"
    precious.mkdir(exist_ok=True)
    (precious / "thesis.tex").write_text("all of it")
    faults = rng.choices([cut, corrupt, delete, copy, link, fill], k=rng.randint(1, 3))
    told = [fault(rng, folder) for fault in faults]
    before = good(folder)
    how = ("--resume", "auto")
    if "fill" in told:
        size = int(10 ** rng.uniform(2, 6.5))
        told.append(attempt(flags, size, *how))
        assert newest(good(folder)) >= newest(before)
    said = attempt(flags, None, *how)
    told.append(said)
    assert contents(precious) == {"thesis.tex": b"all of it"}
    if said:  # refused: all that was good is still there, and it is refused again
        assert good(folder).items() >= before.items()
        assert attempt(flags, None, *how) == said
    else:
        same(folder, longer)
        assert not list(folder.rglob("*.partial"))
        assert not [p for p in folder.rglob("step-*.tmp") if not p.is_symlink()]
        assert read_checkpoint(by_step(folder / "checkpoints")[-1]).about["step"] == LONGER
        assert attempt(flags, None, *how) == ""  # finished: nothing left to do, nothing lost
        same(folder, longer)
    print(f"seed {seed}: " + "; ".join(filter(None, told)))
    return not said


@pytest.mark.parametrize("seed", range(8))
def test_faults_at_random(flags: list[str], short: Path, longer: Path, seed: int) -> None:
    one_story(flags, longer, short.with_name("damaged"), seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_faults_at_random(flags: list[str], short: Path, longer: Path) -> None:
    """FAULTS (200) stories of one to three faults each."""
    began, finished = time.perf_counter(), 0
    count = int(os.environ.get("FAULTS", "200"))
    first = int(os.environ.get("FIRST_SEED", "100"))
    for seed in range(first, first + count):
        try:
            finished += one_story(flags, longer, short.with_name("damaged"), seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    seconds = time.perf_counter() - began
    print(f"{count} stories, {finished} finished, the rest refused, in {seconds:.0f} s")
