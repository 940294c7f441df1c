"""An experience of one class or of one example is learned like any other, by every method."""

import pytest
import torch
from brief_methods import briefly

from growmoe.continual import METHODS, from_datasets
from growmoe.continual.methods import controls

pytest.importorskip("avalanche")


def silent(fraction, text):
    pass


@pytest.fixture(scope="module")
def stream():
    """Two classes, then one example, then one class, then two."""
    generator = torch.Generator().manual_seed(0)

    def part(labels):
        labels = torch.tensor(labels)
        pixels = torch.randint(0, 60, (len(labels), 1, 8, 8), generator=generator)
        pixels[range(len(labels)), 0, labels] += 150
        return pixels.to(torch.uint8), labels

    groups = ([0, 1] * 8, [2], [3] * 12, [4, 5] * 8)
    return from_datasets("small", [*map(part, groups)], [*map(part, groups)], num_classes=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *controls()])
def test_every_method_survives_one_class_and_one_example(stream, name):
    torch.manual_seed(0)
    chosen = briefly(4, {**METHODS, **controls()})[name]
    cell = chosen.run(stream, 0, silent)
    assert len(cell.accuracy_matrix) == 4
    assert all(0 <= accuracy <= 1 for row in cell.accuracy_matrix for accuracy in row)
