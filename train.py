"""Open-Reasoner-Zero: vanilla PPO with a critic, GAE at γ = λ = 1 and a 0/1 reward, straight on a base model.

    python train.py                                             the tiny model, on a laptop
    python train.py --model Qwen2.5-7B --data orz_57k.json      the paper's settings of that size

`train` is the whole algorithm; each stage of it is one file of this folder.
"""

import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import data
import ppo
import report
import rollout
from batch import micro_batches, mini_batches, over_tokens
from checkpoint import export
from config import Config, Inputs, parse, prepare
from critic import load_critic, token_values
from evaluate import evaluate, score
from gae import gae, grpo_advantages, last_token_rewards, normalise
from log import RunLog
from metrics import describe, explained_variance, mean
from policy import load_policy, token_logprobs
from rollout import Rollout, Sampling, TransformersEngine, VllmEngine


def train(cfg: Config, inputs: Inputs) -> Path:
    """Train, evaluate, draw; returns the run folder."""
    path, tokenizer, eos, problems, heldout, grader = inputs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = open_engine(cfg, path, tokenizer, eos, device)
    policy = load_policy(path, device)
    policy_optimizer = ppo.adamw(list(policy.parameters()))
    critic = load_critic(path, cfg.value_head, cfg.seed, device) if cfg.advantage == "gae" else None
    critic_optimizer = ppo.adamw(list(critic.parameters())) if critic else None
    reference = load_policy(path, device).requires_grad_(False) if cfg.kl_loss or cfg.kl_reward else None
    sampling = Sampling(cfg.response_tokens, cfg.temperature, cfg.top_p)

    def sample(problems: Sequence[data.Problem], step: int) -> list[Rollout]:
        return rollout.sample(engine, tokenizer, problems, cfg.samples, sampling, f"{cfg.seed}/{step}")

    def held_out(step: int) -> tuple[dict[str, float], list[Rollout]]:
        return evaluate(engine, tokenizer, grader, heldout, cfg.eval_samples, sampling, f"{cfg.seed}/eval/{step}")

    rollout.sync(engine, policy)
    refuse_wrong_sampler(cfg, policy, rollout.sample(engine, tokenizer, problems[:4], 1, sampling, f"{cfg.seed}/check"))
    with grader, RunLog(Path(cfg.runs) / cfg.run, cfg) as log:
        before = log.evaluation(0, held_out) if heldout else None
        for step in range(cfg.steps):
            with log.phase("sample"):
                rollouts = sample(data.take(problems, step, cfg.prompts, cfg.seed), step)
            with log.phase("grade"):
                score(grader, rollouts)
            with log.saved_if_not_finite(step, rollouts):
                with log.phase("values"):
                    values = predict(cfg, critic, rollouts, device)
                    A, targets = advantages(cfg, policy, reference, rollouts, values)
                with log.phase("critic"):
                    stats = update_critic(cfg, critic, critic_optimizer, rollouts, values, targets, step)
                with log.phase("policy"):
                    stats |= update_policy(cfg, policy, reference, policy_optimizer, rollouts, normalise(A), step)
            with log.phase("sync"):
                rollout.sync(engine, policy)
            log.step(step, describe(rollouts) | stats, rollouts)
            if heldout and cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
                log.evaluation(step + 1, held_out)
        if before:
            log.before_after(before, log.evaluation(cfg.steps, held_out))
    export(policy, tokenizer, log.folder / "policy")
    if critic:
        export(critic, tokenizer, log.folder / "critic")
    report.figures(log.folder)
    return log.folder


def open_engine(
    cfg: Config, path: str, tokenizer: PreTrainedTokenizerBase, eos: list[int], device: str
) -> VllmEngine | TransformersEngine:
    """The sampler that the run asks for; see `Config.engine`."""
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    if cfg.engine == "vllm" or (cfg.engine == "auto" and device == "cuda" and find_spec("vllm")):
        return VllmEngine(path, eos, dtype, cfg.prompt_tokens + cfg.response_tokens, cfg.rows, cfg.vllm_memory, cfg.seed)
    return TransformersEngine(path, tokenizer, eos, dtype, device, cfg.rows)


def predict(cfg: Config, critic: PreTrainedModel | None, rollouts: Sequence[Rollout], device: str) -> Tensor:
    """V(s_t) of all response tokens before the critic's update, flat (N,); zeros where there is no critic."""
    if critic is None:
        return torch.zeros(sum(len(r.ids) for r in rollouts), device=device)
    return over_tokens(lambda micro: token_values(critic, micro), rollouts, cfg.micro_tokens, device)


def advantages(
    cfg: Config, policy: PreTrainedModel, reference: PreTrainedModel | None, rollouts: Sequence[Rollout], values: Tensor
) -> tuple[Tensor, Tensor]:
    """Â_t and value targets of all response tokens of the step, flat (N,) (§2.1); in GRPO mode its group advantage."""
    lengths = torch.tensor([len(r.ids) for r in rollouts], device=values.device)
    R = torch.tensor([r.reward for r in rollouts], device=values.device)
    rewards = last_token_rewards(R, lengths)
    if reference and cfg.kl_reward:
        logp, logp_ref = (logprobs(cfg, model, rollouts) for model in (policy, reference))
        rewards = ppo.kl_shaped_rewards(rewards, logp, logp_ref, cfg.kl_reward, cfg.kl_estimator)
    A, targets = gae(rewards, values, lengths, cfg.gamma, cfg.lam)
    if cfg.advantage == "grpo":
        groups = torch.arange(len(rollouts), device=values.device) // cfg.samples
        A = grpo_advantages(R, groups, lengths)
    return A, targets


def update_critic(
    cfg: Config, critic: PreTrainedModel | None, optimizer: torch.optim.AdamW | None, rollouts: Sequence[Rollout],
    values: Tensor, targets: Tensor, step: int,
) -> dict[str, float]:  # fmt: skip
    """Eq. 2: one optimizer step on each of 12 mini-batches that together use every response once (§3.1)."""
    if critic is None or optimizer is None:
        return {}
    lengths = [len(r.ids) for r in rollouts]
    losses, norms, lr = [], [], 0.0
    for k, members in enumerate(mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")):
        tokens, total = sum(lengths[i] for i in members), 0.0
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, critic.device):
            v = token_values(critic, micro)
            loss = ppo.value_loss(v, targets[micro.flat], values[micro.flat], cfg.value_clip) / tokens
            loss.backward()
            total += finite("value loss", loss)
        lr = ppo.learning_rate(step * cfg.critic_steps + k, cfg.critic_lr, cfg.critic_warmup)
        norms.append(ppo.optimizer_step(optimizer, lr, cfg.max_norm))
        losses.append(total)
    return {
        "value_loss": mean(losses),
        "critic_grad_norm": mean(norms),
        "critic_lr": lr,
        "value_mean": float(values.mean()),
        "explained_variance": explained_variance(values, targets),
    }


def update_policy(
    cfg: Config, policy: PreTrainedModel, reference: PreTrainedModel | None, optimizer: torch.optim.AdamW,
    rollouts: Sequence[Rollout], A: Tensor, step: int,
) -> dict[str, float]:  # fmt: skip
    """Eq. 1: one strictly on-policy step on the whole batch (§3.1), or `policy_steps` steps on as many mini-batches.

    On-policy, π_old is the policy itself, so its log-probabilities are the current ones, detached: no extra forward pass.
    """
    lengths = [len(r.ids) for r in rollouts]
    logp_sampler = torch.tensor([p for r in rollouts for p in r.logprobs], device=A.device)
    logp_old = logprobs(cfg, policy, rollouts) if cfg.policy_steps > 1 else None
    sums = dict.fromkeys(("policy_loss", "entropy", "clipped", "logp_gap", "kl"), 0.0)
    gap_max, norms, lr = 0.0, [], 0.0
    for k, members in enumerate(mini_batches(lengths, cfg.policy_steps, f"{cfg.seed}/{step}")):
        tokens = sum(lengths[i] for i in members)
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, policy.device):
            logp, entropy = token_logprobs(policy, micro, cfg.temperature)
            old = logp.detach() if logp_old is None else logp_old[micro.flat]
            advantage = A[micro.flat]
            if cfg.tis_cap:
                advantage = advantage * ppo.truncated_is(old, logp_sampler[micro.flat], cfg.tis_cap)
            loss, clipped = ppo.policy_loss(logp, old, advantage, cfg.eps)
            if reference and cfg.kl_loss:
                with torch.no_grad():
                    logp_ref, _ = token_logprobs(reference, micro, cfg.temperature)
                kl = ppo.kl(logp, logp_ref, cfg.kl_estimator).sum()
                loss = loss + cfg.kl_loss * kl
                sums["kl"] += float(kl.detach())
            (loss / tokens).backward()
            gap = (old - logp_sampler[micro.flat]).abs()
            gap_max = max(gap_max, float(gap.max()))
            sums["policy_loss"] += finite("policy loss", loss)
            sums["entropy"] += float(entropy.sum())
            sums["clipped"] += float(clipped.sum())
            sums["logp_gap"] += float(gap.sum())
        lr = ppo.learning_rate(
            step * cfg.policy_steps + k, cfg.policy_lr, cfg.policy_warmup, cfg.anneal_steps, cfg.anneal_to
        )
        norms.append(ppo.optimizer_step(optimizer, lr, cfg.max_norm))
    per_token = {name: total / sum(lengths) for name, total in sums.items() if name != "kl" or cfg.kl_loss}
    return per_token | {"logp_gap_max": gap_max, "policy_grad_norm": mean(norms), "policy_lr": lr}


def logprobs(cfg: Config, model: PreTrainedModel, rollouts: Sequence[Rollout]) -> Tensor:
    """log π(a_t|s_t) of all response tokens, flat (N,), without gradient."""
    return over_tokens(lambda m: token_logprobs(model, m, cfg.temperature)[0], rollouts, cfg.micro_tokens, model.device)


def refuse_wrong_sampler(cfg: Config, policy: PreTrainedModel, rollouts: Sequence[Rollout]) -> None:
    """Raise RuntimeError when the sampler's log-probabilities are not the trainer's: stale or wrong weights would train
    on another model's samples without any other sign."""
    logp_sampler = torch.tensor([p for r in rollouts for p in r.logprobs], device=policy.device)
    gap = float((logprobs(cfg, policy, rollouts) - logp_sampler).abs().mean())
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
    try:
        inputs = prepare(cfg)
    except (ValueError, OSError) as wrong:
        sys.exit(f"train.py: {wrong}")
    try:
        train(cfg, inputs)
    except FloatingPointError as wrong:
        sys.exit(f"train.py: {wrong}")


if __name__ == "__main__":
    main()
