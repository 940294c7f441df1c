"""Every way of choosing outlives surgery, checkpoints, copies, recomputation and low precision.

The contracts are the public ones, `growmoe.testing`; counters in half precision are checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from router_cases import CASES, KINDS, D, build, call, inputs
from slow_parameters import but_slow

from growmoe import aux_loss
from growmoe.testing import ROUTER_CONTRACTS, RouterSubject

every_way = pytest.mark.parametrize("name", but_slow(CASES, *KINDS))


# the quick ones see every kind and every contract, each with a third of the others
PAIRS = [
    pytest.param(
        name,
        contract,
        id=f"{contract.__name__}-{name}",
        marks=() if name in KINDS[i % 3 :: 3] else pytest.mark.slow,
    )
    for i, contract in enumerate(ROUTER_CONTRACTS)
    for name in CASES
]


@pytest.mark.parametrize(("name", "contract"), PAIRS)
def test_it_keeps_the_contract(name: str, contract: Callable[[RouterSubject], None]) -> None:
    case = CASES[name]
    contract(RouterSubject(case.make, case.context, partial(build, name), D))


@every_way
def test_it_counts_exactly_in_half_precision(name: str) -> None:
    layer = build(name).bfloat16()
    counters = ("anneal_steps", "lambda_steps", "bias_steps")
    of_layer = {n: b for n, b in layer.named_buffers() if n.endswith(counters)}
    assert bool(of_layer) == name.startswith(("dense to sparse", "remoe", "bias balanced"))
    for counter in of_layer.values():
        counter.fill_(257)  # which bfloat16 cannot tell from 256
    for step in range(4 if of_layer else 0):
        y = call(name, layer, inputs(5, seed=step).bfloat16())
        (y.float().square().mean() + aux_loss(layer)).backward()
    for n, counter in of_layer.items():
        assert counter.dtype is torch.int64
        assert counter == 261 if n.endswith("anneal_steps") else abs(counter - 257) <= 3
