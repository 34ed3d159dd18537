"""train.py, config.py and preflight.py: the loop on small real runs, and what is refused before a
weight is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_RUN, Ended, load_records, orz_data, untimed_metrics, write_orz
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Config,
)

import train
from config import TINY, Config, parse
from critic import load_critic
from data import Problem
from preflight import prepare, validate_settings
from reports.log import RunLog
from rollout import Rollout, save_rollouts
from toy import tiny

ROOT = Path(__file__).parent.parent


def run_program(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


@pytest.fixture(scope="module")
def flags(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A two-step run from the briefly trained tiny model."""
    files = ["--model", str(base_folder), "--data", str(base_folder / "train.json")]
    files += ["--runs", str(tmp_path_factory.mktemp("runs"))]
    return [*files, "--overwrite", "--steps", "2", *SMALL_RUN]


def run(flags: list[str], *more: str) -> tuple[Path, list[dict[str, Any]]]:
    """Train; returns the run folder and the metrics of each step."""
    cfg = parse([*flags, *more])
    folder = train.train(cfg, prepare(cfg))
    return folder, load_records(folder / "metrics.jsonl")


def test_time_left_is_without_the_first_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 s of evaluation, then 10 s for the first of 3 steps: 20 s are left."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with RunLog(tmp_path, Config(steps=3)) as log:
        now[0] = 100
        log.evaluation(0, {"reward": 0.0, "length": 1.0, "format": 0.0}, [])
        with log.phase("sample"):
            now[0] = 110
        log.step(0, {"logp_gap": 0.0}, [], tiny.tokenizer(), None, torch.empty(0))
    assert capsys.readouterr().out.splitlines()[2].endswith(" 10.0   0:20")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_writes_all_its_files(
    flags: list[str], base_folder: Path, engine: str, call: Callable[..., Ended]
) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    heldout = base_folder.parent / "few.json"
    heldout.write_text(json.dumps(json.loads((base_folder / "heldout.json").read_text())[:16]))
    evaluation = ["--eval-data", str(heldout), "--eval-every", "1"]
    done = call(train.main, *flags, "--name", engine, "--engine", engine, *evaluation)
    assert done.code == 0, done.err
    folder = Path(parse(flags).runs) / engine
    steps = load_records(folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [0, 1]
    names = set("reward length format reflection entropy value_loss tokens_per_second".split())
    for step in steps:
        assert step["logp_gap"] < 1e-4
        assert step["clipped"] == 0  # strictly on-policy
        assert 0 < step["policy_grad_norm"] < 1e4
        assert names <= set(step)
    assert json.loads((folder / "config.json").read_text())["critic_steps"] == 3
    evaluations = load_records(folder / "evaluations.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 1, 2]
    assert len(load_records(folder / "rollouts.jsonl")) == 32
    assert list(folder.glob("tensorboard/events*"))
    figures = {"reward_length", "format", "reflection", "heldout", "health"}
    assert {p.stem for p in folder.glob("*.png")} == figures
    assert (folder / "report.html").exists()
    trained, base = state(folder / "policy"), state(base_folder)
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert AutoTokenizer.from_pretrained(folder / "policy").decode([0]) is not None
    assert load_critic(str(folder / "critic")).model.score.weight.abs().sum() > 0


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a policy, by name."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_custom_reward_and_several_heldout_sets(
    flags: list[str], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--reward module:function grades both training and evaluation. Gold answers that cannot be
    parsed do not matter then."""
    (tmp_path / "short_reward.py").write_text(
        "def short(response, problem): return 1 / (1 + len(response))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [("1+2=?", "three or so, perhaps"), ("2+2=?", "\\frac{")] * 4
    sets = [f"{name}={write_orz(tmp_path / f'{name}.json', rows)}" for name in ("a", "b")]
    flags = [*flags, "--name", "own", "--reward", "short_reward:short", "--steps", "1"]
    flags += ["--keep-rollouts", "99", "--data", str(tmp_path / "a.json"), "--eval-data", *sets]
    folder, (step,) = run(flags)
    graded = load_records(folder / "rollouts.jsonl")
    assert len(graded) == 16
    assert 0 < step["reward"] < 1
    for r in graded:
        points = 1 / (1 + len(r["response"]))
        assert r["reward"] == (points if r["finish"] == "stop" else 0)
    evaluations = load_records(folder / "evaluations.jsonl")
    assert len(evaluations) == 2
    for record in evaluations:
        assert record["reward"] == pytest.approx((record["reward/a"] + record["reward/b"]) / 2)
    with pytest.raises(ValueError, match="--reward short_reward:long: expected module:function"):
        prepare(parse([*flags, "--reward", "short_reward:long"]))


def test_reward_length_and_format_rise_together(tmp_path: Path) -> None:
    """The recipe learns from the 0/1 reward alone: fifteen steps on shorter sums, from a base model
    with a shorter training."""
    shorter = tiny.TINY._replace(numbers=range(1, 10), terms=range(4, 7), first_terms=range(4, 7))
    tiny.make(tmp_path / "base", seed=0, steps=500, task=shorter)
    files = {
        "model": str(tmp_path / "base"),
        "data": str(tmp_path / "base" / "train.json"),
        "runs": str(tmp_path),
    }
    cfg = Config(**TINY | files | {"name": "learns", "steps": 15, "grader_workers": 1})
    folder = train.train(cfg, prepare(cfg))
    steps = load_records(folder / "metrics.jsonl")

    def average(part: list[dict[str, Any]], name: str) -> float:
        return sum(step[name] for step in part) / 3

    first, last = steps[:3], steps[-3:]
    assert average(last, "reward") > average(first, "reward") + 0.1
    assert average(last, "length") > 1.5 * average(first, "length")
    assert average(last, "format") > average(first, "format") + 0.1


def test_same_seed_same_run(flags: list[str]) -> None:
    """Bit for bit on one CPU thread. Another seed gives another run. The size of micro-batches
    changes rounding only."""
    folder, _ = run(flags, "--name", "a")
    again, _ = run(flags, "--name", "b")
    other, _ = run(flags, "--name", "c", "--seed", "1")
    assert untimed_metrics(folder) == untimed_metrics(again)
    a, b, c = ((f / "policy" / "model.safetensors").read_bytes() for f in (folder, again, other))
    assert a == b
    assert b != c
    small, _ = run(flags, "--name", "d", "--micro-tokens", "90", "--steps", "1")
    large, _ = run(flags, "--name", "e", "--steps", "1")
    x, y = state(small / "policy"), state(large / "policy")
    assert all(torch.allclose(x[name], y[name], atol=1e-5) for name in x)


def test_learning_rate_zero_changes_nothing(flags: list[str], base_folder: Path) -> None:
    flags = [*flags, "--name", "still", "--policy-lr-warmup", "100000000"]
    folder, _ = run(flags, "--steps", "1")
    trained, base = state(folder / "policy"), state(base_folder)
    assert trained.keys() == base.keys()
    assert all(torch.allclose(trained[name], base[name], atol=1e-9) for name in base)


@pytest.mark.parametrize(
    "ablation",
    [
        "--kl-loss 0.1",
        "--kl-reward 0.1 --kl-estimator k1",
        "--advantage grpo",
        "--policy-steps 3 --value-clip 0.2 --lam 0.95",
        "--tis-cap 2 --temperature 0.8 --top-p 0.9 --max-logp-gap 5",
        "--value-head zeros --anneal-steps 2 --require-boxed",
        "--template paper --prompt-tokens 480",
    ],
)
def test_ablations_run(flags: list[str], ablation: str) -> None:
    name = ablation.replace("--", "").replace(" ", "-")
    _, (step,) = run(flags, "--name", name, "--steps", "1", *ablation.split())
    assert ("value_loss" in step) == ("grpo" not in ablation)
    assert ("kl" in step) == ("--kl-loss" in ablation)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_rollouts(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.ppo.policy_loss

    def nan_loss(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, was_clipped = original(*args)
        return loss * float("nan"), was_clipped

    monkeypatch.setattr(train.ppo, "policy_loss", nan_loss)
    cfg = parse([*flags, "--name", "nan"])
    message = r"step 0: policy loss is nan.*failed-step-0.jsonl"
    with pytest.raises(FloatingPointError, match=message):
        train.train(cfg, prepare(cfg))
    rollouts = load_records(Path(cfg.runs) / "nan" / "failed-step-0.jsonl")
    assert len(rollouts) == 16
    assert all(len(r["ids"]) == len(r["logprobs"]) == r["tokens"] for r in rollouts)


def test_defaults_are_the_papers_and_presets_can_be_overridden() -> None:
    expected = {
        "model": "Qwen/Qwen2.5-7B",
        "prompts": 128,
        "samples": 64,
        "policy_lr": 1e-6,
        "critic_lr": 5e-6,
        "gamma": 1,
        "lam": 1,
        "clip_eps": 0.2,
        "policy_steps": 1,
        "critic_steps": 12,
        "kl_loss": 0,
    }
    paper = parse(["--model", "Qwen2.5-7B", "--data", "x.json"])
    assert {name: getattr(paper, name) for name in expected} == expected
    assert parse(["--model", "Qwen2.5-32B"]).response_tokens > 8000
    assert parse(["--model=Qwen2.5-0.5B", "--samples", "4"]).samples == 4
    assert parse([]).model == "tiny"
    assert parse(["--steps", "3"]).steps == 3
    assert parse([]).prompts == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples 0: must be above 0"),
        ({"policy_lr": -1.0}, "--policy-lr -1.0: must be above 0"),
        ({"kl_loss": -0.1}, "--kl-loss -0.1: must not be negative"),
        ({"lam": 1.5}, "--lam 1.5: must not be above 1"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0"),
        (
            {"prompts": 1, "samples": 4},
            "--critic-steps 12: 1 prompts × 4 samples are only 4 responses",
        ),
        ({"advantage": "grpo", "samples": 1}, "--samples 1: --advantage grpo compares the samples"),
        ({"micro_tokens": 100}, "--micro-tokens 100: cannot hold one sequence"),
        ({"model": "some/model"}, "--data is missing"),
        ({"engine": "vllm"}, "--engine vllm: vLLM is not installed here"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preflight.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        validate_settings(Config(**{"model": "tiny"} | changes))


def refusal(flags: list[str], *more: str) -> str:
    """The one line with which `prepare` refuses."""
    cfg = parse([*flags, "--name", "refused", "--overwrite", *more])
    with pytest.raises((ValueError, OSError)) as error:
        prepare(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals_name_the_culprit(
    flags: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    good = ("1+1?", "2")
    bad = write_orz(tmp_path / "bad.json", [good, ("Which?", r"16 \mid a_{81}"), *[good] * 8])
    message = refusal(flags, "--data", str(bad))
    assert "bad.json:2: Math-Verify cannot parse the gold answer" in message
    cfg = parse([*flags, "--data", str(bad), "--name", "dropped", "--drop-bad-rows"])
    assert len(prepare(cfg).problems) == 9
    long = write_orz(tmp_path / "long.json", [*[good] * 8, ("1+" * 80 + "1=?", "81")])
    assert "long.json:9: prompt of" in refusal(flags, "--data", str(long))
    message = refusal(flags, "--data", str(tmp_path / "absent.json"))
    assert "absent.json: no such file or folder, and not a hub id" in message
    few = write_orz(tmp_path / "few.json", [good] * 3)
    assert "3 problems are fewer than --prompts 4" in refusal(flags, "--data", str(few))

    message = refusal(flags, "--model", str(tmp_path))
    assert "not a folder or hub id with a readable model" in message
    assert "over the 512 positions" in refusal(flags, "--response-tokens", "500")
    t5 = tmp_path / "t5"
    T5Config(d_model=32, num_layers=1, num_heads=1, d_ff=32).save_pretrained(t5)
    tokenizer.save_pretrained(t5)
    assert "a t5 model is not a causal language model" in refusal(flags, "--model", str(t5))


def test_an_unwritable_or_used_run_folder_is_refused(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write the run folder" in refusal(flags, "--runs", str(tmp_path / "file"))
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "thesis.tex").touch()
    cfg = parse([*flags, "--runs", str(tmp_path / "runs"), "--name", "old", "--no-overwrite"])
    message = "is not empty; choose another --name, or pass --overwrite or --resume auto"
    with pytest.raises(ValueError, match=message):
        prepare(cfg)


def test_a_run_that_is_still_running_is_refused(flags: list[str]) -> None:
    """When torchrun is killed its ranks may go on. A second run must not write to their folder."""
    cfg = parse([*flags, "--name", "busy", "--steps", "1"])
    inputs = prepare(cfg)
    with (
        RunLog(Path(cfg.runs) / "busy", cfg),
        pytest.raises(OSError, match="busy is in use by another process"),
    ):
        train.train(cfg, inputs)
    run(flags, "--name", "busy", "--steps", "1")


def test_overwrite_replaces_runs_only(flags: list[str]) -> None:
    run(flags, "--name", "twice", "--steps", "1")
    folder, steps = run(flags, "--name", "twice", "--steps", "1")
    assert len(steps) == 1
    (folder.parent / "notes").mkdir()
    (folder.parent / "notes" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a run's; neither --overwrite nor --resume touches"):
        prepare(parse([*flags, "--name", "notes"]))


def test_the_program_refuses_in_one_line_with_an_exit_code() -> None:
    unknown = run_program("--polcy-lr", "1")
    assert unknown.returncode != 0
    assert "--policy-lr" in unknown.stderr + unknown.stdout  # the nearest is suggested
    missing = run_program("--model", "Qwen2.5-7B")
    assert missing.returncode != 0
    assert missing.stderr.strip().splitlines()[-1].startswith("train.py: --data is missing")
    assert "Traceback" not in missing.stderr


def qwen_folder(folder: Path) -> Path:
    """A random model with the architecture, the vocabulary size and the tokenizer of Qwen2.5: 4
    layers, hidden size 256."""
    source = orz_data("qwen2_tokenizer", "vocab.json").parent
    tokenizer = Qwen2Tokenizer(
        vocab=str(source / "vocab.json"),
        merges=str(source / "merges.txt"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_real_tokenizer_vocabulary_and_data(tmp_path: Path, engine: str) -> None:
    """One step with all stages, on rows of the authors' data and with the real tokenizer."""
    training_data = orz_data("orz_train", "orz_math_57k_first2048_w_num_correct.json")
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(training_data.read_text())[:16]))
    if engine == "vllm":
        pytest.importorskip("vllm")
    model = qwen_folder(tmp_path / "qwen")
    files = ["--model", str(model), "--data", str(few), "--runs", str(tmp_path)]
    settings = f"""
        --engine {engine} --steps 1 --prompts 2 --samples 2 --response-tokens 16
        --critic-steps 2 --drop-bad-rows --grader-workers 1
    """.split()
    folder, (step,) = run([*files, *settings])
    assert step["logp_gap_max"] < 1e-4
    assert step["truncated"] > 0
    assert (folder / "policy" / "tokenizer.json").exists()


def test_replay_accepts_the_ids_of_the_model_and_no_others(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """The model's vocabulary is three wider than the tokenizer's; such ids are sampled, too."""
    flags = f"""--model {model_folder} --replay {tmp_path} --runs {tmp_path / "runs"} --steps 1
        --prompts 1 --samples 2 --critic-steps 1 --prompt-tokens 64 --response-tokens 64
        --micro-tokens 512""".split()
    for name, last, refused in (("widest", 2, False), ("beyond", 3, True)):
        ids = [5, len(tokenizer) + last]
        rollouts = [Rollout(problems[0], ids, [-1.0, -1.0], "stop", "")] * 2
        save_rollouts(tmp_path / "step-0.jsonl", rollouts)
        cfg = parse([*flags, "--name", name])
        if refused:
            with pytest.raises(
                ValueError, match="line 1: has an id that is not one of the model's"
            ):
                prepare(cfg)
        else:
            prepare(cfg).grader.close()
