"""The options of the critic: trained alone first, and started from another model; through resume,
replay, export, ranks and refusals. test_gae.py has those of λ."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, Ended, load_records, random_model, random_rollouts, untimed_metrics
from safetensors.torch import load_file
from test_checkpoint import refusal, run, weights
from transformers import AutoConfig, PreTrainedTokenizerBase

import preflight
from checkpoint import read_checkpoint, without_effect
from config import Config, parse
from critic import load_critic
from data import Problem
from packing import forward_all_tokens
from tools import ask, plan

ALONE = 2  # iterations in which the critic learns alone


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model of half the width, with the tokenizer of `base_folder` and more rows than tokens."""
    return random_model(
        tmp_path_factory.mktemp("small") / "model", tokenizer, tied=False, hidden_size=32
    )


@pytest.fixture(scope="module")
def flags(base_folder: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of four steps with a small critic, which learns alone in the first two."""
    files = ["--model", str(base_folder), "--data", str(base_folder / "train.json")]
    files += ["--runs", str(tmp_path_factory.mktemp("runs")), "--critic-model", str(small)]
    settings = f"""--engine transformers --steps 4 --checkpoint-every 1 --critic-only-steps {ALONE}
        --policy-lr-warmup 4""".split()
    return [*files, *settings, *SMALL_RUN]


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """The run, with all its rollouts and checkpoints."""
    return run(flags, "--name", "whole", "--save-rollouts", "--keep-checkpoints", "9")


# ── trained alone first ───────────────────────────────────────────────────────────────────────────


def test_the_critic_learns_alone_and_the_metrics_say_so(whole: Path) -> None:
    """The policy's learning rate is 0, then warms up from its own first step; the critic's counts
    from step 0. In critic-only steps there are no numbers of an update that did not happen."""
    steps = load_records(whole / "metrics.jsonl")
    assert [step["policy_lr"] for step in steps] == pytest.approx([0, 0, 0.25e-3, 0.5e-3])
    critic_lr = [1e-3 * 3 * (n + 1) / 50 for n in range(4)]  # three optimizer steps an iteration
    assert [step["critic_lr"] for step in steps] == pytest.approx(critic_lr)
    of_update = {"policy_loss", "policy_grad_norm", "entropy", "clipped"}
    for n, step in enumerate(steps):
        assert of_update & step.keys() == (of_update if n >= ALONE else set())
        assert step["logp_gap"] < 1e-4 and step["value_loss"] > 0


def tensors_at(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The policy's and the critic's weights in a checkpoint, by name."""
    path = run_folder / "checkpoints" / f"step-{step}"
    reader = torch.distributed.checkpoint.FileSystemReader(path)
    names = reader.read_metadata().state_dict_metadata
    loaded = {name: torch.empty(about.size) for name, about in names.items()}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=path, no_dist=True)
    return loaded


def test_the_policy_stands_still_to_the_last_bit(whole: Path, base_folder: Path) -> None:
    """Its weights are the base model's after the critic-only steps, and AdamW has not begun; the
    critic's change from the first step on."""
    base = load_file(base_folder / "model.safetensors")
    first, alone, then = (tensors_at(whole, step) for step in (1, ALONE, ALONE + 1))
    names = [name for name in alone if name.startswith("policy/") and "/exp_" not in name]
    names = [name for name in names if not name.endswith("/step")]
    assert len(names) == len(base)
    for name in names:
        assert torch.equal(alone[name], base[name.removeprefix("policy/model.")])
        assert alone[f"{name}/step"] == 0 and then[f"{name}/step"] == 1
    assert any(not torch.equal(alone[name], then[name]) for name in names)
    head = "critic/model.score.weight"
    assert not torch.equal(first[head], alone[head])
    assert alone[f"{head}/step"] == 3 * ALONE


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_resumes_in_and_after_the_critic_only_steps(
    flags: list[str], whole: Path, step: int
) -> None:
    saved = str(whole / "checkpoints" / f"step-{step}")
    branch = run(flags, "--name", f"branch-{step}", "--resume", saved)
    assert untimed_metrics(branch) == untimed_metrics(whole)
    assert weights(branch) == weights(whole)


def test_critic_only_steps_are_replayed(flags: list[str], whole: Path) -> None:
    again = run(flags, "--name", "replay", "--replay", str(whole / "rollouts"))
    assert untimed_metrics(again) == untimed_metrics(whole)
    assert weights(again) == weights(whole)


def test_critic_only_steps_can_change_until_they_are_over(flags: list[str], whole: Path) -> None:
    """Later the policy's learning rate would be counted anew. A checkpoint of an early version, in
    whose settings the number is not, had none."""
    first, third = (str(whole / "checkpoints" / f"step-{step}") for step in (1, 3))
    for more in (("--critic-only-steps", "1"), ("--critic-only-steps", "4")):
        preflight._validate_changes(parse([*flags, *more]), read_checkpoint(Path(first)))
        message = refusal(flags, "--resume", third, *more)
        assert message.endswith(f"is over at {third}; pass {ALONE} as before")
    message = refusal(flags, "--resume", first, "--critic-only-steps", "0")
    assert message.startswith("--critic-only-steps 0: counts from step 0 and is over at")
    early = read_checkpoint(Path(third))
    del early.about["settings"]["critic_only_steps"]
    with pytest.raises(ValueError, match=r"--critic-only-steps 2: .*; pass 0 as before"):
        preflight._validate_changes(parse(flags), early)


# ── started from another model ────────────────────────────────────────────────────────────────────


def test_a_small_critic_is_exported_and_started_from(
    flags: list[str], whole: Path, base_folder: Path
) -> None:
    """The export holds the small critic, and --init-critic takes it although it is not of the
    policy's architecture. With as many critic-only steps as steps only the critic is trained."""
    assert AutoConfig.from_pretrained(whole / "policy").hidden_size == 64
    assert AutoConfig.from_pretrained(whole / "critic").hidden_size == 32
    model, critic = flags.index("--critic-model"), str(whole / "critic")
    flags = [*flags[:model], *flags[model + 2 :], "--init-critic", critic]
    alone = ("--steps", "1", "--critic-only-steps", "1")
    started = run(flags, "--name", "started", *alone)
    trained, base = (load_file(f / "model.safetensors") for f in (started / "policy", base_folder))
    assert all(torch.equal(trained[name], base[name]) for name in base)
    (step,) = untimed_metrics(started)
    assert step["value_mean"] != untimed_metrics(whole)[0]["value_mean"]
    saved = str(started / "checkpoints" / "step-1")
    message = refusal(flags[:-2], "--resume", saved, *alone)
    assert "is of another critic: its hidden_size is 32, this run's (--critic-model) has 64" in (
        message
    )


def test_values_are_those_of_the_small_model_itself(small: Path, problems: list[Problem]) -> None:
    """An id beyond the critic's rows, which only a wider policy samples, is read as its last."""
    critic = load_critic(str(small))
    rows = critic.model.config.vocab_size
    rollouts = random_rollouts(problems, rows, [3, 1, 5])
    rollouts[2].token_ids[1] = rows - 1
    expected = forward_all_tokens(critic, rollouts, 4096, "cpu")
    rollouts[2].token_ids[1] = rows + 70
    assert torch.equal(forward_all_tokens(critic, rollouts, 4096, "cpu"), expected)
    rollouts[2].token_ids[1] = 5
    assert not torch.equal(forward_all_tokens(critic, rollouts, 4096, "cpu"), expected)


def test_resuming_needs_a_critic_of_the_same_shape(
    flags: list[str], whole: Path, tmp_path: Path, small: Path
) -> None:
    """A folder that moved is said to have no effect; without the flag the critic is another one."""
    saved = str(whole / "checkpoints" / "step-3")
    moved = shutil.copytree(small, tmp_path / "moved")
    cfg = parse([*flags, "--resume", saved, "--critic-model", str(moved)])
    checkpoint = read_checkpoint(Path(saved))
    preflight._check_model_files(cfg, cfg.model, checkpoint, cfg.critic_model)
    assert without_effect(checkpoint, cfg) == {"critic_model": "the weights are the checkpoint's"}
    message = refusal(flags, "--resume", saved, "--critic-model", "")
    assert message.endswith(
        "is of another critic: its hidden_size is 32, this run's (--critic-model) has 64"
    )


def test_ask_shows_the_values_of_a_small_critic(whole: Path, call: Callable[..., Ended]) -> None:
    models = ("--model", whole / "policy", "--critic", whole / "critic")
    done = call(ask.main, "1+2=?", *models, "--response-tokens", "4")
    assert done.code == 0, done.err
    assert "V" in done.out


def test_the_plan_counts_the_small_critic(small: Path, base_folder: Path) -> None:
    """Its weights, its moments, its pass and its gradient: as if the whole run had its size; the
    policy and the sampler keep theirs."""
    lengths = {"prompt_tokens": 64, "response_tokens": 64, "micro_tokens": 4096, "gpus": 1}
    large = Config(model=str(base_folder), **lengths)
    mixed, tiny = replace(large, critic_model=str(small)), replace(large, model=str(small))
    memory = {cfg: plan.memory(cfg) for cfg in (large, mixed, tiny)}
    for name in ("critic weights", "critic moments", "critic gradients", "activations"):
        assert memory[mixed]["critic"][name] == memory[tiny]["critic"][name]
    for name in ("policy weights", "policy moments", "activations", "logits"):
        assert memory[mixed]["policy"][name] == memory[large]["policy"][name]
    assert memory[mixed]["sample"]["sampler weights"] == memory[large]["sample"]["sampler weights"]
    for phase, of in (("values", tiny), ("critic", tiny), ("policy", large), ("sample", large)):
        assert plan.work(mixed)[phase][0] == plan.work(of)[phase][0]
    moved = {cfg: plan._offloaded_bytes(cfg) for cfg in (large, mixed, tiny)}
    of_critic = {phase: moved[tiny][phase] for phase in ("values", "critic")}
    assert moved[mixed] == moved[large] | of_critic
    assert f"with the critic {small}" in plan.show(mixed)


def test_the_plan_of_a_7b_policy_with_a_half_billion_critic() -> None:
    """The critic's 16 bytes a parameter are those of 494 million parameters."""
    seven = parse(["--model", "Qwen2.5-7B", "--critic-model", "Qwen2.5-0.5B"])
    assert seven.critic_model == "Qwen/Qwen2.5-0.5B"
    needs = plan.memory(seven)["critic"]
    states = sum(needs[f"critic {state}"] for state in ("weights", "moments", "gradients"))
    assert states == 16 * 494_033_664 / 8  # its head is tied, so the critic has 896 numbers more
