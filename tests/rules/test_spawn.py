"""When an expert is born: at the stated values by hand, and in small trainings."""

import pytest
import torch
from drifting import CENTERS, Learner, done, signals
from slow_parameters import but_slow

from growmoe.rules import SpawnOnLoss, SpawnOnNovelty, SpawnOnOverload, SplitOnNovelty

MEAN = torch.ones(4)


def novel(share, **more):
    fields = {"novel_count": 9.0, "novel_mean": MEAN, "novel_nearest": 2, **more}
    return signals(novel_share=share, **fields)


def test_novelty_must_exceed_the_share():
    rule = SpawnOnNovelty(0.25)
    assert rule.propose(novel(0.25)) == []
    (proposal,) = rule.propose(novel(0.26))
    assert (proposal.act, proposal.ids, proposal.toward) == ("spawn", (2,), MEAN)
    assert proposal.signals == {"novel_share": 0.26, "novel_count": 9.0}
    assert "26% > 25%" in proposal.reason


def test_novelty_without_an_input_to_turn_to_gives_no_birth():
    assert SpawnOnNovelty().propose(novel(0.9, novel_mean=None, novel_nearest=None)) == []
    (proposal,) = SpawnOnNovelty().propose(novel(0.9, novel_nearest=None))
    assert proposal.ids == ()


def test_overload_is_measured_in_fair_shares_and_the_worst_comes_first():
    rule = SpawnOnOverload(factor=1.5, min_age=10)
    ages = {"age": [10, 10, 10]}
    assert rule.propose(signals(load=[0.5, 0.25, 0.25], **ages)) == []  # 1.5 is not exceeded
    proposals = rule.propose(signals(load=[0.51, 0.0, 0.6], **ages))
    assert [p.ids for p in proposals] == [(2,), (0,)]
    assert proposals[0].signals["load"] == pytest.approx(1.8)
    assert rule.propose(signals(load=[0.9, 0, 0], age=[9, 99, 99])) == []


def test_a_rise_of_the_loss_is_measured_in_standard_errors():
    # the fast mean's standard error is sqrt(0.1 / 1.9) of the spread
    error = (0.04 * 0.1 / 1.9) ** 0.5
    fields = {"loss_var": [0.04] * 3, "loss_slow": [1.0] * 3}

    def at(z, count=20):
        fast = [1.0, 1.0 + z * error, 0.5]
        return signals(loss_fast=fast, loss_count=[count] * 3, **fields)

    assert at(5).loss_z(1) == pytest.approx(5)
    assert SpawnOnLoss(z=5).propose(at(4.99)) == []
    (proposal,) = SpawnOnLoss(z=5).propose(at(5.01))
    assert proposal.ids == (1,)
    assert SpawnOnLoss(z=5).propose(at(50, count=19)) == []  # too few losses to tell


def test_a_constant_loss_that_rises_is_noticed_though_its_spread_is_zero():
    values = {"loss_var": [0, 0, 0], "loss_slow": [1, 1, 1], "loss_count": [99, 99, 99]}
    assert SpawnOnLoss().propose(signals(loss_fast=[1, 1, 1], **values)) == []
    (proposal,) = SpawnOnLoss().propose(signals(loss_fast=[1, 1.1, 1], **values))
    assert proposal.ids == (1,)


def test_a_split_is_for_the_expert_whose_own_inputs_are_novel():
    rule = SplitOnNovelty(share=0.25, min_hits=30)
    assert rule.propose(signals(novel=[0.25, 0, 0], hits=[30, 30, 30])) == []
    assert rule.propose(signals(novel=[0.9, 0, 0], hits=[29, 30, 30])) == []
    proposals = rule.propose(signals(novel=[0.3, 0.1, 0.5], hits=[30, 30, 30]))
    assert [p.ids for p in proposals] == [(2,), (0,)]


@pytest.mark.parametrize(
    "rule,setting", [(SpawnOnNovelty, "share"), (SpawnOnOverload, "factor"), (SpawnOnLoss, "z")]
)
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_setting_out_of_range_is_named(rule, setting, value):
    with pytest.raises(ValueError, match=f"{rule.__name__}: {setting} must be positive, got"):
        rule(**{setting: value})


# In training.


@pytest.mark.parametrize("seed", but_slow(range(2), 0))
def test_a_new_domain_brings_forth_an_expert_for_it_and_a_known_one_none(seed):
    learner = Learner([SpawnOnNovelty()], seed=seed)
    assert learner.learn(100) == []
    events = learner.learn(40, centers=(3,))
    born = done(events, "spawn")
    assert len(born) == 1 and events == born
    assert born[0].step <= 120  # within two decisions
    key = learner.layer.experts[born[0].child].entries.key
    assert torch.cosine_similarity(key, CENTERS[3], dim=0) > 0.9
    with torch.no_grad():
        x, _ = learner.stream.batch(centers=(3,))
        assignment = learner.layer.route(x).assignment
    assert assignment.counts_E[-1] > 0.9 * len(x)  # it took its domain over
    assert learner.learn(60, centers=(0, 1, 3)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_born_of_novelty_or_loss_in_a_stationary_stream(seed):
    learner = Learner([SpawnOnNovelty(), SpawnOnLoss()], k=2, seed=seed)
    assert learner.learn(300, centers=(0, 1, 2)) == []


@pytest.mark.slow
def test_a_loss_that_rises_on_known_inputs_brings_forth_an_expert():
    learner = Learner([SpawnOnLoss()])
    assert learner.learn(150) == []
    born = done(learner.learn(30, turned=True), "spawn")
    assert born and born[0].signals["loss_z"] > 5
    assert "rose from" in born[0].reason


def test_an_overloaded_expert_is_cloned():
    learner = Learner([SpawnOnOverload(2.0, min_age=50)], num_experts=4, seed=1)
    for e, expert in learner.layer.experts.items():  # all inputs lie on one side
        expert.entries.key.data.fill_(2.0 if e == 1 else -2.0)
    born = done(learner.learn(60), "spawn")
    assert born and born[0].parents == (1,)
    assert born[0].signals["load"] == pytest.approx(4.0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_born_in_a_long_stationary_stream(seed):
    learner = Learner([SpawnOnNovelty(), SpawnOnLoss()], num_experts=4, k=2, seed=seed, noise=0.3)
    assert learner.learn(3000, centers=(0, 1, 2)) == []
