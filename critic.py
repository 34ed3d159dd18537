"""The critic V_φ: a separate copy of the base model with a scalar head (paper §3.1)."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from batch import MicroBatch, hidden_states


def load_critic(path: str, head: str = "authors", seed: int = 0, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Base model `path` with its vocabulary head replaced by a linear map H → 1 without bias, in float32.

    The class is transformers' sequence classifier with one label, so a saved critic is an ordinary Hugging Face folder
    (TRL's value models have the same form). A folder that already holds a value head keeps it; otherwise `head` says how
    to draw it, with d the hidden size:

    - "authors": N(0, 1/(d+1)²), what their code does; V starts near 0
    - "paper":   U(−√5, √5) as §3.1 prints it; V starts far outside [0, 1], see LOG.md
    - "zeros":   V starts at 0
    """
    critic = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32, attn_implementation="packed"
    )
    if not _has_value_head(path):
        random = torch.Generator().manual_seed(seed)
        weight, d = critic.score.weight.data, critic.config.hidden_size
        if head == "authors":
            weight.normal_(0, 1 / (d + 1), generator=random)
        elif head == "paper":
            weight.uniform_(-math.sqrt(5), math.sqrt(5), generator=random)
        elif head == "zeros":
            weight.zero_()
        else:
            raise ValueError(f"value head {head!r}: expected authors, paper or zeros")
    return critic.to(device).eval()


def _has_value_head(path: str) -> bool:
    files = Path(path).glob("*.safetensors")
    return any("score.weight" in safe_open(file, "pt").keys() for file in files)  # noqa: SIM118


def token_values(critic: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """V_φ(s_t) for each action, (n,) float32, read at the token *before* the action: the same hidden state position that
    gives log π(a_t|s_t). The first action's value is read at the last prompt token; nothing is read after the last."""
    return critic.score(hidden_states(critic, micro).float()).squeeze(-1)
