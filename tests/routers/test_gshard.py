"""GShard uses the second expert as often as it weighs."""

from __future__ import annotations

import math

import pytest
from router_cases import layer_with, one, within_3_sd

from growmoe.routers import GShard

N = 20_000


@pytest.mark.parametrize("second", [0.02, 0.1, 0.3, 0.45])
def test_the_second_is_kept_with_probability_twice_its_weight(second: float) -> None:
    layer = layer_with([math.log(1 - second), math.log(second), -9.0], GShard())
    counts = layer.route(one(N)).assignment.counts_E.tolist()
    assert counts[0] == N and counts[2] == 0
    assert within_3_sd(counts[1], N, 2 * second)


def test_it_is_always_kept_where_both_weigh_the_same_and_in_eval_mode() -> None:
    layer = layer_with([0.0, 0.0], GShard())
    assert layer.route(one(500)).assignment.counts_E.tolist() == [500, 500]
    layer = layer_with([4.0, 0.0], GShard()).eval()
    assert layer.route(one(50)).assignment.counts_E.tolist() == [50, 50]


def test_weights_are_divided_by_their_sum_whether_the_second_is_used_or_not() -> None:
    layer = layer_with([math.log(v) for v in (1.0, 2.0, 6.0)], GShard())
    rows = set(
        map(tuple, layer.route(one(100)).assignment.dense().mul(8).round(decimals=4).tolist())
    )
    assert rows == {(0, 2, 6), (0, 0, 6)}
    assert GShard.min_experts == 2
