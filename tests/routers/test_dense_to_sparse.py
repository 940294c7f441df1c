"""DenseToSparse begins with all experts and ends with about one."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one

from growmoe import FFN, MoE
from growmoe.routers import DenseToSparse


def test_the_temperature_falls_exponentially_and_then_stays() -> None:
    layer = layer_with([1.0, 0.0], DenseToSparse(steps=4, start=2.0, end=0.5))
    seen = []
    for _ in range(7):
        layer(one(2))
        seen.append(layer.router.temperature().item())
    half = math.sqrt(2)
    assert seen == pytest.approx([2, half, 1, half / 2, 0.5, 0.5, 0.5])
    layer.eval()(one(2))
    assert layer.router.temperature().item() == pytest.approx(0.5)


def test_before_any_training_it_is_the_first_temperature() -> None:
    assert layer_with([1.0, 0.0], DenseToSparse()).router.temperature().item() == 2.0


def test_dense_first_and_about_one_expert_last() -> None:
    layer = MoE(8, FFN(4), 6, DenseToSparse(steps=50, end=0.1), seed=0)
    taken = []
    with torch.no_grad():
        for step in range(55):
            x = torch.randn(200, 8, generator=torch.Generator().manual_seed(step))
            layer(x)
            taken.append(float(layer.recorder._last.token_R.numel()) / 200)
    assert taken[0] > 3.5
    assert 1 <= taken[-1] < 1.25
    smooth = [sum(taken[i : i + 10]) for i in range(0, 50, 10)]
    assert smooth == sorted(smooth, reverse=True)


def test_who_passes_the_threshold_worked_out_by_hand() -> None:
    # p² over its sum at τ = 1/2: 36, 9, 4, 1 of 50
    layer = layer_with([math.log(v) for v in (6, 3, 2, 1)], DenseToSparse(1, 2.0, 0.5)).eval()
    layer.router.anneal_steps.fill_(1)
    want = torch.tensor([[36 / 50, 9 / 50, 0, 0]])
    torch.testing.assert_close(layer.route(one()).assignment.dense(), want)  # more than 1/8
    layer.router.threshold = 0.05
    want = torch.tensor([[36 / 50, 9 / 50, 4 / 50, 0]])
    torch.testing.assert_close(layer.route(one()).assignment.dense(), want)
    layer.router.threshold = 0.9  # the best in any case
    want = torch.tensor([[36 / 50, 0, 0, 0]])
    torch.testing.assert_close(layer.route(one()).assignment.dense(), want)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"start": 0.2}, {"end": 0.0}, {"threshold": 1.0}, {"threshold": -0.1}],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DenseToSparse: "):
        DenseToSparse(**options)
