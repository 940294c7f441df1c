"""Surgery: survivors untouched, births that disturb nothing, all or nothing."""

import copy
import itertools
import warnings

import pytest
import torch
from slow_parameters import but_slow
from snapshots import differences, of_everything, of_experts
from torch import nn

from growmoe import FFN, ExpertChoice, MoE, TopK, surgery
from growmoe.consent import evidence_of
from growmoe.optim import STATE_ENTRIES

D = 8


# the newborn's masked logit adds exp(-inf) = 0 to the softmax's sum, in another order of summation
ROUNDING = 1e-6


class Linear(nn.Module):
    """A user's own kind of expert."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x):
        return self.map(x)


class Unmergeable(Linear):
    def fresh(self, d_model, d_out, *, generator, device, dtype):
        return Unmergeable()

    def merged(self, others, weights):
        raise RuntimeError("cannot be merged")


def build(expert=None, num_experts=4, k=2, seed=0, **options):
    return MoE(D, expert or FFN(16, bias=True), num_experts, TopK(k), seed=seed, **options)


def adamw(layer):
    return [torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)]


def sgd(layer):
    return [torch.optim.SGD(layer.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)]


def keys_apart(layer):
    """Two groups: keys without weight decay."""
    named = list(layer.named_parameters())
    keys = [(n, p) for n, p in named if "entries" in n]
    rest = [(n, p) for n, p in named if "entries" not in n]
    groups = [{"params": rest}, {"params": keys, "weight_decay": 0.0, "lr": 3e-3}]
    return [torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)]


def muon_and_adamw(layer):
    """Muon for matrices, AdamW for keys and biases."""
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    vectors = [p for p in layer.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)]


OPTIMIZERS = [adamw, sgd, keys_apart, muon_and_adamw]


def train(layer, optimizers, steps=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    layer.train()
    for _ in range(steps):
        x = torch.randn(64, D, generator=draw)
        loss = (layer(x) - x.flip(1)).square().mean() + layer.aux_loss()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    return loss.item()


def inputs(rows=256, seed=5):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(layer, x=None):
    layer.eval()
    y = layer(inputs() if x is None else x)
    layer.train()
    return y


ACTS = {
    "spawn a clone": (lambda layer, o: surgery.spawn(layer, 1, o), []),
    "spawn a fresh one": (lambda layer, o: surgery.spawn(layer, None, o), []),
    "spawn another kind": (lambda layer, o: surgery.spawn(layer, None, o, expert=Linear), []),
    "spawn another width": (lambda layer, o: surgery.spawn(layer, None, o, expert=FFN(24)), []),
    "spawn toward": (lambda layer, o: surgery.spawn(layer, 1, o, toward=torch.ones(D)), []),
    "spawn admitted": (lambda layer, o: surgery.spawn(layer, 1, o, admitted=True), []),
    "merge": (lambda layer, o: surgery.merge(layer, [3, 1], o), [1, 3]),
    "prune": (lambda layer, o: surgery.prune(layer, [1, 2], o), [1, 2]),
    "freeze": (lambda layer, o: surgery.freeze(layer, [1]), [1]),
    "thaw": (lambda layer, o: surgery.thaw(layer, [0]), [0]),
}


@pytest.mark.parametrize("optimizers", but_slow(OPTIMIZERS, adamw, muon_and_adamw))
@pytest.mark.parametrize("act", ACTS)
def test_survivors_are_untouched_to_the_last_bit(act, optimizers):
    layer = build()
    optimizers = optimizers(layer)
    train(layer, optimizers)
    surgery.freeze(layer, [0])
    loss = layer(inputs()).square().mean()
    loss.backward()  # pending gradients are the survivors' too
    perform, named = ACTS[act]
    survivors = [id for id in layer.experts if id not in named]
    before = of_experts(layer, optimizers, survivors)
    perform(layer, optimizers)
    assert differences(before, of_experts(layer, optimizers, survivors)) == []
    y = output(layer)  # re-pools the weights, which must not show either
    assert differences(before, of_experts(layer, optimizers, survivors)) == []
    assert y.isfinite().all()


@pytest.mark.parametrize("optimizers", but_slow(OPTIMIZERS, adamw, muon_and_adamw))
@pytest.mark.parametrize("act", [a for a in ACTS if a.startswith(("spawn", "merge", "prune"))])
def test_each_living_parameter_is_in_one_group_once_and_the_dead_leave_with_their_state(
    act, optimizers
):
    layer = build()
    optimizers = optimizers(layer)
    train(layer, optimizers)
    ACTS[act][0](layer, optimizers)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in layer.parameters())
    for o in optimizers:
        assert {id(p) for p in o.state} <= {id(p) for g in o.param_groups for p in g["params"]}
    train(layer, optimizers, 3)


def test_a_newborn_joins_its_parents_groups():
    layer = build()
    (optimizer,) = keys_apart(layer)
    train(layer, [optimizer])
    for event in (
        surgery.spawn(layer, 1, optimizer),
        surgery.spawn(layer, None, optimizer),
        surgery.merge(layer, [0, 1], optimizer),
    ):
        newborn = layer.experts[event.child]
        groups = [{id(p) for p in g["params"]} for g in optimizer.param_groups]
        for name, p in newborn.learned().items():
            assert (id(p) in groups[0], id(p) in groups[1]) == (
                "body" in name,
                "entries" in name,
            )


def test_names_of_parameters_run_along_with_them():
    layer = build()
    optimizer = torch.optim.AdamW(layer.named_parameters(), lr=1e-2)
    train(layer, [optimizer])
    surgery.spawn(layer, 1, optimizer)
    surgery.spawn(layer, None, optimizer, expert=Linear)
    surgery.merge(layer, [0, 2], optimizer)
    surgery.prune(layer, [3], optimizer)
    (group,) = optimizer.param_groups
    names = {id(p): n for n, p in layer.named_parameters()}
    assert len(group["param_names"]) == len(group["params"])
    mine = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
    linear = {id(p) for p in layer.experts[5].body.parameters()}
    assert {i: n for i, n in mine.items() if i not in linear} == {
        i: n for i, n in names.items() if i not in linear
    }
    assert sorted(mine[i] for i in linear) == sorted(names[i] for i in linear)
    assert torch.optim.AdamW(layer.named_parameters()).param_groups[0]["param_names"] == list(
        names.values()
    )


def test_a_list_of_hyperparameters_as_long_as_the_group_is_not_taken_for_one_per_parameter():
    layer = build(num_experts=2, k=1)
    keys = [e.entries.key for e in layer.experts.values()]
    bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
    optimizer = torch.optim.AdamW([{"params": bodies}, {"params": keys, "betas": [0.8, 0.9]}])
    train(layer, [optimizer])
    surgery.spawn(layer, 0, optimizer)
    surgery.prune(layer, [0], optimizer)
    assert optimizer.param_groups[1]["betas"] == [0.8, 0.9]
    train(layer, [optimizer], 2)


def test_a_parameter_that_its_siblings_keep_from_the_optimizer_stays_out_of_it():
    layer = build()
    trained = [e.body.w_out for e in layer.experts.values()]
    optimizer = torch.optim.AdamW(trained)
    newborn = layer.experts[surgery.spawn(layer, 0, optimizer).child]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        *map(id, trained),
        id(newborn.body.w_out),
    ]


@pytest.mark.parametrize("born", ["clone", "fresh"])
@pytest.mark.parametrize(
    "router",
    [TopK(2), TopK(2, "softmax_topk"), TopK(2, "sigmoid"), TopK(4), ExpertChoice(1.5)],
    ids=["softmax", "softmax_topk", "sigmoid", "all", "expert choice"],
)
def test_a_masked_birth_leaves_the_output_as_it_was_and_warmup_lets_the_newborn_in(router, born):
    warmup = 20
    layer = MoE(D, FFN(16), 4, router, warmup=warmup, seed=0)
    x = inputs()
    before = output(layer)
    event = surgery.spawn(layer, 1 if born == "clone" else None)
    assert (output(layer) - before).abs().max() <= ROUNDING * before.abs().max()
    newborn = layer.experts[event.child]
    layer.experts[event.child].entries.key.data.copy_(layer.experts[1].entries.key.data)
    position, mass = list(layer.experts).index(event.child), []
    for age in range(warmup + 1):
        assert newborn.admission == pytest.approx(age / warmup, abs=1e-5)
        with torch.no_grad():
            routing = layer.route(x)
            mass.append(routing.probs_TE[:, position].mean().item())
            layer(x)
    assert mass[0] == 0
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(mass))
    assert mass[1] < 0.2 * mass[-1]
    assert mass[-1] > 0.1


def test_an_admitted_newborn_takes_part_at_once():
    layer = build()
    before = output(layer)
    event = surgery.spawn(layer, 1, admitted=True, noise=0.5)
    assert layer.experts[event.child].admission == 1
    assert (output(layer) - before).norm() > 0.01 * before.norm()


def test_growth_between_forward_and_backward_leaves_the_gradients_right():
    grown, plain = build(), build()
    grads = []
    for layer in (grown, plain):
        loss = layer(inputs()).square().mean()
        if layer is grown:
            surgery.spawn(layer, 0)
            output(layer)
            surgery.prune(layer, [3])
            output(layer)
        loss.backward()
        grads.append(
            {i: copy.deepcopy([p.grad for p in layer.experts[i].parameters()]) for i in range(3)}
        )
    for i in range(3):
        for a, b in zip(*(g[i] for g in grads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_clone_is_its_parent_but_for_noise_of_the_stated_size(noise):
    layer = build(FFN(512))
    event = surgery.spawn(layer, 2, noise=noise)
    parent, clone = layer.experts[2], layer.experts[event.child]
    assert event.parents == (2,)
    for name, p in parent.body.named_parameters():
        gap = (dict(clone.body.named_parameters())[name] - p).square().mean().sqrt().item()
        assert gap == pytest.approx(noise * p.square().mean().sqrt().item(), rel=0.1)
    assert torch.equal(clone.entries.key, parent.entries.key)


def test_a_newborn_turns_toward_its_inputs_with_a_key_of_usual_length():
    layer = build()
    toward = torch.arange(D, dtype=torch.float32)
    for parent in (None, 1):
        key = layer.experts[surgery.spawn(layer, parent, toward=toward).child].entries.key
        assert torch.cosine_similarity(key, toward, dim=0).item() == pytest.approx(1, abs=1e-5)
        if parent is not None:
            assert key.norm().item() == pytest.approx(
                layer.experts[parent].entries.key.norm().item()
            )


def test_a_clone_of_a_frozen_expert_can_learn():
    layer = build()
    (optimizer,) = adamw(layer)
    train(layer, [optimizer])
    surgery.freeze(layer, [1])
    clone = layer.experts[surgery.spawn(layer, 1, optimizer, admitted=True).child]
    assert not clone.frozen and all(p.requires_grad for p in clone.parameters())
    before = [p.detach().clone() for p in clone.parameters()]
    train(layer, [optimizer], 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, clone.parameters(), strict=True))


def test_the_newborns_of_a_function_leave_the_global_random_state_alone():
    layers = [build(Linear, seed=3) for _ in range(2)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    weights = []
    for i, layer in enumerate(layers):
        torch.manual_seed(i)
        surgery.spawn(layer)
        weights.append(layer.experts[4].body.map.weight)
    assert torch.equal(*weights)  # the layer's own seed decides
    torch.manual_seed(0)
    surgery.spawn(layers[0])
    assert torch.equal(state, torch.get_rng_state())


def test_ids_ascend_and_are_never_used_again():
    layer = build()
    born = [surgery.spawn(layer, 0).child, surgery.merge(layer, [1, 4]).child]
    surgery.prune(layer, [5])
    born.append(surgery.spawn(layer).child)
    assert born == [4, 5, 6]
    assert list(layer.experts) == [0, 2, 3, 6]
    assert layer.lineage.replay() == [0, 2, 3, 6]


# Merge.


def permuted(ffn, order):
    """The same network with its hidden units in another order."""
    other = copy.deepcopy(ffn)
    fused = ffn.activation == "swiglu"
    column = torch.cat([order, order + ffn.d_hidden]) if fused else order
    with torch.no_grad():
        other.w_in.copy_(ffn.w_in[:, column])
        other.w_out.copy_(ffn.w_out[order])
        if ffn.bias:
            other.b_in.copy_(ffn.b_in[column])
    return other


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_two_orders_of_the_hidden_units_of_one_network_gives_that_network(activation, bias):
    layer = build(FFN(16, activation, bias=bias))
    one = layer.experts[0]
    layer.experts[2].body = permuted(one.body, torch.randperm(16))
    event = surgery.merge(layer, [0, 2])
    child = layer.experts[event.child]
    x = inputs()
    assert torch.allclose(child(x), one(x), atol=1e-6)
    for name, p in child.body.named_parameters():  # none received a row, so 0 is the reference
        assert torch.allclose(p, dict(one.body.named_parameters())[name], atol=1e-6)


def test_a_merged_expert_is_the_mean_of_its_parents_by_the_rows_they_received():
    layer = build(Linear)
    (optimizer,) = adamw(layer)
    train(layer, [optimizer])
    parents = [layer.experts[i] for i in (0, 2, 3)]
    rows = torch.tensor([e.statistics["rows"] for e in parents])
    assert rows.min() > 0
    share = (rows / rows.sum()).tolist()
    busiest = parents[int(rows.argmax())]
    moments = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in busiest.learned().items()
    }
    child = layer.experts[surgery.merge(layer, [0, 2, 3], optimizer).child]
    for name, p in child.learned().items():
        mean = sum(w * e.learned()[name] for w, e in zip(share, parents, strict=True))
        assert torch.allclose(p, mean, atol=1e-6)
        state = optimizer.state[p]
        assert state["step"] == moments[name]["step"]
        assert torch.equal(state["exp_avg_sq"], moments[name]["exp_avg_sq"])
        assert not state["exp_avg"].any()
    assert child.statistics["rows"] == rows.sum()
    assert child.admission == 1


def test_merging_only_frozen_experts_gives_a_frozen_one():
    layer = build()
    surgery.freeze(layer, [0, 1, 2])
    both = layer.experts[surgery.merge(layer, [0, 1]).child]
    assert both.frozen and not any(p.requires_grad for p in both.parameters())
    one = layer.experts[surgery.merge(layer, [2, 3]).child]
    assert not one.frozen and all(p.requires_grad for p in one.parameters())
    assert layer.lineage.frozen() == [both.id]
    surgery.thaw(layer, [both.id])
    assert all(p.requires_grad for p in both.parameters())


def dense_output(layer, experts, x):
    """The mixture of these experts, token by token in float64."""
    out = []
    for row in x.double():
        logits = torch.stack([e.entries.key.detach().double() @ row for e in experts])
        probs = logits.softmax(0)
        weight, chosen = probs.topk(layer.router.k)
        weight = weight / weight.sum()
        bodies = [copy.deepcopy(experts[i].body).double() for i in chosen.tolist()]
        with torch.no_grad():
            out.append(sum(w * b(row[None])[0] for w, b in zip(weight, bodies, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("act", ["merge", "prune"])
def test_the_change_in_the_event_is_what_an_independent_measurement_gives(act):
    layer = build()
    optimizers = adamw(layer)
    train(layer, optimizers, 20)
    before = list(layer.experts.values())
    rows = {e.id: evidence_of(layer, e).clone() for e in before}
    assert all(len(x) >= 16 for x in rows.values())
    old = {i: dense_output(layer, before, x) for i, x in rows.items()}
    event = getattr(surgery, act)(layer, [1, 2], optimizers)
    after = list(layer.experts.values())
    change = max(
        float((dense_output(layer, after, x) - old[i]).norm() / old[i].norm())
        for i, x in rows.items()
    )
    assert event.change == pytest.approx(change, rel=1e-4)
    assert event.change > 0.01


@pytest.mark.parametrize("act", ["merge", "prune"])
@pytest.mark.parametrize("evidence", ["inputs", "moments"])
def test_tolerance_refuses_a_costly_act_and_changes_nothing_at_all(act, evidence):
    layer = build(evidence=evidence)
    optimizers = adamw(layer)
    train(layer, optimizers, 20)
    layer(inputs()).sum().backward()
    before = of_everything(layer, optimizers)
    with pytest.raises(surgery.Refused, match=r"would change by .*% is tolerated") as refused:
        getattr(surgery, act)(layer, [1, 2], optimizers, tolerance=1e-4)
    assert refused.value.change > 1e-4
    assert differences(before, of_everything(layer, optimizers)) == []
    getattr(surgery, act)(layer, [1, 2], optimizers, tolerance=refused.value.change * 2 + 1)


def test_an_act_without_enough_evidence_is_refused_where_a_tolerance_is_given():
    layer = build()
    optimizers = adamw(layer)
    train(layer, optimizers, 15)
    with pytest.raises(
        surgery.Refused, match="has 15 inputs as evidence, 16 are needed"
    ) as refused:
        surgery.prune(layer, [1], optimizers, tolerance=100.0)
    assert refused.value.change is None
    assert surgery.prune(layer, [1], optimizers).change is None


# Freeze.


def test_freezing_drops_a_pending_gradient_and_twice_is_once():
    layer = build()
    layer(inputs()).sum().backward()
    expert = layer.experts[1]
    expert.body.b_in.requires_grad_(False)
    surgery.freeze(layer, [1])
    surgery.freeze(layer, [1])
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters())
    assert not expert.body.training
    layer.train()
    assert not expert.body.training
    surgery.thaw(layer, [1])
    assert not expert.body.b_in.requires_grad  # what was not trainable before is not now
    assert expert.body.w_in.requires_grad and expert.entries.key.requires_grad
    assert expert.body.training


# Bad input.


BAD = {
    "unknown": (lambda s, a, o: s.prune(a, [9], o), r"no expert 9 \(unknown\); the living are"),
    "dead": (lambda s, a, o: s.prune(a, [4], o), r"no expert 4 \(dead\)"),
    "repeated": (lambda s, a, o: s.prune(a, [1, 1], o), "names an expert twice"),
    "empty": (lambda s, a, o: s.prune(a, [], o), "at least one expert"),
    "none": (lambda s, a, o: s.prune(a, None, o), "ids must be a sequence of integers"),
    "a number": (lambda s, a, o: s.prune(a, 1, o), "ids must be a sequence of integers"),
    "a string": (lambda s, a, o: s.prune(a, "12", o), "ids must be a sequence of integers"),
    "a truth value": (lambda s, a, o: s.prune(a, [True], o), "ids must be a sequence of integers"),
    "parent unknown": (lambda s, a, o: s.spawn(a, 9, o), "no expert 9"),
    "parent is text": (lambda s, a, o: s.spawn(a, "1", o), "ids must be a sequence of integers"),
    "freeze unknown": (lambda s, a, o: s.freeze(a, [1, 9]), "no expert 9"),
    "thaw unknown": (lambda s, a, o: s.thaw(a, [1, 9]), "no expert 9"),
    "merge of one": (lambda s, a, o: s.merge(a, [1], o), "at least two experts"),
    "too few left": (lambda s, a, o: s.prune(a, [0, 1, 2], o), "needs at least 2 experts"),
    "merge to too few": (lambda s, a, o: s.merge(a, [0, 1, 2, 3], o), "needs at least 2 experts"),
    "parent and kind": (lambda s, a, o: s.spawn(a, 1, o, expert=FFN(16)), "give parent or expert"),
    "negative noise": (lambda s, a, o: s.spawn(a, 1, o, noise=-0.1), "noise must not be negative"),
    "noise NaN": (lambda s, a, o: s.spawn(a, 1, o, noise=float("nan")), "noise must"),
    "noise infinite": (lambda s, a, o: s.spawn(a, 1, o, noise=float("inf")), "noise must"),
    "toward too long": (
        lambda s, a, o: s.spawn(a, 1, o, toward=torch.ones(D + 1)),
        "toward must be",
    ),
    "toward NaN": (
        lambda s, a, o: s.spawn(a, None, o, toward=torch.ones(D) / 0 * 0),
        "toward must be",
    ),
    "toward a list": (lambda s, a, o: s.spawn(a, None, o, toward=[1.0] * D), "toward must be"),
    "kind is no module": (lambda s, a, o: s.spawn(a, None, o, expert=3), "must be a module"),
    "builds no module": (lambda s, a, o: s.spawn(a, None, o, expert=lambda: 3), "is no module"),
    "no optimizer": (lambda s, a, o: s.prune(a, [1]), "pass it as optimizer="),
    "spawn, no optimizer": (lambda s, a, o: s.spawn(a, 1), "pass it as optimizer="),
    "merge, no optimizer": (lambda s, a, o: s.merge(a, [1, 2]), "pass it as optimizer="),
    "not an optimizer": (
        lambda s, a, o: s.prune(a, [1], "adam"),
        "must be a torch.optim.Optimizer",
    ),
    "signals no mapping": (lambda s, a, o: s.prune(a, [1], o, signals=3), None),
    "freeze, signals no mapping": (lambda s, a, o: s.freeze(a, [1], signals=3), None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_clear_error_and_changes_nothing(case):
    layer = build()
    optimizers = adamw(layer)
    surgery.spawn(layer, 0, optimizers)
    surgery.prune(layer, [4], optimizers)
    train(layer, optimizers)
    layer(inputs()).sum().backward()
    act, message = BAD[case]
    before = of_everything(layer, optimizers)
    with pytest.raises(ValueError if message else TypeError, match=message):
        act(surgery, layer, optimizers)
    assert differences(before, of_everything(layer, optimizers)) == []


def test_different_kinds_or_shapes_are_not_merged():
    layer = build([FFN(16), FFN(32), Linear, FFN(16, "relu")])
    optimizers = adamw(layer)
    train(layer, optimizers)
    before = of_everything(layer, optimizers)
    for pair in ([0, 1], [0, 2], [2, 0], [0, 3]):
        with pytest.raises(ValueError, match="different kinds"):
            surgery.merge(layer, pair, optimizers)
    assert differences(before, of_everything(layer, optimizers)) == []


def test_a_layer_is_not_left_with_newborns_alone():
    layer = build(k=1)
    surgery.spawn(layer, 0)
    before = of_everything(layer)
    with pytest.raises(ValueError, match="newborns alone"):
        surgery.prune(layer, [0, 1, 2, 3])
    assert differences(before, of_everything(layer)) == []
    with torch.no_grad():
        layer(inputs())  # after one forward it is let in a little
    surgery.prune(layer, [0, 1, 2, 3])
    assert output(layer).isfinite().all()


def test_an_optimizer_that_mixes_parameters_is_refused():
    layer = build()
    lbfgs = torch.optim.LBFGS(layer.parameters())
    before = of_everything(layer)
    for act in (lambda: surgery.spawn(layer, 0, lbfgs), lambda: surgery.prune(layer, [0], lbfgs)):
        with pytest.raises(ValueError, match="LBFGS keeps one history"):
            act()
    assert differences(before, of_everything(layer)) == []


def test_one_of_two_optimizers_left_out_is_named():
    layer = build()
    muon, adam = muon_and_adamw(layer)
    before = of_everything(layer, [muon, adam])
    with pytest.raises(ValueError, match=r"an optimizer \(AdamW\) trains this layer"):
        surgery.spawn(layer, 0, muon)
    assert differences(before, of_everything(layer, [muon, adam])) == []


def test_an_optimizer_that_is_gone_stands_in_no_ones_way():
    layer = build()
    optimizer = torch.optim.AdamW(layer.parameters())
    cycle = [optimizer]
    cycle.append(cycle)
    del optimizer, cycle
    surgery.spawn(layer, 0)


def test_a_layer_in_distributed_data_parallel_is_refused(tmp_path):
    layer = build()
    optimizers = adamw(layer)
    before = of_everything(layer, optimizers)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
            surgery.spawn(layer, 0, optimizers)
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
            surgery.prune(layer, [0], optimizers)
        assert differences(before, of_everything(layer, optimizers)) == []
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


# A surgery happens whole or not at all.


def test_a_kind_that_fails_to_merge_leaves_everything_as_it_was():
    layer = build(Unmergeable)
    optimizers = adamw(layer)
    train(layer, optimizers)
    before = of_everything(layer, optimizers)
    with pytest.raises(RuntimeError, match="cannot be merged"):
        surgery.merge(layer, [0, 1], optimizers)
    assert differences(before, of_everything(layer, optimizers)) == []


def test_a_kind_that_fails_to_be_built_leaves_everything_as_it_was():
    def broken():
        torch.randn(3)
        raise RuntimeError("out of memory")

    layer = build()
    optimizers = adamw(layer)
    train(layer, optimizers, 5)
    before = of_everything(layer, optimizers)
    with pytest.raises(RuntimeError, match="out of memory"):
        surgery.spawn(layer, None, optimizers, expert=broken)
    assert differences(before, of_everything(layer, optimizers)) == []


def test_an_expert_that_fails_on_its_first_inputs_is_not_left_behind():
    layer = build()
    optimizers = adamw(layer)
    train(layer, optimizers, 20)
    (event,) = [surgery.spawn(layer, 0, optimizers)]

    def fail(module, args):
        raise RuntimeError("broken body")

    layer.experts[1].body.register_forward_pre_hook(fail)
    before = of_everything(layer, optimizers)
    with pytest.raises(RuntimeError, match="broken body"):
        surgery.merge(layer, [2, event.child], optimizers)
    assert differences(before, of_everything(layer, optimizers)) == []


class Strange(torch.optim.SGD):
    """Keeps something of its own about each parameter."""

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["strange"] = torch.zeros_like(p)
        return result


@pytest.mark.parametrize("act", ["spawn a clone", "merge", "prune"])
def test_a_state_entry_of_unknown_meaning_is_refused_until_it_is_told(act, monkeypatch):
    layer = build()
    optimizers = [Strange(layer.parameters(), lr=0.01, momentum=0.9)]
    train(layer, optimizers, 5)
    before = of_everything(layer, optimizers)
    with pytest.raises(ValueError, match=r"\['strange'\] is not known.*STATE_ENTRIES"):
        ACTS[act][0](layer, optimizers)
    assert differences(before, of_everything(layer, optimizers)) == []
    known = {"Strange": {"momentum_buffer": "first", "strange": "first"}}
    monkeypatch.setattr("growmoe.optim.STATE_ENTRIES", {**STATE_ENTRIES, **known})
    ACTS[act][0](layer, optimizers)
    train(layer, optimizers, 2)


def test_what_is_tied_to_a_survivor_outlives_the_dead():
    layer = build(Linear)
    layer.experts[1].body.map = layer.experts[0].body.map  # two experts, one map, two keys
    optimizers = adamw(layer)
    train(layer, optimizers)
    before = of_experts(layer, optimizers, [0, 2, 3])
    surgery.prune(layer, [1], optimizers)
    assert differences(before, of_experts(layer, optimizers, [0, 2, 3])) == []


def test_surgery_inside_inference_mode_gives_experts_that_can_be_trained():
    layer = build()
    optimizers = adamw(layer)
    train(layer, optimizers, 5)
    with torch.inference_mode():
        surgery.spawn(layer, 0, optimizers, admitted=True)
        surgery.spawn(layer, None, optimizers, admitted=True)
        surgery.merge(layer, [1, 2], optimizers)
        layer.eval()(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(layer, optimizers, 3)


def test_every_act_is_in_the_lineage_with_its_reason():
    layer = build()
    surgery.spawn(layer, 1, step=7, reason="why not", signals={"load": 2.0})
    surgery.merge(layer, [2, 0], reason="alike")
    surgery.prune(layer, [3])
    surgery.freeze(layer, [1])
    surgery.thaw(layer, [1])
    told = [(e.act, e.ids, e.parents, e.child) for e in layer.lineage]
    assert told == [
        ("init", (0, 1, 2, 3), (), None),
        ("spawn", (), (1,), 4),
        ("merge", (2, 0), (2, 0), 5),
        ("prune", (3,), (), None),
        ("freeze", (1,), (), None),
        ("thaw", (1,), (), None),
    ]
    event = layer.lineage.events[1]
    assert (event.step, event.reason, event.signals) == (7, "why not", {"load": 2.0})
