"""checkpoint.py: whole or absent; refusals in one line; exports that others load; rollouts that can be trained on again."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model, random_rollouts
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
from checkpoint import Checkpoints, by_step, find_checkpoint, named_tensors
from config import Config, Sampling, parse
from critic import Critic, load_critic
from data import Problem
from packing import forward_all_tokens
from policy import load_policy
from preflight import prepare
from rollout import Rollout, VllmSampler, load_rollouts, sample_responses, save_rollouts

STEPS = 4


@pytest.fixture(scope="module")
def flags(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        "--model", str(base_folder), "--data", str(base_folder / "train.json"), "--engine", "transformers",
        "--runs", str(tmp_path_factory.mktemp("runs")), "--prompts", "4", "--samples", "4", "--steps", str(STEPS),
        "--prompt-tokens", "64", "--response-tokens", "24", "--critic-steps", "3", "--policy-lr", "1e-3",
        "--critic-lr", "1e-3", "--grader-workers", "1", "--checkpoint-every", "1",
    ]  # fmt: skip


def run(flags: list[str], *more: str) -> Path:
    cfg = parse([*flags, *more])
    return train.train(cfg, prepare(cfg))


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """A run of four steps with everything kept."""
    return run(flags, "--name", "whole", "--save-rollouts", "--keep-checkpoints", "9")


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if "second" not in k and k != "memory_gb"} for row in rows
    ]


def weights(folder: Path) -> dict[str, bytes]:
    return {
        role: (folder / role / "model.safetensors").read_bytes() for role in ("policy", "critic")
    }


def refusal(flags: list[str], *more: str) -> str:
    with pytest.raises(ValueError) as wrong:
        prepare(parse([*flags, *more]))
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


@pytest.fixture
def copy(whole: Path) -> Path:
    """The run again, to be damaged."""
    folder = whole.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder


def test_every_step_and_only_the_last_ones_are_kept(flags: list[str], whole: Path) -> None:
    assert [p.name for p in by_step(whole / "checkpoints")] == [
        f"step-{n}" for n in range(1, STEPS + 1)
    ]
    two = run(flags, "--name", "two", "--keep-checkpoints", "2")
    assert [p.name for p in by_step(two / "checkpoints")] == ["step-3", "step-4"]
    assert not list((two / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("step", [1, 3])
def test_branching_off_gives_the_same_run(flags: list[str], whole: Path, step: int) -> None:
    """From a checkpoint in another folder: same metrics, before and after it, and the same weights to the last bit."""
    branch = run(
        flags, "--name", f"branch-{step}", "--resume", str(whole / "checkpoints" / f"step-{step}")
    )
    assert metrics(branch) == metrics(whole)
    assert weights(branch) == weights(whole)


def test_auto_starts_when_there_is_nothing_and_goes_on_when_there_is(
    flags: list[str], whole: Path
) -> None:
    more = ("--name", "auto", "--resume", "auto")
    half = run(flags, *more, "--steps", "2")
    assert len(metrics(half)) == 2
    assert weights(run(flags, *more)) == weights(whole)
    assert metrics(half) == metrics(whole)
    assert weights(run(flags, *more)) == weights(
        whole
    )  # finished: nothing left to do, nothing lost
    assert "finished run without checkpoints" in refusal(flags, *more, "--name", bare(half).name)


def bare(folder: Path) -> Path:
    other = folder.with_name("bare")
    shutil.copytree(folder, other)
    shutil.rmtree(other / "checkpoints")
    return other


def test_a_truncated_checkpoint_is_passed_over(
    flags: list[str], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((copy / "checkpoints" / "step-4").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    found = find_checkpoint("auto", copy)
    assert found.path.name == "step-3"
    assert "step-4 is damaged" in capsys.readouterr().out
    assert "is damaged: __0_0.distcp has" in refusal(
        flags, "--name", "x", "--resume", str(file.parent)
    )
    (copy / "checkpoints" / "step-3" / "run.json").unlink()
    assert find_checkpoint("auto", copy).path.name == "step-2"
    assert "no complete checkpoint" in refusal(
        flags, "--name", "x", "--resume", str(copy / "checkpoints" / "step-3")
    )
    assert len(by_step(copy / "checkpoints")) == 4  # none was removed


def test_other_models_and_runs_are_refused_by_name(
    flags: list[str], whole: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    last = str(whole / "checkpoints" / "step-4")
    other = random_model(tmp_path / "other", tokenizer, tied=False)
    for file in ("train.json", "heldout.json"):
        shutil.copy(Path(flags[1]) / file, other)
    said = refusal(flags, "--model", str(other), "--name", "x", "--resume", last)
    assert "is of another model: its" in said
    assert "holds policy and critic, this run has policy" in refusal(flags, "--name", "x", "--resume", last, "--advantage", "grpo")  # fmt: skip  # noqa: E501
    assert "already past --steps 3" in refusal(
        flags, "--name", "x", "--resume", last, "--steps", "3"
    )
    assert "step-4 is newer" in refusal(
        flags, "--name", "whole", "--resume", str(whole / "checkpoints" / "step-2")
    )
    assert "pass one of them" in refusal(
        flags, "--name", "whole", "--resume", "auto", "--overwrite"
    )
    assert "is not empty" in refusal(flags, "--name", "whole")
    assert "--resume auto" in refusal(flags, "--name", "whole")


def trained(
    folder: Path, tied: bool = True
) -> dict[str, tuple[torch.nn.Module, torch.optim.AdamW]]:
    policy = load_policy(str(folder))
    return {"policy": (policy, ppo.adamw(list(policy.parameters())))}


def test_the_loop_goes_on_while_a_copy_is_written(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk is the state at the call, whatever has been trained since."""
    real, model = checkpoint.dcp.save, trained(model_folder)
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: (time.sleep(1), real(*a, **k)))
    before = {name: t.clone() for name, t in named_tensors(model).items()}
    with Checkpoints(tmp_path, Config(checkpoint_every=1), model) as saver:
        start = time.perf_counter()
        saver.step(1, False, [])
        assert time.perf_counter() - start < 0.9
        with torch.no_grad():
            for t in named_tensors(model).values():
                t.add_(1)
        assert not by_step(tmp_path)
        saver.finish()
    fresh = trained(model_folder)
    checkpoint.load_checkpoint(checkpoint.read_checkpoint(tmp_path / "step-1"), fresh)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(fresh).items())


def test_a_full_disk_is_said_and_the_older_checkpoint_stays(
    tmp_path: Path, model_folder: Path
) -> None:
    """A file-size limit stands for the full disk: the write fails in the same place."""
    with Checkpoints(tmp_path, Config(checkpoint_every=1), trained(model_folder)) as saver:
        saver.step(1, False, [])
        saver.finish()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(
                OSError, match=r"step-2 could not be written .*step-1 is complete"
            ) as wrong:
                saver.step(2, False, [])
                saver.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(wrong.value)
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
        saver.step(3, False, [])  # room again
        saver.finish()
    assert checkpoint.read_checkpoint(tmp_path / "step-3").about["step"] == 3


def test_replay_trains_the_same_without_a_sampler(
    flags: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "open_sampler", lambda *_: pytest.fail("a replay needs no sampler"))
    again = run(flags, "--name", "replay", "--replay", str(whole / "rollouts"))
    assert metrics(again) == metrics(whole)
    assert weights(again) == weights(whole)
    said = refusal(flags, "--name", "x", "--replay", str(whole / "rollouts"), "--steps", "9")
    assert "has no step-4.jsonl; lower --steps" in said


def test_rollouts_come_back_from_their_file(tmp_path: Path, problems: list[Problem]) -> None:
    rollouts = random_rollouts(problems, 100, [3, 1, 5])
    rollouts[1].reward, rollouts[1].logprobs, rollouts[1].text = 1.0, [-0.1], 'a "quoted"\nline ⟨'
    save_rollouts(tmp_path / "step-0.jsonl", rollouts)
    assert [list(r.problem.prompt_ids) for r in load_rollouts(tmp_path / "step-0.jsonl")] == [
        list(r.problem.prompt_ids) for r in rollouts
    ]
    assert load_rollouts(tmp_path / "step-0.jsonl") == rollouts
    (tmp_path / "bad.jsonl").write_text('{"problem": "x"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl: line 1: not a saved rollout"):
        load_rollouts(tmp_path / "bad.jsonl")


def logprobs(model: torch.nn.Module, rollouts: list[Rollout]) -> torch.Tensor:
    return forward_all_tokens(lambda m: model(m)[0], rollouts, 4096, "cpu")


def test_transformers_loads_an_export(whole: Path, flags: list[str]) -> None:
    """Log-probabilities and values of the last checkpoint's weights, by transformers' own forward; the prompt by the chat
    template; the end by the generation configuration."""
    folder, base = whole / "policy", Path(flags[1])
    model = trained(base)
    critic = load_critic(str(base))
    model["critic"] = (critic, ppo.adamw(list(critic.parameters())))
    checkpoint.load_checkpoint(
        checkpoint.read_checkpoint(whole / "checkpoints" / f"step-{STEPS}"), model
    )
    policy = model["policy"][0]
    rollouts = load_rollouts(whole / "rollouts" / "step-3.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scorer = AutoModelForSequenceClassification.from_pretrained(
        whole / "critic", dtype=torch.float32
    )
    logp, values = [], []
    for r in rollouts:
        ids = torch.tensor([[*r.problem.prompt_ids, *r.token_ids]])
        at = len(r.problem.prompt_ids) - 1
        logp.append(
            plain(ids)
            .logits[0, at:-1]
            .log_softmax(-1)
            .gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0]
        )
        values.append(scorer.score(scorer.model(ids).last_hidden_state)[0, at:-1, 0])
    torch.testing.assert_close(torch.cat(logp), logprobs(policy, rollouts), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        torch.cat(values), forward_all_tokens(critic, rollouts, 4096, "cpu"), atol=1e-4, rtol=1e-5
    )
    question = rollouts[0].problem.question
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    assert chat == data.prompt(question)
    generation = GenerationConfig.from_pretrained(folder)
    assert tokenizer.eos_token_id in generation.eos_token_id
    assert "</answer>" in generation.stop_strings


def test_vllm_loads_an_export(whole: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("vllm")
    sampler = VllmSampler(str(whole / "policy"), [tokenizer.eos_token_id], "float32", 512, 64, 0.4)
    rollouts = sample_responses(
        sampler,
        tokenizer,
        [r.problem for r in load_rollouts(whole / "rollouts" / "step-3.jsonl")][::4],
        3,
        Sampling(24),
        "0",
    )
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    torch.testing.assert_close(
        sampled, logprobs(load_policy(str(whole / "policy")), rollouts), atol=1e-4, rtol=0
    )


def values(critic: Critic, rollouts: list[Rollout]) -> torch.Tensor:
    return forward_all_tokens(critic, rollouts, 4096, "cpu")


def test_a_critic_to_begin_with(
    flags: list[str], whole: Path, tmp_path: Path, problems: list[Problem]
) -> None:
    """Our export, and the authors' released form: the head is called value_head and folded to (8, H/8)."""
    rollouts = random_rollouts(problems, 100, [3, 1, 5])
    expected = values(load_critic(str(whole / "critic")), rollouts)
    theirs = tmp_path / "theirs"
    shutil.copytree(whole / "critic", theirs)
    stored = load_file(theirs / "model.safetensors")
    stored["value_head.weight"] = stored.pop("score.weight").reshape(8, -1)
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(values(load_critic(str(theirs), "zeros"), rollouts), expected)

    first = [
        metrics(run(flags, "--name", f"begins-{i}", "--steps", "1", *more))[0]
        for i, more in enumerate(
            (("--init-critic", str(theirs)), ("--init-critic", str(whole / "critic")), ())
        )
    ]
    assert first[0] == first[1]
    assert first[0]["value_loss"] != first[2]["value_loss"]
    assert "holds no value head" in refusal(flags, "--name", "x", "--init-critic", flags[1])
    stored["value_head.weight"] = stored["value_head.weight"][:4].contiguous()
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    assert "a value head of 32 numbers; expected 64" in refusal(
        flags, "--name", "x", "--init-critic", str(theirs)
    )
