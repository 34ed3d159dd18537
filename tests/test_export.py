"""An export where people load models: transformers' generate and pipeline, vLLM's server with an
OpenAI client, tools.ask; from a finished run, and with tools.export from a checkpoint. A prompt of
one's own is that of training, evaluation, asking and the chat template alike."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import SMALL_RUN, Ended, load_records, write_orz
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    pipeline,
)

import data
import preflight
import reports.log
import train
from checkpoint import Checkpoint, find_checkpoint
from config import STOP, TASK_MODELS, Sampling, parse
from hf_sampler import HFSampler
from tools import ask, export
from toy import tiny

OWN_TEMPLATE = '{{Sum}} {% it %} "up" \\n {question}\nstep by step: é😀 {# so #}\n'
OWN_STOP = ("</answer>", "答え")


def questions() -> list[str]:
    return tiny.problems(0)[0][:8]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two steps from the shipped base model, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("export")
    rows = [(question, str(sum(tiny.numbers(question)))) for question in questions()]
    problems = write_orz(folder / "sums.json", rows)
    held_out = write_orz(folder / "held-out.json", [("1+2+3=?", "6"), ("4+5+6=?", "15")])
    return [
        *("--model", str(tiny.BASE), "--data", str(problems), "--eval-data", str(held_out)),
        *("--runs", str(folder), "--engine", "transformers", "--checkpoint-every", "1"),
        *SMALL_RUN,
    ]


def train_run(flags: list[str], *more: str) -> Path:
    cfg = parse([*flags, *more])
    return train.train(cfg, preflight.prepare(cfg))


@pytest.fixture(scope="module")
def run(flags: list[str]) -> Path:
    return train_run(flags, "--name", "a run", "--steps", "2")


@pytest.fixture(scope="module")
def own(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a template and stop strings of its own; the template's file is gone since."""
    file = tmp_path_factory.mktemp("template") / "mine.txt"
    file.write_text(OWN_TEMPLATE + "\n", encoding="utf-8")
    more = ("--template", str(file), "--stop", *OWN_STOP, "--prompt-tokens", "120")
    folder = train_run(flags, "--name", "own", "--steps", "1", *more)
    file.unlink()
    return folder


def loaded(folder: Path) -> tuple[AutoModelForCausalLM, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def likeliest(folder: Path, asked: list[str], max_tokens: int = 100) -> list[str]:
    """What the training's sampler answers when it always takes the likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampler = HFSampler(str(folder), tokenizer, [tokenizer.eos_token_id], "float32", "cpu", 8)
    prompts = [tokenizer(data.prompt(question))["input_ids"] for question in asked]
    sampling = Sampling(max_tokens, top_p=1e-6)
    responses = sampler.generate(prompts, [0] * len(prompts), sampling)
    return [tokenizer.decode(r.token_ids) for r in responses]


# ── transformers ──────────────────────────────────────────────────────────────────────────────────


def test_generate_and_pipeline_need_nothing_but_the_folder(run: Path) -> None:
    """They raise if the generation settings hold stop strings. A token that holds a stop string
    ends the response, so that here the text is that of our sampler."""
    question = "7+4+12+3+9+6+11=?"
    (expected,) = likeliest(run / "policy", [question])
    assert expected.endswith("</answer>")
    model, tokenizer = loaded(run / "policy")
    inputs = tokenizer(data.prompt(question), return_tensors="pt")
    model.generate(**inputs, max_new_tokens=3)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=100)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == expected
    write = pipeline("text-generation", model=str(run / "policy"))
    asked = [{"role": "user", "content": question}]
    (answer,) = write(asked, do_sample=False, max_new_tokens=100)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_generation_settings_are_those_of_the_training(run: Path, own: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    generation = GenerationConfig.from_pretrained(run / "policy")
    assert generation.stop_strings is None
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert generation.max_new_tokens == 24
    ends = [tokenizer.decode([i]) for i in generation.eos_token_id]
    assert tokenizer.eos_token in ends and "} </answer>" in ends
    assert all(end == tokenizer.eos_token or any(s in end for s in STOP) for end in ends)
    fewer = GenerationConfig.from_pretrained(own / "policy").eos_token_id
    assert {tokenizer.decode([i]) for i in {*generation.eos_token_id} - {*fewer}} == {
        "\nAssistant: <think>"
    }


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def test_the_card_describes_the_run_and_its_snippet_runs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (run / "policy" / "README.md").read_text()
    for text in (
        "# a run\n",
        "base after 2 of 2 iterations",
        "| policy_lr | 0.001 |",
        "- Training: `sums.json`, 8 problems\n- Held-out: `held-out.json`",
        "| held-out problems | after 0 iterations | after 2 iterations |",
        f"```text\n{data.TEMPLATE}\n```",
        "vllm serve . --served-model-name 'a run'",
        "python -m tools.ask --model . ",
    ):
        assert text in card, text
    assert str(run.parent) not in card and "license:" not in card
    local, client = code(card, "python")
    assert f"stop={json.dumps(list(STOP))}," in client
    monkeypatch.chdir(run / "policy")
    exec(local, {})
    said = capsys.readouterr().out
    assert said.strip() and "Assistant: <think>" not in said
    critic = (run / "critic" / "README.md").read_text()
    assert "V(s_t) of the run a run after 2 iterations" in critic


def test_the_card_knows_the_models_that_bring_their_problems() -> None:
    assert set(TASK_MODELS) == set(tiny.TASKS)


# ── the prompt ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", [data.TEMPLATE, data.TABLE_1, OWN_TEMPLATE])
@pytest.mark.parametrize("bos", [None, '<s> "quoted"'])
def test_the_chat_template_is_the_prompt_and_refuses_other_conversations(
    template: str, bos: str | None
) -> None:
    """Line ends, quotes, braces and marks of Jinja in the template mean themselves."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.BASE)
    tokenizer.bos_token = bos
    tokenizer.chat_template = data.chat_template(tokenizer, template)
    user = {"role": "user", "content": "{{ 1 }} + {question}?"}
    rendered = tokenizer.apply_chat_template([user], tokenize=False)
    assert rendered == (bos or "") + data.prompt(user["content"], template)
    parts = {"role": "user", "content": [{"type": "text", "text": "1+1?"}]}
    system, assistant = ({"role": role, "content": "x"} for role in ("system", "assistant"))
    for messages in ([system, user], [user, assistant, user], [assistant], [parts]):
        with pytest.raises(jinja2.TemplateError, match="trained with one prompt"):
            tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_run_keeps_the_text_of_its_template(own: Path, flags: list[str], tmp_path: Path) -> None:
    """The file may change or go. Training asked with the text, and ended at its stop strings."""
    settings = json.loads((own / "config.json").read_text())
    assert settings["template"] == OWN_TEMPLATE and settings["stop"] == list(OWN_STOP)
    assert data.trained_prompt(str(own / "policy")) == (OWN_TEMPLATE, OWN_STOP)
    assert f"```text\n{OWN_TEMPLATE}\n```" in (own / "policy" / "README.md").read_text()
    evaluations = load_records(own / "evaluations.jsonl")
    assert evaluations[-1]["settings"]["template"] == OWN_TEMPLATE
    assert evaluations[-1]["settings"]["stop"] == list(OWN_STOP)
    (tmp_path / "mine.txt").write_text(OWN_TEMPLATE, encoding="utf-8-sig")
    cfg = parse([*flags, "--template", str(tmp_path / "mine.txt"), "--prompt-tokens", "120"])
    assert cfg.template == OWN_TEMPLATE.removesuffix("\n")
    inputs = preflight.prepare(cfg)
    inputs.grader.close()
    asked = inputs.tokenizer.decode(inputs.problems[0].prompt_ids)
    assert asked == data.prompt(inputs.problems[0].question, cfg.template)


def test_a_changed_prompt_is_said_when_a_run_goes_on(
    own: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As for the other settings of the sampler: it is said in one line, and the closing table
    compares only evaluations that were made alike."""
    copy = shutil.copytree(own, own.with_name("copy"))
    more = ("--name", "copy", "--resume", "auto", "--prompt-tokens", "480")
    train_run(flags, *more, "--steps", "2", "--template", "paper")
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("going on from")]
    assert "template '{{Sum}}" in line and " → paper" in line and "stop ['</answer>', " in line
    assert "since the start template '{{Sum}}" in said and "nothing to compare with" in said
    assert data.trained_prompt(str(copy / "policy")) == ("paper", STOP)


def test_a_model_is_asked_with_its_own_prompt(own: Path, run: Path) -> None:
    """evaluate.py and tools.ask share `with_prompt`; what is given on the command line wins."""
    question = ask.Question(question="1+2=?")
    of_own = preflight.with_prompt(question, str(own / "policy"))
    assert (of_own.template, of_own.stop) == (OWN_TEMPLATE, OWN_STOP)
    tokenizer = AutoTokenizer.from_pretrained(own / "policy")
    problem = ask.tokenized(of_own, tokenizer, 200)
    assert tokenizer.decode(problem.prompt_ids) == data.prompt("1+2=?", OWN_TEMPLATE)
    for folder in (run / "policy", tiny.BASE):
        plain = preflight.with_prompt(question, str(folder))
        assert (plain.template, plain.stop) == ("authors", STOP)
    given = ask.Question(question="1+2=?", template="paper", stop=("x",))
    assert preflight.with_prompt(given, str(own / "policy")) == given


def test_training_on_a_model_with_another_prompt_says_so(
    own: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--name", "second", "--model", str(own / "policy"), "--prompts", "9")
    with pytest.raises(ValueError, match="fewer than --prompts 9"):
        preflight.prepare(parse([*flags, *more]))
    assert "policy was trained with another prompt, see its prompt.json" in capsys.readouterr().out


def test_a_stop_string_whose_characters_are_several_tokens_ends_a_response(own: Path) -> None:
    """The tiny tokenizer has one token for each byte of 答え."""
    tokenizer = AutoTokenizer.from_pretrained(own / "policy")
    eos = [tokenizer.eos_token_id]
    sampler = HFSampler(str(own / "policy"), tokenizer, eos, "float32", "cpu", 1)
    ids = torch.tensor(tokenizer("x答え")["input_ids"])
    assert len(ids) == 7
    stop = OWN_STOP[1:]
    assert sampler._stopped(ids, stop) and not sampler._stopped(ids[:-1], stop)
    assert sampler.may_stop(stop)[ids[-1]]
    assert not sampler.may_stop(STOP)[ids[-1]]


# ── tools.export ──────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_becomes_the_folders_of_a_finished_run(
    run: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    """From a run that is going on, which holds its lock, and may be writing a line."""
    going_on = shutil.copytree(run, tmp_path / "a run")
    shutil.rmtree(going_on / "policy")
    shutil.rmtree(going_on / "critic")
    with (going_on / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 3, "rewa')
    lock = reports.log.lock_folder(going_on)
    try:
        newest = call(export.main, going_on)
        older = call(export.main, going_on, "--step", 1, "--out", tmp_path / "one")
    finally:
        os.close(lock)
    assert newest.code == 0, newest.err
    assert newest.out == f"{going_on / 'exports' / 'step-2'} holds critic and policy\n"
    for role in ("policy", "critic"):
        exported = going_on / "exports" / "step-2" / role
        names = sorted(path.name for path in exported.iterdir())
        assert names == sorted(path.name for path in (run / role).iterdir())
        for name in set(names) - {"README.md"}:
            assert (exported / name).read_bytes() == (run / role / name).read_bytes(), name
    assert older.code == 0, older.err
    weights = [folder / "policy" / "model.safetensors" for folder in (tmp_path / "one", run)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    card = (tmp_path / "one" / "policy" / "README.md").read_text()
    assert "after 1 of 2 iterations" in card
    assert "| held-out problems | after 0 iterations |\n" in card
    assert find_checkpoint("auto", going_on).about["step"] == 2  # nothing of the run has changed


def test_a_checkpoint_that_the_run_removes_meanwhile(
    run: Path, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = shutil.copytree(run, tmp_path / "run")
    load_weights = export.load_weights

    def remove_first(found: Checkpoint, role: str, module: torch.nn.Module) -> None:
        shutil.rmtree(found.path, ignore_errors=True)
        load_weights(found, role, module)

    monkeypatch.setattr(export, "load_weights", remove_first)
    done = call(export.main, going_on, "--step", 1)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "step-1 cannot be loaded (the run has removed it meanwhile" in line


# ── vLLM's server ─────────────────────────────────────────────────────────────────────────────────

# What vLLM's server imports beside vLLM itself; its command also asks for vLLM's version.
SERVER = """vllm openai uvicorn watchfiles prometheus_fastapi_instrumentator
    model_hosting_container_standards""".split()


def missing_for_a_server() -> list[str]:
    missing = [name for name in SERVER if find_spec(name) is None]
    try:
        version("vllm")
    except PackageNotFoundError:
        missing.append("the metadata of a package called vllm")
    return missing


@pytest.fixture
def served(run: Path) -> Iterator[int]:
    """`vllm serve` on the exported policy as its card says; yields the port."""
    missing = missing_for_a_server()
    if missing:
        pytest.skip(f"vLLM's server needs {', '.join(missing)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "."]
    command += ["--served-model-name", "a run", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = run.parent / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=run / "policy", env=os.environ | settings, stdout=output, stderr=output
        )
    try:
        _wait_until_it_answers(server, f"http://127.0.0.1:{port}/health", log)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_it_answers(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + 3000
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=60):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


@pytest.mark.slow
def test_vllm_serves_an_export_to_an_openai_client(
    run: Path, served: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the stop strings the text is that of our sampler; the card's own snippet runs; a system
    message and a second turn are refused with the reason."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served}/v1", api_key="none", timeout=600)

    def answer(*messages: dict[str, object], **settings: object) -> str:
        settings = {"temperature": 0, "max_tokens": 100, "stop": list(STOP)} | settings
        settings |= {"extra_body": {"include_stop_str_in_output": True}}
        made = client.chat.completions.create(model="a run", messages=list(messages), **settings)
        return made.choices[0].message.content

    asked = questions()[:4]
    for question, expected in zip(asked, likeliest(run / "policy", asked), strict=True):
        user = {"role": "user", "content": question}
        assert answer(user) == expected
        parts = {"role": "user", "content": [{"type": "text", "text": question}]}
        assert answer(parts) == expected
    for messages in (
        [{"role": "system", "content": "Be brief."}, user],
        [user, {"role": "assistant", "content": "2"}, user],
    ):
        with pytest.raises(openai.BadRequestError, match="trained with one prompt"):
            answer(*messages)
    _, snippet = code((run / "policy" / "README.md").read_text(), "python")
    exec(snippet.replace("http://localhost:8000/v1", f"http://127.0.0.1:{served}/v1"), {})
    assert capsys.readouterr().out.strip()
