"""BiasBalanced chooses by biased scores within groups, and its biases even out the load."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one

from growmoe import FFN, MoE, surgery
from growmoe.routers import BiasBalanced


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# groups are id mod 2: scores of group 0 are .9 .1 .1, of group 1 .6 .5 .1
SCORES = [logit(p) for p in (0.9, 0.6, 0.1, 0.5, 0.1, 0.1)]


def steps(layer: MoE) -> list[int]:
    return [int(e.entries.bias_steps) for e in layer.experts.values()]


def test_the_group_with_the_best_two_scores_is_chosen_though_the_best_is_in_another() -> None:
    # group 0: .9 + .1 = 1.0; group 1: .6 + .5 = 1.1
    layer = layer_with(SCORES, BiasBalanced(2, groups=2, chosen_groups=1, scale=2.5))
    want = torch.tensor([[0, 2.5 * 0.6 / 1.1, 0, 2.5 * 0.5 / 1.1, 0, 0]])
    torch.testing.assert_close(layer.route(one()).assignment.dense(), want)


def test_without_a_limit_the_best_scores_are_chosen() -> None:
    for router in (BiasBalanced(2), BiasBalanced(2, groups=2)):
        want = torch.tensor([[0.9 / 1.5, 0.6 / 1.5, 0, 0, 0, 0]])
        torch.testing.assert_close(layer_with(SCORES, router).route(one()).assignment.dense(), want)


def test_the_bias_decides_who_is_chosen_and_not_what_they_weigh() -> None:
    layer = layer_with(SCORES, BiasBalanced(1, rate=0.1, scale=1.0))
    layer.experts[3].entries.bias_steps += 5  # .5 + .5 > .9
    assert layer.route(one()).assignment.expert_R.tolist() == [3]
    two = layer_with(SCORES, BiasBalanced(2, rate=0.1))
    two.experts[3].entries.bias_steps += 5
    want = torch.tensor([[0.9 / 1.4, 0, 0, 0.5 / 1.4, 0, 0]])
    torch.testing.assert_close(two.route(one()).assignment.dense(), want)


def test_a_bias_moves_by_the_rate_toward_the_mean_load_after_a_forward() -> None:
    layer = layer_with([3.0, 0.0, -1.0], BiasBalanced(1, rate=0.01))
    layer(one(6))
    assert steps(layer) == [0, 0, 0]  # what a recomputation sees does not change
    layer(one(6))
    assert steps(layer) == [-1, 1, 1]
    layer.eval()(one(6))
    assert steps(layer) == [-1, 1, 1]
    layer.train()(one(6))
    assert steps(layer) == [-2, 2, 2]


def test_an_even_load_moves_nothing() -> None:
    layer = layer_with([3.0, 3.0], BiasBalanced(2))
    for _ in range(4):
        layer(one(5))
    assert steps(layer) == [0, 0]


@pytest.mark.slow
def test_a_collapsed_gate_is_evened_out() -> None:
    layer = MoE(8, FFN(4), 8, BiasBalanced(1, rate=0.02), seed=0)
    with torch.no_grad():
        for e in layer.experts.values():
            e.entries.key[0] = 3.0 if e.id == 0 else -1.0
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].abs() + 0.5
    assert layer.route(x).assignment.counts_E[0] > 480
    with torch.no_grad():
        for _ in range(120):
            layer(x)
    counts = layer.route(x).assignment.counts_E
    assert counts.max() <= 1.4 * 64 and counts.min() >= 0.6 * 64


@pytest.mark.parametrize("parent", [0, 1, None])
def test_a_birth_into_a_group_of_one_does_not_close_it(parent: int | None) -> None:
    # group 1 is expert 1 alone, with .8; group 0 has .4 + .3
    scores = [logit(p) for p in (0.4, 0.8, 0.3)]
    layer = layer_with(scores, BiasBalanced(1, groups=2, chosen_groups=1)).eval()
    before = layer.route(one()).assignment
    assert before.expert_R.tolist() == [1]
    surgery.spawn(layer, parent)
    assert torch.equal(layer.route(one()).assignment.expert_R, before.expert_R)


def test_a_clone_is_in_its_parents_group_with_its_bias() -> None:
    layer = layer_with(SCORES, BiasBalanced(2, groups=3))
    layer.experts[1].entries.bias_steps += 7
    child = layer.experts[surgery.spawn(layer, 1).child]
    assert child.id == 6 and child.entries.group == 1 and child.entries.bias_steps == 7
    fresh = layer.experts[surgery.spawn(layer, None).child]
    assert fresh.id == 7 and fresh.entries.group == 1 and fresh.entries.bias_steps == 0


def test_a_merged_expert_has_the_mean_bias_in_whole_steps() -> None:
    layer = layer_with(SCORES, BiasBalanced(2, groups=2))
    for id, value in ((1, 10), (3, 13)):
        layer.experts[id].entries.bias_steps += value
    child = layer.experts[surgery.merge(layer, [1, 3]).child]
    assert child.entries.bias_steps in (11, 12) and child.entries.group == 1
    assert child.entries.bias_steps.dtype is torch.int64


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"rate": -1.0},
        {"groups": 0},
        {"groups": 2, "chosen_groups": 3},
        {"groups": 2, "chosen_groups": 0},
    ],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="BiasBalanced: "):
        BiasBalanced(**options)
