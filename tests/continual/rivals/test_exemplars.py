"""The memory is balanced, bounded and a fair sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe.continual.rivals.exemplars import BalancedReservoir


@given(
    size=st.integers(4, 30),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=120),
    batch=st.integers(1, 40),
)
def test_classes_have_equal_shares_and_the_size_is_kept(size, labels, batch):
    store = BalancedReservoir(size)
    labels = torch.tensor(labels)
    images = torch.arange(len(labels)).float()[:, None]
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        store.add(x, y)
    images_kept, kept = store.draw(1000)
    assert len(store) == len(kept) <= size
    share = size // len(labels.unique())
    for k in labels.unique().tolist():
        assert int((kept == k).sum()) <= share
    assert (labels[images_kept[:, 0].long()] == kept).all()  # an image keeps its label
    assert len(set(images_kept[:, 0].tolist())) == len(kept)


def test_early_and_late_examples_are_as_likely_to_be_kept():
    kept = torch.zeros(100)
    for seed in range(200):
        store = BalancedReservoir(10, seed)
        store.add(torch.arange(100).float()[:, None], torch.zeros(100, dtype=torch.long))
        kept[store.draw(10)[0][:, 0].long()] += 1
    halves = kept.view(2, 50).sum(1) / 2000
    assert halves[0].item() == pytest.approx(0.5, abs=0.05)
