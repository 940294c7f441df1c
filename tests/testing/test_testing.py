"""The public checks pass what the library has, and name what is wrong with what is broken."""

from __future__ import annotations

import pytest
import torch
from slow_parameters import but_slow
from torch import nn

import growmoe
from growmoe import rules, testing
from growmoe.experts.zero_computation import Constant, Copy
from growmoe.rules import Proposal

OWN = [
    getattr(rules, name)
    for name in rules.__all__
    if isinstance(getattr(rules, name), type) and name not in ("Rule", "Proposal")
]


@pytest.mark.parametrize("rule", but_slow(OWN, rules.SpawnOnNovelty), ids=lambda r: r.__name__)
@pytest.mark.parametrize(
    "contract",
    # the others need layers that have lived for some hundred steps
    but_slow(testing.RULE_CONTRACTS, testing.RULE_CONTRACTS[-1]),
    ids=lambda c: c.__name__,
)
def test_every_rule_of_the_library_keeps_the_contract(rule, contract):
    contract(rule())


@pytest.mark.parametrize(
    "kind", but_slow(["ffn", "swiglu", "copy", "constant", "module", "function"], "ffn")
)
def test_every_kind_of_expert_of_the_library_keeps_the_contract(kind):
    templates = {
        "ffn": growmoe.FFN(16),
        "swiglu": growmoe.FFN(8, activation="swiglu", bias=True),
        "copy": Copy(),
        "constant": Constant(),
        "module": nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8)),
        "function": lambda: nn.Linear(8, 8),
    }
    testing.check_expert(templates[kind])


@pytest.mark.slow
def test_an_expert_may_be_narrower_than_its_input():
    testing.check_expert(growmoe.FFN(6), d_model=6, d_out=3)


class Ahead(growmoe.TopK):
    """Looks at the whole batch."""

    def forward(self, x_TD, experts, admission_E, context=None):
        return super().forward(x_TD + x_TD.mean(0), experts, admission_E, context)


class Open(growmoe.TopK):
    """Forgets who is admitted."""

    def forward(self, x_TD, experts, admission_E, context=None):
        return super().forward(x_TD, experts, torch.ones_like(admission_E), context)


class Counting(growmoe.TopK):
    """Changes what it decides in the forward itself, and keeps that in no buffer."""

    calls = 0

    def forward(self, x_TD, experts, admission_E, context=None):
        self.calls += self.training
        return super().forward(x_TD * (1 + 0.1 * self.calls), experts, admission_E, context)


class Unsorted(growmoe.TopK):
    """Gives the rows in another order than the experts'."""

    def forward(self, x_TD, experts, admission_E, context=None):
        routing = super().forward(x_TD, experts, admission_E, context)
        a = routing.assignment
        other = growmoe.Assignment(
            a.token_R.flip(0), a.expert_R.flip(0), a.weight_R.flip(0), a.counts_E, a.num_tokens
        )
        return growmoe.Routing(other, routing.probs_TE, routing.logits_TE)


@pytest.mark.parametrize(
    ("router", "broken"),
    [
        (Ahead, ["later tokens change nothing"]),
        pytest.param(
            Open,
            ["a birth changes no output", "an expert that is not admitted weighs nothing"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Counting,
            ["training goes on from a checkpoint", "recomputation gives the same"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Unsorted,
            ["its choice is a well formed assignment: expert_R is not ascending"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_router_is_found_and_what_is_wrong_is_named(router, broken):
    with pytest.raises(AssertionError) as caught:
        testing.check_router(router)
    for contract in broken:
        assert f"- {contract}" in str(caught.value)


class Ghost:
    def propose(self, signals):
        return [Proposal("prune", (99,), "a ghost", {})]


class Moody:
    def __init__(self):
        self.times = 0

    def propose(self, signals):
        self.times += 1
        return [Proposal("freeze", (signals.ids[0],), f"asked {self.times} times", {})]


class Meddler:
    def propose(self, signals):
        signals.values["load"][0] = 0.0
        return []


class Silent:
    def propose(self, signals):
        return [Proposal("spawn", (), " ", {})]


class Generator:
    def propose(self, signals):
        yield Proposal("spawn", (), "why not", {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (Ghost, "no living expert [99]"),
        (Moody, "it keeps nothing in mind"),
        (Meddler, "it touches neither model nor signals"),
        (Silent, "no reason"),
        (Generator, "not a list"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_rule_is_found_and_what_is_wrong_is_named(rule, broken):
    with pytest.raises(AssertionError) as caught:
        testing.check_rule(rule())
    assert broken in str(caught.value)


def test_a_class_is_no_rule():
    with pytest.raises(AssertionError, match="is no rule"):
        testing.check_rule(Ghost)


class Crowd(nn.Linear):
    """A row's output depends on the other rows."""

    def forward(self, x):
        return super().forward(x - (x.mean(0) if len(x) else 0))


class Hoarder(nn.Linear):
    """Its clones share a tensor with it."""

    def __deepcopy__(self, memo):
        twin = Hoarder(self.in_features, self.out_features)
        twin.weight, twin.bias = self.weight, self.bias
        return twin


@pytest.mark.parametrize(
    ("template", "broken"),
    [
        pytest.param(
            lambda: Crowd(8, 8), "it maps rows to rows each for itself", marks=pytest.mark.slow
        ),
        (lambda: Hoarder(8, 8), "a clone shares memory with its parent"),
        (lambda: nn.Linear(8, 9), "it maps rows to rows"),
    ],
    ids=["crowd", "hoarder", "wide"],
)
def test_a_broken_expert_is_found_and_what_is_wrong_is_named(template, broken):
    with pytest.raises(AssertionError) as caught:
        testing.check_expert(template)
    assert broken in str(caught.value)
