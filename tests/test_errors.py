"""Bad input gets an error that names the argument and what it got, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growmoe import EMA, FFN, ExpertChoice, MoE, Organizer, TopK, aux_loss, surgery


def a_layer(**options: Any) -> MoE:
    layer = MoE(8, FFN(8), 3, seed=0, **options)
    layer(torch.randn(6, 8))
    return layer


def state_of(layer: MoE) -> list[Tensor]:
    """All that could have changed, bit by bit."""
    records = [e.statistics.record for e in layer.experts.values()]
    own = [layer.recorder.novel, layer.recorder.lost, layer.generator.get_state()]
    counts = torch.tensor([layer.steps, layer.next_id, len(layer.lineage), len(layer.experts)])
    return [t.detach().clone() for t in (*layer.parameters(), *records, *own, counts)]


def refused(layer: MoE, act: Callable[[], object], message: str) -> None:
    """Assert that the act raises ValueError with this message and changes nothing."""
    before, aux = state_of(layer), layer._aux
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        act()
    after = state_of(layer)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layer._aux is aux
    assert torch.equal(torch.get_rng_state(), random)
    x = torch.randn(6, 8)
    assert layer.double()(x.double()).isfinite().all()


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


# Building.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(8, FFN(8), 1), r"k=2.*needs at least 2 experts, got num_experts=1"),
        (lambda: MoE(8, FFN(8), 3, TopK(4)), r"k=4.*at least 4 experts, got num_experts=3"),
        (lambda: MoE(0), r"d_model must be a positive integer, got 0"),
        (lambda: MoE(8.0), r"d_model must be a positive integer, got 8.0"),
        (lambda: MoE(8, num_experts=0), r"num_experts must be a positive integer, got 0"),
        (lambda: MoE(8, num_experts=-2), r"num_experts must be a positive integer, got -2"),
        (lambda: MoE(8, d_out=0), r"d_out must be a positive integer, got 0"),
        (lambda: MoE(8, d_out=-3), r"d_out must be a positive integer, got -3"),
        (lambda: MoE(8, warmup=0), r"warmup must be at least 1, got 0"),
        (lambda: MoE(8, evidence="all"), r"evidence must be 'inputs' or 'moments', got 'all'"),
        (lambda: MoE(8, [FFN(8), FFN(8)], 3), r"expert: 2 kinds for num_experts=3"),
        (lambda: MoE(8, [], 3), r"expert: 0 kinds for num_experts=3"),
        (lambda: MoE(8, 16), r"expert must be a module or a function .*, got 16"),
        (lambda: MoE(8, lambda: 3), r"expert: the function built 3, which is no module"),
        (lambda: MoE(8, NoReset()), r"NoReset.*no reset_parameters"),
        (lambda: MoE(8, nn.Sequential(NoReset())), r"NoReset \(0\).*no reset_parameters"),
        (lambda: MoE(8, FFN(8), shared=NoReset()), r"NoReset.*no reset_parameters"),
        (lambda: MoE(8, FFN(8, d_model=12)), r"d_model=12.* does not map d_model=8 to d_out=8"),
        (lambda: MoE(8, FFN(8, d_out=4)), r"d_out=4.* does not map d_model=8 to d_out=8"),
        (lambda: MoE(8, FFN(8), shared=FFN(8, d_out=4)), r"does not map d_model=8 to d_out=8"),
        (lambda: FFN(0), r"d_hidden must be a positive integer, got 0"),
        (lambda: FFN(8, "tanh"), r"activation must be one of .*, got 'tanh'"),
        (lambda: TopK(0), r"k must be a positive integer, got 0"),
        (lambda: TopK(1.5), r"k must be a positive integer, got 1.5"),
        (lambda: TopK(2, "max"), r"score must be one of .*, got 'max'"),
        (lambda: TopK(2, noise=-1.0), r"noise must not be negative, got -1.0"),
        (lambda: ExpertChoice(0), r"capacity must be positive, got 0"),
        (lambda: ExpertChoice(math.nan), r"capacity must be positive, got nan"),
        (lambda: ExpertChoice(math.inf), r"capacity must be positive.*, got inf"),
        (lambda: EMA(nn.Linear(2, 2), 1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: Organizer(nn.Linear(2, 2)), r"no growmoe.MoE layer"),
    ],
)
def test_building(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# Inputs.


def with_value(value: float) -> Tensor:
    x = torch.zeros(2, 3, 8)
    x[1, 2, 3] = x[0, 0, 0] = value
    return x


BAD_INPUTS = [
    (torch.zeros(4, 7), r"moe: input has shape \(4, 7\), .* must be d_model=8"),
    (torch.zeros(8, 4), r"input has shape \(8, 4\)"),
    (torch.zeros(0), r"input has shape \(0,\)"),
    (torch.tensor(1.0), r"input has shape \(\)"),
    (with_value(math.nan), r"moe: 2 of 48 input values are NaN or infinite"),
    (with_value(math.inf), r"2 of 48 input values are NaN or infinite"),
    (with_value(-math.inf), r"2 of 48 input values are NaN or infinite"),
    (torch.zeros(4, 8).double(), r"input is torch.float64, but .* weights are torch.float32"),
    (torch.zeros(4, 8).bfloat16(), r"input is torch.bfloat16, but .* weights are torch.float32"),
    (torch.zeros(4, 8).long(), r"input is torch.int64, it must be floating point"),
    (torch.zeros(4, 8).bool(), r"input is torch.bool, it must be floating point"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
def test_inputs(x: Tensor, message: str, training: bool) -> None:
    layer = a_layer().train(training)
    refused(layer, lambda: layer(x), message)


def test_inputs_on_the_slow_path() -> None:
    layer = a_layer().double()
    message = r"input is torch.float32, but the expert's weights are torch.float64"
    refused(layer, lambda: layer(torch.zeros(4, 8)), message)


def test_large_finite_inputs_are_fine() -> None:
    layer = a_layer().half()
    assert layer(torch.full((600, 8), 200.0, dtype=torch.float16)).isfinite().all()  # sum overflows


@pytest.mark.parametrize("width", [4, 1])
def test_an_expert_whose_output_has_the_wrong_width(width: int) -> None:
    layer = MoE(8, [FFN(8), nn.Linear(8, width), FFN(8)], 3, TopK(3), seed=0)
    layer.experts[1].body = nn.Linear(8, 8)
    layer(torch.randn(6, 8))
    layer.experts[1].body = nn.Linear(8, width)
    before = state_of(layer)
    message = rf"expert 1 \(Linear\) mapped \(6, 8\) to \(6, {width}\), expected \(6, 8\)"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(layer), strict=True))


@pytest.mark.parametrize("width", [4, 1])
def test_a_shared_expert_whose_output_has_the_wrong_width(width: int) -> None:
    layer = a_layer(shared=nn.Linear(8, 8))
    layer.shared = nn.Linear(8, width)
    before = state_of(layer)
    message = rf"moe: the shared expert mapped \(6, 8\) to \(6, {width}\), expected \(6, 8\)"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(layer), strict=True))


# Structure.


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: surgery.spawn(m, 7), r"no expert 7 \(unknown\); the living are \[0, 1, 2\]"),
        (lambda m: surgery.spawn(m, 0, noise=-1.0), r"noise must not be negative.*, got -1.0"),
        (lambda m: surgery.spawn(m, 0, expert=FFN(8)), r"give parent or expert"),
        (lambda m: surgery.spawn(m, toward=torch.zeros(7)), r"toward must be .*8 finite numbers"),
        (
            lambda m: surgery.spawn(m, toward=torch.full((8,), math.nan)),
            r"toward must be .*8 finite",
        ),
        (lambda m: surgery.spawn(m, expert=NoReset()), r"no reset_parameters"),
        (lambda m: surgery.spawn(m, expert=FFN(8, d_out=4)), r"does not map"),
        (lambda m: surgery.merge(m, [0]), r"at least two experts, got \[0\]"),
        (lambda m: surgery.merge(m, [0, 0]), r"names an expert twice"),
        (lambda m: surgery.merge(m, [0, 1, 2]), r"needs at least 2 experts"),
        (lambda m: surgery.prune(m, [0, 1]), r"needs at least 2 experts"),
        (lambda m: surgery.prune(m, []), r"at least one expert must be named"),
        (lambda m: surgery.prune(m, 0), r"ids must be a sequence of integers, got 0"),
        (lambda m: surgery.freeze(m, ["0"]), r"ids must be a sequence of integers"),
        (lambda m: surgery.thaw(m, [9]), r"no expert 9"),
    ],
)
def test_structure(act: Callable[[MoE], object], message: str) -> None:
    layer = a_layer()
    refused(layer, lambda: act(layer), message)


def test_an_unknown_id_names_the_living() -> None:
    layer = a_layer()
    for id in (3, -1, "0", None):
        with pytest.raises(KeyError, match=r"the living are \[0, 1, 2\]"):
            layer.experts[id]
        assert id not in layer.experts


def test_the_error_says_which_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, FFN(8), 3, seed=0))
    Organizer(model)
    with pytest.raises(ValueError, match=r"^1: input has shape"):
        model[1](torch.zeros(4, 7))


def test_an_error_leaves_the_last_auxiliary_loss() -> None:
    layer = a_layer()
    with pytest.raises(ValueError, match="input has shape"):
        layer(torch.zeros(4, 7))
    assert aux_loss(layer) > 0
