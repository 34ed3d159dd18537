"""What an arm changes that no flag of train.py can: its settings, or a stage of its training.

SETTINGS has the arms that differ in settings which are prepared for each seed, such as a file of
fewer problems. TRAINING has the arms whose training differs. `train_variant` is train.py's loop
without checkpoints, replay, offloading and GRPO, and takes the stages that an arm replaces.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ppo
import train
from config import Config
from curation.files import write_atomically
from gae import normalize_advantages
from packing import MicroBatch, micro_batches, mini_batches
from preflight import Inputs, prepare
from reports.log import RunLog
from reports.metrics import explained_variance, mean, rollout_metrics
from rollout import Rollout, sync_weights
from toy import tiny
from train import Models, PolicyTotals, Sampler

RUNS = Path("runs/experiments")
ROOT = Path(__file__).parent.parent
HALF_CRITIC = "tiny-long-half"  # the base model of the smaller critic


# ── settings that are prepared for each seed ─────────────────────────────────────────────────────


def few_problems(count: int, cfg: Config) -> Config:
    """Train on the first `count` problems; evaluate on the first 256 held-out ones."""
    base = tiny.ensure(cfg.seed, name=cfg.model)
    training = first_problems(base / "train.json", count, f"problems-{count}-{cfg.seed}")
    heldout = first_problems(base / "heldout.json", 256, f"heldout-256-{cfg.seed}")
    return replace(cfg, data=str(training), eval_data=(str(heldout),))


def first_problems(file: Path, count: int, name: str) -> Path:
    """A file of the first `count` problems of `file`."""
    problems = json.loads(file.read_text())
    few = RUNS / f"{name}.json"
    write_atomically(few, [json.dumps(problems[:count])])
    return few


def half_critic(cfg: Config) -> Config:
    """Begin with a critic half as wide, whose base model was trained on the same corpus."""
    return replace(cfg, critic_model=str(tiny.ensure(cfg.seed, name=HALF_CRITIC)))


def annealing(hard: bool, cfg: Config) -> Config:
    """Continue for ten steps at a falling rate where the default arm ended: on problems that it
    finds hard, or on problems it has not trained on."""
    base = tiny.ensure(cfg.seed, name=cfg.model)
    default = trained_default(cfg)
    problems = json.loads((base / "train.json").read_text())
    pool = RUNS / f"{cfg.name}-pool.json"
    pool.write_text(json.dumps(problems[-2_000:]))  # the default arm stopped long before these
    data = mine_hard_problems(default, pool, cfg) if hard else pool
    return replace(
        cfg,
        model=str(default / "policy"),
        init_critic=str(default / "critic"),
        data=str(data),
        eval_data=(str(base / "heldout.json"),),
        eval_samples=4,
        steps=10,
        policy_lr_warmup=1,
        critic_lr_warmup=1,
        anneal_steps=10,
        anneal_to=cfg.policy_lr * 0.3,
    )


def trained_default(cfg: Config) -> Path:
    """The run folder of the default arm; it is run here where its models are missing."""
    folder = RUNS / f"default-{cfg.seed}"
    if not (folder / "policy").is_dir() or not (folder / "critic").is_dir():
        again = replace(cfg, name=f"{folder.name}-for-{cfg.name}")
        folder = train.train(again, prepare(again))
    return folder


def mine_hard_problems(default: Path, pool: Path, cfg: Config) -> Path:
    """A file of the problems of `pool` that the default arm's policy solves in fewer than two of
    four responses."""
    answers = RUNS / f"{cfg.name}-answers"
    hard = RUNS / f"{cfg.name}-hard.jsonl"
    lengths = f"--prompt-tokens {cfg.prompt_tokens} --response-tokens {cfg.response_tokens}"
    run_program(
        f"evaluate.py --model {default}/policy --benchmarks pool={pool} --samples 4 {lengths} "
        f"--threads 1 --overwrite --out {answers}"
    )
    (responses,) = answers.rglob("pool.jsonl")
    passes = "--no-choice --no-proof --no-language --no-gold --no-exact --no-ngram"
    run_program(
        f"-m curation.curate {pool} --rollouts {responses} --hard 2 --hard-of 4 {passes} "
        f"--out {hard}"
    )
    return hard


def run_program(arguments: str) -> None:
    """Run a program of this project as a user would."""
    command = [sys.executable, *arguments.split()]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stdout, stderr=sys.stderr)


SETTINGS: dict[str, Callable[[Config], Config]] = {
    "problems-16": partial(few_problems, 16),
    "problems-64": partial(few_problems, 64),
    "half-critic": half_critic,
    "anneal": partial(annealing, False),
    "anneal-hard": partial(annealing, True),
}


# ── training with replaced stages ────────────────────────────────────────────────────────────────


def train_variant(
    cfg: Config,
    inputs: Inputs,
    collect_rollouts: Callable[..., list[Rollout]] = train.collect_rollouts,
    update_critic: Callable[..., dict[str, float]] = train.update_critic,
    update_policy: Callable[..., dict[str, float]] = train.update_policy,
) -> Path:
    """Train, evaluate and export as train.train does, with the given stages; one process. Returns
    the run folder."""
    sampler = train.start_sampler(cfg, inputs)
    models = train.load_models(cfg, inputs.model_path)
    train.check_sampler_matches_policy(cfg, inputs, sampler, models.policy)
    log = RunLog(Path(cfg.runs) / cfg.name, cfg)
    with inputs.grader, log:
        train.evaluate_heldout(cfg, inputs, sampler, log, 0)
        for step in range(cfg.steps):
            rollouts = collect_rollouts(cfg, inputs, sampler, log, step)
            metrics = rollout_metrics(rollouts)
            with log.phase("values"):
                values = train.predict_values(cfg, models.critic, rollouts)
                advantages, targets = train.compute_advantages(cfg, models, rollouts, values)
            with log.phase("critic"):
                metrics |= update_critic(cfg, models, rollouts, values, targets, step)
            advantages = normalize_advantages(advantages)
            with log.phase("policy"):
                metrics |= update_policy(cfg, models, rollouts, advantages, step)
            with log.phase("sync"):
                sync_weights(sampler, models.policy)
            log.step(step, metrics, rollouts, inputs.tokenizer, values, advantages)
            train.evaluate_heldout(cfg, inputs, sampler, log, step + 1)
    train.save_models(cfg, models, inputs, log.folder)
    sampler.close()
    return log.folder


def weigh_packs_alike(packs: Sequence[MicroBatch]) -> list[float]:
    """A weight for the summed loss of each pack. With it, the loss of an update divided by its
    number of tokens is the mean over packs of their means over tokens, as in the authors' code.

    Two packs of 2 and 6 tokens with losses of 1 and 3 a token: the mean over packs is 2, and the
    mean over tokens would be 2.5.
    """
    num_tokens = sum(len(pack.flat) for pack in packs)
    return [num_tokens / len(packs) / len(pack.flat) for pack in packs]


def update_critic_per_pack(
    cfg: Config,
    models: Models,
    rollouts: Sequence[Rollout],
    values: Tensor,
    targets: Tensor,
    step: int,
) -> dict[str, float]:
    """train.update_critic, but every pack's mean weighs alike."""
    lengths = [len(r.token_ids) for r in rollouts]
    losses, norms = [], []
    lr = 0.0
    for k, members in enumerate(mini_batches(lengths, cfg.critic_steps, f"{cfg.seed}/{step}")):
        packs = list(micro_batches(rollouts, members, cfg.micro_tokens, values.device))
        num_tokens = sum(lengths[i] for i in members)
        total = torch.zeros(())
        for micro, weight in zip(packs, weigh_packs_alike(packs), strict=True):
            v = models.critic(micro)
            loss = weight * ppo.value_loss(v, targets[micro.flat]) / num_tokens
            loss.backward()
            total += loss.detach()
        losses.append(train.require_finite("value loss", total))
        lr = ppo.learning_rate(step * cfg.critic_steps + k, cfg.critic_lr, cfg.critic_lr_warmup)
        norms.append(ppo.optimizer_step(models.critic_optimizer, lr, cfg.max_grad_norm))
    return {
        "value_loss": mean(losses),
        "critic_grad_norm": mean(norms),
        "critic_lr": lr,
        "value_mean": float(values.mean()),
        "explained_variance": explained_variance(values, targets),
    }


def update_policy_per_pack(
    cfg: Config, models: Models, rollouts: Sequence[Rollout], advantages: Tensor, step: int
) -> dict[str, float]:
    """train.update_policy for one strictly on-policy step, but every pack's mean weighs alike."""
    lengths = [len(r.token_ids) for r in rollouts]
    num_tokens = sum(lengths)
    logp_sampler = train.sampler_logprobs(rollouts)
    totals = PolicyTotals(advantages.device)
    (members,) = mini_batches(lengths, 1, f"{cfg.seed}/{step}")
    packs = list(micro_batches(rollouts, members, cfg.micro_tokens, advantages.device))
    for micro, weight in zip(packs, weigh_packs_alike(packs), strict=True):
        logp, entropy = models.policy(micro, cfg.temperature)
        old = logp.detach()
        loss, clipped = ppo.policy_loss(logp, old, advantages[micro.flat], cfg.clip_eps)
        loss = weight * loss
        (loss / num_tokens).backward()
        totals.add(loss, entropy, clipped, None, (old - logp_sampler[micro.flat]).abs())
    train.require_finite("policy loss", totals.sums[0])
    lr = train.policy_learning_rate(cfg, step)
    norm = ppo.optimizer_step(models.policy_optimizer, lr, cfg.max_grad_norm)
    stats = totals.means(num_tokens)
    del stats["kl"]
    return stats | {"policy_grad_norm": norm, "policy_lr": lr}


def collect_retokenized(
    cfg: Config, inputs: Inputs, sampler: Sampler, log: RunLog, step: int
) -> list[Rollout]:
    """train.collect_rollouts, and then `retokenize`."""
    rollouts = train.collect_rollouts(cfg, inputs, sampler, log, step)
    changed = retokenize(rollouts, inputs.tokenizer)
    print(f"step {step}: {changed} of {len(rollouts)} responses have other token ids")
    return rollouts


def retokenize(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> int:
    """Replace the sampled token ids of each response by those of its text, as the authors' code
    does; returns for how many responses they differ. There the sampler's log-probabilities are
    unknown and become 0."""
    changed = 0
    for r in rollouts:
        token_ids = tokenizer.encode(r.text)
        if token_ids != r.token_ids:
            r.token_ids = token_ids
            r.logprobs = [0.0] * len(token_ids)
            changed += 1
    return changed


TRAINING: dict[str, Callable[[Config, Inputs], Path]] = {
    "per-pack": partial(
        train_variant, update_critic=update_critic_per_pack, update_policy=update_policy_per_pack
    ),
    "retokenised": partial(train_variant, collect_rollouts=collect_retokenized),
}
