"""growmoe and the heads beside it, on any stream."""

import pytest
from rows import rows

from growmoe.continual import closed_form as room
from growmoe.continual.methods import METHODS
from growmoe.continual.scenarios import permuted


def silent(fraction, text):
    assert 0 <= fraction <= 1


def test_one_class_an_experience_is_learned():
    stream = rows(experiences=6, classes=6, each=30)
    cell = room.run_growmoe(stream, 0, silent, batch_size=16, early=20)
    assert sum(cell.accuracy_matrix[-1]) / 6 > 0.9
    assert cell.extras == {"experts": 6, "domains": 1} and cell.detections == []
    assert sum(map(sum, cell.routing)) == sum(stream.test_counts)
    assert cell.load_history


def test_one_example_an_experience_is_survived():
    stream = rows(experiences=6, classes=6, each=1)
    cell = room.run_growmoe(stream, 0, silent, batch_size=2, early=3)
    assert len(cell.accuracy_matrix) == 6 and cell.memory_bytes > 0


@pytest.mark.parametrize("drift", ["sharp", "fuzzy", "recurring", "none"])
def test_the_heads_run_where_experiences_end_inside_batches(drift):
    stream = rows(experiences=3, family=permuted, scenario="domain", each=20, drift=drift)
    for name in ("growmoe", "ridge"):
        cell = METHODS[name].again(batch_size=16, early=32).run(stream, 0, silent)
        assert len(cell.accuracy_matrix) == stream.num_experiences


def test_the_wide_head_has_growmoes_memory():
    stream = rows(experiences=3, classes=6, each=60)
    grown = room.run_growmoe(stream, 0, silent, batch_size=16, early=32)
    wide = METHODS["ridge-wide"].again(batch_size=16, early=32).run(stream, 0, silent)
    assert wide.memory.statistics == pytest.approx(grown.memory.statistics, rel=0.25)
