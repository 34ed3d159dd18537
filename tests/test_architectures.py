"""Which architectures train right, and which are refused: the table of docs/models.md.

`python tests/test_architectures.py` prints the table. Every model here is tiny and random; its
reference is transformers' own forward pass with eager attention, one sequence at a time.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rollouts
from torch import Tensor
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import policy
import ppo
import preflight
import train
from checkpoint import export_model
from config import Config, Sampling
from critic import load_critic
from data import Problem
from hf_sampler import HFSampler
from packing import forward_all_tokens
from policy import load_policy
from rollout import Rollout, sample_responses, sync_weights
from toy import tiny

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from a uniform distribution
    "sliding_window": 8,  # shorter than the sequences; most types have no windows and ignore it
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
ONE_WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}

# type → (settings beside SMALL, what is special about it)
WORKING: dict[str, tuple[dict[str, Any], str]] = {
    "apertus": ({}, "activation with stored buffers; no critic class in transformers"),
    "arcee": ({}, ""),
    "bitnet": ({}, "no critic class"),
    "cohere": ({}, "logits multiplied; no critic class"),
    "cohere2": (ONE_WINDOW, "logits multiplied; windows; no critic class"),
    "cwm": (ONE_WINDOW, "windows; no critic class"),
    "deepseek_v3": (
        EXPERTS
        | LATENT
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "latent attention; experts; stored routing bias",
    ),
    "ernie4_5": ({}, "no critic class"),
    "exaone4": (ONE_WINDOW, "windows"),
    "gemma": ({}, ""),
    "gemma2": ({"attn_logit_softcapping": 2.0}, "logits and scores capped; windows"),
    "gemma3_text": (ONE_WINDOW | {"final_logit_softcapping": 9.0}, "logits capped; windows"),
    "glm": ({}, ""),
    "glm4": ({}, ""),
    "gpt2": ({}, "absolute positions"),
    "gpt_bigcode": ({}, "absolute positions; one key-value head"),
    "gpt_neox": ({}, "head named embed_out"),
    "gpt_oss": (ONE_WINDOW | {"num_local_experts": 4} | EXPERTS, "sinks; windows; experts"),
    "granite": ({"logits_scaling": 4.0}, "logits divided; no critic class"),
    "granitemoe": (
        {"logits_scaling": 4.0, "num_local_experts": 4} | EXPERTS,
        "logits divided; experts; no critic class",
    ),
    "helium": ({}, ""),
    "hunyuan_v1_dense": ({}, ""),
    "hyperclovax": ({"logits_scaling": 0.25}, "logits multiplied; no critic class"),
    "llama": ({}, ""),
    "minicpm3": (LATENT | {"dim_model_base": 16}, "latent attention; logits divided"),
    "mistral": ({}, "windows"),
    "mixtral": ({"num_local_experts": 4} | EXPERTS, "windows; experts"),
    "nanochat": ({}, "logits capped; no critic class"),
    "olmo": ({}, ""),
    "olmo2": ({}, ""),
    "olmo3": (ONE_WINDOW, "windows"),
    "olmoe": ({"num_experts": 4, "sliding_window": None} | EXPERTS, "experts; no critic class"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 64}, "absolute positions"),
    "persimmon": ({}, ""),
    "phi": ({}, "head with a bias"),
    "phi3": ({}, "windows"),
    "qwen2": (ONE_WINDOW | {"use_sliding_window": True}, "windows, where a model uses them"),
    "qwen2_moe": (
        {"num_experts": 4, "shared_expert_intermediate_size": 24} | EXPERTS,
        "experts",
    ),
    "qwen3": ({}, ""),
    "qwen3_moe": ({"num_experts": 4} | EXPERTS, "experts"),
    "seed_oss": ({}, ""),
    "smollm3": ({}, "layers without positions"),
    "starcoder2": ({}, "windows"),
    "vaultgemma": (ONE_WINDOW, "logits capped; windows; no critic class"),
}

STATE = "carries a state from token to token"
# name → (type, settings, words of the refusal)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bamba": ("bamba", {}, STATE),
    "falcon_h1": ("falcon_h1", {}, STATE),
    "jamba": ("jamba", {}, STATE),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, STATE),
    "mamba": ("mamba", {}, STATE),
    "mamba2": ("mamba2", {}, STATE),
    "minimax": ("minimax", {}, STATE),
    "qwen3_5_text": ("qwen3_5_text", {}, STATE),
    "qwen3_next": ("qwen3_next", {}, STATE),
    "recurrent_gemma": ("recurrent_gemma", {}, STATE),
    "rwkv": ("rwkv", {}, STATE),
    "zamba2": ("zamba2", {}, STATE),
    "bert": ("bert", {}, "attention is not causal"),
    "roberta": ("roberta", {"max_position_embeddings": 512}, "attention is not causal"),
    "t5": ("t5", {}, "is not a causal language model"),
    "whisper": ("whisper", {}, "is not a causal language model"),
    "bloom": ("bloom", {}, "its attention cannot be exchanged"),
    "falcon": ("falcon", {}, "its attention cannot be exchanged"),
    "gptj": ("gptj", {}, "its attention cannot be exchanged"),
    "mpt": ("mpt", {}, "its attention cannot be exchanged"),
    "stablelm": ("stablelm", {}, "its attention cannot be exchanged"),
    "nemotron": ("nemotron", {}, "cu_seqlens"),
    "doge": ("doge", {}, "makes an attention mask of its own"),
    "deepseek_v32": ("deepseek_v32", LATENT, "layers of type indexed_attention"),
    "llama4_text": ("llama4_text", {"attention_chunk_size": 50}, "in chunks of 50 tokens"),
    "gemma3": ("gemma3", {}, "parts beside a language model"),
    "llama4": ("llama4", {}, "parts beside a language model"),
    "qwen2_vl": ("qwen2_vl", {}, "is not a causal language model"),
    "phi3, LongRoPE": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
        "LongRoPE changes at 64 tokens",
    ),
    "qwen2_moe, windows": (
        "qwen2_moe",
        ONE_WINDOW | {"use_sliding_window": True, "num_experts": 4} | EXPERTS,
        "does not tell its sliding window",
    ),
}
SETTINGS = Config(
    prompt_tokens=64,
    response_tokens=60,
    micro_tokens=200,
    samples=4,
    critic_steps=2,
    policy_lr=1e-3,
)
LENGTHS = [3, 30, 11, 1, 20, 6, 2, 9]


def small_config(model_type: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the tiny tokenizer's vocabulary and two small layers."""
    tokenizer = tiny.tokenizer()
    special = {
        "vocab_size": len(tokenizer) + 3,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    return CONFIG_MAPPING[model_type](**SMALL | special | settings)


def refused_config(model_type: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """A configuration as small as its type allows; some types check their sizes."""
    try:
        return small_config(model_type, settings)
    except (StrictDataclassError, ValueError, TypeError, AttributeError):
        return CONFIG_MAPPING[model_type](**settings)


@pytest.fixture
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A random model of the type that the test is parametrized with."""
    settings, _ = WORKING[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(request.param, settings))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if p.is_floating_point() and (
                "bias" in name or "sinks" in name
            ):  # they start at 0 and must count
                p.normal_(0, 0.3, generator=random)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def own_logprobs(path: Path, rollouts: list[Rollout]) -> Tensor:
    """log π(a_t|s_t) from transformers' own forward pass, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    logps = []
    for r in rollouts:
        prompt = len(r.problem.prompt_ids)
        ids = torch.tensor([[*r.problem.prompt_ids, *r.token_ids]])
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, ids[0, prompt:, None]).squeeze(-1))
    return torch.cat(logps).detach()


def logprobs(model: policy.Policy, rollouts: list[Rollout]) -> Tensor:
    return forward_all_tokens(lambda micro: model(micro)[0], rollouts, 200, "cpu")


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-4


@pytest.mark.parametrize("folder", WORKING, indirect=True)
def test_architecture_trains_right(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """Log-probabilities are the model's own; the sampler gives the same; GAE's and GRPO's updates
    are finite and reach every weight; exported models load again and answer alike."""
    preflight._check_model_files(SETTINGS, str(folder), None)
    model, critic = load_policy(str(folder)), load_critic(str(folder), seed=1)
    rollouts = random_rollouts(problems, len(tokenizer), LENGTHS)
    assert close(logprobs(model, rollouts), own_logprobs(folder, rollouts))

    sampler = HFSampler(str(folder), tokenizer, [tokenizer.eos_token_id], "float32", "cpu", 16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    sync_weights(sampler, model)
    sampled = sample_responses(sampler, tokenizer, problems[:3], 2, Sampling(24), "0")
    seen = torch.tensor([p for r in sampled for p in r.logprobs])
    assert close(logprobs(model, sampled), seen)

    one_step(model, critic, rollouts)
    export_model(model, tokenizer, tmp_path / "policy")
    export_model(critic, tokenizer, tmp_path / "critic")
    now = logprobs(model, rollouts)
    assert close(now, own_logprobs(tmp_path / "policy", rollouts))
    assert close(now, logprobs(load_policy(str(tmp_path / "policy")), rollouts))
    values = forward_all_tokens(critic, rollouts, 200, "cpu")
    again = load_critic(str(tmp_path / "critic"), "zeros")
    assert close(values, forward_all_tokens(again, rollouts, 200, "cpu"))
    assert float(values.std()) > 1e-4


def one_step(model: policy.Policy, critic: torch.nn.Module, rollouts: list[Rollout]) -> None:
    """One update with GAE and one with GRPO's advantages."""
    models = train.Models(
        model,
        ppo.adamw(list(model.parameters())),
        critic,
        ppo.adamw(list(critic.parameters())),
        None,
    )
    for i, r in enumerate(rollouts):
        r.reward = float(i % 3 == 0)
    before = [p.detach().clone() for p in model.parameters()]
    values = train.predict_values(SETTINGS, critic, rollouts)
    advantages, targets = train.compute_advantages(SETTINGS, models, rollouts, values)
    metrics = train.update_critic(SETTINGS, models, rollouts, values, targets, 0)
    metrics |= train.update_policy(SETTINGS, models, rollouts, advantages, 0)
    assert metrics["policy_grad_norm"] > 0 < metrics["critic_grad_norm"]
    group = train.compute_group_advantages(SETTINGS, rollouts)
    metrics |= train.update_policy(SETTINGS, models, rollouts, group, 0)
    assert metrics["policy_grad_norm"] > 0
    assert all(math.isfinite(value) for value in metrics.values())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)  # experts that no token chose stay as they are


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_is_refused_before_weights(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In one line that names the type and the reason. The folder holds no weights."""
    model_type, settings, reason = REFUSED[name]
    refused_config(model_type, settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refusal:
        preflight._check_model_files(SETTINGS, str(tmp_path), None)
    message = str(refusal.value)
    assert reason in message
    assert model_type in message
    assert "\n" not in message
