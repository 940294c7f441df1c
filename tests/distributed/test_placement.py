"""Placement evens out measured loads and moves little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growmoe.distributed.placement import evenly, imbalance, place, worker_loads

LOADS = st.lists(st.floats(0, 100), min_size=1, max_size=24)


def test_experts_are_spread_by_number():
    assert list(evenly([3, 5, 8, 9, 11], 3).values()) == [0, 0, 1, 1, 2]
    assert evenly([4], 3) == {4: 0}


def test_imbalance_is_max_over_mean():
    assert imbalance({0: (0,), 1: (1,)}, {0: 3.0, 1: 1.0}, 2) == 1.5
    assert imbalance({0: (0, 1), 1: (1,)}, {0: 3.0, 1: 1.0}, 2) == 1.25
    assert imbalance({0: (0,)}, {0: 0.0}, 2) == 1.0


@given(LOADS, st.integers(1, 5), st.integers(0, 3), st.data())
def test_it_never_makes_things_worse_and_keeps_every_expert(loads, workers, replicas, data):
    load = dict(enumerate(loads))
    held = {id: (data.draw(st.integers(0, workers - 1)),) for id in load}
    pinned = {id: held[id] for id in list(load)[: data.draw(st.integers(0, 2))]}
    plan = place(
        load, held, workers, dict.fromkeys(load, 8), pinned=pinned, replicas=replicas, tolerance=1.0
    )
    assert plan.after <= plan.before + 1e-9
    assert set(plan.holders) == set(load)
    assert all(r and len(set(r)) == len(r) for r in plan.holders.values())
    assert sum(len(r) - 1 for r in plan.holders.values()) <= replicas
    assert all(plan.holders[id] == ranks for id, ranks in pinned.items())
    moved = sum(8 * len(set(plan.holders[id]) - set(held[id])) for id in load)
    assert plan.moved == moved
    assert sum(worker_loads(plan.holders, load, workers)) == pytest.approx(sum(loads))


def test_what_is_even_enough_is_left_alone():
    held = {0: (0,), 1: (0,), 2: (1,), 3: (1,)}
    plan = place({0: 1.0, 1: 1.1, 2: 1.0, 3: 1.0}, held, 2, dict.fromkeys(held, 8))
    assert plan.holders == held and plan.moved == 0


def test_one_move_is_made_where_one_suffices():
    held = {0: (0,), 1: (0,), 2: (0,), 3: (1,)}
    plan = place(dict.fromkeys(held, 1.0), held, 2, dict.fromkeys(held, 8))
    assert plan.after == 1.0 and plan.moved == 8


def test_an_expert_too_hot_for_any_worker_is_replicated_and_later_not():
    held = {id: (id,) for id in range(4)}
    hot = place({0: 9.0, 1: 1.0, 2: 1.0, 3: 1.0}, held, 4, dict.fromkeys(held, 8), replicas=2)
    assert len(hot.holders[0]) == 3 and hot.after < 1.4
    cool = place(dict.fromkeys(held, 1.0), hot.holders, 4, dict.fromkeys(held, 8), replicas=2)
    assert all(len(r) == 1 for r in cool.holders.values()) and cool.after == 1.0


def test_slots_are_a_limit_that_swaps_respect():
    held = {0: (0,), 1: (0,), 2: (1,), 3: (1,)}
    loads = {0: 4.0, 1: 4.0, 2: 1.0, 3: 1.0}
    plan = place(loads, held, 2, dict.fromkeys(held, 8), slots=2)
    assert plan.after == 1.0
    assert all(sum(r == (rank,) for r in plan.holders.values()) == 2 for rank in (0, 1))
    with pytest.raises(ValueError, match="do not fit"):
        place(loads, held, 2, dict.fromkeys(held, 8), slots=1)


def test_pinning_an_unknown_expert_is_an_error():
    with pytest.raises(ValueError, match=r"no experts \[7\]"):
        place({0: 1.0}, {0: (0,)}, 2, {0: 8}, pinned={7: (0,)})
