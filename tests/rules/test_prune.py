"""When an expert goes."""

import pytest
from drifting import Learner, done, point, signals

from growmoe.rules import PruneIdle, PruneUseless


def test_the_longest_idle_comes_first():
    rule = PruneIdle(steps=100)
    proposals = rule.propose(signals(4, idle=[99, 100, 5, 300]))
    assert [(p.act, p.ids) for p in proposals] == [("prune", (3,)), ("prune", (1,))]
    assert proposals[0].signals == {"idle": 300}


def test_usefulness_must_lie_below_the_threshold_and_the_least_useful_comes_first():
    rule = PruneUseless(change=0.1, min_age=10)
    useful = {0: 0.05, 1: 0.1, 2: 0.01}
    proposals = rule.propose(signals(usefulness=lambda: useful, age=[10, 10, 10]))
    assert [p.ids for p in proposals] == [(2,), (0,)]
    young = rule.propose(signals(usefulness=lambda: useful, age=[10, 10, 9]))
    assert [p.ids for p in young] == [(0,)]

    def costly():
        raise AssertionError("measured for nothing")

    assert rule.propose(signals(usefulness=costly, age=[9, 9, 9])) == []


@pytest.mark.slow
def test_an_expert_that_never_received_anything_goes():
    learner = Learner([PruneIdle(steps=50)])
    point(learner.layer, [3, 0, 0, 0], [0, 3, 0, 0], [-3, -3, -3, 0])  # inputs lie at +2
    (gone,) = done(learner.learn(70, spread=0.1), "prune")
    assert gone.ids == (2,) and gone.change < 1e-4
    assert 2 not in learner.layer.experts


@pytest.mark.slow
def test_an_idle_expert_that_its_old_domain_needs_stays_and_the_refusal_tells_the_price():
    learner = Learner([PruneIdle(steps=50)], num_experts=2)
    point(learner.layer, [5, 0, 0, 0], [0, 5, 0, 0])
    learner.learn(120, centers=(0, 1), spread=0.1)
    events = learner.learn(70, centers=(0,), spread=0.1)  # the domain of expert 1 is over
    assert learner.layer.experts[1].statistics["idle"] >= 50
    refusal = next(e for e in events if e.ids == (1,))
    assert not refusal.accepted and refusal.change > 0.1
    assert "is tolerated" in refusal.reason and refusal in list(learner.layer.lineage)
    assert 1 in learner.layer.experts


def test_a_useless_expert_goes_and_a_useful_one_stays():
    learner = Learner([PruneUseless(change=0.02, min_age=30)], k=2, lr=1e-3)
    # 0 dominates, 1 comes second with a weight of exp(-6), 2 gets nothing
    point(learner.layer, [3, 3, 3, 0], [0, 0, 0, 0], [-3, -3, -3, 0])
    (gone,) = done(learner.learn(80, centers=(0, 1, 2), spread=0.1), "prune")
    assert gone.ids == (1,)
    assert gone.change == pytest.approx(gone.signals["usefulness"])
    assert 0 < gone.change < 0.02
