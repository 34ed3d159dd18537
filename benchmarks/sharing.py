"""Time updates in which responses share their prompt, beside the same with a prompt for each.

    python -m benchmarks.sharing [--rounds 3]

Two prompts have 64 (0.1 million parameters) or 16 (10 million) responses each, of 125 to 375
tokens; prompts have 250. In the other case a token or two of each response's prompt is another one,
so that every response needs a prompt of its own. The two take turns, on one thread, and the figures
are seconds of the processor, medians of the rounds. The critic takes about five responses of a
prompt in a mini-batch, as with 64 responses and twelve mini-batches.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

import ppo
import train
from benchmarks import flags
from benchmarks.record import Row, record
from config import Config, Count
from critic import load_critic
from data import Problem
from policy import load_policy
from rollout import Rollout
from train import Models

VOCABULARY = 468
PROMPT_TOKENS = 250
NUM_PROMPTS = 2
STAGES = ("values", "critic", "policy")


class Size(NamedTuple):
    """A model, and how much it reads."""

    hidden: int
    layers: int
    width: int
    samples: int  # responses to a prompt
    critic_steps: int


SIZES = {"0.1M": Size(64, 2, 128, 64, 12), "10M": Size(384, 6, 1024, 16, 3)}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    rounds: Count = 3
    """Updates of each kind."""


def random_model(size: Size, folder: str) -> str:
    """The folder of a Qwen2 of this size."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def random_rollouts(size: Size) -> list[Rollout]:
    """Responses of random tokens; every second one is right."""
    rng = random.Random(0)

    def token_ids(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    rollouts = []
    for _ in range(NUM_PROMPTS):
        problem = Problem("", "", "", tuple(token_ids(PROMPT_TOKENS)))
        for i in range(size.samples):
            length = rng.randint(125, 375)
            response = Rollout(problem, token_ids(length), [0.0] * length, "stop", "")
            rollouts.append(replace(response, reward=float(i % 2)))
    return rollouts


def apart(rollouts: list[Rollout]) -> list[Rollout]:
    """The same responses, each with a prompt that no other one has."""
    separate = []
    for i, rollout in enumerate(rollouts):
        ids = rollout.problem.prompt_ids
        marked = (i % VOCABULARY, i // VOCABULARY, *ids[2:])
        separate.append(replace(rollout, problem=replace(rollout.problem, prompt_ids=marked)))
    return separate


def processor_seconds(call: Callable[[], object]) -> float:
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def update_seconds(cfg: Config, models: Models, rollouts: list[Rollout]) -> dict[str, float]:
    """Seconds of each stage of one update."""
    num_actions = sum(len(r.token_ids) for r in rollouts)
    values, targets, advantages = torch.rand(3, num_actions)
    stages = {
        "values": lambda: train.predict_values(cfg, models.critic, rollouts),
        "critic": lambda: train.update_critic(cfg, models, rollouts, values, targets, 0),
        "policy": lambda: train.update_policy(cfg, models, rollouts, advantages, 0),
    }
    return {stage: processor_seconds(call) for stage, call in stages.items()}


def measure_size(name: str, rounds: int) -> list[Row]:
    """The rows of one model."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(size, folder)
        policy, critic = load_policy(path), load_critic(path)
    optimizers = [ppo.adamw(list(module.parameters())) for module in (policy, critic)]
    models = Models(policy, optimizers[0], critic, optimizers[1], None)
    cfg = Config(micro_tokens=4096, critic_steps=size.critic_steps)
    shared = random_rollouts(size)
    separate = apart(shared)
    update_seconds(cfg, models, shared)  # warm-up
    measured = []
    for _ in range(rounds):
        pair = [update_seconds(cfg, models, rollouts) for rollouts in (separate, shared)]
        measured.append(pair)
    rows = []
    for stage in (*STAGES, "update"):
        summed = STAGES if stage == "update" else (stage,)
        alone, together = (
            [sum(pair[k][part] for part in summed) for pair in measured] for k in (0, 1)
        )
        ratios = [b / a for a, b in zip(alone, together, strict=True)]
        cells = {"own prompts s": median(alone), "shared s": median(together)}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append({"parameters": name, "stage": stage} | cells | {"shared / own": spread})
    return rows


def main() -> None:
    """Command line."""
    settings = flags.parse(Settings, "sharing", __doc__)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    table = [row for name in SIZES for row in measure_size(name, settings.rounds)]
    record("sharing", "Sharing prompts: seconds of an update", table)


if __name__ == "__main__":
    main()
