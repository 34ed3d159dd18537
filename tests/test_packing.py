"""packing.py: packing changes neither log-probabilities, values, losses nor gradients."""

from pathlib import Path

import pytest
import torch
from conftest import random_rollouts
from transformers import AutoModelForCausalLM

import ppo
from critic import load_critic
from data import Problem
from packing import forward_all_tokens, micro_batches, mini_batches
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
    A, B = Problem("A", "", "", (1, 2, 3)), Problem("B", "", "", (4, 5))
    a, b = random_rollouts([A, B], 9, [3, 2])
    a.token_ids = [11, 12, 13]
    b.token_ids = [14, 15]
    (micro,) = micro_batches([a, b], [1, 0], max_tokens=100)  # the shorter sequence comes first
    assert micro.input_ids.tolist() == [[4, 5, 14, 1, 2, 3, 11, 12]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert micro.cu_seqlens.tolist() == [0, 3, 8]
    assert micro.max_seqlen == 5
    assert micro.predict_index.tolist() == [1, 2, 5, 6, 7]
    assert micro.actions.tolist() == [14, 15, 11, 12, 13]
    assert micro.flat.tolist() == [3, 4, 0, 1, 2]


def test_packed_equals_separate_forwards(
    model_folder: Path, policy: Policy, problems: list[Problem]
) -> None:
    """Log-probabilities are those of transformers' own forward pass over one sequence at a time."""
    rollouts = random_rollouts(problems, policy.model.config.vocab_size, LENGTHS)
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = []
    for r in rollouts:
        ids = torch.tensor([[*r.problem.prompt_ids, *r.token_ids]])
        logp = plain(ids).logits[0, :-1].log_softmax(-1)[len(r.problem.prompt_ids) - 1 :]
        expected.append(logp.gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0])
    packed = packed_logprobs(policy, rollouts, max_tokens=10_000)  # one pack holds all
    torch.testing.assert_close(packed, torch.cat(expected).detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", ["cu_seqlens", "positions"])
def test_wrong_cu_seqlens_or_positions_change_the_result(
    policy: Policy, problems: list[Problem], broken: str
) -> None:
    """The comparison above can fail: attention across sequences changes the result, and so do wrong
    positions."""
    rollouts = random_rollouts(problems, policy.model.config.vocab_size, LENGTHS)
    (micro,) = micro_batches(rollouts, range(len(rollouts)), 10_000)
    T = micro.input_ids.shape[1]
    if broken == "cu_seqlens":
        one_sequence = torch.tensor([0, T], dtype=torch.int32)
        wrong_micro = micro._replace(cu_seqlens=one_sequence, max_seqlen=T)
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
    rollouts = random_rollouts(problems, policy.model.config.vocab_size, LENGTHS)
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
    rollouts = random_rollouts(problems, 9, LENGTHS)
    micros = list(micro_batches(rollouts, range(len(rollouts)), 40))
    assert len(micros) > 1
    assert sorted(torch.cat([m.flat for m in micros]).tolist()) == list(range(sum(LENGTHS)))
    assert all(m.input_ids.shape[1] <= 40 for m in micros)


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
