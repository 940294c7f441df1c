"""Optimizers: the idle do not move, newborns move as their siblings do, schedules go on."""

import inspect

import pytest
import torch
from slow_parameters import but_slow
from snapshots import copied, differences, of_expert
from torch import nn

from growmoe import FFN, MoE, Organizer, TopK, guard, surgery
from growmoe.optim import STATE_ENTRIES

D = 4
WD = {"weight_decay": 0.1}

# name -> (class, options); each with momentum and weight decay where it has them
FAMILIES = {
    "SGD": ("SGD", {"lr": 1e-2, "momentum": 0.9, **WD}),
    "SGD nesterov": ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, **WD}),
    "SGD dampening": ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, **WD}),
    "Adam": ("Adam", {"lr": 1e-2, **WD}),
    "Adam amsgrad": ("Adam", {"lr": 1e-2, "amsgrad": True, **WD}),
    "AdamW": ("AdamW", {"lr": 1e-2, **WD}),
    "NAdam": ("NAdam", {"lr": 1e-2, **WD}),
    "RAdam": ("RAdam", {"lr": 1e-2, **WD}),
    "Adamax": ("Adamax", {"lr": 1e-2, **WD}),
    "Adadelta": ("Adadelta", {"lr": 1.0, **WD}),
    "Adagrad": ("Adagrad", {"lr": 1e-2, "lr_decay": 1e-4, **WD}),
    "RMSprop": ("RMSprop", {"lr": 1e-2, "centered": True, "momentum": 0.9, **WD}),
    "Rprop": ("Rprop", {"lr": 1e-2}),
    "ASGD": ("ASGD", {"lr": 1e-2, "t0": 100, **WD}),
    "Adafactor": ("Adafactor", {"lr": 1e-2, **WD}),
    "Muon": ("Muon", {"lr": 1e-2, **WD}),
}
FUSED_ON_CPU = {"SGD", "Adam", "AdamW", "Adagrad"}


def make(family, parameters, implementation=None):
    name, options = FAMILIES[family]
    cls = getattr(torch.optim, name)
    if implementation:
        options = {**options, "foreach": implementation == "foreach"}
    if implementation == "fused":
        options = {**options, "foreach": None, "fused": True}
    return cls(list(parameters), **options)


def offered():
    """Every family with every implementation it offers on a CPU."""
    for family, (name, _) in FAMILIES.items():
        takes = inspect.signature(getattr(torch.optim, name)).parameters
        if "foreach" not in takes:
            yield family, None
            continue
        yield family, "for-loop"
        yield family, "foreach"
        if "fused" in takes and name in FUSED_ON_CPU:
            yield family, "fused"


def in_turn():
    """Every family once; implementations and what zero_grad does take turns."""
    for i, family in enumerate(FAMILIES):
        found = [implementation for name, implementation in offered() if name == family]
        yield family, found[i % len(found)], i // 2 % 2 == 0


def routed_layer(bias=True):
    """Expert e takes exactly the inputs whose feature e is 8."""
    layer = MoE(D, FFN(4, bias=bias), 4, TopK(1), seed=0)
    for e, expert in layer.experts.items():
        expert.entries.key.data.copy_(nn.functional.one_hot(torch.tensor(e), D))
    return layer


def inputs_for(experts, draw, rows=8):
    x = 0.1 * torch.randn(rows * len(experts), D, generator=draw)
    x[torch.arange(len(x)), torch.tensor(experts).repeat_interleave(rows)] = 8
    return x


def backward(layer, experts, draw):
    x = inputs_for(experts, draw)
    (layer(x) - torch.randn(x.shape, generator=draw)).square().mean().backward()


def idle_and_frozen_stand_still(family, implementation, set_to_none, steps):
    layer = routed_layer(bias=family != "Muon")
    bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
    optimizer = make(family, bodies, implementation)
    guard(optimizer, layer)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):  # so that all have momentum that would carry them on
        backward(layer, [0, 1, 2, 3], draw)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert len(optimizer.state) == len(bodies)
    surgery.freeze(layer, [2])
    before = snapshot_of_weights(layer, [2, 3], optimizer)
    busy = copied(dict(layer.experts[0].named_parameters()))
    for step in range(steps):
        if step % 10 == 0:  # between these steps nobody receives an input
            backward(layer, [0, 1, 2], draw)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert differences(before, snapshot_of_weights(layer, [2, 3], optimizer)) == []
    assert differences(busy, copied(dict(layer.experts[0].named_parameters())))


def snapshot_of_weights(layer, ids, optimizer):
    snapshots = {}
    for id in ids:
        whole = of_expert(layer.experts[id], [optimizer])
        snapshots[id] = {key: whole[key] for key in ("weights", "state", "parameters")}
    return snapshots


@pytest.mark.parametrize(
    "family,implementation,set_to_none",
    but_slow([(*each, none) for each in offered() for none in (True, False)], *in_turn()),
)
def test_idle_and_frozen_experts_stay_bit_identical(family, implementation, set_to_none):
    idle_and_frozen_stand_still(family, implementation, set_to_none, 20)


@pytest.mark.slow
@pytest.mark.parametrize("family,implementation,set_to_none", list(in_turn()))
def test_idle_and_frozen_experts_stay_bit_identical_over_1000_steps(
    family, implementation, set_to_none
):
    idle_and_frozen_stand_still(family, implementation, set_to_none, 1000)


def test_without_the_guard_zeroed_gradients_do_move_the_idle():
    layer = routed_layer()
    optimizer = make("AdamW", layer.parameters())
    draw = torch.Generator().manual_seed(0)
    for experts in ([0, 1, 2, 3], [0], [0]):
        idle = copied(dict(layer.experts[3].body.named_parameters()))
        backward(layer, experts, draw)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert differences(idle, copied(dict(layer.experts[3].body.named_parameters())))


def test_the_guard_leaves_the_real_gradient_of_a_penalty_on_the_weights():
    layer = routed_layer()
    bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
    optimizer = torch.optim.SGD(bodies, lr=0.1)
    handle = guard(optimizer, layer)
    draw = torch.Generator().manual_seed(0)
    idle = layer.experts[3].body
    before = copied(dict(idle.named_parameters()))
    backward(layer, [0], draw)
    idle.w_in.square().sum().mul(0.5).backward()
    optimizer.step()
    assert torch.allclose(idle.w_in, 0.9 * before["w_in"])
    assert torch.equal(idle.w_out, before["w_out"])
    handle.remove()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert idle.w_out.grad is None and not idle.w_in.grad.any()  # nobody restores it any more


def test_the_guard_holds_across_the_micro_batches_of_one_step():
    layer = routed_layer()
    bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
    optimizer = make("SGD", bodies)
    guard(optimizer, layer)
    draw = torch.Generator().manual_seed(0)
    for experts in ([0], [1]):  # two micro-batches, one step
        backward(layer, experts, draw)
    before = {i: copied(dict(e.body.named_parameters())) for i, e in layer.experts.items()}
    optimizer.step()
    moved = {
        i: bool(differences(before[i], copied(dict(e.body.named_parameters()))))
        for i, e in layer.experts.items()
    }
    assert moved == {0: True, 1: True, 2: False, 3: False}


# Newborns.


class Gradients:
    """Stationary gradients: each element has its own scale and a mean of a third of its spread.

    A clone has the scales of its parent, a fresh expert's are drawn anew.
    """

    def __init__(self, seed=0):
        self.draw = torch.Generator().manual_seed(seed)
        self.scales = {}

    def scale(self, p, like=None):
        if id(p) not in self.scales:
            new = torch.randn(p.shape, generator=self.draw).exp() * 1e-2
            self.scales[id(p)] = new if like is None else self.scale(like)
        return self.scales[id(p)]

    def give(self, parameters):
        for p in parameters:
            p.grad = self.scale(p) * (0.3 + torch.randn(p.shape, generator=self.draw))


def moved(parameters, before):
    total = sum((p.detach() - b).square().sum() for p, b in zip(parameters, before, strict=True))
    return float(total / sum(p.numel() for p in parameters)) ** 0.5


def update_ratios(family, born, spoil=None, warm=200, first=20):
    """RMS update of a newborn over that of its siblings, at each of its first steps."""
    layer = MoE(8, FFN(16), 4, TopK(1), seed=0)
    name, options = ("RMSprop", {"lr": 1e-2}) if family == "RMSprop plain" else FAMILIES[family]
    options = {**options, "weight_decay": 0.0} if "weight_decay" in options else options
    bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
    optimizer = getattr(torch.optim, name)(bodies, **options)
    gradients = Gradients()
    for _ in range(warm):
        gradients.give(bodies)
        optimizer.step()
    parent = layer.experts[1] if born == "clone" else None
    event = surgery.spawn(layer, parent and parent.id, optimizer, noise=0.0)
    newborn = list(layer.experts[event.child].body.parameters())
    for p, q in zip(newborn, parent.body.parameters() if parent else [None] * 9, strict=False):
        gradients.scale(p, like=q)
        if spoil is not None:
            spoil(optimizer, p)
    ratios = []
    for _ in range(first):
        gradients.give([*bodies, *newborn])
        old, young = copied(bodies), copied(newborn)
        optimizer.step()
        ratios.append(moved(newborn, young) / moved(bodies, old))
    return ratios


def mean(values):
    return sum(values) / len(values)


def forget_everything(optimizer, p):
    optimizer.state.pop(p, None)


def forget_the_clock(optimizer, p):
    optimizer.state[p]["step"] = torch.zeros_like(optimizer.state[p]["step"])


def forget_second_moments(optimizer, p):
    meanings = STATE_ENTRIES[type(optimizer).__name__]
    for key, value in optimizer.state[p].items():
        if meanings[key] == "second":
            value.zero_()


def show(family, born, ratios):
    print(
        f"{family:14} {born:6} first {ratios[0]:5.2f}  mean {mean(ratios):5.2f}  "
        f"range {min(ratios):5.2f} to {max(ratios):5.2f}"
    )


# A newborn has its siblings' scale but no momentum yet, so it starts at 0.2 to 0.6 of their size
# where there is momentum and reaches it within some ten steps. Where the siblings' momentum has
# died down (ASGD's and Rprop's steps vary by themselves) single steps may be twice as large.
@pytest.mark.parametrize("born", ["clone", "fresh"])
@pytest.mark.parametrize("family", but_slow(FAMILIES, "SGD", "AdamW", "RMSprop", "Muon"))
def test_a_newborns_first_updates_are_of_its_siblings_size(family, born):
    ratios = update_ratios(family, born)
    show(family, born, ratios)
    assert 0.5 < mean(ratios) < 2
    assert min(ratios) > 0.2
    assert max(ratios) < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,spoil,low,high",
    [
        ("Adagrad", forget_everything, 4, 60),
        ("RMSprop", forget_everything, 2, 20),
        ("RMSprop plain", forget_everything, 2, 20),
        ("Rprop", forget_everything, 100, 1e6),
        ("Adamax", forget_everything, 2, 20),
        ("Adam", forget_the_clock, 1 / 50, 1 / 4),
        ("NAdam", forget_the_clock, 1 / 50, 1 / 4),
        ("RAdam", forget_the_clock, 1 / 50, 1 / 4),
        ("Adam", forget_second_moments, 2, 20),
        ("NAdam", forget_second_moments, 2, 20),
        ("RAdam", forget_second_moments, 2, 20),
        ("Adagrad", forget_second_moments, 4, 60),
    ],
)
def test_a_newborn_that_forgets_its_second_moments_or_its_clock_is_off_by_far(
    family, spoil, low, high
):
    ratios = update_ratios(family, "clone", spoil, warm=300)
    show(family, spoil.__name__, ratios)
    assert low < mean(ratios) < high


@pytest.mark.slow
def test_after_long_training_adam_needs_clock_and_second_moments_together():
    right = update_ratios("Adam", "clone", warm=5000)
    young = update_ratios("Adam", "clone", forget_the_clock, warm=5000)
    bare = update_ratios("Adam", "clone", forget_second_moments, warm=5000)
    for what, ratios in (("both", right), ("step 0", young), ("no second", bare)):
        show("Adam, 5000", what, ratios)
    # at step 1 the mean is divided by 1 - 0.9 and the second moment by 1 - 0.999
    assert young[0] / right[0] == pytest.approx(0.001**0.5 / 0.1, rel=0.05)
    assert mean(young) < 1 / 6
    assert mean(bare) > 5
    assert 0.5 < mean(right) < 2


def uneven_siblings(family, ages, seed=0):
    """A layer whose experts took so many steps each, as where some are hit more than others."""
    layer = MoE(8, FFN(16), len(ages), TopK(1), seed=seed)
    bodies = {i: list(e.body.parameters()) for i, e in layer.experts.items()}
    optimizer = make(family, [p for ps in bodies.values() for p in ps])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    gradients = Gradients()
    for step in range(max(ages)):
        optimizer.zero_grad()
        for i, age in enumerate(ages):
            if step < age:
                gradients.give(bodies[i])
        optimizer.step()
    optimizer.zero_grad()
    return layer, optimizer, bodies, gradients


@pytest.mark.parametrize("ages", [(200, 200, 200, 4), (200, 4, 4, 4), (200, 4), (4, 200, 40)])
@pytest.mark.parametrize("family", but_slow(["Adam", "NAdam", "RAdam", "AdamW", "ASGD"], "AdamW"))
def test_a_fresh_experts_moments_and_clock_fit_together_among_siblings_of_uneven_age(family, ages):
    layer, optimizer, bodies, gradients = uneven_siblings(family, ages)
    newborn = list(layer.experts[surgery.spawn(layer, None, optimizer).child].body.parameters())
    middle = sorted(ages)[(len(ages) - 1) // 2]
    sibling = bodies[ages.index(middle)]
    meanings = STATE_ENTRIES["Adam" if family == "AdamW" else family]
    for p, q in zip(newborn, sibling, strict=True):
        assert optimizer.state[p]["step"] == middle
        for key in [k for k, m in meanings.items() if m == "clock"]:  # all of one sibling
            assert optimizer.state[p][key] == optimizer.state[q][key]
    ratios = []
    for _ in range(20):
        gradients.give([*sibling, *newborn])
        old, young = copied(sibling), copied(newborn)
        optimizer.step()
        ratios.append(moved(newborn, young) / moved(sibling, old))
    show(family, str(ages), ratios)
    assert 0.4 < mean(ratios) < 4


class TwoLayers(nn.Module):
    """Another kind than FFN: other names, other shapes, a bias."""

    def __init__(self, width=12):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


@pytest.mark.parametrize(
    "family", but_slow([f for f in FAMILIES if f != "Muon"], "SGD", "AdamW", "RMSprop")
)
@pytest.mark.parametrize("kind", [TwoLayers, FFN(24)], ids=["another kind", "another width"])
def test_a_newborn_of_another_kind_or_width_starts_with_its_siblings_scale(family, kind):
    layer, optimizer, bodies, gradients = uneven_siblings(family, (150, 150, 150))
    event = surgery.spawn(layer, None, optimizer, expert=kind)
    newborn = [p for p in layer.experts[event.child].body.parameters() if p.dim() == 2]
    everyone = [p for ps in bodies.values() for p in ps]
    ratios = []
    for _ in range(20):
        gradients.give([*everyone, *layer.experts[event.child].body.parameters()])
        old, young = copied(everyone), copied(newborn)
        optimizer.step()
        ratios.append(moved(newborn, young) / moved(everyone, old))
    show(family, "other", ratios)
    assert 0.4 < mean(ratios) < 3


# Schedules, clipping, accumulation, scaling: all across a birth and a death.


def free_layer():
    return MoE(8, FFN(16, bias=True), 4, TopK(2), seed=0)


def loss_of(layer, draw, rows=32):
    x = torch.randn(rows, 8, generator=draw)
    return (layer(x) - x.flip(1)).square().mean() + layer.aux_loss()


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        o, 10
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", but_slow(["SGD", "AdamW"], "AdamW"))
def test_a_schedule_goes_on_as_planned_for_the_old_and_the_newborn(schedule, family):
    layer, plain = free_layer(), nn.Linear(1, 1)
    optimizer, reference = make(family, layer.parameters()), make(family, plain.parameters())
    scheduler, expected = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](reference)
    draw = torch.Generator().manual_seed(0)
    for step in range(40):
        loss_of(layer, draw).backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        if step < 39:
            scheduler.step()
            expected.step()
        if step == 10:
            surgery.spawn(layer, 1, optimizer)
            surgery.spawn(layer, None, optimizer)
        if step == 20:
            surgery.prune(layer, [0], optimizer)
        (group,), (planned,) = optimizer.param_groups, reference.param_groups
        for key in set(group) - {"params"}:
            assert group[key] == planned[key], key
    assert all(p.isfinite().all() for p in layer.parameters())


def test_clipping_bounds_the_gradients_of_newborns_too():
    layer = free_layer()
    optimizer = make("SGD", layer.parameters())
    draw = torch.Generator().manual_seed(0)
    for step in range(12):
        (100 * loss_of(layer, draw)).backward()
        total = nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert total > 0.1
        assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(0.1, rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            born = surgery.spawn(layer, 1, optimizer, admitted=True).child
        if step == 6:
            assert all(p.grad is None for p in layer.experts[born].parameters())
            surgery.prune(layer, [0], optimizer)


def test_surgery_between_micro_batches_keeps_the_survivors_gradients():
    layer, same = free_layer(), free_layer()
    optimizer = make("SGD", layer.parameters())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 8, generator=draw)
    layer(x[0]).square().mean().backward()
    same(x[0]).square().mean().backward()
    surgery.spawn(layer, 1, optimizer)
    layer(x[1]).square().mean().backward()
    same(x[1]).square().mean().backward()
    for id, expert in same.experts.items():
        for name, p in expert.named_parameters():
            mine = dict(layer.experts[id].named_parameters())[name].grad
            assert (mine is None) == (p.grad is None)
            assert p.grad is None or torch.allclose(mine, p.grad, atol=1e-6)
    optimizer.step()


def test_a_grad_scaler_steps_over_infinite_gradients_and_takes_newborns_along():
    layer = free_layer()
    optimizer = make("AdamW", layer.parameters())
    organizer = Organizer(layer, optimizer, every=1000)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    draw = torch.Generator().manual_seed(0)
    done = 0
    for step in range(20):
        loss = loss_of(layer, draw)
        scaler.scale(loss * float("inf") if step in (4, 12) else loss).backward()
        before = copied(dict(layer.named_parameters()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        organizer.step(loss)
        stood = not differences(before, copied(dict(layer.named_parameters())))
        assert stood == (step in (4, 12))
        done += not stood
        assert organizer.steps == done  # a step that was skipped is none
        if step == 7:
            born = surgery.spawn(layer, 1, optimizer, admitted=True).child
        if step == 10:
            surgery.prune(layer, [0], optimizer)
    assert optimizer.state[layer.experts[born].entries.key]["step"] > 5
    assert all(p.isfinite().all() for p in layer.parameters())
