"""Tables drift in concept: the same rows, other labels."""

import sys

import pytest
import torch

from growmoe.continual import load
from growmoe.continual.data import tables

pytest.importorskip("river")


@pytest.mark.parametrize(
    ("name", "width"),
    [("sea", 3), pytest.param("agrawal", 9, marks=pytest.mark.slow), ("stagger", 9)],
)
def test_every_concept_has_both_classes_and_rows_from_zero_to_one(name, width):
    concepts = tables.read_table(name)
    assert len(concepts) == tables.CONCEPTS[name][1]
    for part in concepts:
        assert part.train_pixels.shape == (3000, 1, 1, width)
        assert part.test_pixels.shape == (1000, 1, 1, width)
        assert part.train_pixels.min() >= 0 and part.train_pixels.max() <= 1
        assert 0.1 < part.train_labels.float().mean() < 0.9


def test_sea_is_a_sum_above_a_threshold_but_for_a_tenth_of_the_labels():
    for part, threshold in zip(tables.read_table("sea"), (8, 9, 7, 9.5), strict=True):
        x = part.train_pixels.flatten(1)
        agrees = (10 * (x[:, 0] + x[:, 1]) > threshold) == part.train_labels.bool()
        assert max(agrees.float().mean(), 1 - agrees.float().mean()) == pytest.approx(0.9, abs=0.03)


def test_a_tabular_stream_is_domain_incremental_and_drifts_as_asked():
    stream = load("tabular-stagger:drift=recurring,examples=200,tests=50", 0)
    assert stream.scenario == "domain" and stream.num_classes == 2
    assert stream.num_experiences == 6 and stream.image_shape == (1, 1, 9)
    assert stream.num_examples == 600 and stream.test_counts == [50] * 6
    again = load("tabular-stagger:drift=recurring,examples=200,tests=50", 0)
    assert torch.equal(again.train_images(), stream.train_images())
    assert load("tabular-stagger", 1).digest() != load("tabular-sea", 1).digest()


def test_without_river_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.datasets", None)
    monkeypatch.delitem(sys.modules, "river.datasets.synth", raising=False)
    tables.read_table.cache_clear()
    with pytest.raises(ImportError, match=r"growmoe\[river\]"):
        load("tabular-sea", 0)
