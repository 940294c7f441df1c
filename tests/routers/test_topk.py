"""TopK chooses the k largest logits and weighs them as its formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import growmoe
from growmoe import FFN, MoE, Routing, TopK

SCORES = ["softmax", "softmax_topk", "sigmoid"]


def layer_with(logits: list[float], router: TopK, **options: object) -> MoE:
    """A layer whose gate gives these logits for the input (1, 0, ...)."""
    layer = MoE(4, FFN(4), len(logits), router, seed=0, **options)
    with torch.no_grad():
        for e, logit in zip(layer.experts.values(), logits, strict=True):
            e.entries.key.zero_()[0] = logit
    return layer


def route(layer: MoE, tokens: int = 1) -> Routing:
    return layer.route(torch.eye(4)[:1].expand(tokens, 4))


LN = [math.log(v) for v in (1.0, 2.0, 5.0)]  # softmax 1/8, 2/8, 5/8; sigmoid 1/2, 2/3, 5/6


@pytest.mark.parametrize(
    ("score", "renormalize", "want"),
    [
        ("softmax", False, [0, 2 / 8, 5 / 8]),
        ("softmax", True, [0, 2 / 7, 5 / 7]),
        ("softmax_topk", False, [0, 2 / 7, 5 / 7]),
        ("softmax_topk", True, [0, 2 / 7, 5 / 7]),
        ("sigmoid", False, [0, 2 / 3, 5 / 6]),
        ("sigmoid", True, [0, 4 / 9, 5 / 9]),
    ],
)
def test_weights_worked_out_by_hand(score: str, renormalize: bool, want: list[float]) -> None:
    routing = route(layer_with(LN, TopK(2, score, renormalize)))
    torch.testing.assert_close(routing.assignment.dense(), torch.tensor([want]))
    probs = [1 / 2, 2 / 3, 5 / 6] if score == "sigmoid" else [1 / 8, 2 / 8, 5 / 8]
    torch.testing.assert_close(routing.probs_TE, torch.tensor([probs]))
    torch.testing.assert_close(routing.logits_TE, torch.tensor([LN]))


def test_a_single_choice_that_is_renormalized_weighs_one() -> None:
    for score in SCORES:
        dense = route(layer_with(LN, TopK(1, score, renormalize=True))).assignment.dense()
        assert dense.tolist() == [[0, 0, 1]]


@given(
    k=st.integers(1, 4),
    score=st.sampled_from(SCORES),
    renormalize=st.booleans(),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_k_largest_of_each_token(
    k: int, score: str, renormalize: bool, tokens: int, seed: int
) -> None:
    layer = MoE(4, FFN(4), 5, TopK(k, score, renormalize), seed=seed)
    x = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    routing = layer.route(x)
    dense = routing.assignment.dense()
    assert dense.shape == (tokens, 5)
    assert ((dense > 0).sum(1) == k).all()
    if tokens:
        kept = routing.logits_TE.masked_fill(dense == 0, math.inf).amin(1)
        left = routing.logits_TE.masked_fill(dense > 0, -math.inf).amax(1)
        assert (kept >= left).all()
    if renormalize or score == "softmax_topk":
        torch.testing.assert_close(dense.sum(1), torch.ones(tokens))
    if score != "sigmoid":
        torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(tokens))


def test_noise_is_drawn_in_training_only() -> None:
    layer = layer_with(LN, TopK(1, noise=3.0))
    chosen = route(layer, 400).assignment.counts_E
    assert (chosen > 20).all()
    assert route(layer.eval(), 400).assignment.counts_E.tolist() == [0, 0, 400]


def test_noise_has_the_standard_deviation_it_is_given() -> None:
    layer = layer_with([0.0, 0.0], TopK(1, noise=2.0))
    logits = route(layer, 5000).logits_TE
    assert logits.std().item() == pytest.approx(2.0, rel=0.05)
    assert logits.mean().abs().item() < 0.1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("training", [True, False])
def test_an_expert_not_admitted_is_never_chosen_while_others_can_be(
    score: str, training: bool
) -> None:
    layer = layer_with([0.0, -50.0, -50.0, 9.0], TopK(3, score, noise=1.0)).train(training)
    layer.experts[3].admission = 0.0
    dense = route(layer, 50).assignment.dense()
    assert (dense[:, :3] > 0).all() or score == "softmax"  # softmax of -50 may vanish
    assert route(layer, 50).assignment.counts_E.tolist() == [50, 50, 50, 0]


@pytest.mark.parametrize("score", SCORES)
def test_an_expert_not_admitted_weighs_nothing_where_it_must_be_chosen(score: str) -> None:
    layer = layer_with([0.0, 9.0], TopK(2, score))
    layer.experts[1].admission = 0.0
    layer.zero_grad()
    dense = route(layer).assignment.dense()
    assert dense[0, 1] == 0 and dense[0, 0] > 0
    layer(torch.eye(4)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_admission_offsets_the_logit_by_its_log() -> None:
    layer = layer_with([0.0, 0.0], TopK(2))
    layer.experts[1].admission = 0.25
    torch.testing.assert_close(route(layer).probs_TE, torch.tensor([[0.8, 0.2]]))


@pytest.mark.parametrize("score", SCORES)
def test_a_birth_changes_no_output(score: str) -> None:
    layer = MoE(8, FFN(8), 3, TopK(2, score), seed=1).eval()
    x = torch.randn(50, 8)
    y = layer(x)
    growmoe.surgery.spawn(layer, 0)
    growmoe.surgery.spawn(layer)
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-7)


def test_the_gate_computes_in_float32_under_autocast_and_in_half() -> None:
    layer = MoE(4, FFN(4), 3, seed=0)
    x = torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.route(x)
    assert torch.equal(routing.logits_TE, layer.route(x).logits_TE)
    assert layer.bfloat16().route(x.bfloat16()).logits_TE.dtype is torch.float32
    assert layer.double().route(x.double()).logits_TE.dtype is torch.float64


def test_weights_have_the_right_gradients() -> None:
    keys = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for score in SCORES:
        layer = MoE(3, FFN(4), 4, TopK(2, score), seed=0).double()

        def dense(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            for e, key in zip(layer.experts.values(), keys, strict=True):  # noqa: B023
                e.entries._parameters["key"] = key
            return layer.route(x).assignment.dense()  # noqa: B023

        assert torch.autograd.gradcheck(dense, (x, keys))
