"""A tree's probability of an expert is the product along its path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe import FFN, MoE, TopK, surgery
from growmoe.routers import Dense, Tree


def layer_of(gate: Tree, experts: int = 6) -> MoE:
    return MoE(4, FFN(4), experts, Dense(gate), seed=0)


@given(
    st.sampled_from([(2,), (4,), (2, 2), (3, 2), (2, 2, 2)]),
    st.integers(1, 9),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 999),
)
def test_probabilities_sum_to_one(
    branches: tuple[int, ...], experts: int, keep: int | None, seed: int
) -> None:
    layer = layer_of(Tree(branches, keep), experts)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    routing = layer.route(x)
    torch.testing.assert_close(routing.logits_TE.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.exp())
    (routing.assignment.dense().square().sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def set_keys(layer: MoE, nodes: list[list[float]], keys: list[float]) -> None:
    """Inner products with (1, 0, 0, 0)."""
    with torch.no_grad():
        for level, values in zip(layer.router.gate.nodes, nodes, strict=True):
            level.zero_()[:, 0] = torch.tensor(values)
        for e, value in zip(layer.experts.values(), keys, strict=True):
            e.entries.key.zero_()[0] = value


X = torch.eye(4)[:1]
LN = math.log


def test_the_product_worked_out_by_hand() -> None:
    # leaves 0, 1 below the first branch (3/4), 2 below the second; leaf 3 and the fourth are empty
    layer = layer_of(Tree((2, 2)), 7)
    for e in layer.experts.values():
        e.entries.leaf.fill_([0, 0, 1, 2, 2, 2, 1][e.id])
    set_keys(
        layer,
        [[LN(3), 0.0], [0.0, LN(4), LN(2), LN(9)]],
        [0.0, LN(2), LN(5), 0.0, LN(2), LN(3), LN(5)],
    )
    first, second = 3 / 4, 1 / 4  # at the root
    want = [
        first * (1 / 5) * (1 / 3),
        first * (1 / 5) * (2 / 3),
        first * (4 / 5) * (1 / 2),
        second * 1 * (1 / 6),  # leaf 3 holds nobody and is never taken
        second * 1 * (2 / 6),
        second * 1 * (3 / 6),
        first * (4 / 5) * (1 / 2),
    ]
    torch.testing.assert_close(layer.route(X).probs_TE, torch.tensor([want]))


def test_keep_takes_only_the_best_branches_of_each_node() -> None:
    layer = layer_of(Tree((4,), keep=2), 4)
    set_keys(layer, [[LN(1), LN(4), LN(3), LN(2)]], [0.0] * 4)
    want = torch.tensor([[0, 4 / 7, 3 / 7, 0]])
    torch.testing.assert_close(layer.route(X).probs_TE, want)


def test_a_branch_whose_experts_are_gone_is_no_longer_taken() -> None:
    layer = layer_of(Tree((2,)), 4)
    set_keys(layer, [[0.0, 5.0]], [0.0, 0.0, LN(3), 0.0])
    surgery.prune(layer, [1, 3])
    torch.testing.assert_close(layer.route(X).probs_TE, torch.tensor([[1 / 4, 3 / 4]]))
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_one_level_of_lone_experts_is_a_plain_softmax_over_the_nodes() -> None:
    layer = layer_of(Tree((3,)), 3)
    x = torch.randn(5, 4)
    want = (x @ layer.router.gate.nodes[0].T).softmax(-1)
    torch.testing.assert_close(layer.route(x).probs_TE, want)


def test_a_fresh_experts_leaf_is_by_its_id_and_a_clones_its_parents() -> None:
    layer = layer_of(Tree((2, 2)), 5)
    assert [int(e.entries.leaf) for e in layer.experts.values()] == [0, 1, 2, 3, 0]
    assert layer.experts[surgery.spawn(layer, 3).child].entries.leaf == 3
    assert layer.experts[surgery.spawn(layer, None).child].entries.leaf == 6 % 4


def test_a_newborn_in_an_empty_branch_opens_it_little_by_little() -> None:
    layer = layer_of(Tree((2,)), 1)
    before = layer.route(X).probs_TE
    child = surgery.spawn(layer, None).child  # leaf 1, where nobody is
    set_keys(layer, [[0.0, 0.0]], [0.0, 0.0])
    assert torch.equal(layer.route(X).probs_TE, torch.cat([before, torch.zeros(1, 1)], 1))
    layer.experts[child].admission = 0.25
    torch.testing.assert_close(layer.route(X).probs_TE, torch.tensor([[0.8, 0.2]]))


def test_any_router_can_choose_by_it() -> None:
    layer = MoE(4, FFN(4), 8, TopK(2, gate=Tree((4,))), seed=0)
    x = torch.randn(6, 4)
    routing = layer.route(x)
    top = routing.probs_TE.topk(2).indices.sort(1).values
    chosen = routing.assignment.dense().topk(2).indices.sort(1).values
    assert torch.equal(top, chosen)


@pytest.mark.parametrize(
    "options", [{"branches": ()}, {"branches": (1,)}, {"branches": (2.0,)}, {"keep": 0}]
)
def test_bad_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Tree: (branches|keep) must be"):
        Tree(**options)  # type: ignore[arg-type]


def test_one_tree_serves_one_layer() -> None:
    gate = Tree()
    layer_of(gate)
    with pytest.raises(ValueError, match="this Tree already belongs to a layer"):
        layer_of(gate)
