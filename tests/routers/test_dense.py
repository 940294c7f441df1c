"""Dense weighs all experts by the softmax."""

from __future__ import annotations

import math

import torch
from router_cases import layer_with, one

from growmoe.routers import Dense


def test_weights_worked_out_by_hand() -> None:
    layer = layer_with([math.log(v) for v in (1.0, 2.0, 5.0)], Dense())
    torch.testing.assert_close(
        layer.route(one()).assignment.dense(), torch.tensor([[1 / 8, 2 / 8, 5 / 8]])
    )


def test_the_output_is_the_mixture_of_all_outputs() -> None:
    layer = layer_with([0.0, 0.0], Dense())
    x = torch.randn(5, 4)
    x[:, 0] = 0
    mean = sum(e(x) for e in layer.experts.values()) / 2
    torch.testing.assert_close(layer(x), mean)
