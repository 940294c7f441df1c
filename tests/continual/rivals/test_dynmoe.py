"""DynMoE: an expert comes where none accepts, and goes where it accepts nothing."""

import torch
import torch.nn.functional as F

from growmoe.continual.rivals.dynmoe import DynMoE


def made(num_experts=2, window=1000, max_experts=16):
    torch.manual_seed(0)
    return DynMoE(
        (1, 8, 8),
        6,
        width=8,
        hidden=4,
        num_experts=num_experts,
        max_experts=max_experts,
        window=window,
        learning_rate=1e-3,
    )


def set_keys(learner, keys, threshold=0.5):
    with torch.no_grad():
        for expert, key in zip(learner.net.layer.experts.values(), keys, strict=True):
            expert.entries.key.copy_(key)
            expert.entries.threshold.fill_(threshold)


def test_an_expert_is_added_toward_the_inputs_that_none_accepts():
    learner, eye = made(), torch.eye(8)
    set_keys(learner, eye[:2])
    learner.record(torch.stack([eye[0], eye[1], 2 * eye[5], eye[5] + eye[6]]))
    learner.adapt()
    experts = learner.net.layer.experts
    assert list(experts) == [0, 1, 2]
    key = F.normalize(experts[2].entries.key, dim=0)
    torch.testing.assert_close(key, F.normalize(3 * eye[5] + eye[6], dim=0))
    spawned = [e for e in learner.lineage() if e["act"] == "spawn"]
    assert "2 inputs" in spawned[0]["reason"]


def test_an_expert_that_accepted_nothing_goes_and_others_stay():
    learner, eye = made(), torch.eye(8)
    set_keys(learner, eye[:2])
    learner.record(eye[:1].repeat(3, 1))
    kept = learner.net.layer.experts[0]
    learner.adapt()
    assert list(learner.net.layer.experts) == [0] and learner.net.layer.experts[0] is kept


def test_nothing_changes_while_all_are_accepted_and_all_are_used():
    learner, eye = made(), torch.eye(8)
    set_keys(learner, eye[:2])
    learner.record(eye[:2])
    learner.adapt()
    assert list(learner.net.layer.experts) == [0, 1]


def test_at_most_as_many_experts_as_allowed_and_never_none():
    learner, eye = made(num_experts=1, max_experts=1), torch.eye(8)
    set_keys(learner, eye[:1])
    learner.record(eye[3:4])
    learner.adapt()
    assert list(learner.net.layer.experts) == [0]


def test_it_adapts_every_window_while_it_learns():
    learner = made(window=5)
    for _ in range(10):
        learner.learn(torch.rand(16, 1, 8, 8), torch.randint(0, 6, (16,)))
    assert learner._batches == 0
    assert learner(torch.rand(3, 1, 8, 8)).shape == (3, 6)
