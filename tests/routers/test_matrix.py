"""What holds for every way of choosing: the reference's numbers, surgery, memory, precision."""

from __future__ import annotations

import pytest
import torch
from reference import compare, reference
from router_cases import CASES, EVERY, KINDS, D, build, inputs
from slow_parameters import but_slow
from torch import nn

from growmoe import FFN, MoE
from growmoe.routers import Gate, Router

FAST, SLOW = 1e-5, 1e-12  # float32 by the pool, float64 by the loop
CLEAR = 1e-4  # a decision nearer than this to falling otherwise is not compared

every_way = pytest.mark.parametrize("name", but_slow(CASES, *KINDS))


def test_no_way_of_choosing_is_left_out() -> None:
    used = {type(m).__name__ for name in CASES for m in CASES[name].make().modules()}
    for name, kind in EVERY.items():
        if issubclass(kind, Router | Gate) and name not in ("Router", "Gate", "ClosedFormGate"):
            assert name in used, f"{name} is not in the matrix"


def equals_the_reference(name: str, layer: MoE, tokens: int | tuple[int, ...] = 10) -> None:
    """In float32 and in float64, output, gradients and auxiliary loss."""
    shape = (tokens,) if isinstance(tokens, int) else tokens
    for seed in range(7, 60):
        x = inputs(torch.Size(shape).numel(), seed).view(*shape, D)
        context = CASES[name].context(x.numel() // D)
        if reference(layer, x, context=context, seed=seed).margin > CLEAR:
            break
    else:
        raise AssertionError("no input is clear enough")
    compare(layer, x, FAST, context=context, seed=seed, aux=True)
    layer = layer.double()
    x = x.double()
    if reference(layer, x, context=context, seed=seed).margin > 1e-9:
        compare(layer, x, SLOW, context=context, seed=seed, aux=True)


@every_way
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_and_every_gradient_are_the_references(name: str, training: bool) -> None:
    # nothing that is learned has a part in a uniform choice
    layer = build(name, z_loss=0.0 if name == "stochastic uniform" else 0.01).train(training)
    equals_the_reference(name, layer)


@every_way
def test_a_newborn_half_let_in_is_as_the_reference_has_it(name: str) -> None:
    layer = build(name, warmup=4)
    layer.experts[3].admission = 0.25
    equals_the_reference(name, layer)
    layer = build(name)
    layer.experts[3].admission = 0.0
    equals_the_reference(name, layer.eval())


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8))


VARIANTS = {
    "no input": lambda name: (build(name), 0),
    "no sequence": lambda name: (build(name), (0, 3)),
    "empty sequences": lambda name: (build(name), (2, 0)),
    "one token": lambda name: (build(name), 1),
    "sequences": lambda name: (build(name), (2, 3)),
    "as few experts as may be": lambda name: (build(name, CASES[name].make().min_experts), 4),
    "frozen": lambda name: (frozen(build(name)), 6),
    "another kind": lambda name: (build(name, 4, expert=[FFN(6), sequential, FFN(6), FFN(4)]), 6),
    "shared": lambda name: (build(name, shared=FFN(4), d_out=5), 6),
}


def frozen(layer: MoE) -> MoE:
    for id in (1, 2):
        layer.experts[id].freeze()
    return layer


@every_way
@pytest.mark.parametrize(
    "variant", but_slow(VARIANTS, "no input", "one token", "as few experts as may be", "frozen")
)
def test_unusual_layers_and_inputs_are_as_the_reference_has_them(name: str, variant: str) -> None:
    if name == "sinkhorn" and variant == "one token":
        pytest.skip("the plan of one token has equal entries: any choice is right")
    if variant == "shared" and name.startswith("multi gate") and name != "multi gate task":
        pytest.skip("one output for each task: see test_multi_gate")
    equals_the_reference(name, *VARIANTS[variant](name))
