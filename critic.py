"""The critic V_φ: a separate copy of the base model with a scalar head (§3.1)."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import distributed
from distributed import Sharding
from packing import MicroBatch, hidden_states

WHOLE = Sharding()


class Critic(torch.nn.Module):
    """V_φ: transformers' sequence classifier with one label and no bias, called on packs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro: MicroBatch) -> Tensor:
        """V_φ(s_t) for each action, (n,) float32, read at the token *before* the action: at the
        same hidden state that gives log π(a_t|s_t). The first action's value is read at the last
        prompt token; nothing is read after the last action."""
        values = self.model.score(hidden_states(self.model, micro).float()).squeeze(-1)
        return values.clone()  # FSDP attaches hooks to the output, which may not be a view


def load_critic(
    path: str, head: str = "authors", seed: int = 0, sharding: Sharding = WHOLE
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
    """
    model = distributed.load_pretrained(AutoModelForSequenceClassification, path, num_labels=1)
    critic = Critic(model.eval())
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


def value_head(path: str) -> Tensor | None:
    """The value head stored in a local folder, in whatever shape; None where there is none."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = set(weights.keys())
            for name in ("score.weight", "value_head.weight"):
                if name in names:
                    return weights.get_tensor(name)
    return None
