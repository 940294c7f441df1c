"""Switch takes the one best expert, by a gate that sees its input jittered."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one

from growmoe.routers import Switch


def test_the_weight_is_the_probability_worked_out_by_hand() -> None:
    layer = layer_with([math.log(v) for v in (1.0, 5.0, 2.0)], Switch()).eval()
    torch.testing.assert_close(layer.route(one()).assignment.dense(), torch.tensor([[0, 5 / 8, 0]]))


def test_the_jitter_multiplies_each_value_by_an_even_draw_around_one() -> None:
    layer = layer_with([1.0, 0.0], Switch(0.2))
    logits = layer.route(one(4000)).logits_TE[:, 0]
    assert 0.8 <= logits.min() < 0.81 and 1.19 < logits.max() <= 1.2
    assert logits.mean().item() == pytest.approx(1, abs=0.01)
    assert logits.var().item() == pytest.approx(0.4**2 / 12, rel=0.1)
    assert (layer.eval().route(one(9)).logits_TE[:, 0] == 1).all()


def test_the_experts_see_their_input_without_jitter() -> None:
    layer = layer_with([1.0], Switch(0.5))
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), layer.experts[0](x))  # a weight of 1


@pytest.mark.parametrize("jitter", [-0.1, 1.0, math.nan])
def test_a_bad_jitter_is_refused(jitter: float) -> None:
    with pytest.raises(ValueError, match=r"jitter must be in \[0, 1\)"):
        Switch(jitter)
