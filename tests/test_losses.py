"""The auxiliary losses have the values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe import FFN, Assignment, MoE, Routing, TopK, losses


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


# A routing of 4 tokens and 3 experts, with E = 3 and two rows for each token:
#   P = (0.4, 0.35, 0.25), c = (3, 4, 1), f = c/8, gate mass = (1.5, 1.7, 0.2)
PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.1, 0.4, 0.5]])
TAKEN = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 2]])
WEIGHTS = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6], [0.2, 0.2]])


def routing(weights: torch.Tensor = WEIGHTS, probs: torch.Tensor = PROBS) -> Routing:
    return Routing(Assignment.from_choice(TAKEN, weights, 3), probs, probs.log())


def nats(*probs: float) -> float:
    return -sum(p * math.log(p) for p in probs if p)


def test_gshard_worked_out_by_hand() -> None:
    # (1/3) Σ (c_e/4) P_e
    want = (3 / 4 * 0.4 + 4 / 4 * 0.35 + 1 / 4 * 0.25) / 3
    assert float(losses.gshard_loss(routing())) == pytest.approx(want)


def test_importance_worked_out_by_hand() -> None:
    mass = [1.5, 1.7, 0.2]
    mean = sum(mass) / 3
    want = sum((m - mean) ** 2 for m in mass) / 3 / mean**2
    assert float(losses.importance_loss(routing())) == pytest.approx(want)


def test_load_worked_out_by_hand() -> None:
    # B = 8/3, c/B = 9/8, 12/8, 3/8
    want = (1 / 8) ** 2 + (4 / 8) ** 2 + (5 / 8) ** 2
    assert float(losses.load_loss(routing())) == pytest.approx(want)


def test_the_loads_gradient_is_that_of_soft_counts() -> None:
    weights = WEIGHTS.clone().requires_grad_()
    losses.load_loss(routing(weights)).backward()
    excess = torch.tensor([1 / 8, 4 / 8, -5 / 8])
    want = 2 * excess[TAKEN] / (8 / 3) / WEIGHTS
    torch.testing.assert_close(weights.grad, want)


def test_entropy_worked_out_by_hand() -> None:
    want = sum(nats(*row) for row in PROBS.tolist()) / 4
    assert float(losses.entropy_loss(routing())) == pytest.approx(want)


def test_mutual_information_worked_out_by_hand() -> None:
    want = sum(nats(*row) for row in PROBS.tolist()) / 4 - nats(0.4, 0.35, 0.25)
    assert float(losses.mutual_information_loss(routing())) == pytest.approx(want, abs=1e-6)


def test_mutual_information_is_least_where_tokens_are_decided_and_experts_alike() -> None:
    a = chosen([[0], [1], [2]], 3)
    loss = losses.mutual_information_loss(Routing(a, torch.eye(3), torch.eye(3).log()))
    assert float(loss) == pytest.approx(-math.log(3))
    one = torch.tensor([[1.0, 0, 0]]).expand(3, 3)
    assert float(losses.mutual_information_loss(Routing(a, one, one.log()))) == pytest.approx(0)


OF_GATE = [
    losses.balance_loss,
    losses.gshard_loss,
    losses.importance_loss,
    losses.load_loss,
    losses.z_loss,
    losses.entropy_loss,
    losses.mutual_information_loss,
]


@pytest.mark.parametrize("loss", OF_GATE)
def test_where_nothing_was_routed_it_is_zero_with_a_gradient(loss) -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    nobody = torch.zeros(0, dtype=torch.int64)
    empty = Assignment.from_pairs(nobody, nobody, logits.sum(1), 3, 0)
    value = loss(Routing(empty, logits.softmax(-1), logits))
    assert value.shape == () and value.item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert logits.grad is not None


@pytest.mark.parametrize("loss", OF_GATE)
@given(
    tokens=st.integers(1, 8),
    experts=st.integers(1, 5),
    size=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_bounds(loss, tokens: int, experts: int, size: float, seed: int) -> None:
    logits = size * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    probs = logits.softmax(-1)
    k = 1 + seed % experts
    weight, expert = probs.topk(k)
    value = float(loss(Routing(Assignment.from_choice(expert, weight, experts), probs, logits)))
    lower, upper = {
        losses.balance_loss: (0, experts),
        losses.gshard_loss: (0, 1 / experts),  # at most P sums to 1 and every count is T
        losses.importance_loss: (0, experts - 1),
        losses.load_loss: (0, experts * (experts - 1)),
        losses.z_loss: (0, float(logits.logsumexp(1).square().max())),
        losses.entropy_loss: (0, math.log(experts)),
        losses.mutual_information_loss: (-math.log(experts), 0),
    }[loss]
    assert lower - 1e-5 <= value <= upper * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("loss", [f for f in OF_GATE if f is not losses.load_loss])
def test_gradients(loss) -> None:
    def value(logits: torch.Tensor) -> torch.Tensor:
        probs = logits.softmax(-1)
        a = Assignment.from_choice(TAKEN, probs.gather(1, TAKEN), 3)
        return loss(Routing(a, probs, logits))

    assert torch.autograd.gradcheck(value, torch.randn(4, 3, dtype=torch.float64).requires_grad_())


def test_several_mixtures_count_by_their_mean() -> None:
    two = torch.stack([WEIGHTS * 0.5, WEIGHTS * 1.5], -1)
    assert float(losses.importance_loss(routing(two))) == pytest.approx(
        float(losses.importance_loss(routing()))
    )


# Of the experts themselves.


class Of(torch.nn.Module):
    """An expert of these weights that gives them for any input."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.body = self
        self.value = torch.nn.Parameter(torch.tensor(weights))

    def parameters(self, recurse: bool = True):
        return iter([self.value])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), -1)


def test_weight_diversity_worked_out_by_hand() -> None:
    # cosines 0, 1/√2, 1/√2: mean of squares 1/3
    experts = [Of(2.0, 0.0), Of(0.0, -3.0), Of(1.0, 1.0)]
    assert losses.weight_diversity(experts).item() == pytest.approx(1 / 3)
    x = torch.zeros(5, 2)
    assert losses.output_diversity(experts, x).item() == pytest.approx(1 / 3)
    assert losses.weight_diversity([Of(1.0, 2.0), Of(-2.0, -4.0)]).item() == pytest.approx(1)
    assert losses.weight_diversity(experts[:1]).item() == 0
    assert losses.output_diversity(experts[:1], x).item() == 0


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_diversity_lies_between_zero_and_one(seed: int, experts: int, tokens: int) -> None:
    layer = MoE(3, FFN(4), experts, TopK(1), seed=seed)
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed))
    mine = list(layer.experts.values())
    for value in (losses.weight_diversity(mine), losses.output_diversity(mine, x)):
        assert -1e-6 <= value.item() <= 1 + 1e-5


def test_descending_it_makes_experts_different() -> None:
    layer = MoE(3, FFN(4), 3, TopK(1), seed=0)
    mine, x = list(layer.experts.values()), torch.randn(8, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for loss in (losses.weight_diversity, lambda experts: losses.output_diversity(experts, x)):
        before = loss(mine).item()
        for _ in range(30):
            loss(mine).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss(mine).item() < 0.5 * before


def test_experts_of_different_sizes_are_refused() -> None:
    layer = MoE(3, [FFN(4), FFN(5)], 2, TopK(1), seed=0)
    with pytest.raises(ValueError, match="different numbers of weights"):
        losses.weight_diversity(list(layer.experts.values()))


def test_a_layer_adds_the_losses_it_is_given() -> None:
    x = torch.randn(9, 4)
    plain = MoE(4, FFN(4), 3, TopK(2), seed=0, balance_loss=0.0)
    layer = MoE(
        4,
        FFN(4),
        3,
        TopK(2),
        seed=0,
        balance_loss=0.5,
        z_loss=0.25,
        losses={losses.entropy_loss: 2.0, losses.importance_loss: 0.0},
    )
    layer(x)
    decided = plain.route(x)
    want = (
        0.5 * losses.balance_loss(decided)
        + 0.25 * losses.z_loss(decided)
        + 2 * losses.entropy_loss(decided)
    )
    torch.testing.assert_close(layer.aux_loss(), want)
