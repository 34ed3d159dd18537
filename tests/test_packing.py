"""packing.py: packing changes neither log-probabilities, values, losses nor gradients."""

import random
from pathlib import Path

import pytest
import torch
from conftest import random_rollouts
from transformers import AutoModelForCausalLM

import packing
import ppo
from critic import load_critic
from data import Problem
from packing import (
    Size,
    assign_packs,
    forward_all_tokens,
    micro_batches,
    mini_batches,
    pack_tokens,
    packed_attention,
)
from policy import Policy, load_policy
from rollout import Rollout

LENGTHS = [5, 1, 9, 3, 7, 2, 12, 4]


@pytest.fixture(scope="module")
def policy(model_folder: Path) -> Policy:
    return load_policy(str(model_folder))


def packed_logprobs(policy: Policy, rollouts: list[Rollout], max_tokens: int) -> torch.Tensor:
    return forward_all_tokens(lambda m: policy(m)[0], rollouts, max_tokens, "cpu")


def test_docstring_example() -> None:
    """The example of the module's docstring, field by field."""
    P, Q = Problem("P", "", "", (1, 2, 3)), Problem("Q", "", "", (4, 5))
    rollouts = [response(P, 11, 12, 13), response(P, 14, 15), response(Q, 16, 17)]
    (micro,) = micro_batches(rollouts, range(3), max_tokens=9)
    assert micro.input_ids.tolist() == [[1, 2, 3, 11, 12, 14, 4, 5, 16]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert micro.predict_index.tolist() == [2, 3, 4, 2, 5, 7, 8]
    assert micro.actions.tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert micro.flat.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert micro.layout.cu_seqlens_q.tolist() == [0, 3, 5, 6, 9]
    assert micro.layout.cu_seqlens_k.tolist() == [0, 3, 8, 12, 15]
    assert micro.layout.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]


def response(problem: Problem, *token_ids: int) -> Rollout:
    """A response that ended by itself."""
    return Rollout(problem, list(token_ids), [0.0] * len(token_ids), "stop", "")


def shared(problems: list[Problem], vocab: int) -> list[Rollout]:
    """Responses of unlike lengths: two to each of three problems, and one to each of two."""
    return random_rollouts(problems[:5], vocab, LENGTHS)


def test_a_prompt_without_company_is_not_gathered() -> None:
    """Where every prompt stands with one response, the keys are the pack itself."""
    P, Q = Problem("P", "", "", (1, 2, 3)), Problem("Q", "", "", (4, 5))
    (micro,) = micro_batches([response(P, 11, 12), response(Q, 16)], range(2), max_tokens=9)
    assert micro.input_ids.tolist() == [[1, 2, 3, 11, 4, 5]]
    assert micro.layout.cu_seqlens_q.tolist() == micro.layout.cu_seqlens_k.tolist() == [0, 4, 6]
    assert micro.layout.key_index is None


def test_packed_equals_separate_forwards(
    model_folder: Path, policy: Policy, problems: list[Problem]
) -> None:
    """Log-probabilities are those of transformers' own forward pass over one sequence at a time."""
    rollouts = shared(problems, policy.model.config.vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = []
    for r in rollouts:
        ids = torch.tensor([[*r.problem.prompt_ids, *r.token_ids]])
        logp = plain(ids).logits[0, :-1].log_softmax(-1)[len(r.problem.prompt_ids) - 1 :]
        expected.append(logp.gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0])
    packed = packed_logprobs(policy, rollouts, max_tokens=10_000)  # one pack holds all
    torch.testing.assert_close(packed, torch.cat(expected).detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", ["layout", "positions"])
def test_a_wrong_layout_or_positions_change_the_result(
    policy: Policy, problems: list[Problem], broken: str
) -> None:
    """The comparison above can fail: attention across sequences changes the result, and so do wrong
    positions."""
    rollouts = shared(problems, policy.model.config.vocab_size)
    (micro,) = micro_batches(rollouts, range(len(rollouts)), 10_000)
    T = micro.input_ids.shape[1]
    if broken == "layout":
        wrong_micro = micro._replace(layout=packing._layout([packing.Segment(0, T, 0, 0)], "cpu"))
    else:
        wrong_micro = micro._replace(position_ids=torch.arange(T)[None] * 3)
    right, wrong = policy(micro)[0].detach(), policy(wrong_micro)[0].detach()
    assert float((right - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("max_tokens", [1, 20, 45, 10_000])
def test_loss_and_gradient_do_not_depend_on_packing(
    model_folder: Path, policy: Policy, problems: list[Problem], max_tokens: int
) -> None:
    """Policy and critic losses, divided by the batch's number of response tokens: with one sequence
    in a pack, with a few, or with all."""
    rollouts = shared(problems, policy.model.config.vocab_size)
    critic = load_critic(str(model_folder))
    torch.manual_seed(1)
    A, targets = torch.randn(2, sum(LENGTHS))

    def gradients(limit: int) -> tuple[float, torch.Tensor]:
        total = 0.0
        for micro in micro_batches(rollouts, range(len(rollouts)), limit):
            logp, _ = policy(micro)
            policy_loss, _ = ppo.policy_loss(logp, logp.detach() + 0.1, A[micro.flat])
            value_loss = ppo.value_loss(critic(micro), targets[micro.flat])
            loss = (policy_loss + value_loss) / sum(LENGTHS)
            loss.backward()
            total += float(loss.detach())
        grads = [p.grad.flatten() for m in (policy, critic) for p in m.parameters()]
        policy.zero_grad()
        critic.zero_grad()
        return total, torch.cat(grads)

    loss, gradient = gradients(max_tokens)
    expected_loss, expected = gradients(60)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert float(expected.norm()) > 0.1


def test_micro_batches_use_every_token_once_within_the_limit(problems: list[Problem]) -> None:
    rollouts = shared(problems, 9)
    micros = list(micro_batches(rollouts, range(len(rollouts)), 40))
    assert len(micros) > 1
    assert sorted(torch.cat([m.flat for m in micros]).tolist()) == list(range(sum(LENGTHS)))
    assert all(m.input_ids.shape[1] <= 40 for m in micros)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_prompt_stands_once_where_its_responses_meet(ranks: int) -> None:
    """Packs hold few prompts twice, ranks work evenly, and nothing is lost."""
    rng = random.Random(0)
    prompts = {f"prompt {k}": rng.randint(20, 60) for k in range(12)}
    sizes = {}
    for i in range(192):
        prompt = rng.choice(list(prompts))
        sizes[i] = Size(prompt, prompts[prompt], rng.randint(0, 80))
    packs = assign_packs(sizes, 500, ranks)
    assert sorted(i for rank in packs for pack in rank for i in pack) == list(range(192))
    loads = [[pack_tokens(pack, sizes) for pack in rank] for rank in packs]
    assert all(load <= 500 for rank in loads for load in rank)
    assert all(rank == sorted(rank, reverse=True) for rank in loads)
    apart = sum(size.prompt_tokens + size.own for size in sizes.values())
    together = sum(prompts.values()) + sum(size.own for size in sizes.values())
    total = sum(map(sum, loads))
    assert total - together <= 0.2 * (apart - together)
    assert max(map(sum, loads)) <= 1.05 * total / ranks


def test_a_prompt_that_is_all_the_work_is_cut() -> None:
    """A prompt whose responses are all the work is shared out among the ranks."""
    sizes = {i: Size("p", 10, 100) for i in range(8)}
    assert [sorted(map(len, rank)) for rank in assign_packs(sizes, 10**6, 4)] == [[2]] * 4


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 4])
def test_groups_of_like_lengths_attend_as_one_group(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None
) -> None:
    """Compiled layers unfold all segments at once: the same numbers, behind a long prompt, a short
    one, and none that is shared."""
    prompts = [tuple(range(length)) for length in (70, 5, 9)]
    problems = [Problem("", "", "", prompts[k]) for k in (0, 0, 0, 0, 1, 1, 1, 2)]
    rollouts = random_rollouts(problems, 9, [*LENGTHS[:3], 40, *LENGTHS[4:]])
    (micro,) = micro_batches(rollouts, range(8), 10_000)
    T = micro.input_ids.shape[1]
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8), torch.randn(1, 2, T, 8)
    how = {"layout": micro.layout, "sliding_window": window, "softcap": softcap}

    def attend() -> torch.Tensor:
        return packed_attention(torch.nn.Identity(), query, key, value, None, **how)[0]

    in_groups = attend()
    assert {group.before for group in micro.layout.groups} == {0, 70}
    assert len(micro.layout.groups) > 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(attend(), in_groups)


def test_mini_batches_are_near_equal_and_use_every_response_once() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (256,)).tolist()
    minis = mini_batches(lengths, 12, seed="3")
    assert len(minis) == 12
    assert sorted(i for mini in minis for i in mini) == list(range(256))
    tokens = [sum(lengths[i] for i in mini) for mini in minis]
    assert max(tokens) <= 1.03 * sum(lengths) / 12
    assert minis == mini_batches(lengths, 12, seed="3")
    assert minis != mini_batches(lengths, 12, seed="4")
    assert mini_batches([3, 3], 12, seed="0") in ([[0], [1]], [[1], [0]])
