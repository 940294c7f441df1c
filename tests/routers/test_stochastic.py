"""Stochastic draws as often as it says; ExpertDropout hides as often."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import layer_with, one, within_3_sd

from growmoe import TopK
from growmoe.losses import z_loss
from growmoe.routers import ExpertDropout, Stochastic

N = 20_000
P = (0.1, 0.2, 0.3, 0.4)
LN = [math.log(p) for p in P]


def counts(router: Stochastic, training: bool = True) -> list[int]:
    return layer_with(LN, router).train(training).route(one(N)).assignment.counts_E.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_are_as_frequent_as_the_probabilities(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in P]
    for count, p in zip(counts(Stochastic(1, temperature=temperature)), powers, strict=True):
        assert within_3_sd(count, N, p / sum(powers))


def test_two_draws_are_without_replacement() -> None:
    chances = [p + sum(q * p / (1 - q) for q in P if q != p) for p in P]
    for count, p in zip(counts(Stochastic(2)), chances, strict=True):
        assert within_3_sd(count, N, p)


@pytest.mark.parametrize("k", [1, 2])
def test_a_uniform_draw_takes_all_alike_with_weight_one_over_k(k: int) -> None:
    layer = layer_with(LN, Stochastic(k, "uniform"))
    a = layer.route(one(N)).assignment
    assert all(within_3_sd(count, N, k / 4) for count in a.counts_E.tolist())
    torch.testing.assert_close(a.weight_R, torch.full((k * N,), 1 / k))
    assert layer.router.balances and not Stochastic(1).balances


def test_the_best_are_taken_without_a_draw() -> None:
    layer = layer_with(LN, Stochastic(2)).eval()
    want = torch.tensor([[0, 0, 3 / 7, 4 / 7]]).expand(50, 4)
    torch.testing.assert_close(layer.route(one(50)).assignment.dense(), want)
    layer = layer_with(LN, Stochastic(1, "best")).train()
    want = torch.tensor([[0, 0, 0, 0.4]]).expand(50, 4)
    torch.testing.assert_close(layer.route(one(50)).assignment.dense(), want)


def test_inference_may_draw_too_and_then_answers_differ() -> None:
    for count, p in zip(counts(Stochastic(1, inference="sample"), False), P, strict=True):
        assert within_3_sd(count, N, p)
    layer = layer_with(LN, Stochastic(1, inference="uniform")).eval()
    answers = torch.stack([layer(one(20)) for _ in range(2)])
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("options", [{"k": 0}, {"train": "often"}, {"temperature": 0.0}])
def test_bad_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Stochastic: "):
        Stochastic(**options)  # type: ignore[arg-type]


# ExpertDropout.


def test_each_expert_is_hidden_from_each_token_as_often() -> None:
    layer = layer_with(LN, TopK(1, gate=ExpertDropout(0.3)))
    hidden = layer.route(one(N)).logits_TE < -100
    all_hidden = 0.3**4
    for e in range(4):
        assert within_3_sd(hidden[:, e].sum().item(), N, 0.3 - all_hidden)
    both = (hidden[:, 0] & hidden[:, 1]).sum().item()
    assert within_3_sd(both, N, 0.09 - all_hidden)
    assert not (layer.eval().route(one(50)).logits_TE < -100).any()


def test_the_best_of_those_in_sight_is_chosen() -> None:
    layer = layer_with(LN, TopK(1, gate=ExpertDropout(0.5)))
    a = layer.route(one(N)).assignment
    # all hidden is none hidden: 3 is chosen then too
    want = [1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 16]
    for count, p in zip(a.counts_E.tolist(), want, strict=True):
        assert within_3_sd(count, N, p)


def test_a_token_from_which_all_would_be_hidden_sees_all_and_has_ordinary_logits() -> None:
    layer = layer_with(LN, TopK(2, gate=ExpertDropout(0.9)))
    layer.experts[0].admission = 0.0
    routing = layer.route(one(500))
    assert z_loss(routing).detach() < 100
    assert (routing.logits_TE[:, 1:] > -100).any(1).all()
    assert (routing.assignment.dense() > 0).any(1).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_a_bad_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        ExpertDropout(p)
