"""Bits per byte: worked out by hand where that can be done."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import growmoe
from growmoe.lm import Domain, evaluate, unigram_bits
from growmoe.lm.evaluate import expert_use, imbalance


class Fixed(nn.Module):
    """The same distribution everywhere."""

    def __init__(self, probs_V):
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(probs_V).log())
        self.seen = []

    def forward(self, token_BS):
        self.seen.append((self.training, token_BS.clone()))
        return self.logits_V.expand(*token_BS.shape, -1)


def domain(tokens, num_bytes=None):
    return Domain("x", tokens, tokens, tokens, (num_bytes or len(tokens),) * 3)


def test_a_uniform_model_of_bytes_needs_eight_bits():
    tokens = torch.randint(256, (1000,), dtype=torch.uint8)
    bits = evaluate(Fixed([1 / 256] * 256), {"x": domain(tokens)}, "test", 8, sequence_length=16)
    assert bits == {"x": pytest.approx(8.0, rel=1e-6)}


def test_bits_are_per_byte_not_per_token():
    tokens = torch.randint(16, (1000,))
    bits = evaluate(
        Fixed([1 / 16] * 16), {"x": domain(tokens, 4000)}, "test", 8, sequence_length=16
    )
    assert bits == {"x": pytest.approx(1.0, rel=1e-6)}


def test_it_is_the_mean_over_all_targets():
    tokens = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 0])
    bits = evaluate(
        Fixed([0.75, 0.25]), {"x": domain(tokens)}, windows=99, sequence_length=2, batch_size=3
    )
    expected = (2 * 2 + 6 * -math.log2(0.75)) / 8
    assert bits["x"] == pytest.approx(expected, rel=1e-6)


def test_it_sees_the_same_windows_each_time_in_eval_mode_and_leaves_the_modes():
    model = Fixed([0.5, 0.5])
    domains = {"x": domain(torch.randint(2, (500,)))}
    first, again = (evaluate(model, domains, sequence_length=8) for _ in range(2))
    assert first == again and model.training
    half = len(model.seen) // 2
    for (training, a), (_, b) in zip(model.seen[:half], model.seen[half:], strict=True):
        assert not training and torch.equal(a, b)


def test_the_unigram_figure_is_the_cross_entropy_of_smoothed_counts():
    tokens = torch.tensor([0, 0, 0, 1])
    # counts + 1: 4, 2, 1, 1 of 8
    assert unigram_bits(domain(tokens), 4) == pytest.approx((3 * 1 + 2) / 4)


def test_use_of_experts_tells_an_even_layer_from_one_that_collapsed():
    even = growmoe.MoE(4, growmoe.FFN(4), num_experts=2, router=growmoe.TopK(2))
    even(torch.randn(64, 4))
    assert imbalance(even) == pytest.approx(1.0)
    lone = growmoe.MoE(4, growmoe.FFN(4), num_experts=4, router=growmoe.TopK(1))
    for id, expert in lone.experts.items():
        nn.init.constant_(expert.entries.key, float(id == 2))
    lone(torch.rand(64, 4))
    assert imbalance(lone) == pytest.approx(4.0)
    use = expert_use(nn.Sequential(even, lone))
    assert use["experts"] == {"0": 2, "1": 4} and use["dropped"] == {"0": 0.0, "1": 0.0}
    assert use["load"]["1"]["2"] == 1 and sum(use["load"]["0"].values()) == pytest.approx(1)
    none = expert_use(nn.Linear(2, 2))
    assert none == {"experts": {}, "imbalance": {}, "dropped": {}, "load": {}}
