"""Jobs that test_parallel.py starts under torchrun, or calls in its own process for a world of one."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import random_rollouts, sums
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import distributed
import ppo
import rollout
import train
from config import Config, Sampling
from critic import load_critic
from distributed import Sharding
from policy import Policy, load_policy
from toy import tiny

LENGTHS = [5, 1, 9, 3, 7, 2, 12, 4, 40, 1, 1, 6, 8]


def updates(out: Path, model: Path, cfg: Config) -> None:
    """Two iterations of both updates on fixed rollouts; leaves the gradients of every optimizer step, the weights, the
    values and the metrics."""
    sharding = Sharding(cfg.replicas, cfg.activation_checkpointing, cfg.offload)
    policy, critic = load_policy(str(model), sharding), load_critic(str(model), sharding=sharding)
    policy_optimizer, critic_optimizer = (ppo.adamw(list(m.parameters())) for m in (policy, critic))
    models = train.Models(policy, policy_optimizer, critic, critic_optimizer, None)
    left, stats, real = {}, {}, ppo.optimizer_step

    def noted(optimizer: torch.optim.AdamW, lr: float, max_grad_norm: float) -> float:
        for p, name in names.items():
            if p.grad is not None:
                left[f"gradient {len(left)} {name}"] = distributed.full_tensor(p.grad).clone()
        return real(optimizer, lr, max_grad_norm)

    names = {
        p: f"{m} {name}"
        for m, model in enumerate((policy, critic))
        for name, p in model.named_parameters()
    }
    ppo.optimizer_step = noted
    for step in range(2):
        rollouts = random_rollouts(sums(), policy.model.config.vocab_size, LENGTHS, seed=step)
        for i, r in enumerate(rollouts):
            r.reward = float(i % 3 == 0)
        values = train.predict_values(cfg, critic, rollouts)
        advantages, targets = train.compute_advantages(cfg, models, rollouts, values)
        with distributed.on_device(cfg.offload, critic, critic_optimizer):
            stats |= train.update_critic(cfg, models, rollouts, values, targets, step)
        advantages = train.normalize_advantages(advantages)
        with distributed.on_device(cfg.offload, policy, policy_optimizer):
            stats |= train.update_policy(cfg, models, rollouts, advantages, step)
        left[f"values {step}"] = values
    ppo.optimizer_step = real
    left |= {f"weight {name}": distributed.full_tensor(p) for p, name in names.items()}
    if distributed.rank() == 0:
        save_file({name: t.contiguous() for name, t in left.items()}, out / "tensors.safetensors")
        (out / "stats.json").write_text(json.dumps(stats))


def gap(policy: Policy, rollouts: list[rollout.Rollout]) -> float:
    """Largest |Δ log-prob| between the samplers and the sharded trainer."""
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    return float((train.compute_logprobs(Config(), policy, rollouts) - sampled).abs().max())


def engines(out: Path, model: Path, cfg: Config) -> None:
    """The real sampler beside the sharded trainer: agreement, staleness, who answers, who gets which tokens."""
    tokenizer, sampling = tiny.tokenizer(), Sampling(24)
    seen: dict[str, Any] = {}
    sampler = rollout.VllmSampler(
        str(model), [tokenizer.eos_token_id], "float32", 512, 64, 0.4, cfg.tensor_parallel
    )
    policy = load_policy(str(model))

    def sampled(stream: str) -> list[rollout.Rollout]:
        mine = rollout.sample_responses(sampler, tokenizer, sums()[:7], 3, sampling, stream)
        seen.setdefault("shares", distributed.all_gather_objects(len(mine)))
        return rollout.gather_rollouts(mine)

    def refused(rollouts: list[rollout.Rollout]) -> list[bool]:
        try:
            train.require_same_logprobs(cfg, policy, rollouts)
        except RuntimeError:
            return distributed.all_gather_objects(True)
        return distributed.all_gather_objects(False)

    def update(rollouts: list[rollout.Rollout], step: int) -> float:
        lengths = [len(r.token_ids) for r in rollouts]
        advantages = torch.cat([torch.full((n,), n % 2 - 0.5) for n in lengths])
        return train.update_policy(cfg, models, rollouts, advantages, step)["logp_gap"]

    models = train.Models(policy, ppo.adamw(list(policy.parameters())), None, None, None)
    rollout.sync_weights(sampler, policy)
    first = sampled("0/0")
    same = distributed.all_gather_objects([r.token_ids for r in first])
    seen |= {"before": gap(policy, first), "refused in step": refused(first), "ids": same[0]}
    seen |= {
        "all ranks hold the same": all(ids == same[0] for ids in same),
        "logp_gap in step": update(first, 0),
    }
    stale = sampled("0/1")
    seen |= {
        "stale": gap(policy, stale),
        "refused stale": refused(stale),
        "logp_gap stale": update(stale, 1),
    }
    rollout.sync_weights(sampler, policy)
    after = sampled("0/2")
    seen |= {"after": gap(policy, after), "refused after": refused(after)}
    if (
        distributed.rank() == distributed.world_size() - 1 and cfg.tensor_parallel == 1
    ):  # one sampler goes astray
        wrong = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        sampler.load_weights((name, 1.1 * weight) for name, weight in wrong.items())
    seen["refused one astray"] = refused(sampled("0/3"))
    if distributed.rank() == 0:
        (out / "seen.json").write_text(json.dumps(seen))
    sampler.close()


def together(out: Path, model: Path, cfg: Config) -> None:
    """The last rank is late, as one that still grades; then rank 0 alone finds something wrong."""
    if distributed.rank() == distributed.world_size() - 1:
        time.sleep(4)
    ranks = distributed.all_gather_objects(distributed.rank())

    def wrong() -> None:
        raise ValueError("row 7 is bad")

    try:
        distributed.on_rank0(wrong)
    except ValueError as seen:
        (out / f"stopped-{distributed.rank()}").write_text(f"{ranks} {seen}")


if __name__ == "__main__":
    job, out, model, settings = sys.argv[1:]
    cfg = Config(**json.loads(settings))
    torch.set_num_threads(1)
    distributed.start(cfg.timeout_minutes)
    globals()[job](Path(out), Path(model), cfg)
    distributed.stop()
