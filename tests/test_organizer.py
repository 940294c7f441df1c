"""The organizer: each layer decides for itself, within limits, repeatably, with reasons."""

import logging
import math

import pytest
import torch
from drifting import Learner, Stream, done, point
from slow_parameters import but_slow
from snapshots import copied, differences, of_everything
from torch import nn

from growmoe import FFN, MoE, Organizer, TopK, aux_loss, surgery
from growmoe.rules import (
    FreezeConverged,
    MergeSimilar,
    Proposal,
    PruneIdle,
    SpawnOnLoss,
    SpawnOnNovelty,
    SpawnOnOverload,
    ThawOnDrift,
)

D = 4


class Always:
    """Proposes the same at every decision, if its experts live."""

    def __init__(self, *proposals):
        self.proposals = [Proposal(act, ids, "always") for act, ids in proposals]
        self.asked = []

    def propose(self, signals):
        self.asked.append(signals)
        return [p for p in self.proposals if set(p.ids) <= set(signals.ids)]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = MoE(D, FFN(8), 3, TopK(1), seed=0, balance_loss=0.0)
        self.b = nn.Sequential(nn.Linear(D, D), MoE(D, FFN(8), 2, TopK(1), seed=1))

    def forward(self, x):
        return self.b(self.a(x))


def test_there_is_one_decision_every_so_many_optimizer_steps():
    rule = Always()
    learner = Learner([rule], every=7)
    learner.learn(6)
    assert rule.asked == []
    learner.learn(1)
    assert len(rule.asked) == 1
    learner.learn(20)
    assert len(rule.asked) == 3
    assert learner.organizer.steps == 27


def test_without_an_optimizer_calls_are_counted():
    layer = MoE(D, FFN(8), 3, TopK(1), seed=0)
    rule = Always(("prune", (0,)))
    organizer = Organizer(layer, None, [rule], every=3)
    events = []
    for _ in range(7):
        with torch.no_grad():
            layer(torch.randn(8, D))
        events.append(len(organizer.step()))
    assert events == [0, 0, 1, 0, 0, 0, 0]


def test_several_layers_decide_separately_and_are_named_as_in_the_model():
    model = Two()
    organizer = Organizer(model, None, [SpawnOnOverload(1.5, min_age=5)], every=10)
    point(model.a, [9, 9, 9, 9], [-9, -9, -9, -9], [-9, -9, -9, -9])
    model.b[1].experts[0].entries.key.data.zero_()
    model.b[1].experts[1].entries.key.data.copy_(torch.tensor([0.01, 0, 0, 0]))  # about half each
    for _ in range(10):
        with torch.no_grad():
            model(torch.rand(64, D))
        events = organizer.step()
    assert [(e.layer, e.act, e.parents) for e in events if e.layer == "a"] == [("a", "spawn", (0,))]
    assert list(organizer.layers) == ["a", "b.1"] == [model.a.name, model.b[1].name]
    assert len(model.a.experts) == 4
    assert all(e.layer == "b.1" for e in model.b[1].lineage.events[1:])


def test_the_budget_bounds_the_structural_acts_of_a_decision_and_freezing_is_free():
    proposals = [("prune", (0,)), ("spawn", (1,)), ("freeze", (2,)), ("freeze", (3,))]
    for budget, structural in ((1, 1), (2, 2)):
        learner = Learner(
            [Always(*proposals)], num_experts=4, budget=budget, every=40, tolerance=9e9
        )
        learner.learn(40)
        acts = [e.act for e in learner.layer.lineage if e.accepted][1:]
        assert acts.count("freeze") == 2
        assert len([a for a in acts if a in ("prune", "spawn", "merge")]) == structural


def test_an_expert_is_left_alone_for_the_cooldown():
    learner = Learner([Always(("spawn", (1,)))], every=5, cooldown=20)
    events = learner.learn(60)
    assert [e.step for e in events] == [5, 25, 45]


def test_a_newborn_is_left_alone_for_the_cooldown_too():
    class FreezeTheYoungest:
        def propose(self, signals):
            return [Proposal("freeze", (max(signals.ids),), "youngest")]

    learner = Learner([Always(("spawn", (0,))), FreezeTheYoungest()], every=5, cooldown=15)
    events = learner.learn(20)
    born = events[0].child
    assert [(e.step, e.act) for e in events if born in (e.child, *e.ids)] == [
        (5, "spawn"),
        (20, "freeze"),
    ]


def test_a_refusal_is_not_repeated_within_the_cooldown_which_doubles():
    learner = Learner([Always(("spawn", (0,)))], every=5, cooldown=20, max_experts=3)
    events = learner.learn(70)
    assert [e.step for e in events] == [5, 25, 65]
    assert not done(events)


def test_of_conflicting_proposals_the_earlier_wins():
    first, second = Always(("spawn", (0,))), Always(("freeze", (0,)), ("freeze", (1,)))
    learner = Learner([first, second], every=5)
    events = learner.learn(5)
    assert [(e.act, e.ids or e.parents) for e in events] == [("spawn", (0,)), ("freeze", (1,))]
    learner = Learner([second, first], every=5)
    assert [e.act for e in learner.learn(5)] == ["freeze", "freeze"]


def test_max_experts_is_never_exceeded_and_the_refusal_says_so():
    learner = Learner([Always(("spawn", ()))], max_experts=5, every=2)
    events = learner.learn(12)
    assert len(learner.layer.experts) == 5
    assert len(done(events)) == 2
    assert "refused: max_experts=5 is reached" in events[-1].reason


@pytest.mark.parametrize("act,ids", [("prune", (0,)), ("merge", (0, 1))])
def test_consent_refuses_a_costly_act_changes_nothing_and_its_figure_stands_in_the_lineage(
    act, ids
):
    learner = Learner([Always((act, ids))], every=40, tolerance=0.01)
    point(learner.layer, [3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0])
    learner.learn(39, centers=(0, 1, 2))
    x, y = learner.stream.batch(centers=(0, 1, 2))
    (learner.layer(x) - y).square().mean().backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    before = of_everything(learner.layer, [learner.optimizer])
    (event,) = learner.organizer.step()
    after = of_everything(learner.layer, [learner.optimizer])
    for part in ("experts", "parameters", "groups", "states", "counters", "random"):
        assert differences(before[part], after[part]) == []
    assert not event.accepted and event.change > 0.01
    assert learner.layer.lineage.events[-1] is event
    assert f"would change by {event.change:.2%}, 1.00% is tolerated" in event.reason
    with pytest.raises(surgery.Refused) as refused:  # the same figure by hand
        getattr(surgery, act)(learner.layer, list(ids), learner.optimizer, tolerance=0.01)
    assert refused.value.change == event.change


def test_nothing_is_left_to_newborns_alone_nor_to_too_few():
    class Die:
        def propose(self, signals):
            return [Proposal("prune", (id,), "die") for id in signals.ids]

    learner = Learner([Die()], every=20, cooldown=3, budget=9, tolerance=9e9, k=2)
    learner.learn(20)
    assert len(learner.layer.experts) == 2
    learner = Learner([Always(("spawn", ())), Die()], every=20, cooldown=3, budget=9, tolerance=9e9)
    learner.learn(60)
    with torch.no_grad():
        assert learner.layer(learner.stream.batch()[0]).isfinite().all()


def micro_batched(call_each_time, rules, steps=60, micro=4):
    layer = MoE(D, FFN(8), 3, TopK(1), warmup=5, seed=0, balance_loss=0.0)
    point(layer, [3, 3, 3, 3], [-1, 0, 0, 0], [0, -1, 0, 0])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    organizer = Organizer(layer, optimizer, rules, every=10, cooldown=20)
    stream = Stream()
    between = []
    for _ in range(steps):
        for i in range(micro):
            x, y = stream.batch()
            losses = (layer(x) - y).square().mean(1)
            (losses.mean() / micro).backward()
            if i == micro - 1:
                optimizer.step()
                optimizer.zero_grad()
            if call_each_time or i == micro - 1:
                events = organizer.step(losses)
                if events and i < micro - 1:
                    between += events
    return layer, between


@pytest.mark.slow
def test_decisions_are_the_same_called_per_micro_batch_or_per_step_and_none_falls_between():
    rules = [SpawnOnNovelty(), SpawnOnOverload(1.5, 50), PruneIdle(150)]
    often, between = micro_batched(True, rules)
    once, _ = micro_batched(False, rules)
    assert between == []
    assert len(often.lineage) > 3
    assert [str(e) for e in often.lineage] == [str(e) for e in once.lineage]
    for a, b in zip(often.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)


def test_losses_that_are_not_numbers_are_counted_told_and_otherwise_ignored(caplog):
    learner = Learner([SpawnOnLoss()], every=10)
    learner.learn(30)
    losses = [e.statistics["loss_slow"] for e in learner.layer.experts.values()]
    with caplog.at_level(logging.WARNING, logger="growmoe"):
        for value in (math.nan, math.inf, torch.tensor(-math.inf)):
            assert learner.organizer.step(value) == []
        assert learner.organizer.lost_losses == 3 and caplog.records == []  # not at each
        assert losses == [e.statistics["loss_slow"] for e in learner.layer.experts.values()]
        learner.learn(10)
        assert [r.getMessage() for r in caplog.records] == [
            "3 losses were NaN or infinite and ignored"
        ]
        learner.learn(10)
        assert len(caplog.records) == 1  # once is enough
    assert all(
        math.isfinite(v)
        for e in learner.layer.experts.values()
        for v in e.statistics.record.tolist()
    )
    mixed = torch.ones(48)
    mixed[::2] = math.nan
    learner.layer(learner.stream.batch()[0])
    learner.organizer.step(mixed)
    assert learner.organizer.lost_losses == 3 + 24


def test_a_loss_that_does_not_fit_the_forward_is_named():
    learner = Learner([])
    learner.learn(1)
    with pytest.raises(ValueError, match="loss has 7 values, the last forward 48 inputs"):
        learner.organizer.step(torch.ones(7))


def test_a_loss_told_after_a_surgery_is_not_put_down_to_the_wrong_experts():
    learner = Learner([])
    point(learner.layer, [3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0])
    learner.learn(5, centers=(0, 1, 2))
    layer = learner.layer
    layer(learner.stream.batch(centers=(0,))[0])
    surgery.prune(layer, [0], learner.optimizer)
    surgery.spawn(layer, 1, learner.optimizer)  # as many as before, but others
    before = [e.statistics["loss_count"] for e in layer.experts.values()]
    learner.organizer.step(torch.tensor(100.0))
    assert before == [e.statistics["loss_count"] for e in layer.experts.values()]


ALL_RULES = [
    ThawOnDrift(3.0),
    SpawnOnNovelty(),
    SpawnOnLoss(4.0),
    SpawnOnOverload(1.8, 30),
    MergeSimilar(0.9, 40),
    PruneIdle(60),
    FreezeConverged(0.2, 60),
]


def eventful(seed, disturb=False):
    learner = Learner(ALL_RULES, num_experts=4, seed=seed, budget=2, cooldown=20, max_experts=8)
    if disturb:
        torch.manual_seed(12345)
    learner.learn(60)
    learner.learn(60, centers=(3,))
    learner.learn(60, turned=True)
    return learner


@pytest.mark.slow
def test_the_same_seed_gives_the_same_lineage_whatever_the_global_random_state():
    first, second, other = eventful(0), eventful(0, disturb=True), eventful(1)
    lines = [[str(e) for e in run.layer.lineage] for run in (first, second, other)]
    assert lines[0] == lines[1] != lines[2]
    assert len({e.act for e in first.layer.lineage}) >= 4
    assert len(lines[0]) > 6
    for a, b in zip(first.layer.parameters(), second.layer.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.layer.lineage.replay() == list(first.layer.experts)


@pytest.mark.parametrize("set_to_none", but_slow([True, False], True))
def test_the_idle_and_the_frozen_do_not_move_under_an_organizer(set_to_none):
    layer = MoE(D, FFN(8), 4, TopK(1), seed=0)
    point(layer, [5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [-5, -5, -5, 0])
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    vectors = [p for p in layer.parameters() if p.dim() != 2]
    optimizers = [
        torch.optim.SGD(matrices, lr=0.05, momentum=0.9, weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=1e-3),
    ]
    organizer = Organizer(layer, optimizers, [SpawnOnOverload(1.5, 20)], every=10, max_experts=6)
    stream = Stream()

    def learn(steps, centers):
        for _ in range(steps):
            x, y = stream.batch(centers=centers, spread=0.1)
            ((layer(x) - y).square().mean() + aux_loss(layer)).backward()
            for o in optimizers:
                o.step()
            for o in optimizers:
                o.zero_grad(set_to_none=set_to_none)
            organizer.step()

    learn(15, (0, 1, 2))
    surgery.freeze(layer, [1])
    frozen, idle = layer.experts[1], layer.experts[2]

    def still():
        named = {**frozen.learned(), **{f"idle {n}": p for n, p in idle.body.named_parameters()}}
        return {
            n: [copied(p), *(copied(o.state.get(p, {})) for o in optimizers)]
            for n, p in named.items()
        }

    before, busy = still(), copied(layer.experts[0].body.w_in)
    learn(60, (0, 1))
    assert idle.statistics["idle"] == 60
    assert differences(before, still()) == []
    assert not torch.equal(busy, layer.experts[0].body.w_in)
    assert len(layer.lineage) > 2  # and something was born meanwhile


@pytest.mark.parametrize(
    "options,message",
    [
        ({"every": 0}, "every must be a positive integer"),
        ({"budget": -1}, "budget must be a positive integer"),
        ({"max_experts": 2.5}, "max_experts must be a positive integer"),
        ({"tolerance": -0.1}, "tolerance must not be negative"),
        ({"tolerance": math.nan}, "tolerance must not be negative"),
        ({"rules": ["prune"]}, "is no rule"),
    ],
)
def test_a_setting_out_of_range_is_named(options, message):
    layer = MoE(D, FFN(8), 3, TopK(1), seed=0)
    with pytest.raises(ValueError, match=message):
        Organizer(layer, None, **options)


def test_a_model_without_a_mixture_has_nothing_to_organize():
    with pytest.raises(ValueError, match=r"has no growmoe\.MoE layer"):
        Organizer(nn.Linear(2, 2))
