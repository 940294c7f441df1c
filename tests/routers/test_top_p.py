"""TopP takes the fewest experts that together are probable enough."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_cases import layer_with, one

from growmoe import FFN, MoE
from growmoe.routers import TopP


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (0.4, [0.5, 0, 0, 0]),
        (0.5, [0.5, 0, 0, 0]),
        (0.51, [0.5, 0.25, 0, 0]),
        (0.8, [0.5, 0.25, 0.15, 0]),
        (0.95, [0.5, 0.25, 0.15, 0.1]),
        (1.0, [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_worked_out_by_hand(p: float, want: list[float]) -> None:
    layer = layer_with([math.log(v) for v in (0.5, 0.25, 0.15, 0.1)], TopP(p - 1e-6 * (p == 0.5)))
    torch.testing.assert_close(layer.route(one()).assignment.dense(), torch.tensor([want]))


@given(st.floats(0.05, 0.95), st.integers(1, 6), st.sampled_from([None, 1, 2]), st.integers(0, 999))
def test_no_fewer_experts_would_do(p: float, experts: int, most: int | None, seed: int) -> None:
    layer = MoE(4, FFN(4), experts, TopP(p, most=most), seed=seed)
    x = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    routing = layer.route(x)
    for probs, taken in zip(routing.probs_TE, routing.assignment.dense() > 0, strict=True):
        number = int(taken.sum())
        assert number >= 1
        if most is not None:
            assert number <= most
        if number != most:
            assert probs[taken].sum() >= p - 1e-6
        if number > 1:
            fewer = combinations(probs.tolist(), number - 1)
            assert all(sum(some) < p + 1e-6 for some in fewer)


def test_its_loss_is_the_entropy_worked_out_by_hand() -> None:
    layer = layer_with([math.log(v) for v in (0.5, 0.25, 0.25)], TopP(entropy=2.0))
    aux = layer.route(one(3)).aux
    assert aux is not None and aux.item() == pytest.approx(2 * 1.5 * math.log(2))
    assert layer.eval().route(one(3)).aux is None


@pytest.mark.parametrize(
    "options", [{"p": 0}, {"p": 1.1}, {"p": math.nan}, {"entropy": -1.0}, {"most": 0}]
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="TopP: "):
        TopP(**options)
