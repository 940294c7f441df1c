"""Every way of choosing outlives surgery, checkpoints, copies, recomputation and low precision."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from router_cases import CASES, KINDS, adamw, build, but_slow, call, inputs, train
from snapshots import copied, differences, of_everything, of_experts
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import growmoe
from growmoe import MoE, aux_loss, surgery

every_way = pytest.mark.parametrize("name", but_slow(CASES, *KINDS))


@torch.no_grad()
def output(name: str, layer: MoE, seed: int = 5) -> Tensor:
    layer.eval()
    torch.manual_seed(seed)
    y = call(name, layer, inputs(40, seed=1))
    layer.train()
    return y


def state(layer: MoE) -> dict[str, Tensor]:
    return {n: copied(t) for n, t in layer.state_dict().items() if isinstance(t, Tensor)}


def of_router(layer: MoE, optimizers: list[torch.optim.Optimizer]) -> object:
    own = dict(layer.router.named_parameters())
    return [
        copied(dict(layer.router.state_dict())),
        {n: [id(p), copied(optimizers[0].state.get(p, {}))] for n, p in own.items()},
    ]


# Surgery.


@every_way
@pytest.mark.parametrize("parent", [1, None], ids=["clone", "fresh"])
def test_a_birth_changes_no_output_and_nobody_else_and_the_newborn_is_let_in_and_learns(
    name: str, parent: int | None
) -> None:
    layer = build(name, warmup=4)
    optimizers = adamw(layer)
    train(name, layer, optimizers, 3)
    before, router = of_experts(layer, optimizers), of_router(layer, optimizers)
    y = output(name, layer)
    child = surgery.spawn(layer, parent, optimizers).child
    assert child == 4
    if not CASES[name].draws[1]:  # the draws of eval mode are one for each expert
        torch.testing.assert_close(output(name, layer), y, rtol=1e-6, atol=1e-6)
    assert differences(before, of_experts(layer, optimizers, [0, 1, 2, 3])) == []
    assert differences(router, of_router(layer, optimizers)) == []

    newborn = layer.experts[child]
    admissions = []
    for step in range(4):
        train(name, layer, optimizers, 1, seed=step)
        admissions.append(newborn.admission)
    assert admissions == [0.25, 0.5, 0.75, 1.0]
    weights = copied(dict(newborn.named_parameters()))
    train(name, layer, optimizers, 6)
    assert differences(weights, copied(dict(newborn.named_parameters()))) != []
    assert layer(inputs(), CASES[name].context(10)).isfinite().all()


@every_way
def test_a_merge_leaves_the_others_as_they_were(name: str) -> None:
    layer = build(name)
    optimizers = adamw(layer)
    train(name, layer, optimizers, 3)
    before, router = of_experts(layer, optimizers, [0, 3]), of_router(layer, optimizers)
    event = surgery.merge(layer, [1, 2], optimizers)
    assert list(layer.experts) == [0, 3, event.child]
    assert differences(before, of_experts(layer, optimizers, [0, 3])) == []
    assert differences(router, of_router(layer, optimizers)) == []
    assert output(name, layer).isfinite().all()
    train(name, layer, optimizers, 2)


@every_way
def test_a_prune_leaves_the_others_as_they_were_down_to_the_fewest(name: str) -> None:
    layer = build(name)
    optimizers = adamw(layer)
    train(name, layer, optimizers, 3)
    fewest = layer.router.min_experts
    dead = list(layer.experts)[fewest:]
    before, router = of_experts(layer, optimizers, range(fewest)), of_router(layer, optimizers)
    surgery.prune(layer, dead, optimizers)
    assert differences(before, of_experts(layer, optimizers)) == []
    assert differences(router, of_router(layer, optimizers)) == []
    assert output(name, layer).isfinite().all()
    train(name, layer, optimizers, 2)
    everything = of_everything(layer, optimizers)
    with pytest.raises(ValueError, match=rf"needs at least {fewest} experts, but layer 'moe'"):
        surgery.prune(layer, [0], optimizers)
    assert differences(everything, of_everything(layer, optimizers)) == []


@every_way
def test_fewer_experts_than_it_needs_are_refused_from_the_beginning(name: str) -> None:
    fewest = CASES[name].make().min_experts
    if fewest > 1:
        with pytest.raises(ValueError, match=rf"needs at least {fewest} experts, got"):
            build(name, fewest - 1)


@every_way
def test_an_expert_that_is_not_admitted_weighs_nothing_even_where_it_must_be_chosen(
    name: str,
) -> None:
    layer = build(name, max(2, CASES[name].make().min_experts))
    newborn = list(layer.experts.values())[-1]
    newborn.admission = 0.0
    x = inputs(12)
    context = CASES[name].context(12)
    for training in (True, False):
        routing = layer.train(training).route(x, context=context)
        assert not routing.assignment.weight_R[routing.assignment.expert_R == newborn.id].any()
    layer.eval()(x, context).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert all(p.grad is None or not p.grad.any() for p in newborn.body.parameters())


@every_way
def test_nothing_of_a_frozen_expert_moves(name: str) -> None:
    layer = build(name)
    optimizers = adamw(layer)
    train(name, layer, optimizers, 2)
    surgery.freeze(layer, [1, 2])

    def of_frozen() -> object:
        return [
            copied({n: t for n, t in layer.experts[id].state_dict().items() if "statist" not in n})
            for id in (1, 2)
        ]

    before, others = of_frozen(), state(layer)
    train(name, layer, optimizers, 3)
    assert differences(before, of_frozen()) == []
    assert differences(others, state(layer)) != []
    surgery.thaw(layer, [1, 2], optimizers)
    train(name, layer, optimizers, 4)
    assert differences(before, of_frozen()) != []


# Memory.


@every_way
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    name: str, tmp_path: Path
) -> None:
    layer = build(name, warmup=10)
    optimizers = adamw(layer)
    train(name, layer, optimizers, 3)
    surgery.spawn(layer, 1, optimizers)
    surgery.freeze(layer, [2])
    train(name, layer, optimizers, 2)
    growmoe.save(tmp_path / "c.safetensors", layer, optimizers)
    other = build(name, 6, seed=9, warmup=10)
    others = adamw(other)
    train(name, other, others, 1)
    growmoe.load(tmp_path / "c.safetensors", other, others)
    assert torch.equal(output(name, layer), output(name, other))
    went_on, loaded = train(name, layer, optimizers, 3), train(name, other, others, 3)
    assert all(torch.equal(a, b) for a, b in zip(went_on, loaded, strict=True))
    assert differences(state(layer), state(other)) == []


@every_way
@pytest.mark.parametrize("how", but_slow(["deepcopy", "pickle", "state_dict"], "deepcopy"))
def test_a_copy_goes_on_like_the_original(name: str, how: str) -> None:
    layer = build(name)
    train(name, layer, adamw(layer), 2)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = build(name, 5, seed=3)
        other.load_state_dict(layer.state_dict())
    a, b = train(name, layer, adamw(layer), 2), train(name, other, adamw(other), 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert differences(state(layer), state(other)) == []


@every_way
def test_recomputation_gives_the_same_gradients_step_after_step(name: str) -> None:
    plain = build(name, warmup=8)
    plain.experts[3].admission = 0.25
    recomputed = copy.deepcopy(plain)
    of_plain, of_recomputed = adamw(plain), adamw(recomputed)
    for step in range(3):
        x = inputs(16, seed=step)
        torch.manual_seed(step)
        loss = call(name, plain, x).square().mean() + aux_loss(plain)
        loss.backward()
        torch.manual_seed(step)
        y = checkpoint(call, name, recomputed, x, use_reentrant=False)
        again = y.square().mean() + aux_loss(recomputed)
        again.backward()
        assert torch.equal(loss, again)
        for (n, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), n
            assert p.grad is None or torch.equal(p.grad, q.grad), n
        for optimizers in (of_plain, of_recomputed):
            optimizers[0].step()
            optimizers[0].zero_grad()
    assert differences(state(plain), state(recomputed)) == []


# Precision.


@every_way
def test_it_runs_under_autocast(name: str) -> None:
    layer = build(name)
    x = inputs(12).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(name, layer, x)
        loss = y.float().square().mean() + aux_loss(layer)
    loss.backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@every_way
def test_it_runs_in_half_precision_and_counts_exactly(name: str) -> None:
    layer = build(name).bfloat16()
    counters = ("anneal_steps", "lambda_steps", "bias_steps")
    of_layer = {n: b for n, b in layer.named_buffers() if n.endswith(counters)}
    assert bool(of_layer) == name.startswith(("dense to sparse", "remoe", "bias balanced"))
    for counter in of_layer.values():
        counter.fill_(257)  # which bfloat16 cannot tell from 256
    for step in range(4):
        x = inputs(5, seed=step).bfloat16()
        y = call(name, layer, x)
        (y.float().square().mean() + aux_loss(layer)).backward()
        assert y.dtype is torch.bfloat16 and y.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    for n, counter in of_layer.items():
        assert counter.dtype is torch.int64
        assert counter == 261 if n.endswith("anneal_steps") else abs(counter - 257) <= 3
