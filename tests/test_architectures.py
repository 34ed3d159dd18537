"""Which architectures train right, and which are refused: the table of docs/models.md.

`PYTHONPATH=. python tests/test_architectures.py` prints the table. Every model here is tiny and
random; its reference is transformers' own forward pass with eager attention, one sequence at a
time.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rollouts
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import distributed
import packing
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
    "olmoe": (
        {"num_experts": 4, "sliding_window": None, "output_router_logits": True} | EXPERTS,
        "experts; no critic class",
    ),
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
    "biogpt": ("biogpt", {}, "its attention cannot be exchanged"),
    "bloom": ("bloom", {}, "its attention cannot be exchanged"),
    "falcon": ("falcon", {}, "its attention cannot be exchanged"),
    "gptj": ("gptj", {}, "its attention cannot be exchanged"),
    "mpt": ("mpt", {}, "its attention cannot be exchanged"),
    "stablelm": ("stablelm", {}, "its attention cannot be exchanged"),
    "nemotron": ("nemotron", {}, "layout"),
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
BECAUSE = {
    STATE: "it carries a state from token to token",
    "attention is not causal": "its attention is not causal",
    "layout": "it does not hand the bounds of sequences on to its attention",
    "makes an attention mask of its own": "it makes an attention mask of its own",
    "layers of type indexed_attention": "attention to an indexed part of the tokens",
    "in chunks of 50 tokens": "attention in chunks, where sequences are longer than one",
    "parts beside a language model": "it has parts beside a language model",
    "LongRoPE changes at 64 tokens": "its angles would change for short sequences, too, where a "
    "pack holds one above the switch",
    "does not tell its sliding window": "its attention does not tell its window",
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


# ── the check at load, and what it catches ────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", ["granite", "cohere", "gemma2", "nanochat"], indirect=True)
def test_a_forgotten_transform_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does to its logits what nobody derives from its configuration."""
    monkeypatch.setattr(policy, "logits_transform", lambda config: policy.PLAIN)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.raises(ValueError, match=rf"{model_type} is not supported: log-probabilities of"):
        load_policy(str(folder))


@pytest.mark.parametrize("folder", ["llama", "gpt_oss", "mistral"], indirect=True)
def test_attention_across_sequences_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and critic alike, when each token of a pack sees all that stand before it."""
    packed = packing.packed_attention

    def leaking(*states: Any, **arguments: Any) -> tuple[Tensor, None]:
        whole = [packing.Segment(0, states[1].shape[2], 0, 0)]
        return packed(*states, **arguments | {"layout": packing._layout(whole, "cpu")})

    monkeypatch.setitem(packing.AttentionInterface._global_mapping, "packed", leaking)
    with pytest.raises(ValueError, match="log-probabilities of a pack differ"):
        load_policy(str(folder))
    with pytest.raises(ValueError, match="hidden states of a pack differ"):
        load_critic(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "the argument position_bias is not supported"),
        ({"indices": torch.zeros(1)}, "the argument indices is not supported"),
        ({"dropout": 0.1}, "the argument dropout is not supported"),
        ({"is_causal": False}, "attention is not causal"),
        ({"attention_mask": torch.zeros(1)}, "a mask of its own|an attention mask of its own"),
        ({"dropout": 0.0, "position_ids": torch.zeros(1), "is_causal": True}, ""),
    ],
)
def test_unknown_attention_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 2, 5, 4)
    segments = [packing.Segment(0, 2, 0, 0), packing.Segment(2, 3, 2, 0)]
    known = {"attention_mask": None, "layout": packing._layout(segments, "cpu")}
    if not message:
        packing.packed_attention(torch.nn.Identity(), x, x, x, **known | arguments)
        return
    with pytest.raises(ValueError, match=message):
        packing.packed_attention(torch.nn.Identity(), x, x, x, **known | arguments)


def missing(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]


def left_over(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)


def of_another_shape(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(63)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"weight model.layers.1.mlp.up_proj.weight is missing \(and 1 more\)"),
        (left_over, r"weight model.layers.2.mlp.up_proj.weight is not part of the model"),
        (of_another_shape, r"weight model.norm.weight has another shape than the model's"),
    ],
)
@pytest.mark.parametrize("load", [load_policy, load_critic])
@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_wrong_weights_are_refused(
    folder: Path,
    load: Callable[[str], torch.nn.Module],
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    """transformers would fill what is missing with random numbers, and ignore what is left over."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as refusal:
        load(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_critic_is_no_policy(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its vocabulary head would be random."""
    export_model(load_critic(str(folder)), tokenizer, tmp_path / "critic")
    with pytest.raises(ValueError, match=r"weight lm_head\.weight is missing"):
        load_policy(str(tmp_path / "critic"))


@pytest.mark.parametrize("length", [60, 70])
def test_longrope_is_trained_below_its_switch(
    length: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """LongRoPE takes one of two sets of angles, for all sequences of a pack alike."""
    _, settings, _ = REFUSED["phi3, LongRoPE"]
    config = small_config("phi3", settings)
    if length <= 64:
        preflight.require_trainable(config, length, "m")
        return
    with pytest.raises(ValueError, match=r"LongRoPE changes at 64 tokens .* from 70"):
        preflight.require_trainable(config, length, "m")


@pytest.mark.parametrize("folder", ["deepseek_v3"], indirect=True)
def test_ranks_get_the_stored_buffers_and_stop_together(folder: Path, tmp_path: Path) -> None:
    """Two ranks have rank 0's buffers and the log-probabilities of a world of one; what rank 0
    finds wrong with the weights, every rank says."""
    model = load_policy(str(folder))  # before rank 0 removes a weight from the folder
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, folder, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for rank in (0, 1):
        seen = load_file(tmp_path / f"{rank}.safetensors")
        assert close(seen.pop("logprobs"), model(packing.pack_token_ids([range(20)]))[0].detach())
        bias = seen.pop("model.layers.1.mlp.gate.e_score_correction_bias")
        assert float(bias.abs().min()) > 0
        assert torch.equal(
            bias,
            dict(model.model.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"],
        )
        assert "is missing" in (tmp_path / f"{rank}.txt").read_text()


def on_rank(folder: Path, out: Path) -> None:
    """What each rank of the test above does."""
    distributed.start(2)
    rank = distributed.rank()
    model = load_policy(str(folder))
    with torch.no_grad():
        seen = {"logprobs": model(packing.pack_token_ids([range(20)]))[0]}
    seen |= {name: b.clone() for name, b in model.model.named_buffers()}
    save_file(seen, out / f"{rank}.safetensors")
    distributed.all_gather_objects(rank)
    if rank == 0:
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "broken.safetensors", {"format": "pt"})
        (folder / "broken.safetensors").rename(folder / "model.safetensors")
    try:
        load_policy(str(folder))
    except ValueError as error:
        (out / f"{rank}.txt").write_text(str(error))
    distributed.all_gather_objects(rank)
    distributed.stop()


# ── logits: bias, scale, cap, temperature, nucleus ────────────────────────────────────────────────


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("transform", [(1.0, None), (0.25, None), (3.0, 2.0), (1.0, 5.0)])
def test_chunks_apply_the_transform(
    monkeypatch: pytest.MonkeyPatch,
    with_bias: bool,
    temperature: float,
    top_p: float,
    transform: tuple[float, float | None],
) -> None:
    """Log-probabilities, entropy and gradients against torch's, with chunks that leave a
    remainder."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(11, 16, generator=random, requires_grad=True)
    W = torch.randn(50, 16, generator=random, requires_grad=True)
    bias = torch.randn(50, generator=random, requires_grad=True) if with_bias else None
    inputs = [h, W] if bias is None else [h, W, bias]
    scale, cap = transform
    logits = torch.nn.functional.linear(h, W, bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    actions = logits.argmax(-1)  # always in the nucleus
    if top_p < 1:
        logits = nucleus(logits, top_p)
    logp = logits.log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    weights = torch.randn(11, generator=random)
    naive = logp.gather(-1, actions[:, None])[:, 0]
    expected = torch.autograd.grad((naive * weights).sum(), inputs)

    monkeypatch.setitem(policy.CHUNK, "cpu", 4 * 50)
    monkeypatch.setattr(policy, "LEAST", 1)
    asked = (temperature, bias, policy.LogitsTransform(*transform), top_p)
    ours, our_entropy = policy.TokenLogProbs.apply(h, W, actions, *asked)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_entropy, entropy, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((ours * weights).sum(), inputs)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """−∞ outside the smallest set of most likely tokens with at least the mass `top_p`."""
    kept = torch.full_like(logits, -torch.inf)
    for row, values in enumerate(logits.detach()):
        mass = 0.0
        for token in values.argsort(descending=True):
            kept[row, token] = 0.0
            mass += float(values.softmax(-1)[token])
            if mass >= top_p:
                break
    return logits + kept


def test_an_action_outside_the_nucleus_has_a_finite_logprob() -> None:
    """Rounding may put it there: the sampler's arithmetic is another."""
    h, W = torch.ones(1, 1), torch.tensor([[3.0], [1.0], [0.0]])
    logp, _ = policy.TokenLogProbs.apply(h, W, torch.tensor([2]), 1.0, None, policy.PLAIN, 0.5)
    expected = torch.tensor([3.0, 0.0]).log_softmax(-1)[1]  # the most likely token, and the action
    torch.testing.assert_close(logp, expected[None])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("folder", ["llama", "granite"], indirect=True)
def test_top_p_is_the_samplers(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    temperature: float,
) -> None:
    """With --top-p below 1 the trainer's log-probabilities are of the distribution sampled from.
    Those of the whole vocabulary differ."""
    model = load_policy(str(folder))
    sampler = HFSampler(str(folder), tokenizer, [tokenizer.eos_token_id], "float32", "cpu", 16)
    asked = Sampling(24, temperature, 0.8)
    sampled = sample_responses(sampler, tokenizer, problems[:4], 4, asked, "0")
    seen = torch.tensor([p for r in sampled for p in r.logprobs])

    def trainer(top_p: float) -> Tensor:
        return forward_all_tokens(lambda m: model(m, temperature, top_p)[0], sampled, 500, "cpu")

    assert close(trainer(0.8), seen)
    assert float((trainer(1.0) - seen).abs().max()) > 0.01


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def table() -> str:
    """The tables of docs/models.md."""
    lines = ["| type | what is special about it |", "|---|---|"]
    lines += [f"| {name} | {note} |" for name, (_, note) in WORKING.items()]
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {name} | {BECAUSE.get(why, why)} |" for name, (_, _, why) in REFUSED.items()]
    return "\n".join(lines)


def test_docs_hold_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "models.md"
    assert table() in page.read_text()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        on_rank(Path(sys.argv[1]), Path(sys.argv[2]))
    print(table())
