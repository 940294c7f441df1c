"""Gumbel draws as the softmax says, with a gradient straight through."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one, within_3_sd

from growmoe.routers import Gumbel
from growmoe.routers.gumbel import gumbel_like

N = 20_000
P = (0.1, 0.2, 0.3, 0.4)
LN = [math.log(p) for p in P]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_choices_are_as_frequent_as_the_softmax_of_the_logits(temperature: float) -> None:
    # the largest of logit + noise does not depend on what divides it
    layer = layer_with(LN, Gumbel(1, temperature))
    counts = layer.route(one(N)).assignment.counts_E.tolist()
    for count, p in zip(counts, P, strict=True):
        assert within_3_sd(count, N, p)


def test_k_choices_are_draws_without_replacement() -> None:
    chosen = layer_with(LN, Gumbel(2)).route(one(N)).assignment.dense() > 0
    for i in range(4):
        for j in range(i):
            both = (chosen[:, i] & chosen[:, j]).sum().item()
            p = P[i] * P[j] / (1 - P[i]) + P[j] * P[i] / (1 - P[j])
            assert within_3_sd(both, N, p)


def test_without_noise_in_eval_mode() -> None:
    layer = layer_with(LN, Gumbel(2)).eval()
    want = torch.tensor([[0, 0, 0.5, 0.5]])
    torch.testing.assert_close(layer.route(one()).assignment.dense(), want)
    soft = layer_with(LN, Gumbel(hard=False)).eval()
    torch.testing.assert_close(soft.route(one()).assignment.dense(), torch.tensor([P]))
    cold = layer_with(LN, Gumbel(temperature=0.5, hard=False)).eval()
    want = torch.tensor([[p * p for p in P]]) / sum(p * p for p in P)
    torch.testing.assert_close(cold.route(one()).assignment.dense(), want)


@pytest.mark.parametrize("k", [1, 2])
def test_the_straight_through_gradient_is_the_soft_one(k: int) -> None:
    x, cotangent = one(30), torch.randn(30, 4)
    gradients = []
    hard, soft = layer_with(LN, Gumbel(k, 0.7)), layer_with(LN, Gumbel(temperature=0.7, hard=False))
    for layer in (hard, soft):
        torch.manual_seed(1)
        weights = layer.route(x).assignment.dense()
        if layer is hard:
            chosen = weights > 0
            assert torch.equal(weights[chosen], torch.full_like(weights[chosen], 1 / k))
        (weights * cotangent * chosen / (k if layer is soft else 1)).sum().backward()
        gradients.append(torch.stack([e.entries.key.grad for e in layer.experts.values()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gumbel_draws_have_the_right_moments() -> None:
    draw = gumbel_like(torch.empty(100_000, dtype=torch.float64))
    assert draw.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert draw.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Gumbel(temperature=0)
