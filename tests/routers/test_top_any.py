"""TopAny takes every expert whose threshold is passed, and the nearest where none is."""

from __future__ import annotations

import math

import pytest
import torch

from growmoe import FFN, MoE
from growmoe.routers import TopAny


def layer_of(keys: list[list[float]], thresholds: list[float], **options: float) -> MoE:
    layer = MoE(2, FFN(4), len(keys), TopAny(**options), seed=0)
    with torch.no_grad():
        for e, key, threshold in zip(layer.experts.values(), keys, thresholds, strict=True):
            e.entries.key.copy_(torch.tensor(key))
            e.entries.threshold.fill_(threshold)
    return layer


X = torch.tensor([[2.0, 0.0]])
KEYS = [[3.0, 0.0], [1.0, 1.0], [0.0, -4.0], [-1.0, 0.0]]  # cosines 1, .707, 0, -1


@pytest.mark.parametrize(
    ("thresholds", "taken"),
    [
        ([0, 0, 0.1, 0], [0, 1]),
        ([1.1, 0.7, 0.1, -0.9], [1]),
        ([0, 0, -0.1, -1.1], [0, 1, 2, 3]),
        ([2, 2, 0.2, 0], [2]),  # nobody passes; 2 lacks the least
    ],
)
def test_worked_out_by_hand(thresholds: list[float], taken: list[int]) -> None:
    dense = layer_of(KEYS, thresholds).route(X).assignment.dense()[0]
    want = [1 / len(taken) if e in taken else 0.0 for e in range(4)]
    assert dense.tolist() == pytest.approx(want)


def test_the_gradient_of_a_threshold_is_that_of_its_sigmoid() -> None:
    layer = layer_of(KEYS, [0.0, 0.0, 0.1, 0.0])
    layer.route(X).assignment.dense()[0, 0].backward()
    # weight (1/2)(σ(cos) − σ(g)), σ' at 0 is 1/4
    assert layer.experts[0].entries.threshold.grad.item() == pytest.approx(-1 / 8)


def test_its_loss_worked_out_by_hand() -> None:
    layer = layer_of([[3.0, 0.0], [1.0, 1.0], [0.0, -4.0]], [0, 0, 0], diversity=0.5)
    # off-diagonal cosines .707, 0, −.707, each twice: ‖·‖² = 4 · 1/2; norms 3, √2, 4
    want = 0.5 * (math.sqrt(2) + (7 + math.sqrt(2)) / 3)
    aux = layer.route(X).aux
    assert aux is not None and aux.item() == pytest.approx(want)
    assert layer.eval().route(X).aux is None


def test_its_loss_alone_makes_alike_keys_different_and_shorter() -> None:
    layer = layer_of([[3.0, 0.1], [3.0, -0.1]], [0, 0], diversity=1.0)
    keys = [e.entries.key for e in layer.experts.values()]
    optimizer = torch.optim.SGD(keys, lr=0.1)
    for _ in range(50):
        layer.route(X).aux.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(float(torch.cosine_similarity(*keys, dim=0).detach())) < 0.5
    assert all(key.norm() < 2.9 for key in keys)


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="diversity must not be negative"):
        TopAny(-1.0)
