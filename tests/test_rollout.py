"""rollout.py and hf_sampler.py: both samplers sample from the policy's distribution and follow its
weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicLayer, PreTrainedTokenizerBase

import data
import hf_sampler
from config import STOP, Config, Sampling
from data import Problem
from hf_sampler import HFSampler, sample_token
from packing import forward_all_tokens
from policy import Policy, load_policy
from rollout import Rollout, VllmSampler, sample_responses, sync_weights
from toy import tiny
from train import require_same_logprobs

Sampler = VllmSampler | HFSampler
SAMPLING = Sampling(max_tokens=40)

# Samplers stay open: a vLLM sampler that is freed destroys the process groups of the others.
OPEN: dict[tuple[str, Path], Sampler] = {}


def open_sampler(kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler of this kind for the model in `folder`, opened once."""
    eos = [tokenizer.eos_token_id]
    if (kind, folder) in OPEN:
        return OPEN[kind, folder]
    if kind == "vllm":
        pytest.importorskip("vllm")
        OPEN[kind, folder] = VllmSampler(str(folder), eos, "float32", 512, 64, 0.4)
    else:
        OPEN[kind, folder] = HFSampler(
            str(folder), tokenizer, eos, "float32", "cpu", max_num_seqs=64
        )
    return OPEN[kind, folder]


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sampler(kind: str, model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    return open_sampler(kind, model_folder, tokenizer)


@pytest.fixture
def policy(sampler: Sampler, model_folder: Path) -> Policy:
    """The trainer's policy; the sampler holds its weights."""
    policy = load_policy(str(model_folder))
    sync_weights(sampler, policy)
    return policy


def gap(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Largest |Δ log-prob| between sampler and trainer."""
    logp = forward_all_tokens(lambda m: policy(m, temperature)[0], rollouts, 4096, "cpu")
    logp_sampler = torch.tensor([p for r in rollouts for p in r.logprobs])
    return float((logp - logp_sampler).abs().max())


def perturb(policy: Policy, seed: int = 0) -> None:
    """Move every weight by about a tenth of its size."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=random))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(
    sampler: Sampler,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    temperature: float,
) -> None:
    rollouts = sample_responses(sampler, tokenizer, problems, 4, Sampling(40, temperature), "0/0")
    assert [r.problem for r in rollouts] == [p for p in problems for _ in range(4)]
    assert all(len(r.token_ids) == len(r.logprobs) >= 1 for r in rollouts)
    assert gap(policy, rollouts, temperature) <= 1e-4


def test_sampler_follows_the_new_weights(
    sampler: Sampler, policy: Policy, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    perturb(policy)
    stale = sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/1")
    assert gap(policy, stale) > 1e-2
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/1")) <= 1e-4


def test_a_tied_head_must_be_passed_by_name(
    kind: str,
    sampler: Sampler,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> None:
    """First silent failure: `named_parameters` of a tied model does not list the head, and vLLM
    keeps the old one."""
    perturb(policy, seed=1)
    named = dict(policy.model.named_parameters())
    assert "lm_head.weight" not in named
    sampler.load_weights(named.items())
    without_head = gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/2"))
    if kind == "vllm":
        assert without_head > 1e-2
    else:  # in transformers embedding and head are one tensor
        assert without_head <= 1e-4
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/2")) <= 1e-4


def test_the_prefix_cache_must_be_cleared_with_the_weights(
    sampler: Sampler,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Second silent failure: with the new weights, vLLM still uses the cached keys and values of
    long prompts, which the old weights computed."""
    if not isinstance(sampler, VllmSampler):
        pytest.skip("only vLLM keeps prefixes between calls")
    ids = tokenizer.encode("+".join(str(1 + i % 9) for i in range(150)) + "=?")
    assert len(ids) > 256  # two blocks of the CPU build
    long = [Problem("long", "", "", tuple(ids))]
    sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")
    perturb(policy, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
        sync_weights(sampler, policy)
        assert gap(policy, sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")) > 1e-2
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")) <= 1e-4


def test_a_sampler_with_other_weights_is_refused(
    sampler: Sampler, policy: Policy, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """Third silent failure: a sampler that takes the weights and does not use them. Only
    log-probabilities show it."""
    cfg = Config(temperature=1.0)
    rollouts = sample_responses(sampler, tokenizer, problems[:4], 2, SAMPLING, "0/4")
    require_same_logprobs(cfg, policy, rollouts)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="does not hold the policy's weights"):
        require_same_logprobs(cfg, policy, rollouts)


def test_nan_at_the_start_is_named(model_folder: Path, problems: list[Problem]) -> None:
    """It is not said that the sampler has other weights. With several samplers, too, of which only
    the last is wrong."""
    policy = load_policy(str(model_folder))
    rollouts = [Rollout(p, [5, 6], [-1.0, -1.0], "stop", "") for p in problems[:3]]
    rollouts[2].logprobs[1] = math.nan
    with pytest.raises(RuntimeError, match=r"^the sampler's log-probabilities are NaN"):
        require_same_logprobs(Config(), policy, rollouts)
    with torch.no_grad():
        policy.model.model.norm.weight[3] = math.nan
    with pytest.raises(RuntimeError, match=r"^the policy's weight model\.norm\.weight holds NaN"):
        require_same_logprobs(Config(), policy, rollouts)


def test_untied_models_sync(
    kind: str, untied_folder: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    sampler = open_sampler(kind, untied_folder, tokenizer)
    policy = load_policy(str(untied_folder))
    perturb(policy)
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/5")) <= 1e-4


def test_same_seed_same_rollouts(
    sampler: Sampler, policy: Policy, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """Also with other problems in the batch: a response has a random stream of its own. The
    responses to one problem differ."""

    def sample(problems: list[Problem], stream: str) -> list[tuple[int, ...]]:
        rollouts = sample_responses(sampler, tokenizer, problems, 4, SAMPLING, stream)
        return [tuple(r.token_ids) for r in rollouts]

    first = sample(problems, "7/0")
    assert sample(problems, "7/0") == first
    assert sample(problems[:3], "7/0") == first[:12]
    assert sample(problems, "7/1") != first
    for i in range(0, len(first), 4):
        assert len(set(first[i : i + 4])) > 1


def test_responses_end_where_they_should(
    kind: str, base_folder: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """A response ends with the token that completes a stop string, with EOS, or at the limit. That
    token is part of the response and nothing follows it. The text is the decoded ids."""
    sampler = open_sampler(kind, base_folder, tokenizer)
    rollouts = sample_responses(sampler, tokenizer, problems, 8, Sampling(24), "1/0")
    ends = set()
    for r in rollouts:
        assert r.text == tokenizer.decode(r.token_ids)
        found = [s for s in STOP if s in r.text]
        before = tokenizer.decode(r.token_ids[:-1])
        assert not any(s in before for s in STOP)
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
        if r.finish_reason == "length":
            assert len(r.token_ids) == 24
            ends.add("length")
        elif found:
            ends.add("stop string")
        else:
            assert r.token_ids[-1] == tokenizer.eos_token_id
            ends.add("eos")
    assert ends == {"stop string", "eos", "length"}


def truth_values(mask: Tensor, max_tokens: int, dtype: torch.dtype) -> Tensor:
    """In the place of `hf_sampler.additive`: the same mask as bool."""
    return torch.nn.functional.pad(mask, (0, max_tokens), value=True)[:, None, None]


def test_growing_buffers_change_no_bit(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens and log-probabilities are those of transformers' own cache, which appends by copying,
    and of a mask of truth values; also when responses leave the batch and buffers grow twice."""
    sampler = open_sampler("transformers", base_folder, tokenizer)
    prompts = [p.prompt_ids for p in problems[:4] for _ in range(4)]
    sampling = Sampling(3 * max(map(len, prompts)))
    grown = sampler.generate(prompts, range(16), sampling)
    monkeypatch.setattr(hf_sampler, "GrowingLayer", DynamicLayer)
    monkeypatch.setattr(hf_sampler, "additive", truth_values)
    assert sampler.generate(prompts, range(16), sampling) == grown
    assert len({len(r.token_ids) for r in grown}) > 4


def test_sampled_tokens_follow_the_distribution() -> None:
    """Frequencies match the softmax. Top-p keeps the smallest set of tokens with at least that
    mass, and the log-probabilities are those within the set."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    batch = logits.expand(len(uniform), -1)
    token, logp = sample_token(batch, uniform, Sampling(1, temperature=0.5))
    frequencies = torch.bincount(token, minlength=4) / len(uniform)
    p = (logits / 0.5).softmax(0)
    torch.testing.assert_close(frequencies, p, atol=1e-4, rtol=0)
    torch.testing.assert_close(logp, p.log()[token])
    token, logp = sample_token(batch, uniform, Sampling(1, top_p=0.8))
    p_of_two = logits[:2].softmax(0)  # 0.64 + 0.24 is the first sum ≥ 0.8
    assert token.max() == 1
    torch.testing.assert_close(logp, p_of_two.log()[token])


def test_samplers_ignore_the_generation_settings_of_a_model(
    sampler: Sampler,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> None:
    """T = 1 and top-p 1 mean the full distribution: the sampled log-probabilities average to minus
    the entropy."""
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    policy = load_policy(str(model_folder))
    sync_weights(sampler, policy)
    rollouts = sample_responses(sampler, tokenizer, problems[:1], 400, Sampling(1), "2/0")
    logp = plain(torch.tensor([problems[0].prompt_ids])).logits[0, -1].log_softmax(-1).detach()
    p = logp.exp()
    entropy = float(-(p * logp).sum())
    std = float((p * (logp + entropy) ** 2).sum().sqrt())
    estimate = -sum(r.logprobs[0] for r in rollouts) / 400
    assert abs(estimate - entropy) < 4 * std / math.sqrt(400)


def test_overlong_prompts_are_refused_at_load(tokenizer: PreTrainedTokenizerBase) -> None:
    short = Problem("set.json:1", "1+2=?", "3")
    long = Problem("set.json:2", "+".join("123456789") + "=?", "45")
    message = r"set.json:2: prompt of \d+ tokens is over --prompt-tokens 10"
    with pytest.raises(ValueError, match=message):
        data.tokenize([short, long], tokenizer, 10, data.TEMPLATE)
    kept = data.tokenize([short, long], tokenizer, 10, data.TEMPLATE, drop=True)
    assert [p.source for p in kept] == ["set.json:1"]


def test_prompts_are_encoded_together_as_alone(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ENCODED_AT_ONCE", 2)
    questions = ["1+2=?", "naïve ∑ 日本", "", "10+11+12=?", "7"]
    problems = [Problem(f"set.json:{i}", text, "") for i, text in enumerate(questions)]
    encoded = data.tokenize(problems, tokenizer, 500, data.TEMPLATE)
    assert [p.source for p in encoded] == [p.source for p in problems]
    for problem in encoded:
        alone = tokenizer.encode(data.prompt(problem.question), add_special_tokens=False)
        assert list(problem.prompt_ids) == alone


def test_tiny_template_is_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    question = tiny.problems(0)[0][0]
    ids = tokenizer.encode(data.prompt(question), add_special_tokens=False)
    assert tokenizer.decode(ids) == data.prompt(question)


def test_a_rank_without_a_share_has_no_responses(
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the second of two ranks has for one response to one problem."""
    sampler = open_sampler("transformers", model_folder, tokenizer)
    monkeypatch.setattr("distributed.world_size", lambda: 2)
    monkeypatch.setattr("distributed.rank", lambda: 1)
    assert sample_responses(sampler, tokenizer, problems[:1], 1, SAMPLING, "0/5") == []
