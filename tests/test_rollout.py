"""rollout.py: both engines give what the trainer would have given, and follow its weights."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import data
from config import STOP, Sampling
from data import Problem
from hf_sampler import HFSampler, sample_token
from packing import forward_all_tokens
from policy import Policy, load_policy
from rollout import Rollout, VllmSampler, sample_responses, sync_weights
from toy import tiny

Sampler = VllmSampler | HFSampler
SAMPLING = Sampling(max_tokens=40)


OPEN: dict[
    tuple[str, Path], Sampler
] = {}  # a vLLM sampler that is dropped takes the process groups of the others along


def open_sampler(kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Sampler:
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
    """The trainer's policy, with the sampler in step with it."""
    policy = load_policy(str(model_folder))
    sync_weights(sampler, policy)
    return policy


def gap(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Largest |Δ log-prob| between sampler and trainer."""
    trainer = forward_all_tokens(lambda m: policy(m, temperature)[0], rollouts, 4096, "cpu")
    return float((trainer - torch.tensor([p for r in rollouts for p in r.logprobs])).abs().max())


def perturb(policy: Policy, seed: int = 0) -> None:
    """Another policy of the same shape: every weight moved by about a tenth of its size."""
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
    """First silent failure: `named_parameters` of a tied model does not list the head, and vLLM keeps the old one."""
    perturb(policy, seed=1)
    named = dict(policy.model.named_parameters())
    assert "lm_head.weight" not in named
    sampler.load_weights(named.items())
    off = gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/2"))
    assert off > 1e-2 if kind == "vllm" else off <= 1e-4  # in transformers the two are one tensor
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, problems, 2, SAMPLING, "0/2")) <= 1e-4


def test_the_prefix_cache_must_not_outlive_the_weights(
    sampler: Sampler,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Second silent failure: keys and values of long prompts, computed with the old weights, answer for the new ones."""
    if not isinstance(sampler, VllmSampler):
        pytest.skip("only vLLM keeps prefixes between calls")
    ids = tokenizer.encode("+".join(str(1 + i % 9) for i in range(150)) + "=?")
    assert len(ids) > 256  # two blocks of the CPU build
    long = [Problem("long", "", "", tuple(ids))]
    sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")
    perturb(policy, seed=2)
    with monkeypatch.context() as without:
        without.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
        sync_weights(sampler, policy)
        assert gap(policy, sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")) > 1e-2
    sync_weights(sampler, policy)
    assert gap(policy, sample_responses(sampler, tokenizer, long, 2, SAMPLING, "0/3")) <= 1e-4


def test_a_sampler_with_other_weights_is_refused(
    sampler: Sampler, policy: Policy, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """Third silent failure: an sampler that takes the weights and does not use them. Only log-probabilities show it."""
    from config import Config
    from train import require_same_logprobs

    cfg = Config(temperature=1.0)
    require_same_logprobs(
        cfg, policy, sample_responses(sampler, tokenizer, problems[:4], 2, SAMPLING, "0/4")
    )
    stale = sample_responses(sampler, tokenizer, problems[:4], 2, SAMPLING, "0/4")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="does not hold the policy's weights"):
        require_same_logprobs(cfg, policy, stale)


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
    """Also when the rest of the batch is another: a response has a random stream of its own. Samples of a problem differ."""
    first = [
        r.token_ids for r in sample_responses(sampler, tokenizer, problems, 4, SAMPLING, "7/0")
    ]
    assert first == [
        r.token_ids for r in sample_responses(sampler, tokenizer, problems, 4, SAMPLING, "7/0")
    ]
    assert first[:12] == [
        r.token_ids for r in sample_responses(sampler, tokenizer, problems[:3], 4, SAMPLING, "7/0")
    ]
    assert first != [
        r.token_ids for r in sample_responses(sampler, tokenizer, problems, 4, SAMPLING, "7/1")
    ]
    assert all(len({tuple(ids) for ids in first[i : i + 4]}) > 1 for i in range(0, len(first), 4))


def test_responses_end_where_they_should(
    kind: str, base_folder: Path, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """A response ends with the token that completes a stop string, with EOS, or at the limit; that last token is part of
    it; nothing follows it; text and ids say the same."""
    sampler = open_sampler(kind, base_folder, tokenizer)
    rollouts = sample_responses(sampler, tokenizer, problems, 8, Sampling(24), "1/0")
    kinds = set()
    for r in rollouts:
        assert r.text == tokenizer.decode(r.token_ids)
        stopped_at = [s for s in STOP if s in r.text]
        before = tokenizer.decode(r.token_ids[:-1])
        assert not any(s in before for s in STOP)
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
        if r.finish_reason == "length":
            assert len(r.token_ids) == 24
            kinds.add("length")
        else:
            assert stopped_at or r.token_ids[-1] == tokenizer.eos_token_id
            kinds.add("stop string" if stopped_at else "eos")
    assert kinds == {"stop string", "eos", "length"}


def test_sampled_tokens_follow_the_distribution() -> None:
    """Frequencies match the softmax; top-p keeps the smallest set of at least that mass and renormalises its log-probs."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    token, logp = sample_token(logits.expand(len(u), -1), u, Sampling(1, temperature=0.5))
    p = (logits / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(token, minlength=4) / len(u), p, atol=1e-4, rtol=0)
    torch.testing.assert_close(logp, p.log()[token])
    token, logp = sample_token(logits.expand(len(u), -1), u, Sampling(1, top_p=0.8))
    q = logits[:2].softmax(0)  # 0.64 + 0.24 is the first sum ≥ 0.8
    assert token.max() == 1
    torch.testing.assert_close(logp, q.log()[token])


def test_an_engine_leaves_generation_defaults_of_a_model_alone(
    sampler: Sampler,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> None:
    """T = 1 and top-p 1 mean the full distribution: the sampled log-probs average to minus the entropy."""
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    policy = load_policy(str(model_folder))
    sync_weights(sampler, policy)
    rollouts = sample_responses(sampler, tokenizer, problems[:1], 400, Sampling(1), "2/0")
    logp = plain(torch.tensor([problems[0].prompt_ids])).logits[0, -1].log_softmax(-1).detach()
    p = logp.exp()
    entropy = float(-(p * logp).sum())
    spread = float((p * (logp + entropy) ** 2).sum().sqrt())
    assert abs(-sum(r.logprobs[0] for r in rollouts) / 400 - entropy) < 4 * spread / math.sqrt(400)


def test_overlong_prompts_are_refused_at_load(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        Problem("set.json:1", "1+2=?", "3"),
        Problem("set.json:2", "+".join("123456789") + "=?", "45"),
    ]
    with pytest.raises(
        ValueError, match=r"set.json:2: prompt of \d+ tokens is over --prompt-tokens 10"
    ):
        data.tokenize(rows, tokenizer, 10, data.TEMPLATE)
    assert [p.source for p in data.tokenize(rows, tokenizer, 10, data.TEMPLATE, drop=True)] == [
        "set.json:1"
    ]


def test_tiny_template_is_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    question = tiny.problems(0)[0][0]
    ids = tokenizer.encode(data.prompt(question), add_special_tokens=False)
    assert tokenizer.decode(ids) == data.prompt(question)
