"""Streaming LDA equals Avalanche's, whatever the mini-batches."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_features import Plain, examples

from growmoe.continual.rivals.slda import StreamingLDA


def learned(images, labels, size, classes=4):
    learner = StreamingLDA(Plain(), classes, early=1)
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        learner.learn(x, y)
    return learner


def test_it_equals_avalanches_example_by_example():
    pytest.importorskip("avalanche")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from avalanche.training.supervised import StreamingLDA as Theirs
    images, labels = examples()
    theirs = Theirs(
        slda_model=torch.nn.Flatten(),
        criterion=torch.nn.CrossEntropyLoss(),
        input_size=6,
        num_classes=3,
        evaluator=None,
    )
    for x, y in zip(images.flatten(1), labels, strict=True):
        theirs.fit(x[None], y[None])
    mine = learned(images, labels, 80, classes=3)
    torch.testing.assert_close(mine.S_DD / mine.n, theirs.Sigma, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(mine.mu_KD, theirs.muK)
    torch.testing.assert_close(
        mine(images), theirs.predict(images.flatten(1)), rtol=1e-2, atol=1e-2
    )


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 90))
def test_the_size_of_mini_batches_changes_nothing(size):
    images, labels = examples()
    expected, found = learned(images, labels, 1), learned(images, labels, size)
    torch.testing.assert_close(found.S_DD, expected.S_DD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mu_KD, expected.mu_KD)


def test_a_class_that_was_not_seen_is_not_predicted():
    images, labels = examples()
    learner = learned(images, labels, 16, classes=5)
    assert set(learner(images).argmax(1).tolist()) <= {0, 1, 2}
    memory = learner.memory(1)
    assert memory.statistics == 4 * (5 * 6 + 5 + 36) and memory.examples == 0
