from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe.compress.layer import CompressError
from growmoe.compress.plan import LayerSize, make_plan


def sizes(*counts: int, k: int = 2, **rest: object) -> dict[str, LayerSize]:
    return {str(i): LayerSize(tuple(range(n)), k, **rest) for i, n in enumerate(counts)}  # type: ignore[arg-type]


def values(*rows: list[float]) -> dict[str, torch.Tensor]:
    return {str(i): torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)}


def test_uniform_takes_the_lowest_of_each_layer() -> None:
    plan = make_plan(values([4, 1, 3, 2], [1, 1, 9, 0.5]), sizes(4, 4), ratio=0.5)
    assert plan.remove == {"0": [1, 3], "1": [3, 0]}
    assert plan.ratio == 0.5
    assert "rank 1 of 4" in plan.reasons["0"][1]


def test_global_takes_the_lowest_of_all_relative_to_each_layers_mean() -> None:
    # relative to their means: (0.4, 1.2, 1.2, 1.2) and (0.8, 0.8, 0.8, 1.6)
    found = values([1, 3, 3, 3], [200, 200, 200, 400])
    plan = make_plan(found, sizes(4, 4), ratio=0.375, per_layer="global")
    assert plan.remove == {"0": [0], "1": [0, 1]}


def test_global_leaves_k_in_each_layer() -> None:
    found = values([0.1, 0.1, 0.1, 0.1, 9], [5, 5, 5, 5, 5])
    plan = make_plan(found, sizes(5, 5), ratio=0.5, per_layer="global")
    assert len(plan.remove["0"]) == 3 and len(plan.remove["1"]) == 2


def test_groups_lose_equally_many() -> None:
    size = sizes(4, groups=2)
    plan = make_plan(values([1, 2, 30, 40]), size, ratio=0.5)
    assert plan.remove == {"0": [0, 2]}
    with pytest.raises(CompressError, match="groups"):
        make_plan(values([1, 2, 30, 40]), size, keep=3)


def test_super_experts_stay() -> None:
    plan = make_plan(values([1, 2, 3, 4]), sizes(4), ratio=0.5, spared={"0": [0]})
    assert plan.remove == {"0": [1, 2]}
    with pytest.raises(CompressError, match="super"):
        make_plan(values([1, 2, 3, 4]), sizes(4), ratio=0.5, spared={"0": [0, 1, 2]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.9}, "ratio=0.9 would leave 0 of 4 experts, but each token takes 2"),
        ({"keep": 1}, "keep=1 would leave 1 of 4"),
        ({"keep": 9}, "there are 4 experts"),
        ({"ratio": 0.01}, "removes nothing"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"),
        ({"ratio": 0.5, "keep": 2}, "exactly one"),
        ({}, "exactly one"),
        ({"ratio": 0.5, "per_layer": "odd"}, "per_layer must be one of"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        make_plan(values([1, 2, 3, 4]), sizes(4), **settings)


def test_a_saliency_of_nan_is_refused() -> None:
    with pytest.raises(CompressError, match="NaN"):
        make_plan(values([1, float("nan"), 3, 4]), sizes(4), ratio=0.25)


def test_layers_that_must_stay_equal_are_not_pruned_globally_or_unequally() -> None:
    with pytest.raises(CompressError, match="same number of experts in every layer"):
        make_plan(values([1, 2, 3, 4]), sizes(4, uniform=True), ratio=0.25, per_layer="global")
    with pytest.raises(CompressError, match="use keep"):
        make_plan(values([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]), sizes(4, 6, uniform=True), ratio=0.5)


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=12), min_size=1, max_size=4),
    st.floats(0.1, 0.9),
    st.sampled_from(["uniform", "global"]),
)
def test_a_plan_meets_its_budget_or_is_refused(
    rows: list[list[float]], ratio: float, per_layer: str
) -> None:
    size = sizes(*map(len, rows))
    try:
        plan = make_plan(values(*rows), size, ratio=ratio, per_layer=per_layer)
    except CompressError:
        return
    for i, row in enumerate(rows):
        gone = plan.remove[str(i)]
        assert len(set(gone)) == len(gone) and len(row) - len(gone) >= 2
        kept = [v for e, v in enumerate(row) if e not in gone]
        assert all(row[e] <= v for e in gone for v in kept), "the lowest go"
    if per_layer == "global":
        assert plan.removed == int(ratio * plan.total + 0.5)
