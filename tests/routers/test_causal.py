"""A way of choosing that is not said to see the future does not, so causal models may use it."""

from __future__ import annotations

import pytest
import torch
from router_cases import CASES, KINDS, D, build, inputs
from slow_parameters import but_slow

from growmoe import Capacity

BLIND = [name for name in CASES if not CASES[name].make().sees_future]
SEEING = [name for name in CASES if name not in BLIND]
every_blind = pytest.mark.parametrize("name", but_slow(BLIND, *KINDS))


@pytest.mark.parametrize("name", SEEING)
def test_one_that_sees_the_future_is_refused_in_a_causal_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"router: what .* depends on later tokens"):
        build(name, causal=True)
    build(name, causal=False)


@every_blind
def test_one_that_does_not_is_accepted(name: str) -> None:
    build(name, causal=True)


@pytest.mark.parametrize(
    "capacity",
    [Capacity(drop="gate"), Capacity(reroute=True), Capacity(drop="gate", reroute=True)],
    ids=repr,
)
def test_a_capacity_that_sees_the_future_is_refused_in_a_causal_model(capacity: Capacity) -> None:
    with pytest.raises(ValueError, match=r"capacity: what .* depends on later tokens"):
        build("topk softmax", causal=True, capacity=capacity)
    build("topk softmax", causal=True, capacity=Capacity(drop="position"))


def leak(name: str, training: bool, capacity: Capacity | None, forwards: int = 1) -> float:
    """The largest change of an output by a change of the tokens after it, in one sequence."""
    worst = 0.0
    for cut in (1, 6, 11):
        outputs = []
        for other in (False, True):
            layer = build(name, capacity=capacity).train(training)
            x = inputs(12)
            if other:
                x[cut:] = 3 * inputs(12, seed=99)[cut:] + 1
            told = CASES[name].context(12)
            for step in range(forwards):
                torch.manual_seed(step)  # the same noise whatever the tokens are
                past = inputs(12, seed=step) if step < forwards - 1 else x
                y = layer(past.view(1, 12, D), told)
            outputs.append(y[0, :cut])
        worst = max(worst, float((outputs[0] - outputs[1]).detach().abs().max()))
    return worst


@every_blind
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_later_tokens_change_nothing_of_earlier_ones(name: str, training: bool) -> None:
    assert leak(name, training, None, forwards=2) <= 1e-6


@pytest.mark.parametrize("name", SEEING)
def test_those_that_see_the_future_do(name: str) -> None:
    assert leak(name, True, None) > 1e-3


FIXED = [
    name
    for name in BLIND
    if CASES[name].make().capped
    and name not in ("gshard", "top p", "remoe", "top any", "dense to sparse", "multi gate k")
]


@pytest.mark.parametrize("name", but_slow(FIXED, *KINDS))
@pytest.mark.parametrize("factor", [0.5, "adaptive"])
def test_nor_where_each_expert_keeps_its_first(name: str, factor: float) -> None:
    assert leak(name, True, Capacity(factor, most=1.05), forwards=2) <= 1e-6


@pytest.mark.parametrize("name", ["top p", "remoe"])
def test_but_room_follows_the_number_of_rows_where_that_depends_on_the_tokens(name: str) -> None:
    # an expert's room is a share of all rows in the batch, so later tokens widen or narrow it
    assert leak(name, True, Capacity(0.5)) > 1e-3
