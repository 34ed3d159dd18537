"""Jobs that test_distributed.py starts under torchrun, or calls in its own process as one rank."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import random_rollouts, sums
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import distributed
import ppo
import rollout
import train
from config import Config, Sampling
from critic import load_critic
from distributed import Sharding
from policy import Policy, load_policy
from rollout import Rollout, VllmSampler
from toy import tiny

LENGTHS = [5, 1, 9, 3, 7, 2, 12, 4, 40, 1, 1, 6, 8]


# ── updates ───────────────────────────────────────────────────────────────────────────────────────


def updates(out: Path, model_path: Path, cfg: Config) -> None:
    """Two iterations of both updates on fixed rollouts. Saves the gradients of every optimizer
    step, the weights, the values and the metrics."""
    sharding = Sharding(cfg.replicas, cfg.activation_checkpointing, cfg.offload)
    policy = load_policy(str(model_path), sharding)
    critic = load_critic(cfg.critic_model or str(model_path), sharding=sharding)
    policy_optimizer = ppo.adamw(list(policy.parameters()))
    critic_optimizer = ppo.adamw(list(critic.parameters()))
    models = train.Models(policy, policy_optimizer, critic, critic_optimizer, None)
    names = {p: f"policy {name}" for name, p in policy.named_parameters()}
    names |= {p: f"critic {name}" for name, p in critic.named_parameters()}
    tensors: dict[str, Tensor] = {}
    stats: dict[str, float] = {}
    with record_gradients(names, tensors):
        for step in range(2):
            values, step_stats = update_once(cfg, models, step)
            tensors[f"values {step}"] = values
            stats |= step_stats
    tensors |= {f"weight {name}": distributed.full_tensor(p) for p, name in names.items()}
    if distributed.rank() == 0:
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        save_file(contiguous, out / "tensors.safetensors")
        (out / "stats.json").write_text(json.dumps(stats))


@contextmanager
def record_gradients(names: dict[Tensor, str], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Add to `tensors` the whole gradients that each optimizer step is given."""
    original = ppo.optimizer_step

    def recorded(optimizer: torch.optim.AdamW, lr: float, max_grad_norm: float) -> float:
        for p, name in names.items():
            if p.grad is not None:
                tensors[f"gradient {len(tensors)} {name}"] = distributed.full_tensor(p.grad).clone()
        return original(optimizer, lr, max_grad_norm)

    ppo.optimizer_step = recorded
    try:
        yield
    finally:
        ppo.optimizer_step = original


def update_once(cfg: Config, models: train.Models, step: int) -> tuple[Tensor, dict[str, float]]:
    """One iteration on random rollouts, every third of which is right: the values before it, and
    its metrics."""
    policy, critic = models.policy, models.critic
    rollouts = random_rollouts(sums(), policy.model.config.vocab_size, LENGTHS, seed=step)
    for i, r in enumerate(rollouts):
        r.reward = float(i % 3 == 0)
    values = train.predict_values(cfg, critic, rollouts)
    advantages, targets = train.compute_advantages(cfg, models, rollouts, values)
    with distributed.on_device(cfg.offload, critic, models.critic_optimizer):
        stats = train.update_critic(cfg, models, rollouts, values, targets, step)
    advantages = train.normalize_advantages(advantages)
    with distributed.on_device(cfg.offload, policy, models.policy_optimizer):
        stats |= train.update_policy(cfg, models, rollouts, advantages, step)
    return values, stats


# ── samplers ──────────────────────────────────────────────────────────────────────────────────────


def samplers(out: Path, model_path: Path, cfg: Config) -> None:
    """The real samplers beside the sharded trainer: before an update, with the old weights after
    it, and with the new ones. Saves how far the log-probabilities differ, who refuses, how many
    responses each rank sampled, and whether all ranks hold the same responses."""
    tokenizer = tiny.tokenizer()
    eos = [tokenizer.eos_token_id]
    sampler = VllmSampler(str(model_path), eos, "float32", 512, 64, 0.4, cfg.tensor_parallel)
    policy = load_policy(str(model_path))
    models = train.Models(policy, ppo.adamw(list(policy.parameters())), None, None, None)
    seen: dict[str, Any] = {}

    rollout.sync_weights(sampler, policy)
    local_rollouts = sample(sampler, tokenizer, "0/0")
    first = rollout.gather_rollouts(local_rollouts)
    ids_on_ranks = distributed.all_gather_objects([r.token_ids for r in first])
    seen["shares"] = distributed.all_gather_objects(len(local_rollouts))
    seen["ids"] = ids_on_ranks[0]
    seen["all ranks hold the same"] = all(ids == ids_on_ranks[0] for ids in ids_on_ranks)
    seen["gap before"] = gap(policy, first)
    seen["refused before"] = refused(cfg, policy, first)
    seen["logp_gap before"] = update_policy(cfg, models, first, 0)

    stale = rollout.gather_rollouts(sample(sampler, tokenizer, "0/1"))
    seen["gap stale"] = gap(policy, stale)
    seen["refused stale"] = refused(cfg, policy, stale)
    seen["logp_gap stale"] = update_policy(cfg, models, stale, 1)

    rollout.sync_weights(sampler, policy)
    after = rollout.gather_rollouts(sample(sampler, tokenizer, "0/2"))
    seen["gap after"] = gap(policy, after)
    seen["refused after"] = refused(cfg, policy, after)

    if distributed.rank() == distributed.world_size() - 1 and cfg.tensor_parallel == 1:
        load_other_weights(sampler, model_path)
    one_wrong = rollout.gather_rollouts(sample(sampler, tokenizer, "0/3"))
    seen["refused one wrong"] = refused(cfg, policy, one_wrong)
    if distributed.rank() == 0:
        (out / "seen.json").write_text(json.dumps(seen))
    sampler.close()


def sample(sampler: VllmSampler, tokenizer: PreTrainedTokenizerBase, stream: str) -> list[Rollout]:
    """This rank's share of 3 responses to each of 7 problems."""
    return rollout.sample_responses(sampler, tokenizer, sums()[:7], 3, Sampling(24), stream)


def gap(policy: Policy, rollouts: list[Rollout]) -> float:
    """Largest |Δ log-prob| between the samplers and the sharded trainer."""
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    return float((train.compute_logprobs(Config(), policy, rollouts) - sampled).abs().max())


def refused(cfg: Config, policy: Policy, rollouts: list[Rollout]) -> list[bool]:
    """For each rank, whether it refuses the samplers of these rollouts."""
    try:
        train.require_same_logprobs(cfg, policy, rollouts)
    except RuntimeError:
        return distributed.all_gather_objects(True)
    return distributed.all_gather_objects(False)


def update_policy(cfg: Config, models: train.Models, rollouts: list[Rollout], step: int) -> float:
    """A policy update with advantages of ±0.5; returns the |Δ log-prob| that it logs."""
    lengths = [len(r.token_ids) for r in rollouts]
    advantages = torch.cat([torch.full((n,), n % 2 - 0.5) for n in lengths])
    return train.update_policy(cfg, models, rollouts, advantages, step)["logp_gap"]


def load_other_weights(sampler: VllmSampler, model_path: Path) -> None:
    """Give this rank's sampler weights that are not the policy's."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    sampler.load_weights((name, 1.1 * weight) for name, weight in model.state_dict().items())


# ── waiting and stopping ──────────────────────────────────────────────────────────────────────────


def stop_together(out: Path, _: Path, cfg: Config) -> None:
    """The last rank is late, as if it still graded. Then rank 0 alone finds an error; every rank
    writes what it saw."""
    if distributed.rank() == distributed.world_size() - 1:
        time.sleep(4)
    ranks = distributed.all_gather_objects(distributed.rank())

    def fail() -> None:
        raise ValueError("row 7 is bad")

    try:
        distributed.on_rank0(fail)
    except ValueError as error:
        (out / f"stopped-{distributed.rank()}").write_text(f"{ranks} {error}")


JOBS = {"updates": updates, "samplers": samplers, "stop_together": stop_together}

if __name__ == "__main__":
    job, out, model_path, settings = sys.argv[1:]
    cfg = Config(**json.loads(settings))
    torch.set_num_threads(1)
    distributed.start(cfg.timeout_minutes)
    JOBS[job](Path(out), Path(model_path), cfg)
    distributed.stop()
