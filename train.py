"""Open-Reasoner-Zero: vanilla PPO with a critic, GAE at γ = λ = 1 and a 0/1 reward.

    python train.py                                              the tiny model, on a laptop
    torchrun --nproc-per-node 8 train.py --model Qwen2.5-7B --data orz_math_57k_collected.json

Trains the base model --model on the problems of --data and writes runs/<name>/: metrics,
transcripts, checkpoints, figures, and the trained policy and critic as Hugging Face folders. A
Qwen2.5 model has the paper's settings by default, the tiny model its own.
"""

import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from torch.optim import AdamW

import data
import distributed
import ppo
from checkpoint import (
    Checkpoints,
    Trained,
    export_model,
    generation_settings,
    load_checkpoint,
)
from config import Config, parse, validate_ranges
from critic import Critic, load_critic
from distributed import Sharding
from gae import (
    gae,
    grpo_advantages,
    last_token_rewards,
    length_adaptive_lam,
    normalize_advantages,
)
from hf_sampler import HFSampler
from packing import MicroBatch, forward_all_tokens, micro_batches, mini_batches
from policy import Policy, load_policy
from preflight import Inputs, prepare, remove_empty
from reports import card
from reports.log import RunLog, draw_run
from reports.metrics import explained_variance, heldout_metrics, mean, rollout_metrics
from reward import RewardError
from rollout import (
    Rollout,
    VllmSampler,
    gather_rollouts,
    load_rollouts,
    open_sampler,
    sample_responses,
    sync_weights,
)

Sampler = VllmSampler | HFSampler


class Models(NamedTuple):
    """What trains, and the fixed reference model of the KL ablations."""

    policy: Policy
    policy_optimizer: AdamW
    critic: Critic | None  # None with GRPO
    critic_optimizer: AdamW | None
    reference: Policy | None  # None in the recipe

    def trained(self) -> Trained:
        """What checkpoints hold."""
        trained = {"policy": (self.policy, self.policy_optimizer)}
        if self.critic:
            trained["critic"] = (self.critic, self.critic_optimizer)
        return trained


def train(cfg: Config, inputs: Inputs) -> Path:
    """Train, evaluate and export; returns the run folder. Every rank runs this."""
    sampler = None if cfg.replay else start_sampler(cfg, inputs)  # --replay samples nothing
    models = load_models(cfg, inputs.model_path, inputs.critic_path)
    policy, critic = models.policy, models.critic
    first_step = load_checkpoint(inputs.resume_from, models.trained())
    if sampler:
        check_sampler_matches_policy(cfg, inputs, sampler, policy)
    log = RunLog(Path(cfg.runs) / cfg.name, cfg, inputs.resume_from)
    checkpoints = Checkpoints(log.folder / "checkpoints", cfg, models.trained(), first_step)
    on_device = partial(distributed.on_device, cfg.offload)  # with --offload: else in host memory
    with inputs.grader, log, checkpoints:
        if inputs.resume_from is None:
            evaluate_heldout(cfg, inputs, sampler, log, 0)
        for step in range(first_step, cfg.steps):
            rollouts = collect_rollouts(cfg, inputs, sampler, log, step)  # a_t and R
            metrics = rollout_metrics(rollouts)
            with log.dump_rollouts_on_nan(step, rollouts):
                if critic:
                    with log.phase("values"), on_device(critic):
                        values = predict_values(cfg, critic, rollouts)  # V(s_t)
                        advantages, targets = compute_advantages(cfg, models, rollouts, values)
                    with log.phase("critic"), on_device(critic, models.critic_optimizer):
                        metrics |= update_critic(cfg, models, rollouts, values, targets, step)
                else:  # GRPO, the paper's comparison
                    values = None
                    advantages = compute_group_advantages(cfg, rollouts)
                advantages = normalize_advantages(advantages)  # §3.1; with GRPO, too
                with log.phase("policy"), on_device(policy, models.policy_optimizer):
                    metrics |= update_policy(cfg, models, rollouts, advantages, step)
            if sampler:
                with log.phase("sync"), on_device(policy):
                    sync_weights(sampler, policy)
            log.step(step, metrics, rollouts, inputs.tokenizer, values, advantages)
            evaluate_heldout(cfg, inputs, sampler, log, step + 1)
            with log.aside("checkpoint"):
                checkpoints.step(step + 1, step + 1 == cfg.steps, log.records, log.spent())
        save_models(cfg, models, inputs, log.folder)
        log.print_before_after()
    if sampler:
        sampler.close()
    return log.folder


# ── before the loop ───────────────────────────────────────────────────────────────────────────────


class Refusal(ValueError):
    """Why a run cannot start, in one line: `main` prints it without a traceback."""


@contextmanager
def refusing() -> Iterator[None]:
    """A ValueError inside is about what is loaded: it becomes a Refusal."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error


@refusing()
def start_sampler(cfg: Config, inputs: Inputs) -> Sampler:
    """The sampler; on a GPU vLLM sleeps until it gets the policy's weights."""
    return open_sampler(cfg, inputs.model_path, inputs.tokenizer, inputs.eos, asleep=True)


@refusing()
def load_models(cfg: Config, path: str, critic_path: str = "") -> Models:
    """Policy; critic, unless the advantage needs none; reference model, if an ablation asks for
    KL. The critic starts from the policy's folder `path` unless there is another one."""
    sharding = Sharding(cfg.replicas, cfg.activation_checkpointing, cfg.offload, cfg.compile)
    policy = load_policy(path, sharding)
    critic = critic_optimizer = reference = None
    if "critic" in cfg.trained_roles:
        source = cfg.init_critic or critic_path or cfg.critic_model or path
        critic = load_critic(source, cfg.value_head, cfg.seed, sharding)
        critic_optimizer = ppo.adamw(list(critic.parameters()))
    if cfg.kl_loss or cfg.kl_reward:
        reference = load_policy(path, sharding._replace(offload=False)).requires_grad_(False)
    policy_optimizer = ppo.adamw(list(policy.parameters()))
    return Models(policy, policy_optimizer, critic, critic_optimizer, reference)


def check_sampler_matches_policy(
    cfg: Config, inputs: Inputs, sampler: Sampler, policy: Policy
) -> None:
    """Give the sampler the policy's weights, sample a little, and compare log-probabilities."""
    problems = inputs.problems[: max(4, distributed.world_size())]
    with distributed.on_device(cfg.offload, policy):
        sync_weights(sampler, policy)
        stream = f"{cfg.seed}/check"
        local = sample_responses(sampler, inputs.tokenizer, problems, 1, cfg.sampling, stream)
        require_same_logprobs(cfg, policy, gather_rollouts(local))


def require_same_logprobs(cfg: Config, policy: Policy, rollouts: Sequence[Rollout]) -> None:
    """Raise RuntimeError when the log-probabilities of any sampler are not the policy's. A sampler
    with stale or wrong weights would train on another model's responses, without any other sign."""
    logp_sampler = sampler_logprobs(rollouts)
    gaps = (compute_logprobs(cfg, policy, rollouts) - logp_sampler).abs()
    by_response = gaps.split([len(r.token_ids) for r in rollouts])
    # Responses went to the samplers in turn.
    num_samplers = min(distributed.world_size() // cfg.tensor_parallel, len(by_response))
    by_sampler = [torch.cat(by_response[s::num_samplers]).mean() for s in range(num_samplers)]
    gap = max(map(float, by_sampler))
    if gaps.isnan().any():  # max() may pass over NaN
        raise RuntimeError(_why_nan(policy, logp_sampler))
    if not gap <= cfg.max_logp_gap:
        raise RuntimeError(
            f"sampler and trainer differ by {gap:.3g} nats per token (limit --max-logp-gap "
            f"{cfg.max_logp_gap}): the sampler does not hold the policy's weights"
        )


def _why_nan(policy: Policy, logp_sampler: Tensor) -> str:
    """Why sampler and trainer cannot be compared."""
    name = distributed.weight_not_finite(policy.model)
    if name:
        return f"the policy's weight {name} holds NaN or infinite numbers"
    who = "sampler's" if logp_sampler.isnan().any() else "trainer's"
    return f"the {who} log-probabilities are NaN: numbers in the model are too large"


# ── the stages of a step ──────────────────────────────────────────────────────────────────────────


def collect_rollouts(
    cfg: Config, inputs: Inputs, sampler: Sampler | None, log: RunLog, step: int
) -> list[Rollout]:
    """Sample and grade this rank's share of the step's responses, and gather all ranks' shares.
    With --replay, load them."""
    if sampler is None:
        return load_rollouts(Path(cfg.replay) / f"step-{step}.jsonl")
    problems = data.take(inputs.problems, step, cfg.prompts, cfg.seed)
    stream = f"{cfg.seed}/{step}"
    with log.phase("sample"):
        local_rollouts = sample_responses(
            sampler, inputs.tokenizer, problems, cfg.samples, cfg.sampling, stream
        )
        sampler.sleep()
    with log.phase("grade"):
        return gather_rollouts(inputs.score(local_rollouts))


def predict_values(cfg: Config, critic: Critic, rollouts: Sequence[Rollout]) -> Tensor:
    """V(s_t) of all response tokens before the critic's update, flat (N,)."""
    return forward_all_tokens(critic, rollouts, cfg.micro_tokens, distributed.device())


def compute_advantages(
    cfg: Config, models: Models, rollouts: Sequence[Rollout], values: Tensor
) -> tuple[Tensor, Tensor]:
    """Â_t and value targets G_t of all response tokens of the step, flat (N,) (§2.1). In the recipe
    Â_t = R − V(s_t) and G_t = R. With --lam-adaptive or --lam-critic each has its own λ."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=values.device)
    R = torch.tensor([r.reward for r in rollouts], device=values.device)
    rewards = last_token_rewards(R, lengths)
    if models.reference and cfg.kl_reward:
        with distributed.on_device(cfg.offload, models.policy):
            logp = compute_logprobs(cfg, models.policy, rollouts)
        whole = replace(cfg, top_p=1.0)  # a KL needs the reference's probability of every token
        logp_ref = compute_logprobs(whole, models.reference, rollouts)
        rewards = ppo.kl_shaped_rewards(rewards, logp, logp_ref, cfg.kl_reward, cfg.kl_estimator)
    if cfg.lam_adaptive is None and cfg.lam_critic is None:  # one λ for both, as in the recipe
        return gae(rewards, values, lengths, cfg.gamma, cfg.lam)
    lam = lam_critic = cfg.lam
    if cfg.lam_adaptive is not None:
        lam = length_adaptive_lam(cfg.lam_adaptive, lengths)
    if cfg.lam_critic is not None:
        lam_critic = cfg.lam_critic
    advantages, _ = gae(rewards, values, lengths, cfg.gamma, lam)
    _, targets = gae(rewards, values, lengths, cfg.gamma, lam_critic)
    return advantages, targets


def compute_group_advantages(cfg: Config, rollouts: Sequence[Rollout]) -> Tensor:
    """GRPO's Â_t of all response tokens of the step, flat (N,): the --samples responses to a
    problem are a group."""
    device = distributed.device()
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=device)
    R = torch.tensor([r.reward for r in rollouts], device=device)
    groups = torch.arange(len(rollouts), device=device) // cfg.samples
    return grpo_advantages(R, groups, lengths)


def update_critic(
    cfg: Config,
    models: Models,
    rollouts: Sequence[Rollout],
    values: Tensor,
    targets: Tensor,
    step: int,
) -> dict[str, float]:
    """Eq. 2: one optimizer step on each of --critic-steps mini-batches (§3.1: 12) that together use
    every response once.

    The denominator of the loss is global: `num_tokens` counts the response tokens of the whole
    mini-batch, on all ranks, since every rank knows every rollout. A rank adds the gradients of its
    packs, and FSDP sums them over ranks (distributed.apply_fsdp).
    """
    lengths = [len(r.token_ids) for r in rollouts]
    losses, norms = [], []
    batches = mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")
    for k, members in enumerate(batches):
        num_tokens = sum(lengths[i] for i in members)
        total = torch.zeros((), device=values.device)
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, values.device):
            v = models.critic(micro)
            loss = ppo.value_loss(v, targets[micro.flat], values[micro.flat], cfg.value_clip)
            loss = loss / num_tokens
            loss.backward()
            total += loss.detach()
        losses.append(require_finite("value loss", total))
        taken = cfg.optimizer_steps("critic", step) + k
        lr = ppo.learning_rate(taken, cfg.critic_lr, cfg.critic_lr_warmup)
        norms.append(ppo.optimizer_step(models.critic_optimizer, lr, cfg.max_grad_norm))
    losses = distributed.all_reduce_sum(torch.tensor(losses, dtype=torch.float64)).tolist()
    return {
        "value_loss": mean(losses),
        "critic_grad_norm": mean(norms),
        "critic_lr": lr,
        "value_mean": float(values.mean()),
        "explained_variance": explained_variance(values, targets),
    }


def update_policy(
    cfg: Config, models: Models, rollouts: Sequence[Rollout], advantages: Tensor, step: int
) -> dict[str, float]:
    """Eq. 1: one strictly on-policy step on the whole batch (§3.1), or `policy_steps` steps on as
    many mini-batches.

    The paper's expectation E[Σ_t …] over responses became a mean over the response tokens of the
    mini-batch, as in the authors' code: every token weighs alike, and a long response weighs more
    than a short one. The denominator is global, as in `update_critic`. On-policy, π_old is the
    policy itself, so its log-probabilities are the current ones, detached: no extra forward pass.

    In the first --critic-only-steps iterations, 0 in the recipe, the policy stands still.
    """
    if step < cfg.critic_only_steps:
        return measure_policy(cfg, models.policy, rollouts)
    lengths = [len(r.token_ids) for r in rollouts]
    logp_sampler = sampler_logprobs(rollouts)
    logp_old = None
    if cfg.policy_steps > 1:
        logp_old = compute_logprobs(cfg, models.policy, rollouts)
    totals = PolicyTotals(advantages.device)
    norms = []
    batches = mini_batches(lengths, cfg.policy_steps, f"{cfg.seed}/{step}")
    for k, members in enumerate(batches):
        num_tokens = sum(lengths[i] for i in members)
        for micro in micro_batches(rollouts, members, cfg.micro_tokens, advantages.device):
            logp, entropy = models.policy(micro, cfg.temperature, cfg.top_p)
            old = logp.detach() if logp_old is None else logp_old[micro.flat]
            advantage = advantages[micro.flat]
            if cfg.tis_cap:
                advantage = advantage * ppo.truncated_is(old, logp_sampler[micro.flat], cfg.tis_cap)
            loss, clipped = ppo.policy_loss(logp, old, advantage, cfg.clip_eps)
            kl = reference_kl(cfg, models, micro, logp)
            if kl is not None:
                loss = loss + cfg.kl_loss * kl
            (loss / num_tokens).backward()
            totals.add(loss, entropy, clipped, kl, (old - logp_sampler[micro.flat]).abs())
        require_finite("policy loss", totals.sums[0])
        lr = policy_learning_rate(cfg, cfg.optimizer_steps("policy", step) + k)
        norms.append(ppo.optimizer_step(models.policy_optimizer, lr, cfg.max_grad_norm))
    stats = totals.means(sum(lengths))
    if not cfg.kl_loss:
        del stats["kl"]
    return stats | {"policy_grad_norm": mean(norms), "policy_lr": lr}


def policy_learning_rate(cfg: Config, optimizer_step: int) -> float:
    """Warm-up, and annealing if it is asked for."""
    return ppo.learning_rate(
        optimizer_step, cfg.policy_lr, cfg.policy_lr_warmup, cfg.anneal_steps, cfg.anneal_to
    )


def measure_policy(cfg: Config, policy: Policy, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What is logged of a policy that stands still (--critic-only-steps): its learning rate, 0, and
    |Δ log-prob|, whether the sampler is still the policy. Nothing is learned."""
    gaps = (compute_logprobs(cfg, policy, rollouts) - sampler_logprobs(rollouts)).abs()
    gap = float(gaps.double().mean())
    return {"logp_gap": gap, "logp_gap_max": float(gaps.max()), "policy_lr": 0.0}


def reference_kl(cfg: Config, models: Models, micro: MicroBatch, logp: Tensor) -> Tensor | None:
    """Sum of the KL estimates of a pack's tokens (the ablation of Fig. 8); None in the recipe."""
    if not (models.reference and cfg.kl_loss):
        return None
    with torch.no_grad():
        logp_ref, _ = models.reference(micro, cfg.temperature)
    return ppo.kl(logp, logp_ref, cfg.kl_estimator).sum()


class PolicyTotals:
    """Sums over the tokens of an update. They stay on the device: reading them at every pack would
    make a GPU wait for the host."""

    NAMES = ("policy_loss", "entropy", "clipped", "logp_gap", "kl")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.gap_max = torch.zeros(1, device=device)

    def add(
        self, loss: Tensor, entropy: Tensor, clipped: Tensor, kl: Tensor | None, gap: Tensor
    ) -> None:
        """Add a pack: its loss and KL sums, and per token entropy, clipping and |Δ log-prob|."""
        if kl is None:
            kl = torch.zeros((), device=loss.device)
        pack = [loss.detach(), entropy.sum(), clipped.sum(), gap.sum(), kl.detach()]
        self.sums += torch.stack(pack)
        self.gap_max = torch.cat([self.gap_max, gap]).max(0, keepdim=True).values

    def means(self, num_tokens: int) -> dict[str, float]:
        """Means over the tokens of all ranks, and the largest |Δ log-prob|."""
        means = (distributed.all_reduce_sum(self.sums) / num_tokens).tolist()
        gap_max = distributed.all_reduce_max(float(self.gap_max))
        return dict(zip(self.NAMES, means, strict=True)) | {"logp_gap_max": gap_max}


def compute_logprobs(cfg: Config, model: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """log π(a_t|s_t) of all response tokens, flat (N,), without gradient."""

    def logp(micro: MicroBatch) -> Tensor:
        return model(micro, cfg.temperature, cfg.top_p)[0]

    return forward_all_tokens(logp, rollouts, cfg.micro_tokens, distributed.device())


def sampler_logprobs(rollouts: Sequence[Rollout]) -> Tensor:
    """The sampler's log-probabilities of all response tokens, flat (N,)."""
    return torch.tensor([p for r in rollouts for p in r.logprobs], device=distributed.device())


def require_finite(name: str, loss: Tensor) -> float:
    """The loss as a float. Raises FloatingPointError when it is NaN or infinite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}")
    return value


# ── evaluation and export ─────────────────────────────────────────────────────────────────────────


def evaluate_heldout(
    cfg: Config, inputs: Inputs, sampler: Sampler | None, log: RunLog, done: int
) -> None:
    """Answer the held-out problems and record the metrics: before and after the training, and every
    --eval-every iterations in between."""
    is_due = done in (0, cfg.steps) or (cfg.eval_every > 0 and done % cfg.eval_every == 0)
    if not (inputs.eval_problems and is_due):
        return
    stream = f"{cfg.seed}/eval/{done}"
    with log.aside("evaluate"):
        local_rollouts = sample_responses(
            sampler, inputs.tokenizer, inputs.eval_problems, cfg.eval_samples, cfg.sampling, stream
        )
        rollouts = gather_rollouts(inputs.score(local_rollouts))
        metrics = heldout_metrics(rollouts)
    log.evaluation(done, metrics, rollouts)


def save_models(cfg: Config, models: Models, inputs: Inputs, folder: Path) -> None:
    """Export policy and critic with their cards; the policy with the settings it was sampled
    with."""
    generation = generation_settings(cfg, inputs.tokenizer, inputs.eos)
    problems = len(inputs.problems)
    files = distributed.on_rank0(
        lambda: card.policy_files(cfg, inputs.model_path, folder, cfg.steps, problems)
    )
    with distributed.on_device(cfg.offload, models.policy):
        export_model(models.policy, inputs.tokenizer, folder / "policy", generation, files)
    if models.critic:
        files = card.critic_files(cfg, cfg.steps)
        with distributed.on_device(cfg.offload, models.critic):
            export_model(models.critic, inputs.tokenizer, folder / "critic", None, files)


ONE_LINE = (Refusal, RewardError, FloatingPointError, OSError)  # says all that is to be said


def main() -> None:
    """Command line. What can be refused before the first step is refused in one line, as is a loss
    that is not finite and a file that cannot be written; any other error keeps its traceback. What
    a reward of your own raises keeps it, too, and the line says so."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    try:
        cfg = parse(sys.argv[1:], description=__doc__, prog="train.py")
        validate_ranges(cfg)
        if cfg.plan:
            from tools import plan

            print(plan.show(cfg))
            return
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        distributed.start(cfg.timeout_minutes)
        inputs = prepare(cfg)
    except (ValueError, OSError) as error:  # on all ranks alike
        sys.exit(f"train.py: {error}" if distributed.rank() == 0 else 1)
    try:
        folder = train(cfg, inputs)
    except ONE_LINE as error:  # perhaps on one rank alone
        if isinstance(error, RewardError) and error.__cause__:
            traceback.print_exception(error.__cause__)
        remove_empty(inputs.made)
        where = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
        sys.exit(f"train.py: {where}{error}")
    if distributed.rank() == 0:
        draw_run(folder)
    distributed.stop()


if __name__ == "__main__":
    main()
