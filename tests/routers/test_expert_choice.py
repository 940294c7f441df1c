"""ExpertChoice gives each expert its best tokens, as many as every other."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

import growmoe
from growmoe import FFN, ExpertChoice, MoE, TopK


@given(
    capacity=st.floats(0.1, 9.0),
    experts=st.integers(1, 5),
    tokens=st.integers(0, 12),
    seed=st.integers(0, 10**6),
)
def test_each_expert_takes_its_best_tokens(
    capacity: float, experts: int, tokens: int, seed: int
) -> None:
    layer = MoE(4, FFN(4), experts, ExpertChoice(capacity), seed=seed)
    x = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    routing = layer.route(x)
    share = min(tokens, math.ceil(tokens * capacity / experts))
    assert routing.assignment.counts_E.tolist() == [share] * experts
    dense, probs = routing.assignment.dense(), routing.probs_TE
    taken = dense > 0
    assert torch.equal(dense[taken], probs[taken])
    if tokens:
        worst = probs.masked_fill(~taken, math.inf).amin(0)
        best_left = probs.masked_fill(taken, -math.inf).amax(0)
        assert (worst >= best_left).all()
        torch.testing.assert_close(probs.sum(1), torch.ones(tokens))


def test_worked_out_by_hand() -> None:
    layer = MoE(2, FFN(4), 2, ExpertChoice(1.0), seed=0)
    with torch.no_grad():
        for e, key in zip(layer.experts.values(), ([1.0, 0.0], [0.0, 1.0]), strict=True):
            e.entries.key.copy_(torch.tensor(key))
    a, b, c = math.log(3), math.log(4), math.log(9)
    x = torch.tensor([[a, 0.0], [b, 0.0], [0.0, 0.0], [0.0, c]])
    # probabilities of expert 0: 3/4, 4/5, 1/2, 1/10; two tokens for each of the two experts
    want = torch.tensor([[3 / 4, 0], [4 / 5, 0], [0, 1 / 2], [0, 9 / 10]])
    torch.testing.assert_close(layer.route(x).assignment.dense(), want)


def test_a_token_may_get_no_expert_and_then_gives_zero() -> None:
    layer = MoE(4, FFN(4), 2, ExpertChoice(0.5), seed=0)
    x = torch.randn(8, 4)
    counts = (layer.route(x).assignment.dense() > 0).sum(1)
    assert counts.sum() == 4
    assert torch.equal(layer(x).abs().sum(1) == 0, counts == 0)


def test_it_says_that_it_sees_the_future() -> None:
    assert ExpertChoice().sees_future and not TopK().sees_future


def test_later_tokens_change_what_earlier_ones_get() -> None:
    layer = MoE(4, FFN(4), 3, ExpertChoice(1.0), seed=0)
    x = torch.randn(30, 4)
    assert not torch.equal(layer(x)[:15], layer(x[:15]))


def test_an_expert_not_admitted_weighs_nothing() -> None:
    layer = MoE(4, FFN(4), 3, ExpertChoice(1.0), seed=0)
    layer.experts[1].admission = 0.0
    dense = layer.route(torch.randn(12, 4)).assignment.dense()
    assert not dense[:, 1].any()
    assert dense[:, [0, 2]].any()


def test_a_birth_changes_no_output() -> None:
    layer = MoE(8, FFN(8), 3, ExpertChoice(1.0), seed=1).eval()
    x = torch.randn(48, 8)
    y = layer(x)
    growmoe.surgery.spawn(layer, 0)
    torch.testing.assert_close(layer(x), y)
