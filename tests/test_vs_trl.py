"""benchmarks/vs_trl.py: pairs of the same seed are compared, a stopped comparison continues, and
what is alike in a pair is alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended

from benchmarks import vs_trl, vs_trl_gradients, vs_trl_worker
from benchmarks.record import Row
from benchmarks.vs_trl_report import GAP, SPEED, TITLES, Runs, draw, pages, peer, rows
from benchmarks.vs_trl_worker import Figures, Run

SEEDS = 5


def figures(program: str, length: int, seed: int) -> Figures:
    """Those of a run: with each seed this program is 3 times as fast as TRL, and its reward at the
    end is higher by 0.1 with PPO, and now higher, now lower with GRPO. Seeds differ much more."""
    ours = program.startswith("ours")
    reward = 0.1 * seed
    if ours:
        reward += 0.1 if program == "ours-ppo" else 0.01 * (-1) ** seed
    seconds = length * (1 + seed) / (3 if ours else 1)
    return {
        "seconds": seconds,
        "cpu": seconds,
        "gb": 0.5,
        "rewards": [0.0] * 15 + [reward] * 5,
        "tokens": float(length),
        "versions": "torch 1",
        "process": seconds + 5,
        "sampling": seconds / 2,
        "forward": seconds / 4,
    }


@pytest.fixture
def measured() -> Runs:
    return {
        (program, length): [figures(program, length, seed) for seed in range(SEEDS)]
        for length in (8, 64)
        for program in TITLES
    }


def find(table: list[Row], program: str, length: int) -> Row:
    (row,) = (r for r in table if (r["program"], r["length"]) == (TITLES[program], length))
    return row


def test_pairs_are_compared_and_not_means(measured: Runs) -> None:
    """The interval is that of the differences within a pair, however much seeds differ."""
    table = rows(measured)
    ppo, grpo = find(table, "ours-ppo", 8), find(table, "ours-grpo", 64)
    for end in ("", " low", " high"):
        assert ppo[SPEED + end] == pytest.approx(3)
        assert ppo[GAP + end] == pytest.approx(0.1)
    assert grpo[f"{GAP} low"] < 0 < grpo[f"{GAP} high"]
    assert grpo[f"{GAP} high"] < 0.02
    assert (ppo["sampling %"], ppo["forward %"]) == pytest.approx((50, 50))
    assert find(table, "trl-ppo", 8).keys().isdisjoint({SPEED, GAP, "sampling %"})
    assert peer(ppo, table)["program"] == "TRL PPO"


def test_pages_quote_the_recorded_result(
    measured: Runs, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "vs_trl.json"
    result.write_text(json.dumps({"rows": rows(measured)}))
    monkeypatch.setattr(vs_trl, "RESULT", result)
    done = call(vs_trl.main, "--print")
    assert done.code == 0
    assert done.out.strip() == pages(json.loads(result.read_text())).strip()
    assert "| 8 | PPO | 110 | 37 | 3.0 [3.0, 3.0] |" in done.out
    assert "| +0.100 [+0.100, +0.100] | 50 % | 50 % |" in done.out
    assert "PPO 3.0 [3.0, 3.0] at 8, 3.0 [3.0, 3.0] at 64; GRPO 3.0" in done.out
    last = done.out.splitlines()[-1]
    assert "PPO at 8 +0.100" in last and "GRPO" not in last
    result.write_text(json.dumps({"rows": [{"length": 8, "program": "this, PPO", SPEED: 3.0}]}))
    assert call(vs_trl.main, "--print").code == 1
    result.unlink()
    assert "run without --print first" in call(vs_trl.main, "--print").err


def test_the_figure_is_drawn(measured: Runs, tmp_path: Path) -> None:
    draw(measured, tmp_path / "vs_trl.png")
    assert (tmp_path / "vs_trl.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_comparison_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are not run again. Each seed has inputs of its own."""
    started: list[Run] = []
    weights: dict[int, bytes] = {}
    stop_at = [3]

    def start(run: Run) -> Figures:
        if len(started) in stop_at:
            stop_at.clear()
            raise RuntimeError("stopped")
        started.append(run)
        weights[run.seed] = Path(run.folder, "model.safetensors").read_bytes()
        return figures(run.program, run.length, run.seed)

    monkeypatch.setattr(vs_trl, "start", start)
    monkeypatch.setattr(vs_trl, "KEPT", tmp_path)
    cfg = vs_trl.Settings(lengths=(8,), seeds=2)
    with pytest.raises(RuntimeError, match="stopped"):
        vs_trl.measure(cfg)
    runs = vs_trl.measure(cfg)
    assert [(r.program, r.seed) for r in started] == [(p, s) for s in range(2) for p in TITLES]
    assert runs == {(p, 8): [figures(p, 8, seed) for seed in range(2)] for p in TITLES}
    assert weights[0] != weights[1]


def test_both_programs_get_the_same_settings() -> None:
    """Those that this program has by its own defaults are TRL's by arguments."""
    for program in ("ours-ppo", "ours-grpo"):
        run = Run(program, "model", 8, 640, seed=3)
        cfg, trl = vs_trl_worker.our_settings(run), vs_trl_worker.trainer_settings(run)
        assert cfg.prompts * cfg.samples == trl["per_device_train_batch_size"]
        assert cfg.steps * cfg.prompts * cfg.samples == 640
        assert cfg.policy_lr == cfg.critic_lr == trl["learning_rate"]
        assert cfg.policy_lr_warmup == cfg.critic_lr_warmup == cfg.anneal_steps == 0
        assert (cfg.policy_steps, cfg.critic_steps) == (1, 1)
        assert cfg.response_tokens == 8
        assert (cfg.gamma, cfg.lam, cfg.temperature, cfg.top_p) == (1, 1, 1, 1)
        clips = program == "ours-grpo"  # TRL's PPO does not
        assert cfg.max_grad_norm == (trl["max_grad_norm"] if clips else 1e9)


def test_the_reward_model_of_trl_gives_the_reward() -> None:
    """Of the ids after the prompt's end, whatever is padded."""
    curve: vs_trl_worker.Curve = []
    model = vs_trl_worker.RewardModel(curve, prompt_end=7)
    ids = torch.tensor([[0, 2, 7, 1, 3, 2], [2, 4, 4, 7, 1, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    hidden = model.backbone(ids, mask).hidden_states[-1]
    assert model.score(hidden)[:, -1, 0].tolist() == [1.0, 0.0]
    (batch,) = curve
    assert batch["prompts"] == [[2, 7], [2, 4, 4, 7]]
    assert batch["responses"] == [[1, 3, 2], [1, 2]]
    assert (batch["reward"], batch["tokens"]) == (0.5, 2.5)


def test_gradients_are_compared_step_by_step(tmp_path: Path) -> None:
    """Each step has one gradient of each model, and of the same weights. The largest difference
    and the smallest cosine are those of one step."""
    vs_trl.prepare(tmp_path, seed=0)
    prompts = [prompt["ids"] for prompt in vs_trl_worker.load_prompts(str(tmp_path))[:2]]
    curve = [
        {"prompts": prompts, "responses": [[1, 3, 5], [2, 4 + step]]}  # rewards 1 and 0
        for step in range(2)
    ]
    cfg = vs_trl_worker.our_settings(Run("ours-ppo", str(tmp_path), 3, 640, seed=0))
    policy, critic = vs_trl_gradients.take_steps(cfg, curve)
    assert (len(policy), len(critic)) == (2, 2)
    assert "score.weight" in critic[0] and "score.weight" not in policy[0]
    same = vs_trl_gradients.row("", 0, policy, policy)
    assert (same["steps"], same["cosine"], same["difference"]) == (2, "1.000000", 0)
    doubled = [policy[0], {name: 2 * gradient for name, gradient in policy[1].items()}]
    other = vs_trl_gradients.row("", 0, policy, doubled)
    assert other["cosine"] == "1.000000" and other["difference"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="of other weights"):
        vs_trl_gradients.row("", 0, policy, critic)
