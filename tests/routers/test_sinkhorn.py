"""Sinkhorn and BASE give every expert the same load."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_cases import layer_with

from growmoe import FFN, MoE
from growmoe.routers import BASE, Sinkhorn
from growmoe.routers.sinkhorn import balanced_assignment, transport_plan


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.1, 4), st.integers(0, 10**6))
def test_rows_and_columns_of_the_plan_have_equal_sums(
    t: int, e: int, size: float, seed: int
) -> None:
    plan = transport_plan(size * randn(t, e, seed=seed), 10_000).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((t,), 1 / t).double())
    torch.testing.assert_close(plan.sum(0), torch.full((e,), 1 / e).double(), rtol=2e-4, atol=0)


@given(*[st.floats(0.1, 10)] * 4)
def test_two_by_two_in_closed_form(a: float, b: float, c: float, d: float) -> None:
    plan = 2 * transport_plan(torch.tensor([[a, b], [c, d]]).log().double(), 1000).exp()
    p = math.sqrt(a * d) / (math.sqrt(a * d) + math.sqrt(b * c))
    torch.testing.assert_close(
        plan, torch.tensor([[p, 1 - p], [1 - p, p]]).double(), rtol=0, atol=2e-4
    )


def test_the_plan_is_the_kernel_scaled_by_rows_and_columns() -> None:
    logits = randn(5, 3, seed=1)
    ratio = transport_plan(logits, 10_000) - logits
    crossed = ratio - ratio[:1] - ratio[:, :1] + ratio[:1, :1]
    assert crossed.abs().max() < 1e-12


def test_columns_may_have_shares() -> None:
    share = torch.tensor([0.5, 0.3, 0.2, 0.0]).double()
    logits = randn(20, 4, seed=2)
    logits[:, 3] = -math.inf
    plan = transport_plan(logits, 10_000, share).exp()
    torch.testing.assert_close(plan.sum(0), share, rtol=2e-4, atol=0)


def test_in_training_the_load_is_nearly_even_and_in_eval_mode_the_best_logits_win() -> None:
    layer = MoE(8, FFN(4), 4, Sinkhorn(1), seed=0)
    with torch.no_grad():
        layer.experts[2].entries.key.fill_(1.0)
    x = torch.randn(400, 8) + 0.5
    skewed = layer.eval().route(x).assignment
    assert skewed.counts_E[2] > 250
    even = layer.train().route(x)
    assert even.assignment.counts_E.min() > 60 and even.assignment.counts_E.max() < 140
    # the weights are the gate's probabilities
    dense = even.assignment.dense()
    assert torch.equal(dense[dense > 0], even.probs_TE[dense > 0])


# BASE.


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_no_other_even_division_has_a_larger_sum(tokens: int, experts: int) -> None:
    for seed in range(3):
        logits = 3 * randn(tokens, experts, seed=seed)
        chosen = balanced_assignment(logits)
        fewest, most = tokens // experts, -(-tokens // experts)

        def value(choice: tuple[int, ...], logits: torch.Tensor = logits) -> float:
            return sum(float(logits[t, e]) for t, e in enumerate(choice))

        best = max(
            value(choice)
            for choice in product(range(experts), repeat=tokens)
            if all(fewest <= Counter(choice)[e] <= most for e in range(experts))
        )
        assert value(tuple(chosen.tolist())) == pytest.approx(best)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 10**6))
def test_every_expert_has_the_same_number_but_for_one(tokens: int, experts: int, seed: int) -> None:
    logits = randn(tokens, experts, seed=seed)
    logits[:, 0] += 5
    counts = torch.bincount(balanced_assignment(logits), minlength=experts)
    assert counts.min() == tokens // experts and counts.max() == -(-tokens // experts)


def test_loads_in_proportion_to_shares() -> None:
    logits = randn(40, 3, seed=0)
    logits[:, 2] = -math.inf
    counts = torch.bincount(balanced_assignment(logits, [1.0, 0.6, 0.0]), minlength=3)
    assert counts.tolist() == [25, 15, 0]


def test_base_weighs_by_the_sigmoid_and_is_greedy_in_eval_mode() -> None:
    layer = layer_with([0.0, math.log(3)], BASE())
    x = torch.eye(4)[:1].expand(6, 4)
    assert layer.route(x).assignment.counts_E.tolist() == [3, 3]
    dense = layer.eval().route(x).assignment.dense()
    torch.testing.assert_close(dense, torch.tensor([[0, 0.75]]).expand(6, 2))


def test_bad_settings_are_refused() -> None:
    for options in ({"k": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="must be a positive integer, got 0"):
            Sinkhorn(**options)
