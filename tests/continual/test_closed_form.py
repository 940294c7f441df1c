"""growmoe and the heads beside it, on any stream."""

import pytest
from rows import rows

from growmoe.continual import closed_form as room
from growmoe.continual.features import default_features
from growmoe.continual.methods import METHODS
from growmoe.continual.scenarios import permuted
from growmoe.experts.moments import moment_numbers


def silent(fraction, text):
    assert 0 <= fraction <= 1


@pytest.mark.slow
def test_one_class_an_experience_is_learned():
    stream = rows(experiences=6, classes=6, each=30)
    cell = room.run_growmoe(stream, 0, silent, batch_size=16, early=20)
    assert sum(cell.accuracy_matrix[-1]) / 6 > 0.9
    assert cell.extras == {"experts": 6, "domains": 1} and cell.detections == []
    assert sum(map(sum, cell.routing)) == sum(stream.test_counts)
    assert cell.load_history


@pytest.mark.slow
def test_one_example_an_experience_is_survived():
    stream = rows(experiences=6, classes=6, each=1)
    cell = room.run_growmoe(stream, 0, silent, batch_size=2, early=3)
    assert len(cell.accuracy_matrix) == 6 and cell.memory_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("drift", ["sharp", "fuzzy", "recurring", "none"])
def test_the_heads_run_where_experiences_end_inside_batches(drift):
    stream = rows(experiences=3, family=permuted, scenario="domain", each=20, drift=drift)
    for name in ("growmoe", "ridge"):
        cell = METHODS[name].again(batch_size=16, early=32).run(stream, 0, silent)
        assert len(cell.accuracy_matrix) == stream.num_experiences


@pytest.mark.parametrize("moments", [1, 10, 19])
def test_the_wide_head_has_the_memory_of_so_many_moments(moments):
    for shape in ((1, 28, 28), (1, 1, 9)):
        features = default_features(shape)
        wide = room.wider(features, moments).num_features
        mine = moments * moment_numbers(features.blocks)
        assert moment_numbers((wide,)) == pytest.approx(mine, rel=0.03)
