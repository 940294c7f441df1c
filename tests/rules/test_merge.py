"""When experts become one."""

import pytest
import torch
from drifting import Learner, done, point, signals

from growmoe import surgery
from growmoe.rules import MergeOverlapping, MergeSimilar


def alike(**pairs):
    cosine_EE = torch.eye(3)
    for (i, j), value in pairs.pop("pairs").items():
        cosine_EE[i, j] = cosine_EE[j, i] = value
    return signals(similarity=lambda: cosine_EE, **pairs)


def test_similarity_must_exceed_the_threshold_and_the_closest_come_first():
    rule = MergeSimilar(0.9, min_age=10)
    pairs = {(0, 1): 0.9, (0, 2): 0.91, (1, 2): 0.99}
    proposals = rule.propose(alike(pairs=pairs, age=[10, 10, 10]))
    assert [p.ids for p in proposals] == [(1, 2), (0, 2)]
    assert proposals[0].signals["similarity"] == pytest.approx(0.99)
    assert all(p.act == "merge" for p in proposals)


def test_the_young_are_not_judged_nor_is_similarity_measured_for_them():
    pairs = {(0, 1): 0.99, (0, 2): 0.99, (1, 2): 0.99}
    rule = MergeSimilar(0.9, min_age=10)
    assert [p.ids for p in rule.propose(alike(pairs=pairs, age=[10, 9, 10]))] == [(0, 2)]

    def costly():
        raise AssertionError("measured for nothing")

    assert rule.propose(signals(similarity=costly, age=[10, 9, 9])) == []


def test_experts_of_different_groups_are_not_proposed():
    pairs = {(0, 1): 0.99, (1, 2): 0.99}
    found = alike(pairs=pairs, age=[999] * 3, groups=["a", "b", "b"])
    assert [p.ids for p in MergeSimilar().propose(found)] == [(1, 2)]


def test_overlap_must_hold_both_ways():
    z_EE = torch.full((3, 3), 9.0)
    z_EE[0, 1], z_EE[1, 0] = 1.9, 1.0
    z_EE[0, 2], z_EE[2, 0] = 0.1, 2.0
    hits = [30, 30, 30]
    rule = MergeOverlapping(z=2.0, min_hits=30)
    assert [p.ids for p in rule.propose(signals(overlap=z_EE, hits=hits))] == [(0, 1)]
    assert rule.propose(signals(overlap=z_EE, hits=[29, 30, 30])) == []


def test_identical_experts_are_merged_at_next_to_no_cost():
    learner = Learner([MergeSimilar(0.99, min_age=40)], lr=1e-4)
    one, twin = learner.layer.experts[1], learner.layer.experts[2]
    twin.body.load_state_dict(one.body.state_dict())
    point(learner.layer, [3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0])
    events = learner.learn(60, centers=(0, 1, 2), spread=0.1)
    (merged,) = done(events, "merge")
    assert merged.ids == (1, 2) and merged.child == 3
    assert merged.signals["similarity"] > 0.99
    assert merged.change < 0.1
    assert list(learner.layer.experts) == [0, 3]


@pytest.mark.slow
def test_different_experts_are_left_apart():
    learner = Learner([MergeSimilar(min_age=40)], k=1)
    assert learner.learn(120, centers=(0, 1, 2)) == []


def test_a_merge_that_would_leave_too_few_for_the_router_is_refused_not_raised():
    learner = Learner([MergeSimilar(min_age=20)], num_experts=2, k=2)
    with torch.no_grad():
        for name, p in learner.layer.experts[1].named_parameters():
            p.copy_(dict(learner.layer.experts[0].named_parameters())[name])
    events = learner.learn(60)
    assert events and not done(events)
    assert "refused: the router needs 2 experts" in events[0].reason
    assert list(learner.layer.experts) == [0, 1]


@pytest.mark.slow
def test_experts_of_different_kinds_do_not_stop_the_training():
    learner = Learner([MergeSimilar(0.01, min_age=20)], num_experts=2, lr=1e-3)
    surgery.spawn(learner.layer, None, learner.optimizer, expert=torch.nn.Linear(4, 4))
    learner.learn(60, centers=(0, 1, 2))
    assert all(e.ids != (0, 2) and e.ids != (1, 2) for e in learner.layer.lineage)
