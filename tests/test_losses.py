"""The auxiliary losses have the values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe import Assignment, Routing, losses


def chosen(expert_TK: list[list[int]], num_experts: int) -> Assignment:
    expert = torch.tensor(expert_TK)
    return Assignment.from_choice(expert, torch.ones(expert.shape), num_experts)


def balance_loss(probs: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    return losses.balance_loss(Routing(assignment, probs, probs.log()))


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    return losses.z_loss(Routing(chosen([[0]], logits.shape[1]), logits.softmax(-1), logits))


def test_balance_is_one_when_uniform() -> None:
    assignment = chosen([[0], [1], [2], [3]], 4)
    assert float(balance_loss(torch.full((4, 4), 0.25), assignment)) == pytest.approx(1)


def test_balance_is_the_number_of_experts_when_all_goes_to_one() -> None:
    probs = torch.tensor([[1.0, 0, 0, 0]]).expand(5, 4)
    assert float(balance_loss(probs, chosen([[0]] * 5, 4))) == pytest.approx(4)


def test_balance_worked_out_by_hand() -> None:
    # f = (2/3, 1/3), P = (0.6, 0.4): 2 · (0.4 + 0.4/3) = 16/15
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    loss = balance_loss(probs, chosen([[0], [0], [1]], 2))
    assert float(loss) == pytest.approx(16 / 15)


def test_balance_normalises_scores_such_as_sigmoids() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    scale = torch.tensor([[0.3], [1.7], [1.0]])
    assignment = chosen([[0], [0], [1]], 2)
    torch.testing.assert_close(
        balance_loss(scores * scale, assignment), balance_loss(scores, assignment)
    )


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 10**6))
def test_balance_lies_between_zero_and_the_number_of_experts(
    experts: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(tokens, experts, generator=generator).softmax(-1)
    pick = torch.randint(experts, (tokens, 1), generator=generator)
    loss = float(balance_loss(probs, chosen(pick.tolist(), experts)))
    assert 0 <= loss <= experts + 1e-5


def test_balance_pushes_probability_from_the_crowded_expert() -> None:
    logits = torch.zeros(6, 3, requires_grad=True)
    balance_loss(logits.softmax(-1), chosen([[0], [0], [0], [0], [1], [2]], 3)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_z_worked_out_by_hand() -> None:
    logits = torch.tensor([[math.log(2), math.log(6)], [0.0, 0.0]])
    want = (math.log(8) ** 2 + math.log(2) ** 2) / 2
    assert float(z_loss(logits)) == pytest.approx(want)


def test_z_ignores_an_expert_that_is_not_admitted() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    masked = torch.cat([logits, torch.full((5, 1), -math.inf)], 1)
    torch.testing.assert_close(z_loss(masked), z_loss(logits))
    z_loss(masked).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_without_tokens_both_are_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    assignment = chosen([[0]], 3)
    empty = Assignment.from_pairs(*torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), 3, 0)
    loss = balance_loss(logits.softmax(-1), empty) + z_loss(logits)
    loss.backward()
    assert loss == 0 and logits.grad is not None
    assert assignment.num_experts == 3


def test_both_have_the_right_gradients() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assignment = chosen([[0], [0], [1], [2]], 3)
    assert torch.autograd.gradcheck(lambda v: balance_loss(v.softmax(-1), assignment), (logits,))
    assert torch.autograd.gradcheck(lambda v: balance_loss(v.sigmoid(), assignment), (logits,))
    assert torch.autograd.gradcheck(z_loss, (logits,))
