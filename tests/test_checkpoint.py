"""checkpoint.py: checkpoints are complete or absent, other programs load the exports, and refusals
are one line. rollout.py: saved rollouts can be trained on again."""

import json
import resource
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_RUN, random_model, random_rollouts, untimed_metrics
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

import checkpoint
import data
import ppo
import train
from checkpoint import Checkpoints, Trained, by_step, find_checkpoint, named_tensors
from config import Config, Sampling, parse
from critic import Critic, load_critic
from data import Problem
from packing import forward_all_tokens
from policy import Policy, load_policy
from preflight import prepare
from rollout import Rollout, VllmSampler, load_rollouts, sample_responses, save_rollouts

STEPS = 4


@pytest.fixture(scope="module")
def flags(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of four steps that saves a checkpoint after each."""
    files = ["--model", str(base_folder), "--data", str(base_folder / "train.json")]
    files += ["--runs", str(tmp_path_factory.mktemp("runs"))]
    settings = f"--engine transformers --steps {STEPS} --checkpoint-every 1".split()
    return [*files, *settings, *SMALL_RUN]


def run(flags: list[str], *more: str) -> Path:
    """Train; returns the run folder."""
    cfg = parse([*flags, *more])
    return train.train(cfg, prepare(cfg))


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """A run that was not interrupted, with all its rollouts and checkpoints."""
    return run(flags, "--name", "whole", "--save-rollouts", "--keep-checkpoints", "9")


def weights(folder: Path) -> dict[str, bytes]:
    """The files of weights that a run exported."""
    roles = ("policy", "critic")
    return {role: (folder / role / "model.safetensors").read_bytes() for role in roles}


def refusal(flags: list[str], *more: str) -> str:
    """The one line with which `prepare` refuses; the run is called x unless `more` names it."""
    with pytest.raises(ValueError) as error:
        prepare(parse([*flags, "--name", "x", *more]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(whole: Path) -> Path:
    """A copy of the run, which a test may damage."""
    folder = whole.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder


def test_only_the_newest_checkpoints_are_kept(flags: list[str], whole: Path) -> None:
    """Up to --keep-checkpoints of them."""
    all_steps = [f"step-{n}" for n in range(1, STEPS + 1)]
    assert [p.name for p in by_step(whole / "checkpoints")] == all_steps
    two = run(flags, "--name", "two", "--keep-checkpoints", "2")
    assert [p.name for p in by_step(two / "checkpoints")] == ["step-3", "step-4"]
    assert not list((two / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("step", [1, 3])
def test_branching_off_gives_the_same_run(flags: list[str], whole: Path, step: int) -> None:
    """A run that resumes from another run's checkpoint has the same metrics, before and after it,
    and the same weights to the last bit."""
    saved = str(whole / "checkpoints" / f"step-{step}")
    branch = run(flags, "--name", f"branch-{step}", "--resume", saved)
    assert untimed_metrics(branch) == untimed_metrics(whole)
    assert weights(branch) == weights(whole)


def test_resume_auto_begins_a_run_and_continues_it(flags: list[str], whole: Path) -> None:
    more = ("--name", "auto", "--resume", "auto")
    half = run(flags, *more, "--steps", "2")
    assert len(untimed_metrics(half)) == 2
    assert weights(run(flags, *more)) == weights(whole)
    assert untimed_metrics(half) == untimed_metrics(whole)
    # The run is finished: resuming it again does nothing.
    assert weights(run(flags, *more)) == weights(whole)
    bare = half.with_name("bare")
    shutil.copytree(half, bare)
    shutil.rmtree(bare / "checkpoints")
    message = refusal(flags, "--name", "bare", "--resume", "auto")
    assert "finished run without checkpoints" in message


def test_a_damaged_checkpoint_is_skipped(
    flags: list[str], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = copy / "checkpoints"
    file = next((checkpoints / "step-4").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    assert find_checkpoint("auto", copy).path.name == "step-3"
    assert "step-4 is damaged" in capsys.readouterr().out
    message = refusal(flags, "--resume", str(checkpoints / "step-4"))
    assert "is damaged: __0_0.distcp has" in message
    (checkpoints / "step-3" / "run.json").unlink()
    assert find_checkpoint("auto", copy).path.name == "step-2"
    message = refusal(flags, "--resume", str(checkpoints / "step-3"))
    assert "no complete checkpoint" in message
    assert len(by_step(checkpoints)) == 4  # none was removed


def test_checkpoints_that_do_not_fit_the_run_are_refused(
    flags: list[str], whole: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    last = str(whole / "checkpoints" / "step-4")
    other = random_model(tmp_path / "other", tokenizer, tied=False)
    message = refusal(flags, "--model", str(other), "--resume", last)
    assert "is of another model: its" in message
    message = refusal(flags, "--resume", last, "--advantage", "grpo")
    assert "holds policy and critic, this run has policy" in message
    assert "already past --steps 3" in refusal(flags, "--resume", last, "--steps", "3")
    older = str(whole / "checkpoints" / "step-2")
    assert "step-4 is newer" in refusal(flags, "--name", "whole", "--resume", older)
    message = refusal(flags, "--name", "whole", "--resume", "auto", "--overwrite")
    assert "pass one of them" in message
    message = refusal(flags, "--name", "whole")
    assert "is not empty" in message
    assert "--resume auto" in message


def test_settings_that_only_count_at_the_start(
    flags: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on has its critic already."""
    older = ("--resume", str(whole / "checkpoints" / "step-3"))
    for name, value in (("value-head", "zeros"), ("init-critic", str(whole / "critic"))):
        message = refusal(flags, *older, f"--{name}", value)
        assert message.startswith(f"--{name} {value}: has no effect with --resume: the critic is")
    message = refusal(flags, *older, "--anneal-steps", "3")
    assert message.startswith("--anneal-steps 3: counts from step 0 and is over at")
    prepare(parse([*flags, "--name", "anneal", *older, "--anneal-steps", "4"])).grader.close()
    last = ("--resume", str(whole / "checkpoints" / f"step-{STEPS}"))
    run(flags, "--name", "at-the-end", *last, "--policy-lr", "1e-4")
    said = capsys.readouterr().out
    assert "policy_lr 0.001 → 0.0001 (no effect: nothing is left to train)" in said


def test_changed_settings_without_an_effect() -> None:
    """What may have changed for a good reason is no error: a folder that moved, a flag left out."""

    def reasons(step: int, then: Config, **now: Any) -> dict[str, str]:
        settings = json.loads(json.dumps(asdict(then)))
        saved = checkpoint.Checkpoint(Path("step"), {"step": step, "settings": settings})
        return checkpoint.without_effect(saved, replace(then, **now))

    base = Config(critic_steps=3, critic_lr_warmup=9)
    assert reasons(3, base, temperature=0.5, anneal_steps=9) == {}
    assert reasons(2, base, critic_lr_warmup=1) == {}
    assert reasons(3, base, critic_lr_warmup=10) == {}
    assert reasons(3, base, critic_lr_warmup=1) == {"critic_lr_warmup": "the warm-up is over"}
    of_checkpoint = "the weights are the checkpoint's"
    assert reasons(1, base, model="moved") == {"model": of_checkpoint}
    assert reasons(1, replace(base, kl_loss=0.1), model="moved") == {}
    assert reasons(1, replace(base, init_critic="x"), init_critic="") == {
        "init_critic": of_checkpoint
    }
    assert reasons(1000, base, lam=0.9) == {"lam": "nothing is left to train"}


def trained_policy(folder: Path) -> Trained:
    """A policy and its optimizer, as checkpoints hold them."""
    policy = load_policy(str(folder))
    return {"policy": (policy, ppo.adamw(list(policy.parameters())))}


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the state at the time of the call, without later updates."""
    original = checkpoint.dcp.save

    def slow_save(*args: Any, **kwargs: Any) -> None:
        time.sleep(1)
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", slow_save)
    trained = trained_policy(model_folder)
    before = {name: t.clone() for name, t in named_tensors(trained).items()}
    with Checkpoints(tmp_path, Config(checkpoint_every=1), trained) as checkpoints:
        start = time.perf_counter()
        checkpoints.step(1, last=False, records=[])
        assert time.perf_counter() - start < 0.9
        with torch.no_grad():
            for t in named_tensors(trained).values():
                t.add_(1)
        assert not by_step(tmp_path)
        checkpoints.finish()
    loaded = trained_policy(model_folder)
    checkpoint.load_checkpoint(checkpoint.read_checkpoint(tmp_path / "step-1"), loaded)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(loaded).items())


def test_a_repeated_signal_is_one_request(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun passes on the signal that its ranks got, too. A signal much later acts at once."""
    acted: list[int] = []
    clock = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: acted.append(number))
        with (
            pytest.raises(SystemExit) as ended,
            Checkpoints(tmp_path, Config(checkpoint_every=0), trained_policy(model_folder)) as kept,
        ):
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
                clock[0] += 0.05
            kept.step(1, last=False, records=[])
        signal.raise_signal(signal.SIGTERM)  # while the process ends
        assert not acted
        clock[0] += checkpoint.REPEATS
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert acted == [signal.SIGTERM]
    assert ended.value.code == 128 + signal.SIGTERM
    assert [p.name for p in by_step(tmp_path)] == ["step-1"]


def test_a_full_disk_is_reported_and_the_older_checkpoint_kept(
    tmp_path: Path, model_folder: Path
) -> None:
    """A limit on the size of files stands for the full disk: it makes the same write fail."""
    trained = trained_policy(model_folder)
    with Checkpoints(tmp_path, Config(checkpoint_every=1), trained) as checkpoints:
        checkpoints.step(1, last=False, records=[])
        checkpoints.finish()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        message = r"step-2 could not be written .*step-1 is complete"
        try:
            with pytest.raises(OSError, match=message) as error:
                checkpoints.step(2, last=False, records=[])
                checkpoints.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
        # With room on the disk the next one is written.
        checkpoints.step(3, last=False, records=[])
        checkpoints.finish()
    assert checkpoint.read_checkpoint(tmp_path / "step-3").about["step"] == 3


def test_replay_trains_the_same_without_a_sampler(
    flags: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "open_sampler", lambda *_: pytest.fail("a replay needs no sampler"))
    again = run(flags, "--name", "replay", "--replay", str(whole / "rollouts"))
    assert untimed_metrics(again) == untimed_metrics(whole)
    assert weights(again) == weights(whole)
    message = refusal(flags, "--replay", str(whole / "rollouts"), "--steps", "9")
    assert "has no step-4.jsonl; lower --steps" in message


def test_saved_rollouts_are_loaded_unchanged(tmp_path: Path, problems: list[Problem]) -> None:
    rollouts = random_rollouts(problems, 100, [3, 1, 5])
    rollouts[1].reward = 1.0
    rollouts[1].logprobs = [-0.1]
    rollouts[1].text = 'a "quoted"\nline ⟨'
    save_rollouts(tmp_path / "step-0.jsonl", rollouts)
    loaded = load_rollouts(tmp_path / "step-0.jsonl")
    assert [r.problem.prompt_ids for r in loaded] == [r.problem.prompt_ids for r in rollouts]
    assert loaded == rollouts
    (tmp_path / "bad.jsonl").write_text('{"problem": "x"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl: line 1: not a saved rollout"):
        load_rollouts(tmp_path / "bad.jsonl")


def packed_logprobs(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    return forward_all_tokens(lambda m: policy(m)[0], rollouts, 4096, "cpu")


def packed_values(critic: Critic, rollouts: list[Rollout]) -> torch.Tensor:
    return forward_all_tokens(critic, rollouts, 4096, "cpu")


def test_transformers_loads_an_export(whole: Path, flags: list[str]) -> None:
    """The forward passes of transformers on the exported models give the log-probabilities and
    values of the last checkpoint."""
    base = Path(flags[1])
    policy, critic = load_policy(str(base)), load_critic(str(base))
    trained = {
        "policy": (policy, ppo.adamw(list(policy.parameters()))),
        "critic": (critic, ppo.adamw(list(critic.parameters()))),
    }
    last = checkpoint.read_checkpoint(whole / "checkpoints" / f"step-{STEPS}")
    checkpoint.load_checkpoint(last, trained)
    rollouts = load_rollouts(whole / "rollouts" / "step-3.jsonl")
    causal = AutoModelForCausalLM.from_pretrained(whole / "policy", dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        whole / "critic", dtype=torch.float32
    )
    logp, values = [], []
    for r in rollouts:
        ids = torch.tensor([[*r.problem.prompt_ids, *r.token_ids]])
        predicting = slice(len(r.problem.prompt_ids) - 1, -1)
        log_softmax = causal(ids).logits[0, predicting].log_softmax(-1)
        logp.append(log_softmax.gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0])
        hidden = classifier.model(ids).last_hidden_state
        values.append(classifier.score(hidden)[0, predicting, 0])
    expected_logp, expected_values = (
        packed_logprobs(policy, rollouts),
        packed_values(critic, rollouts),
    )
    torch.testing.assert_close(torch.cat(logp), expected_logp, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.cat(values), expected_values, atol=1e-4, rtol=1e-5)
    question = rollouts[0].problem.question
    tokenizer = AutoTokenizer.from_pretrained(whole / "policy")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    assert chat == data.prompt(question)
    generation = GenerationConfig.from_pretrained(whole / "policy")
    assert tokenizer.eos_token_id in generation.eos_token_id


def test_vllm_loads_an_export(whole: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("vllm")
    sampler = VllmSampler(str(whole / "policy"), [tokenizer.eos_token_id], "float32", 512, 64, 0.4)
    saved = load_rollouts(whole / "rollouts" / "step-3.jsonl")
    problems = [r.problem for r in saved[::4]]
    rollouts = sample_responses(sampler, tokenizer, problems, 3, Sampling(24), "0")
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    expected = packed_logprobs(load_policy(str(whole / "policy")), rollouts)
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


def test_training_starts_from_a_trained_critic(
    flags: list[str], whole: Path, tmp_path: Path, problems: list[Problem]
) -> None:
    """From our export, or from the authors' released form, in which the head is called value_head
    and has the shape (8, H/8). Both give the same run."""
    ours, theirs = whole / "critic", tmp_path / "theirs"
    rollouts = random_rollouts(problems, 100, [3, 1, 5])
    expected = packed_values(load_critic(str(ours)), rollouts)
    shutil.copytree(ours, theirs)
    stored = load_file(theirs / "model.safetensors")
    stored["value_head.weight"] = stored.pop("score.weight").reshape(8, -1)
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(packed_values(load_critic(str(theirs), "zeros"), rollouts), expected)

    def first_step(name: str, *more: str) -> dict[str, float]:
        return untimed_metrics(run(flags, "--name", name, "--steps", "1", *more))[0]

    from_theirs = first_step("begins-0", "--init-critic", str(theirs))
    assert first_step("begins-1", "--init-critic", str(ours)) == from_theirs
    assert first_step("begins-2")["value_loss"] != from_theirs["value_loss"]
    assert "holds no value head" in refusal(flags, "--init-critic", flags[1])
    stored["value_head.weight"] = stored["value_head.weight"][:4].contiguous()
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    message = refusal(flags, "--init-critic", str(theirs))
    assert "a value head of 32 numbers; expected 64" in message
