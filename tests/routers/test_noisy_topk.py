"""NoisyTopK adds noise of a learned width, and counts the load as it might have been."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one, within_3_sd

from growmoe import TopK
from growmoe.routers import NoisyTopK
from growmoe.routers.noisy_topk import cv_squared, smooth_load


def phi(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_keep_top_k_worked_out_by_hand() -> None:
    layer = layer_with([math.log(v) for v in (1.0, 2.0, 5.0)], NoisyTopK(2)).eval()
    torch.testing.assert_close(
        layer.route(one()).assignment.dense(), torch.tensor([[0, 2 / 7, 5 / 7]])
    )


def test_the_noise_begins_with_softplus_of_zero() -> None:
    logits = layer_with([1.0, -1.0], NoisyTopK(1)).route(one(8000)).logits_TE
    assert (logits[:, 0] - 1).std().item() == pytest.approx(math.log(2), rel=0.03)
    assert (logits[:, 1] + 1).std().item() == pytest.approx(math.log(2), rel=0.03)


def test_the_load_worked_out_by_hand() -> None:
    clean = torch.tensor([[0.0, 1.0, 3.0]])
    noisy = torch.tensor([[2.0, 1.5, 2.5]])
    sd = torch.tensor([[1.0, 2.0, 0.5]])
    # the best of the others: 2.5 for 0 and 1; 2.0 for 2
    want = [phi(-2.5 / 1), phi(-1.5 / 2), phi(1 / 0.5)]
    assert smooth_load(clean, noisy, sd, 1).tolist() == pytest.approx(want)
    # the second best of the others: 1.5, 2.0, 1.5
    want = [phi(-1.5 / 1), phi(-1.0 / 2), phi(1.5 / 0.5)]
    assert smooth_load(clean, noisy, sd, 2).tolist() == pytest.approx(want)
    assert smooth_load(clean, noisy, sd, 3).tolist() == [1, 1, 1]


def test_the_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again() -> None:
    clean, sd = torch.tensor([[0.3, -0.2, 0.5, 0.1]]), torch.tensor([[0.7, 1.0, 0.4, 0.9]])
    noisy = clean + sd * torch.randn(1, 4)
    load = smooth_load(clean, noisy, sd, 2)
    for e in range(4):
        again = noisy.repeat(20_000, 1)
        again[:, e] = clean[0, e] + sd[0, e] * torch.randn(20_000)
        hits = (again.topk(2).indices == e).any(1).sum().item()
        assert within_3_sd(hits, 20_000, float(load[e]))


def test_the_squared_coefficient_of_variation_worked_out_by_hand() -> None:
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(1 / 4)
    assert cv_squared(torch.tensor([2.0, 2.0])).item() == 0
    assert cv_squared(torch.zeros(3)).item() == 0
    assert cv_squared(torch.tensor([5.0])).item() == 0


def test_its_losses_are_least_where_all_is_even_and_off_in_eval_mode() -> None:
    even = layer_with([0.0, 0.0], NoisyTopK(2, importance=1.0, load=1.0))
    aux = even.route(one(500)).aux
    assert aux is not None and aux < 0.01
    skewed = layer_with([4.0, 0.0, 0.0], NoisyTopK(1, importance=1.0, load=1.0))
    aux = skewed.route(one(500)).aux
    assert aux is not None and aux.item() == pytest.approx(4, rel=0.05)  # CV² of (1, 0, 0), twice
    assert skewed.eval().route(one(5)).aux is None
    assert NoisyTopK().balances and not TopK().balances


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        NoisyTopK(0)
    with pytest.raises(ValueError, match="must not be negative"):
        NoisyTopK(2, load=-1.0)
