"""curation/hub.py with the real clients and a hub on this machine: every benchmark by its name,
data and models by their ids, each way in which the hub fails, and what is in the cache then."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SMALL_RUN, Ended, orz_data
from hub_server import NO_ACCESS, TOKEN, Hub, serve
from huggingface_hub import constants
from test_bad_inputs import Borrowed

import data
import evaluate
import preflight
import train
from config import parse
from curation import formats, hub
from grading.pool import Grader
from tools import ask, plan
from toy import tiny

ROOT = Path(train.__file__).parent
BASE = ROOT / "toy" / "base"


# ── the hub, its repositories, and a home for the clients ─────────────────────────────────────────


class Impatient:
    """The module `time` without its waiting."""

    def sleep(self, seconds: float) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def waited(_: Impatient, seconds: float) -> None:
    pytest.fail(f"waited {seconds} seconds for a hub that is gone")  # no Exception


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """What HF_ENDPOINT and HF_HOME do when the clients are imported; and no waiting."""
    old_home = constants.HF_HOME
    for module in (constants, datasets.config):
        for name, value in vars(module).items():
            if isinstance(value, str | Path) and str(value).startswith(old_home):
                moved = str(value).replace(old_home, str(home), 1)
                monkeypatch.setattr(module, name, type(value)(moved))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    # Two services beside the hub; `datasets` does without them.
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", Impatient())
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as server:
        yield server


@pytest.fixture
def local_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, empty, with an empty cache."""
    server.repositories.clear()
    server.requests.clear()
    server.broken_after = None
    use_hub(monkeypatch, server.endpoint, tmp_path / "home")
    return server


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as grader:
        yield grader


@pytest.fixture
def one_grader(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers serve every program here."""
    for module in (preflight, evaluate):
        monkeypatch.setattr(module, "Grader", lambda *_: Borrowed(grader))


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def card(**of_configs: dict[str, str]) -> bytes:
    """The README.md of a data set: configuration → split → its files."""
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
        for name, splits in of_configs.items()
    ]
    return f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()


AIME = [{"id": i, "problem": f"{i}+1?", "answer": str(i + 1), "year": "2024"} for i in range(3)]
MATH = [{"problem": "1+1?", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "a"}]
GPQA = "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"
MMLU = [{"question": "q", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 3}]
PRO = [{"question_id": 1, "question": "q", "options": list("abcdefghij"), "answer": "J"}]
CASES = [{"input": "1", "output": "1", "testtype": "stdin"}]
CODE = [{"question_content": "q", "public_test_cases": json.dumps(CASES), "starter_code": ""}]

# The files of each benchmark as they lie on the hub, and how many problems are asked.
SETS = {
    "aime2024": ({"data/train-00000-of-00001.parquet": parquet(AIME)}, 3),
    "aime2025": (
        {
            "README.md": card(default={"train": "data/train-*"}),
            "data/train-00000-of-00001.parquet": parquet(AIME),
        },
        3,
    ),
    "math500": ({"README.md": b"# MATH-500\n", "test.jsonl": json_lines(MATH)}, 1),
    "gpqa_diamond": (
        {
            "README.md": card(
                gpqa_diamond={"train": "gpqa_diamond.csv"}, gpqa_main={"train": "gpqa_main.csv"}
            ),
            "gpqa_diamond.csv": f"{GPQA}\nr1,Which?,r,w,x,y\nr2,Why?,r,w,x,y\n".encode(),
            "gpqa_main.csv": f"{GPQA}\n".encode(),
        },
        2,
    ),
    "mmlu": (
        {
            "README.md": card(all={"test": "all/test-*", "dev": "all/dev-*"}),
            "all/test-00000-of-00001.parquet": parquet(MMLU),
            "all/dev-00000-of-00001.parquet": parquet(MMLU * 2),
        },
        1,
    ),
    "mmlu_pro": (
        {
            "README.md": card(default={"test": "data/test-*", "validation": "data/validation-*"}),
            "data/test-00000-of-00001.parquet": parquet(PRO),
            "data/validation-00000-of-00001.parquet": parquet(PRO * 2),
        },
        1,
    ),
    "livecodebench": ({"test6.jsonl": json_lines(CODE), "code_generation_lite.py": b"pass"}, 1),
}


def hub_id_of(name: str) -> str:
    return f"datasets/{formats.HUB.fullmatch(formats.BENCHMARKS[name])['id']}"


def downloads(asked: list[str]) -> list[str]:
    """The files that were downloaded."""
    files = [request for request in asked if "/resolve/" in request or "/files/" in request]
    return [file for file in files if file.startswith("GET ")]


# ── data ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", formats.BENCHMARKS)
def test_every_benchmark_is_downloaded_once(
    name: str, local_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time only questions are asked; offline none is."""
    files, count = SETS[name]
    local_hub.add(hub_id_of(name), files, gated=name == "gpqa_diamond")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    problems = data.load(formats.BENCHMARKS[name], name)
    assert len(problems) == count and problems[0].source == f"{name}:1"
    assert all(problem.answer or problem.tests for problem in problems)
    assert downloads(local_hub.asked())
    assert data.load(formats.BENCHMARKS[name], name) == problems
    asked = local_hub.asked()
    assert asked and not downloads(asked)
    go_offline(monkeypatch)
    assert data.load(formats.BENCHMARKS[name], name) == problems
    assert not local_hub.asked()


@pytest.mark.parametrize(
    ("name", "file", "parts"),
    [
        ("math500", "test.jsonl", ("math", "math500_full.jsonl")),
        ("aime2025", "train.jsonl", ("aime", "aime2025.jsonl")),
    ],
)
def test_real_rows(name: str, file: str, parts: tuple[str, str], local_hub: Hub) -> None:
    lines = orz_data(*parts).read_bytes().splitlines(keepends=True)[:20]
    local_hub.add(hub_id_of(name), {file: b"".join(lines)})
    assert data.load(formats.BENCHMARKS[name], name) == data.load(orz_data(*parts), name)[:20]


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        (
            "acme/gated",
            "",
            "it is gated: accept its terms at ENDPOINT/datasets/acme/gated, then log",
        ),
        ("acme/gated/test.jsonl", "", "it is gated: accept its terms at ENDPOINT/datasets/acme/ga"),
        ("acme/gated", NO_ACCESS, "your account has no access: accept its terms at ENDPOINT/data"),
        ("acme/gated", "hf_wrong", "the hub does not know your token; log in with `hf auth login`"),
        ("acme/set@test", "hf_wrong", "the hub does not know your token"),
        ("acme/absent", "", "the hub has no such data set, or it is private; correct the name, or"),
        ("acme/absent", TOKEN, "the hub has no such data set, or it is private; correct the name)"),
        (
            "acme/set/absent.jsonl",
            "",
            "it has no file absent.jsonl; its files are listed at ENDPOINT/",
        ),
        ("acme/set@absent", "", "Unknown split \"absent\". Should be one of ['test']"),
        ("acme/set:absent@test", "", "BuilderConfig 'absent' not found. Available: ['default']"),
        ("acme/script", "", "Dataset scripts are no longer supported, but found script.py"),
        ("acme/empty", "", "doesn't contain any data files"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    source: str, token: str, message: str, local_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"test.jsonl": json_lines(MATH)}
    local_hub.add("datasets/acme/set", rows)
    local_hub.add("datasets/acme/gated", rows, gated=True)
    local_hub.add("datasets/acme/script", {"script.py": b""})
    local_hub.add("datasets/acme/empty", {"README.md": b"#"})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError) as error:
        data.load(source)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{source}: no such file here, and the hub does not give it (")
    assert message.replace("ENDPOINT", local_hub.endpoint) in line
    assert "or use a local copy" in line


def test_a_token_that_is_logged_in_opens_a_gated_set(local_hub: Hub) -> None:
    """As `hf auth login` stores it."""
    local_hub.add("datasets/acme/gated", {"train.jsonl": json_lines(MATH)}, gated=True)
    with pytest.raises(OSError, match="it is gated"):
        data.load("acme/gated")
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert len(data.load("acme/gated")) == 1


@pytest.mark.parametrize("source", ["acme/set", "acme/set/train.jsonl"])
def test_a_broken_download_leaves_nothing_that_is_read(source: str, local_hub: Hub) -> None:
    """Each try to go on from where it broke fails, until the connection is whole again."""
    rows = json_lines([{"problem": f"{i}?", "answer": str(i)} for i in range(200)])
    local_hub.add("datasets/acme/set", {"train.jsonl": rows})
    local_hub.broken_after = len(json_lines([{"problem": "0?", "answer": "0"}])) * 10  # whole rows
    with pytest.raises(OSError, match=r"cannot be reached, or broke off \(peer closed") as error:
        data.load(source)
    assert "start again: whole files are kept" in str(error.value)
    assert len(downloads(local_hub.asked())) == 6  # the first, and five that go on
    assert not list(Path(constants.HF_HUB_CACHE).rglob("blobs/*"))
    local_hub.broken_after = None
    assert len(data.load(source)) == 200


@pytest.mark.parametrize("source", ["acme/set", "acme/set/train.jsonl"])
def test_a_hub_that_is_gone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is read; what is not is one line, at once."""
    with serve() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "home")
        server.add("datasets/acme/set", {"train.jsonl": json_lines(MATH)})
        problems = data.load(source)
    monkeypatch.setattr(Impatient, "sleep", waited)
    assert data.load(source) == problems
    other = source.replace("set", "other")
    with pytest.raises(OSError, match=r"cannot be reached, or broke off \(.*refused\); check"):
        data.load(other)
    go_offline(monkeypatch)
    with pytest.raises(
        OSError, match=r"HF_HUB_OFFLINE is set, and the cache .* unset it, or fetch"
    ):
        data.load(other)
    assert data.load(source) == problems


# ── models ────────────────────────────────────────────────────────────────────────────────────────


def add_model(local_hub: Hub, name: str = "acme/tiny", gated: bool = False) -> None:
    """The base model of the demo, beside files that no program here needs."""
    others = {"README.md": b"#", "onnx/model.onnx": b"0", "consolidated.safetensors": b"0"}
    local_hub.add(name, files_of(BASE) | others, gated=gated)


def add_sums(local_hub: Hub) -> None:
    questions, _ = tiny.problems(0)
    rows = [{"question": q, "answer": str(sum(tiny.numbers(q)))} for q in questions[:8]]
    local_hub.add("datasets/acme/sums", {"train.jsonl": json_lines(rows)})


MODEL_FILES = sorted([*files_of(BASE)])
CALLS = {
    "train": (
        train.main,
        f"--model acme/tiny --data acme/sums --steps 1 {' '.join(SMALL_RUN)} --engine transformers "
        "--runs runs --overwrite --eval-data sums=acme/sums --threads 1",
    ),
    "evaluate": (
        evaluate.main,
        "--model acme/tiny --benchmarks sums=acme/sums --engine transformers --samples 1 --limit 2 "
        "--prompt-tokens 64 --response-tokens 24 --threads 1 --overwrite --grader-workers 1",
    ),
    "ask": (ask.main, "1+2=? --model acme/tiny --response-tokens 24"),
}


@pytest.mark.usefixtures("one_grader")
@pytest.mark.parametrize("program", CALLS)
def test_programs_take_models_by_id(
    program: str,
    local_hub: Hub,
    call: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the files of the model are downloaded, once; offline the program does the same again.
    No token is sent to the host of the weights."""
    add_model(local_hub, gated=True)
    add_sums(local_hub)
    monkeypatch.chdir(tmp_path)
    main, flags = CALLS[program]
    refused = call(main, *flags.split())
    (line,) = refused.err.splitlines()
    assert refused.code == 1 and f"{program}" in line
    assert "--model acme/tiny: not a folder or hub id with a readable model (it is gat" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]  # no run, no results
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_hub.requests.clear()
    first = call(main, *flags.split())
    assert first.code == 0, first.err
    fetched = downloads(local_hub.asked())
    assert len([f for f in fetched if "/datasets/" not in f]) == len(MODEL_FILES)
    assert local_hub.to_files_host.pop() is None and not local_hub.to_files_host
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--acme--tiny/snapshots/*")
    assert sorted(path.name for path in snapshot.iterdir()) == MODEL_FILES
    go_offline(monkeypatch)
    if program == "train":
        monkeypatch.setattr(train, "train", lambda cfg, inputs: Path(inputs.model_path))
        monkeypatch.setattr(train, "draw_run", lambda folder: None)
    again = call(main, *flags.split())
    assert again.code == 0, again.err
    assert not local_hub.asked()
    if program == "evaluate":
        (settings,) = tmp_path.glob("evals/*/settings.json")
        found = json.loads(settings.read_text())
        assert found["model"] == "acme/tiny" and found["files"] == {"commit": snapshot.name}


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("acme/gated", NO_ACCESS, "your account has no access: accept its terms at ENDPOINT/acme/"),
        ("acme/gated", "hf_wrong", "the hub does not know your token; log in"),
        ("acme/tiny", "hf_wrong", "the hub does not know your token; log in"),
        (
            "acme/absent",
            "",
            "the hub has no such model, or it is private; correct the name, or log",
        ),
        ("absent", "", "the hub has no such model"),
        ("acme/bare", "", "it has no weights: neither model*.safetensors nor pytorch_model*.bin"),
        ("acme/none", "", "it has no config.json, which a model of transformers has"),
    ],
)
def test_a_model_that_the_hub_refuses_is_one_line(
    name: str,
    token: str,
    message: str,
    local_hub: Hub,
    call: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_model(local_hub)
    add_model(local_hub, "acme/gated", gated=True)
    local_hub.add("acme/bare", {n: c for n, c in files_of(BASE).items() if n.endswith("json")})
    local_hub.add("acme/none", {"README.md": b"#"})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    done = call(ask.main, "1+2=?", "--model", name)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("tools.ask: --model ")
    assert message.replace("ENDPOINT", local_hub.endpoint) in line


@pytest.mark.usefixtures("one_grader")
def test_a_broken_download_of_weights(
    local_hub: Hub, tmp_path: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is loaded, also offline; the second try completes it."""
    add_model(local_hub)
    add_sums(local_hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", None)  # not reached
    local_hub.broken_after = 50_000  # more than the tokenizer, less than the weights
    main, flags = CALLS["train"]
    line = call(main, *flags.split()).err.splitlines()[-1]
    assert line.startswith("train.py: --model acme/tiny: ") and "start again: whole files" in line
    assert [path.name for path in tmp_path.iterdir()] == ["home"]  # no folder of a run
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--acme--tiny/snapshots/*")
    assert "model.safetensors" not in [path.name for path in snapshot.iterdir()]
    local_hub.broken_after = None
    with monkeypatch.context() as offline:
        go_offline(offline)
        line = call(main, *flags.split()).err.splitlines()[-1]
        assert "HF_HUB_OFFLINE is set, and the cache" in line
    local_hub.requests.clear()
    preflight.prepare(parse(flags.split()))
    assert [path.split("/")[1] for path in downloads(local_hub.asked())] == ["files"]
    assert (snapshot / "model.safetensors").read_bytes() == (
        BASE / "model.safetensors"
    ).read_bytes()


def test_a_model_of_a_hub_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "home")
        add_model(server)
        folder = hub.model_folder("acme/tiny", weights=True)
    monkeypatch.setattr(Impatient, "sleep", waited)
    assert hub.model_folder("acme/tiny", weights=True) == folder
    with pytest.raises(OSError, match=r"cannot be reached, or broke off \(.*refused\); check"):
        hub.model_folder("acme/other")


def test_weights_in_the_older_form_and_in_parts(local_hub: Hub) -> None:
    small = {"config.json": b"{}"}
    parts = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
    older = {"pytorch_model.bin": b"0"}
    local_hub.add("acme/older", small | older)
    local_hub.add("acme/both", small | older | parts | {"model.safetensors.index.json": b"{}"})
    folder = Path(hub.model_folder("acme/older", weights=True))
    assert sorted(files_of(folder)) == ["config.json", "pytorch_model.bin"]
    folder = Path(hub.model_folder("acme/both", weights=True))
    assert sorted(files_of(folder)) == sorted(small | parts | {"model.safetensors.index.json": 0})


@pytest.mark.usefixtures("one_grader")
def test_the_critics_base_model_and_the_plan_take_ids(
    local_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan needs the configuration alone."""
    monkeypatch.chdir(tmp_path)
    add_model(local_hub, "acme/critic")
    add_sums(local_hub)
    flags = ["--model", "tiny", "--critic-model", "acme/critic", "--engine", "transformers"]
    plan.show(parse([*flags, "--plan"]))
    assert not [f for f in downloads(local_hub.asked()) if "/files/" in f]
    inputs = preflight.prepare(parse([*flags, *SMALL_RUN, "--data", "acme/sums"]))
    assert (Path(inputs.critic_path) / "model.safetensors").is_file()


def test_another_machine_downloads_the_same_commit(
    local_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache is empty. It does not ask which commit is the newest."""
    add_model(local_hub)
    there = hub.model_folder("acme/tiny", weights=True)
    assert any(request.endswith("/revision/main") for request in local_hub.asked())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    here = preflight.on_this_machine("--model", "acme/tiny", there)
    assert not any(request.endswith("/revision/main") for request in local_hub.asked())
    assert Path(here).is_relative_to(tmp_path / "other") and Path(here).name == Path(there).name
    assert (Path(here) / "model.safetensors").is_file()
    assert preflight.on_this_machine("--model", str(BASE), str(BASE)) == str(BASE)


# ── as a user calls it ────────────────────────────────────────────────────────────────────────────


def run(
    server: Hub, home: Path, flags: str, ranks: int = 1, **env: str
) -> subprocess.CompletedProcess:
    """evaluate.py as a process of its own, or several; its home is a folder of the test."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    clean |= {"HF_ENDPOINT": server.endpoint, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, *(torchrun if ranks > 1 else ()), str(ROOT / "evaluate.py")]
    return subprocess.run(
        [*start, *flags.split()], cwd=home, env=clean | env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_gated_benchmark_in_a_process(local_hub: Hub, tmp_path: Path) -> None:
    local_hub.add(hub_id_of("gpqa_diamond"), SETS["gpqa_diamond"][0], gated=True)
    done = run(local_hub, tmp_path, "--model acme/tiny --benchmarks gpqa_diamond")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("evaluate.py: Idavidrein/gpqa:gpqa_diamond: no such file here, and the")
    assert "set HF_TOKEN" in line


@pytest.mark.slow
def test_an_evaluation_in_a_process_and_offline_after_that(tmp_path: Path) -> None:
    """Two ranks download as one does; without the hub the results are the same."""
    flags = CALLS["evaluate"][1].replace("sums=acme/sums", "math500 sums=acme/sums")
    flags = flags.replace("--prompt-tokens 64", "--prompt-tokens 480")
    file = tmp_path / "evals" / "acme-tiny" / "results.json"
    with serve() as server:
        add_model(server)
        add_sums(server)
        server.add(hub_id_of("math500"), SETS["math500"][0])
        done = run(server, tmp_path, flags, ranks=2)
        assert done.returncode == 0, done.stderr
        results = file.read_text()
        assert set(json.loads(results)) == {"math500", "sums"}
        assert len([f for f in downloads(server.asked()) if "/files/" in f]) == 1  # the weights
        shutil.rmtree(tmp_path / "evals")
        assert run(server, tmp_path, flags).returncode == 0
        assert not downloads(server.asked())
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        shutil.rmtree(tmp_path / "evals")
        done = run(server, tmp_path, flags, **env)
        assert done.returncode == 0, done.stderr
        assert file.read_text() == results
