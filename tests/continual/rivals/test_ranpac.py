"""RanPAC's head is order-invariant and equals ridge regression on all at once."""

import torch
from plain_features import Plain, examples

from growmoe.continual.rivals.ranpac import RanPAC


def learned(order, size=13):
    images, labels = examples(200)
    learner = RanPAC(Plain(), 3, projected=20, ridge=0.01, early=1, seed=1)
    for part in order.split(size):
        learner.learn(images[part], labels[part])
    return learner, learner(images)


def test_it_equals_ridge_on_all_examples_in_any_order():
    images, labels = examples(200)
    learner, scores = learned(torch.arange(200))
    h = torch.relu(images.flatten(1) @ learner.W_DM).double()
    h = torch.cat([h, torch.ones(200, 1)], 1)
    gram = h.T @ h
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    target = torch.nn.functional.one_hot(labels, 3).double()
    expected = h @ torch.linalg.solve(gram, h.T @ target)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-4)
    for order in (labels.argsort(), torch.arange(200).flip(0)):
        torch.testing.assert_close(learned(order)[1], scores, rtol=1e-3, atol=1e-4)


def test_the_projection_counts_as_memory():
    memory = learned(torch.arange(200))[0].memory(1)
    assert memory.buffers == 4 * 6 * 20
    assert memory.model == 4 * 21 * 3
    # the second moment is symmetric, so that half of it is enough
    whole = 4 * (21 * 21 + 21 * 3)
    assert whole / 2 < memory.statistics <= whole + 64
