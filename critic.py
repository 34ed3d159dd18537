"""The critic V_φ: a separate copy of the base model with a scalar head (§3.1)."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

import distributed
from distributed import Sharding
from packing import MicroBatch, check_against_own_forward, hidden_states

DEFAULT_SHARDING = Sharding()
# Modules whose weights a folder may hold or lack beside those of the base model: our value head,
# the authors', and vocabulary heads.
HEADS = ("score", "value_head", "lm_head", "embed_out")


class Critic(torch.nn.Module):
    """V_φ: transformers' sequence classifier with one label and no bias, called on packs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro: MicroBatch) -> Tensor:
        """V_φ(s_t) for each action, (n,) float32, read at the token *before* the action: at the
        same hidden state that gives log π(a_t|s_t). The first action's value is read at the last
        prompt token; nothing is read after the last action.

        A policy may have more rows than its tokenizer has tokens, and sample one of them. A critic
        of another model (--critic-model) may have fewer: it reads its own last row instead."""
        last_row = self.model.config.vocab_size - 1
        micro = micro._replace(input_ids=micro.input_ids.clamp(max=last_row))
        values = self.model.score(hidden_states(self.model, micro).float()).squeeze(-1)
        return values.clone()  # FSDP attaches hooks to the output, which may not be a view


def critic_class(config: Any) -> type[PreTrainedModel]:
    """The class of a critic for models of this configuration: transformers' sequence classifier, or
    where there is none, the same thing made of the base model: its `score` reads the last hidden
    state.

    >>> from transformers import OlmoeConfig
    >>> critic_class(OlmoeConfig()).__name__
    'OlmoeForSequenceClassification'
    """
    known = AutoModelForSequenceClassification._model_mapping
    if type(config) in known:
        return known[type(config)]
    causal = AutoModelForCausalLM._model_mapping[type(config)]
    # The class of the family that knows how its weights are initialized and sharded.
    family = next(c for c in causal.__mro__[1:] if issubclass(c, PreTrainedModel))
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "")
    members = {"base_model_prefix": causal.base_model_prefix, "__module__": causal.__module__}
    return type(
        f"{name}ForSequenceClassification", (GenericForSequenceClassification, family), members
    )


def load_critic(
    path: str, head: str = "authors", seed: int = 0, sharding: Sharding = DEFAULT_SHARDING
) -> Critic:
    """Base model `path` with a linear map H → 1 without bias in place of its vocabulary head, in
    float32, over all ranks.

    A saved critic is an ordinary Hugging Face folder (TRL's value models have the same form). A
    folder that already holds a value head keeps it: ours, or the authors', which is called
    `value_head` and was released folded to (8, H/8). Otherwise `head` says how the head starts,
    with d the hidden size:

    - "authors": N(0, 1/(d+1)²), what their code does; V starts near 0
    - "paper":   U(−√5, √5) as §3.1 prints it; V starts far outside [0, 1], see docs/log.md
    - "zeros":   V starts at 0

    Raises ValueError when weights of the base model are missing or left over, and when the hidden
    states of a pack are not those of the model itself.
    """
    model_class = critic_class(AutoConfig.from_pretrained(path))
    model = distributed.load_pretrained(model_class, path, HEADS, num_labels=1)
    critic = Critic(model.eval())
    distributed.on_rank0(lambda: check_hidden_states(critic.model, path))
    if distributed.rank() == 0:
        _fill_head(critic.model.score.weight.data, path, head, seed)
    distributed.apply_fsdp(critic, sharding, critic.model.score)
    return critic


def _fill_head(weight: Tensor, path: str, head: str, seed: int) -> None:
    stored = value_head(path)
    generator = torch.Generator().manual_seed(seed)
    d = weight.shape[1]
    if stored is not None:
        weight.copy_(stored.reshape(1, d))
    elif head == "authors":
        weight.normal_(0, 1 / (d + 1), generator=generator)
    elif head == "paper":
        weight.uniform_(-math.sqrt(5), math.sqrt(5), generator=generator)
    elif head == "zeros":
        weight.zero_()
    else:
        raise ValueError(f"value head {head!r}: expected authors, paper or zeros")


def check_hidden_states(model: PreTrainedModel, path: str) -> None:
    """Compare the last hidden states of a small pack with what the base model gives for one
    sequence at a time. Raises ValueError when they differ."""

    def own(token_ids: Tensor) -> tuple[Tensor, float]:
        h = model.base_model(input_ids=token_ids[None], use_cache=False).last_hidden_state[0, :-1]
        return h, float(h.abs().max())

    packed = partial(hidden_states, model)
    check_against_own_forward(model, packed, own, f"critic {path}", "hidden states")


def value_head(path: str) -> Tensor | None:
    """The value head stored in a local folder, in whatever shape; None where there is none."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = set(weights.keys())
            for name in ("score.weight", "value_head.weight"):
                if name in names:
                    return weights.get_tensor(name)
    return None
