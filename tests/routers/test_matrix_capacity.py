"""Every way of choosing under every capacity: who finds room is as the plain queues have it."""

from __future__ import annotations

import pytest
import torch
from reference import compare, reference
from router_cases import CASES, KINDS, build, call, inputs, tasks_of
from slow_parameters import but_slow

from growmoe import Capacity

FAST, SLOW = 1e-5, 1e-12
CLEAR = 1e-4

CAPPED = [name for name in CASES if CASES[name].make().capped]
POLICIES = {
    "position": lambda: Capacity(0.6),
    "gate": lambda: Capacity(0.6, "gate"),
    "reroute by position": lambda: Capacity(0.8, reroute=True),
    "reroute by gate": lambda: Capacity(0.8, "gate", reroute=True),
    "adaptive": lambda: Capacity("adaptive", most=1.1),
    "eval": lambda: Capacity(0.5, eval_factor=0.7, reroute=True),
}

every_capped = pytest.mark.parametrize("name", but_slow(CAPPED, *KINDS))


@pytest.mark.parametrize("name", [name for name in CASES if name not in CAPPED])
def test_a_router_that_sets_its_own_load_takes_no_capacity(name: str) -> None:
    with pytest.raises(ValueError, match="sets the load of its experts by itself"):
        build(name, capacity=Capacity())


@every_capped
@pytest.mark.parametrize("policy", but_slow(POLICIES, "position", "reroute by gate"))
def test_who_is_kept_and_every_gradient_are_the_references(name: str, policy: str) -> None:
    # rows left are counted for the balance loss below
    layer = build(name, capacity=POLICIES[policy](), balance_loss=0.0).train(policy != "eval")
    context = CASES[name].context(9)
    for seed in range(7, 60):
        x = inputs(9, seed)
        expected = reference(layer, x, context=context, seed=seed)
        if expected.margin > CLEAR:
            break
    else:
        raise AssertionError("no input is clear enough")
    before = layer.recorder.dropped.clone()
    compare(layer, x, FAST, expected=expected, context=context, seed=seed, aux=True)
    if layer.training:
        plain = build(name, balance_loss=0.0)
        chosen = reference(plain, x, context=context, seed=seed).weights
        rows = sum(map(len, chosen)) - sum(map(len, expected.weights))
        tokens = sum(map(bool, chosen)) - sum(map(bool, expected.weights))
        assert (layer.recorder.dropped - before)[1:].tolist() == [rows, tokens]
    layer, x = layer.double(), x.double()
    compare(layer, x, SLOW, context=context, seed=seed, aux=True)


@every_capped
@pytest.mark.parametrize("reroute", [False, True])
def test_room_for_all_is_as_no_capacity_to_the_last_bit(name: str, reroute: bool) -> None:
    free = build(name)
    roomy = build(name, capacity=Capacity(4.0, reroute=reroute))
    x = inputs(11)
    torch.manual_seed(3)
    want = call(name, free, x)
    torch.manual_seed(3)
    assert torch.equal(call(name, roomy, x), want)
    assert roomy.recorder.dropped.tolist() == [0, 0, 0]


@every_capped
def test_a_token_without_any_expert_passes_through_a_residual_unchanged(name: str) -> None:
    layer = build(name, capacity=Capacity(0.2))
    x = inputs(12)
    context = CASES[name].context(12)
    torch.manual_seed(3)
    y = layer(x, context)
    torch.manual_seed(3)
    kept = layer.route(x, context=context).assignment
    alone = torch.ones(12, dtype=torch.bool).index_fill(0, kept.token_R, False)
    assert alone.any()
    assert not y[alone].any()
    if y.dim() == 2:
        assert torch.equal((x + y)[alone], x[alone])


def test_eval_mode_has_no_limit_unless_it_is_given() -> None:
    free, capped = (
        build("topk softmax").eval(),
        build("topk softmax", capacity=Capacity(0.2)).eval(),
    )
    assert torch.equal(free(inputs()), capped(inputs()))
    tight = build("topk softmax", capacity=Capacity(4.0, eval_factor=0.2)).eval()
    assert not torch.equal(free(inputs()), tight(inputs()))


def test_two_tasks_gates_are_capped_together() -> None:
    layer = build("multi gate task", capacity=Capacity(0.5))
    counts = layer.route(inputs(), context=tasks_of(10)).assignment.counts_E
    assert counts.max() <= 3  # 20 rows, 4 experts, half of the balanced load
