"""When an expert stands still, and when it learns again."""

import pytest
import torch
from drifting import Learner, done, signals
from snapshots import copied, differences

from growmoe.rules import FreezeConverged, FreezeSettled, ThawOnDrift, ThawOnNovelty


def test_the_loss_must_move_by_less_than_the_slope_after_enough_losses():
    rule = FreezeConverged(slope=0.125, min_losses=500)
    values = {
        "loss_slow": [1.0] * 4,
        "loss_var": [1.0] * 4,
        "loss_count": [500, 500, 500, 499],
    }
    found = signals(4, loss_fast=[1.125, 1.12, 0.88, 1.0], **values)
    assert [p.ids for p in rule.propose(found)] == [(1,), (2,)]
    frozen = signals(4, frozen=(1,), loss_fast=[1.125, 1.12, 0.88, 1.0], **values)
    assert [p.ids for p in rule.propose(frozen)] == [(2,)]


def test_a_frozen_experts_loss_must_rise_by_more_than_z():
    error = (0.04 * 0.1 / 1.9) ** 0.5
    fast = [1 + 5.01 * error, 1 + 4.99 * error, 1 + 9 * error]
    found = signals(
        frozen=(0, 1), loss_fast=fast, loss_slow=[1] * 3, loss_var=[0.04] * 3, loss_count=[50] * 3
    )
    assert [(p.act, p.ids) for p in ThawOnDrift(5.0).propose(found)] == [("thaw", (0,))]


def test_an_expert_is_settled_at_so_many_rows_per_feature():
    found = signals(frozen=(2,), rows=[23, 24, 99])
    assert [p.ids for p in FreezeSettled(6.0).propose(found)] == [(1,)]


def test_a_frozen_experts_inputs_must_have_moved_and_be_recent():
    found = signals(4, frozen=(0, 1, 2), novelty=[1.0, 1.1, 1.1, 9.0], idle=[0, 7, 8, 0])
    assert [p.ids for p in ThawOnNovelty(1.0, recent=8).propose(found)] == [(1,)]


@pytest.mark.parametrize("rule", [FreezeConverged, FreezeSettled, ThawOnDrift, ThawOnNovelty])
def test_a_setting_out_of_range_is_named(rule):
    setting = next(iter(rule.__dataclass_fields__))
    with pytest.raises(ValueError, match=f"{rule.__name__}: {setting} must be positive"):
        rule(**{setting: 0})


@pytest.mark.slow
def test_what_has_converged_freezes_and_thaws_when_its_inputs_change_their_meaning():
    rules = [ThawOnDrift(), FreezeConverged(slope=0.1, z=2.0, min_losses=150)]
    learner = Learner(rules, num_experts=2, noise=0.4)
    events = learner.learn(300)
    frozen = {i for e in done(events, "freeze") for i in e.ids}
    busy = {i for i, e in learner.layer.experts.items() if e.statistics["hits"] > 200}
    assert busy and busy <= frozen
    assert not done(events, "thaw")
    still = copied(dict(learner.layer.named_parameters()))
    assert not done(learner.learn(40), "thaw")
    now = copied(dict(learner.layer.named_parameters()))
    for i in frozen:
        mine = [n for n in still if n.startswith(f"experts.{i}.")]
        assert differences([still[n] for n in mine], [now[n] for n in mine]) == []

    thawed = {i for e in done(learner.learn(30, turned=True), "thaw") for i in e.ids}
    assert busy <= thawed
    assert all(p.requires_grad for i in thawed for p in learner.layer.experts[i].parameters())
    before = learner.layer.experts[min(busy)].body.w_in.detach().clone()
    learner.learn(5, turned=True)
    assert not torch.equal(before, learner.layer.experts[min(busy)].body.w_in)
