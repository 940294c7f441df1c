"""The optimizer's groups, newborns included, and the shape of the schedules."""

from __future__ import annotations

import itertools

import pytest

import growmoe
from growmoe.lm import TrainConfig, build_model, learning_rate, parameter_groups
from growmoe.lm.optimize import build_optimizer

TINY = TrainConfig(d_model=16, layers=1, heads=2, experts=3, hidden=16, shared=8, device="cpu")


def test_matrices_decay_and_nothing_else_does():
    model = build_model(TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    decays, spared = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)
    )
    assert decays | spared == set(names.values()) and not decays & spared
    assert any("w_in" in name for name in decays) and any("attention" in name for name in decays)
    assert "embedding.weight" in spared
    assert {n for n in names.values() if ".entries." in n} <= spared
    assert all(p.dim() >= 2 for n, p in model.named_parameters() if n in decays)


def test_a_newborn_is_treated_like_its_parent():
    model = build_model(TINY)
    optimizer = build_optimizer(model, TINY)
    layer = model.blocks[0].feed_forward
    event = growmoe.surgery.spawn(layer, 1, [optimizer])
    newborn = layer.experts[event.child]
    decays, spared = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert {id(p) for p in newborn.body.parameters()} <= decays
    assert {id(p) for p in newborn.entries.parameters()} <= spared


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("wsd", 0.0), ("constant", 1.0)])
def test_the_rate_rises_then_ends_where_the_schedule_says(schedule, end):
    config = TrainConfig(steps=1000, warmup=100, lr=1.0, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[100] == max(rates) == 1.0
    assert rates[999] == pytest.approx(end, abs=0.01)
    assert all(a <= b for a, b in itertools.pairwise(rates[:100]))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    if schedule == "wsd":
        assert rates[799] == 1.0 and rates[900] == pytest.approx(0.5)
    if schedule == "cosine":
        assert rates[550] == pytest.approx(0.55, abs=0.01)
