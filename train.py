"""Open-Reasoner-Zero: vanilla PPO with a critic, GAE at γ = λ = 1 and a 0/1 reward, straight on a base model.

    python train.py                                             the tiny model, on a laptop
    torchrun --nproc-per-node 8 train.py --model Qwen2.5-7B --data orz_57k.json      the paper's settings of that size

`train` is the whole algorithm; each stage of it is one file of this folder.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

import checkpoint
import data
import distributed
import ppo
import rollout
from checkpoint import Checkpoints, export
from config import Config, parse
from critic import Critic, load_critic
from gae import gae, grpo_advantages, last_token_rewards, normalize_advantages
from hf_sampler import Sampling, open_sampler
from packing import forward_all_tokens, micro_batches, mini_batches
from policy import Policy, load_policy
from preflight import Inputs, prepare
from reports.log import RunLog
from reports.metrics import describe, explained_variance, mean
from reward import evaluate, score
from rollout import Rollout
from tools import plan


def train(cfg: Config, inputs: Inputs) -> Path:
    """Train, evaluate, draw; returns the run folder. Every rank runs this."""
    path, tokenizer, eos, problems, heldout, found, grader, reward = inputs
    engine = None if cfg.replay else open_sampler(cfg, path, tokenizer, eos, asleep=True)
    policy, critic, reference = load_models(cfg, path)
    policy_optimizer, critic_optimizer = (
        ppo.adamw(list(m.parameters())) if m else None for m in (policy, critic)
    )
    trained = {"policy": (policy, policy_optimizer)} | (
        {"critic": (critic, critic_optimizer)} if critic else {}
    )
    first = checkpoint.load(found, trained)
    sampling = Sampling(cfg.response_tokens, cfg.temperature, cfg.top_p)
    on_device = partial(distributed.on_device, cfg.offload)

    def sample(problems: Sequence[data.Problem], count: int, stream: str) -> list[Rollout]:
        return rollout.sample_responses(
            engine, tokenizer, problems, count, sampling, f"{cfg.seed}/{stream}"
        )

    def held_out(step: int) -> tuple[dict[str, float], list[Rollout]]:
        return evaluate(sample(heldout, cfg.eval_samples, f"eval/{step}"), grader, reward)

    if engine:
        with on_device(policy):
            rollout.sync_weights(engine, policy)
            check_sampler_matches_policy(
                cfg,
                policy,
                rollout.gather_rollouts(
                    sample(problems[: max(4, distributed.world_size())], 1, "check")
                ),
            )
    log = RunLog(Path(cfg.runs) / cfg.name, cfg, found)
    with grader, log, Checkpoints(log.folder / "checkpoints", cfg, trained, first) as checkpoints:
        if heldout and not found:
            log.evaluation(0, held_out)
        for step in range(first, cfg.steps):
            if engine:
                with log.phase("sample"):
                    mine = sample(
                        data.take(problems, step, cfg.prompts, cfg.seed), cfg.samples, f"{step}"
                    )
                    engine.sleep()
                with log.phase("grade"):
                    rollouts = rollout.gather_rollouts(score(mine, grader, reward))
            else:
                rollouts = rollout.load_rollouts(Path(cfg.replay) / f"step-{step}.jsonl")
            with log.dump_rollouts_on_nan(step, rollouts):
                with (
                    log.phase("values"),
                    on_device(critic),
                    on_device(policy if cfg.kl_reward else None),
                ):
                    values = predict_values(cfg, critic, rollouts)
                    A, targets = compute_advantages(cfg, policy, reference, rollouts, values)
                with log.phase("critic"), on_device(critic, critic_optimizer):
                    stats = update_critic(
                        cfg, critic, critic_optimizer, rollouts, values, targets, step
                    )
                with log.phase("policy"), on_device(policy, policy_optimizer):
                    stats |= update_policy(
                        cfg,
                        policy,
                        reference,
                        policy_optimizer,
                        rollouts,
                        normalize_advantages(A),
                        step,
                    )
            if engine:
                with log.phase("sync"), on_device(policy):
                    rollout.sync_weights(engine, policy)
            log.step(
                step,
                describe(rollouts) | stats,
                rollouts,
                tokenizer,
                values if critic else None,
                normalize_advantages(A),
            )
            done, last = step + 1, step + 1 == cfg.steps
            if heldout and (last or (cfg.eval_every and done % cfg.eval_every == 0)):
                log.evaluation(done, held_out)
            with log.aside("checkpoint"):
                checkpoints.step(done, last, log.records)
        log.before_after()
    with on_device(policy), on_device(critic):
        save_models(cfg, policy, critic, tokenizer, eos, log.folder)
    log.draw()
    if engine:
        engine.close()
    return log.folder


def load_models(cfg: Config, path: str) -> tuple[Policy, Critic | None, Policy | None]:
    """Policy; critic, unless the advantage needs none; reference model, if an ablation asks for KL."""
    sharding = distributed.Sharding(
        cfg.replicas, cfg.activation_checkpointing, cfg.offload, cfg.compile
    )
    policy = load_policy(path, sharding)
    critic = (
        load_critic(cfg.init_critic or path, cfg.value_head, cfg.seed, sharding)
        if "critic" in cfg.roles
        else None
    )
    fixed = sharding._replace(offload=False)
    reference = (
        load_policy(path, fixed).requires_grad_(False) if cfg.kl_loss or cfg.kl_reward else None
    )
    return policy, critic, reference


def save_models(
    cfg: Config,
    policy: Policy,
    critic: Critic | None,
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    folder: Path,
) -> None:
    """Export what was trained, with the settings it was sampled with."""
    generation = GenerationConfig(
        do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p, top_k=0, max_new_tokens=cfg.response_tokens,
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, stop_strings=list(Sampling.stop),
    )  # fmt: skip
    export(policy, tokenizer, folder / "policy", generation)
    if critic:
        export(critic, tokenizer, folder / "critic")


def predict_values(cfg: Config, critic: Critic | None, rollouts: Sequence[Rollout]) -> Tensor:
    """V(s_t) of all response tokens before the critic's update, flat (N,); zeros where there is no critic."""
    if critic is None:
        return torch.zeros(sum(len(r.token_ids) for r in rollouts), device=distributed.device())
    return forward_all_tokens(critic, rollouts, cfg.micro_tokens, distributed.device())


def compute_advantages(
    cfg: Config,
    policy: Policy,
    reference: Policy | None,
    rollouts: Sequence[Rollout],
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Â_t and value targets of all response tokens of the step, flat (N,) (§2.1); in GRPO mode its group advantage."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=values.device)
    R = torch.tensor([r.reward for r in rollouts], device=values.device)
    rewards = last_token_rewards(R, lengths)
    if reference and cfg.kl_reward:
        logp, logp_ref = (compute_logprobs(cfg, model, rollouts) for model in (policy, reference))
        rewards = ppo.kl_shaped_rewards(rewards, logp, logp_ref, cfg.kl_reward, cfg.kl_estimator)
    A, targets = gae(rewards, values, lengths, cfg.gamma, cfg.lam)
    if cfg.advantage == "grpo":
        groups = torch.arange(len(rollouts), device=values.device) // cfg.samples
        A = grpo_advantages(R, groups, lengths)
    return A, targets


def update_critic(
    cfg: Config, critic: Critic | None, optimizer: torch.optim.AdamW | None, rollouts: Sequence[Rollout],
    values: Tensor, targets: Tensor, step: int,
) -> dict[str, float]:  # fmt: skip
    """Eq. 2: one optimizer step on each of 12 mini-batches that together use every response once (§3.1)."""
    if critic is None or optimizer is None:
        return {}
    lengths = [len(r.token_ids) for r in rollouts]
    losses, norms, lr = [], [], 0.0
    for k, members in enumerate(mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")):
        tokens, total = sum(lengths[i] for i in members), torch.zeros((), device=values.device)
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, values.device):
            v = critic(micro)
            loss = (
                ppo.value_loss(v, targets[micro.flat], values[micro.flat], cfg.value_clip) / tokens
            )
            loss.backward()
            total += loss.detach()
        lr = ppo.learning_rate(step * cfg.critic_steps + k, cfg.critic_lr, cfg.critic_lr_warmup)
        losses.append(finite("value loss", total))
        norms.append(ppo.optimizer_step(optimizer, lr, cfg.max_grad_norm))
    return {
        "value_loss": mean(
            distributed.all_reduce_sum(torch.tensor(losses, dtype=torch.float64)).tolist()
        ),
        "critic_grad_norm": mean(norms),
        "critic_lr": lr,
        "value_mean": float(values.mean()),
        "explained_variance": explained_variance(values, targets),
    }


def update_policy(
    cfg: Config, policy: Policy, reference: Policy | None, optimizer: torch.optim.AdamW,
    rollouts: Sequence[Rollout], A: Tensor, step: int,
) -> dict[str, float]:  # fmt: skip
    """Eq. 1: one strictly on-policy step on the whole batch (§3.1), or `policy_steps` steps on as many mini-batches.

    On-policy, π_old is the policy itself, so its log-probabilities are the current ones, detached: no extra forward pass.
    """
    lengths = [len(r.token_ids) for r in rollouts]
    logp_sampler = torch.tensor([p for r in rollouts for p in r.logprobs], device=A.device)
    logp_old = compute_logprobs(cfg, policy, rollouts) if cfg.policy_steps > 1 else None
    names = ("policy_loss", "entropy", "clipped", "logp_gap", "kl")
    sums = torch.zeros(
        len(names), dtype=torch.float64, device=A.device
    )  # read once: a GPU need not wait for the host
    kl, gap_max, norms, lr = (
        torch.zeros((), device=A.device),
        torch.zeros(1, device=A.device),
        [],
        0.0,
    )
    for k, members in enumerate(mini_batches(lengths, cfg.policy_steps, f"{cfg.seed}/{step}")):
        tokens = sum(lengths[i] for i in members)
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, A.device):
            logp, entropy = policy(micro, cfg.temperature)
            old = logp.detach() if logp_old is None else logp_old[micro.flat]
            advantage = A[micro.flat]
            if cfg.tis_cap:
                advantage = advantage * ppo.truncated_is(old, logp_sampler[micro.flat], cfg.tis_cap)
            loss, clipped = ppo.policy_loss(logp, old, advantage, cfg.clip_eps)
            if reference and cfg.kl_loss:
                with torch.no_grad():
                    logp_ref, _ = reference(micro, cfg.temperature)
                kl = ppo.kl(logp, logp_ref, cfg.kl_estimator).sum()
                loss = loss + cfg.kl_loss * kl
            (loss / tokens).backward()
            gap = (old - logp_sampler[micro.flat]).abs()
            gap_max = torch.cat([gap_max, gap]).max(0, keepdim=True).values
            sums += torch.stack(
                [loss.detach(), entropy.sum(), clipped.sum(), gap.sum(), kl.detach()]
            )
        finite("policy loss", sums[0])
        lr = ppo.learning_rate(
            step * cfg.policy_steps + k,
            cfg.policy_lr,
            cfg.policy_lr_warmup,
            cfg.anneal_steps,
            cfg.anneal_to,
        )
        norms.append(ppo.optimizer_step(optimizer, lr, cfg.max_grad_norm))
    totals = (distributed.all_reduce_sum(sums) / sum(lengths)).tolist()
    per_token = {
        name: total
        for name, total in zip(names, totals, strict=True)
        if name != "kl" or cfg.kl_loss
    }
    return per_token | {
        "logp_gap_max": distributed.all_reduce_max(float(gap_max)),
        "policy_grad_norm": mean(norms),
        "policy_lr": lr,
    }


def compute_logprobs(cfg: Config, model: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """log π(a_t|s_t) of all response tokens, flat (N,), without gradient."""
    return forward_all_tokens(
        lambda micro: model(micro, cfg.temperature)[0],
        rollouts,
        cfg.micro_tokens,
        distributed.device(),
    )


def check_sampler_matches_policy(cfg: Config, policy: Policy, rollouts: Sequence[Rollout]) -> None:
    """Raise RuntimeError when any engine's log-probabilities are not the trainer's: stale or wrong weights would train on
    another model's samples without any other sign."""
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs], device=distributed.device())
    gaps = (
        (compute_logprobs(cfg, policy, rollouts) - sampled)
        .abs()
        .split([len(r.token_ids) for r in rollouts])
    )
    engines = distributed.world_size() // cfg.tensor_parallel
    gap = max(float(torch.cat(gaps[e::engines]).mean()) for e in range(min(engines, len(gaps))))
    if not gap <= cfg.max_logp_gap:
        raise RuntimeError(
            f"sampler and trainer differ by {gap:.3g} nats per token (limit --max-logp-gap {cfg.max_logp_gap}): "
            "the sampler does not hold the policy's weights"
        )


def finite(name: str, loss: Tensor) -> float:
    """The loss as a float; FloatingPointError when it is NaN or infinite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}")
    return value


def main() -> None:
    """Command line. What can be refused before the run is refused in one line; anything later keeps its traceback."""
    cfg = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.plan:
        print(plan.show(cfg))
        return
    distributed.start(cfg.timeout_minutes)
    try:
        inputs = prepare(cfg)
    except (ValueError, OSError) as error:  # on all ranks alike
        sys.exit(f"train.py: {error}" if distributed.rank() == 0 else 1)
    try:
        train(cfg, inputs)
    except (FloatingPointError, OSError) as error:  # perhaps on one rank alone
        sys.exit(
            f"train.py: rank {distributed.rank()}: {error}"
            if distributed.world_size() > 1
            else f"train.py: {error}"
        )
    distributed.stop()


if __name__ == "__main__":
    main()
