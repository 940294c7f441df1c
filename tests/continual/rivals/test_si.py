"""Synaptic intelligence: paths sum up to the fall of the loss; importance holds weights."""

import pytest
import torch
import torch.nn.functional as F
from rows import rows

from growmoe.continual.rivals.learner import Experience
from growmoe.continual.rivals.si import SynapticIntelligence


def made(strength=0.0, learning_rate=1e-3):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6))
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    return SynapticIntelligence(net, optimizer, strength=strength, damping=1e-3)


def experience(stream, i, passes=20):
    index = stream.train_index[i]
    return Experience(stream.train_images(index), stream.data.train_labels[index], 1000, passes)


def test_the_paths_of_all_weights_sum_up_to_the_fall_of_the_loss():
    learner, first = made(), experience(rows(), 0)
    loss = [float(F.cross_entropy(learner(first.images), first.labels))]
    omega = [torch.zeros_like(p) for p in learner.weights]
    for x, y in first.batches():
        learner._step(x, y, omega)
    loss.append(float(F.cross_entropy(learner(first.images), first.labels)))
    assert loss[1] < loss[0]
    assert sum(float(o.sum()) for o in omega) == pytest.approx(loss[0] - loss[1], rel=0.02)


def test_importance_holds_weights_to_where_they_were():
    moved = []
    for strength in (0.0, 1.0):
        learner, stream = made(strength, learning_rate=0.01), rows()
        learner.learn_experience(experience(stream, 0))
        assert all((i >= 0).all() for i in learner.importance) and learner.importance[0].sum() > 0
        weight = learner.weights[0].detach().clone()
        importance = learner.importance[0].clone()
        learner.learn_experience(experience(stream, 1))
        moved.append(float((importance * (learner.weights[0] - weight).square()).sum()))
    assert moved[1] < 0.9 * moved[0]
