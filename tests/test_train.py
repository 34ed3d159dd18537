"""train.py and config.py: the loop on small real runs, and every refusal before a weight is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import orz_data, write_orz
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
from preflight import prepare, validate_settings
from reports.log import RunLog
from toy import tiny

ROOT = Path(__file__).parent.parent


def run_cli(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=280,
    )


@pytest.fixture(scope="module")
def flags(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A two-step run from the briefly trained tiny model."""
    return [
        "--model", str(base_folder), "--data", str(base_folder / "train.json"),
        "--runs", str(tmp_path_factory.mktemp("runs")), "--overwrite",
        "--prompts", "4", "--samples", "4", "--steps", "2", "--prompt-tokens", "64", "--response-tokens", "24",
        "--critic-steps", "3", "--policy-lr", "1e-3", "--critic-lr", "1e-3", "--grader-workers", "1",
    ]  # fmt: skip


def run(flags: list[str], *more: str) -> tuple[Path, list[dict]]:
    cfg = parse([*flags, *more])
    folder = train.train(cfg, prepare(cfg))
    return folder, [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_leaves_everything(flags: list[str], base_folder: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    heldout = base_folder.parent / "few.json"
    heldout.write_text(json.dumps(json.loads((base_folder / "heldout.json").read_text())[:16]))
    folder, rows = run(
        flags,
        "--name",
        engine,
        "--engine",
        engine,
        "--eval-data",
        str(heldout),
        "--eval-every",
        "1",
    )
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["logp_gap"] < 1e-4
        assert row["clipped"] == 0  # strictly on-policy
        assert 0 < row["policy_grad_norm"] < 1e4
        assert {
            "reward",
            "length",
            "format",
            "reflection",
            "entropy",
            "value_loss",
            "tokens_per_second",
        } <= set(row)
    assert json.loads((folder / "config.json").read_text())["critic_steps"] == 3
    assert [
        json.loads(e)["step"] for e in (folder / "evaluations.jsonl").read_text().splitlines()
    ] == [0, 1, 2]
    assert len((folder / "rollouts.jsonl").read_text().splitlines()) == 32
    assert list(folder.glob("tensorboard/events*"))
    figures = {"reward_length", "format", "reflection", "heldout", "health"}
    assert (
        figures == {p.stem for p in folder.glob("*.png")} == {p.stem for p in folder.glob("*.svg")}
    )
    trained = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    assert any(
        not torch.equal(a, b) for a, b in zip(trained.parameters(), base.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(folder / "policy").decode([0]) is not None
    assert load_critic(str(folder / "critic")).model.score.weight.abs().sum() > 0


def test_a_reward_of_ones_own_and_several_heldout_sets(
    flags: list[str], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--reward module:function grades training and evaluation alike; unreadable golds do not matter then."""
    (tmp_path / "short_reward.py").write_text(
        "def short(response, problem): return 1 / (1 + len(response))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [("1+2=?", "three or so, perhaps"), ("2+2=?", "\\frac{")] * 4
    sets = [f"{name}={write_orz(tmp_path / f'{name}.json', rows)}" for name in ("a", "b")]
    flags = [
        *flags,
        "--name",
        "own",
        "--reward",
        "short_reward:short",
        "--steps",
        "1",
        "--keep-rollouts",
        "99",
    ]
    folder, (step,) = run(flags, "--data", str(tmp_path / "a.json"), "--eval-data", *sets)
    graded = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(graded) == 16 and 0 < step["reward"] < 1
    for r in graded:
        assert r["reward"] == (1 / (1 + len(r["response"])) if r["finish"] == "stop" else 0)
    before, after = (
        json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()
    )
    for record in (before, after):
        assert record["reward"] == pytest.approx((record["reward/a"] + record["reward/b"]) / 2)
    with pytest.raises(ValueError, match="--reward short_reward:long: expected module:function"):
        prepare(parse([*flags, "--reward", "short_reward:long"]))


def test_reward_length_and_format_rise_together(tmp_path: Path) -> None:
    """The recipe learns: shorter sums, a base of half the training, fifteen steps, nothing but the 0/1 reward."""
    shorter = tiny.TINY._replace(numbers=range(1, 10), terms=range(4, 7), first_terms=range(4, 7))
    tiny.make(tmp_path / "base", seed=0, steps=500, task=shorter)
    files = {
        "model": str(tmp_path / "base"),
        "data": str(tmp_path / "base" / "train.json"),
        "runs": str(tmp_path),
    }
    cfg = Config(**TINY | files | {"name": "learns", "steps": 15, "grader_workers": 1})
    folder = train.train(cfg, prepare(cfg))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = (
        {k: sum(r[k] for r in part) / 3 for k in ("reward", "length", "format")}
        for part in (rows[:3], rows[-3:])
    )
    assert last["reward"] > first["reward"] + 0.1
    assert last["length"] > 1.5 * first["length"]
    assert last["format"] > first["format"] + 0.1


def test_same_seed_same_run(flags: list[str]) -> None:
    """Bit for bit on one CPU thread; micro-batch size moves it only by rounding; another seed is another run."""
    folder, rows = run(flags, "--name", "a")
    again, same = run(flags, "--name", "b")
    other, _ = run(flags, "--name", "c", "--seed", "1")

    def strip(rows: list[dict]) -> list[dict]:
        return [
            {k: v for k, v in r.items() if "second" not in k and k != "memory_gb"} for r in rows
        ]

    assert strip(rows) == strip(same)
    a, b, c = ((f / "policy" / "model.safetensors").read_bytes() for f in (folder, again, other))
    assert a == b != c
    packed, _ = run(flags, "--name", "d", "--micro-tokens", "90", "--steps", "1")
    whole, _ = run(flags, "--name", "e", "--steps", "1")
    p, w = (
        AutoModelForCausalLM.from_pretrained(f / "policy", dtype=torch.float32).state_dict()
        for f in (packed, whole)
    )
    assert all(torch.allclose(p[k], w[k], atol=1e-5) for k in p)


def test_learning_rate_zero_changes_nothing(flags: list[str], base_folder: Path) -> None:
    cfg = parse([*flags, "--name", "still", "--policy-lr-warmup", "100000000", "--steps", "1"])
    folder = train.train(cfg, prepare(cfg))
    trained = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    assert all(
        torch.allclose(a, b, atol=1e-9)
        for a, b in zip(trained.parameters(), base.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "ablation",
    [
        ["--kl-loss", "0.1"],
        ["--kl-reward", "0.1", "--kl-estimator", "k1"],
        ["--advantage", "grpo"],
        ["--policy-steps", "3", "--value-clip", "0.2", "--lam", "0.95"],
        ["--tis-cap", "2", "--temperature", "0.8", "--top-p", "0.9", "--max-logp-gap", "5"],
        ["--value-head", "zeros", "--anneal-steps", "2", "--require-boxed"],
        ["--template", "paper", "--prompt-tokens", "480"],
    ],
)
def test_ablations_run(flags: list[str], ablation: list[str]) -> None:
    _, rows = run(
        flags, "--name", "-".join(ablation).strip("-").replace("--", ""), "--steps", "1", *ablation
    )
    assert ("value_loss" in rows[0]) == ("grpo" not in ablation)
    assert ("kl" in rows[0]) == ("--kl-loss" in ablation)


def test_not_finite_stops_with_the_data_saved(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.ppo.policy_loss
    monkeypatch.setattr(
        train.ppo, "policy_loss", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1])
    )
    cfg = parse([*flags, "--name", "nan"])
    with pytest.raises(
        FloatingPointError, match=r"step 0: policy loss is nan.*failed-step-0.jsonl"
    ):
        train.train(cfg, prepare(cfg))
    rows = [
        json.loads(line)
        for line in (Path(cfg.runs) / "nan" / "failed-step-0.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 16
    assert all(len(r["ids"]) == len(r["logprobs"]) == r["tokens"] for r in rows)


def test_defaults_are_the_papers_and_presets_can_be_overridden() -> None:
    paper = parse(["--model", "Qwen2.5-7B", "--data", "x.json"])
    assert (paper.model, paper.prompts, paper.samples, paper.policy_lr, paper.critic_lr) == (
        "Qwen/Qwen2.5-7B",
        128,
        64,
        1e-6,
        5e-6,
    )
    assert (
        paper.gamma,
        paper.lam,
        paper.eps,
        paper.policy_steps,
        paper.critic_steps,
        paper.kl_loss,
    ) == (
        1,
        1,
        0.2,
        1,
        12,
        0,
    )
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
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        validate_settings(Config(**{"model": "tiny"} | changes))


def refusal(flags: list[str], *more: str) -> str:
    """The one line with which `prepare` refuses."""
    cfg = parse([*flags, "--name", "refused", "--overwrite", *more])
    with pytest.raises((ValueError, OSError)) as wrong:
        prepare(cfg)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


def test_refusals_name_the_culprit(
    flags: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bad = write_orz(
        tmp_path / "bad.json", [("1+1?", "2"), ("Which?", r"16 \mid a_{81}"), *[("1+1?", "2")] * 8]
    )
    assert "bad.json:2: Math-Verify cannot parse the gold answer" in refusal(
        flags, "--data", str(bad)
    )
    cfg = parse([*flags, "--data", str(bad), "--name", "dropped", "--drop-bad-rows"])
    assert len(prepare(cfg).problems) == 9
    long = write_orz(tmp_path / "long.json", [("1+1?", "2")] * 8 + [("1+" * 80 + "1=?", "81")])
    assert "long.json:9: prompt of" in refusal(flags, "--data", str(long))
    assert "absent.json: no such file or folder, and not a hub id" in refusal(
        flags, "--data", str(tmp_path / "absent.json")
    )
    few = write_orz(tmp_path / "few.json", [("1+1?", "2")] * 3)
    assert "3 problems are fewer than --prompts 4" in refusal(flags, "--data", str(few))
    assert "not a folder or hub id with a readable model" in refusal(
        flags, "--model", str(tmp_path)
    )
    assert "over the 512 positions" in refusal(flags, "--response-tokens", "500")

    T5Config(d_model=32, num_layers=1, num_heads=1, d_ff=32).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    assert "a t5 model is not a causal language model" in refusal(
        flags, "--model", str(tmp_path / "t5")
    )


def test_an_unwritable_or_used_run_folder_is_refused(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write the run folder" in refusal(flags, "--runs", str(tmp_path / "file"))
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "thesis.tex").touch()
    cfg = parse([*flags, "--runs", str(tmp_path / "runs"), "--name", "old", "--no-overwrite"])
    with pytest.raises(
        ValueError,
        match="is not empty; choose another --name, or pass --overwrite or --resume auto",
    ):
        prepare(cfg)


def test_a_run_that_is_still_running_is_left_alone(flags: list[str]) -> None:
    """Ranks may outlive a torchrun that was killed; a second run must not write beside them."""
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
    folder, rows = run(flags, "--name", "twice", "--steps", "1")
    assert len(rows) == 1
    (folder.parent / "notes").mkdir()
    (folder.parent / "notes" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a run's; neither --overwrite nor --resume touches"):
        prepare(parse([*flags, "--name", "notes"]))


def test_command_line_refuses_in_one_line_with_a_code() -> None:
    unknown = run_cli("--polcy-lr", "1")
    assert unknown.returncode != 0
    assert "--policy-lr" in unknown.stderr + unknown.stdout  # the nearest is suggested
    missing = run_cli("--model", "Qwen2.5-7B")
    assert missing.returncode != 0
    assert missing.stderr.strip().splitlines()[-1].startswith("train.py: --data is missing")
    assert "Traceback" not in missing.stderr


def qwen_folder(folder: Path) -> Path:
    """Qwen2.5's architecture, vocabulary width and tokenizer, randomly initialised, 4 layers of 256."""
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
        vocab_size=151_936, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_real_tokenizer_vocabulary_and_data(tmp_path: Path, engine: str) -> None:
    """One step on the authors' rows under the real tokenizer, all stages."""
    rows = orz_data("orz_train", "orz_math_57k_first2048_w_num_correct.json")
    (tmp_path / "few.json").write_text(json.dumps(json.loads(rows.read_text())[:16]))
    if engine == "vllm":
        pytest.importorskip("vllm")
    folder, (row,) = run(
        ["--model", str(qwen_folder(tmp_path / "qwen")), "--data", str(tmp_path / "few.json"), "--runs", str(tmp_path)],
        "--engine", engine, "--steps", "1", "--prompts", "2", "--samples", "2", "--response-tokens", "16",
        "--critic-steps", "2", "--drop-bad-rows", "--grader-workers", "1",
    )  # fmt: skip
    assert row["logp_gap_max"] < 1e-4
    assert row["truncated"] > 0
    assert (folder / "policy" / "tokenizer.json").exists()
