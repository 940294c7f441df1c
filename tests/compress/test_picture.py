"""The picture of `growmoe inspect` names experts by their ids."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from growmoe.compress.picture import draw


@pytest.mark.parametrize(
    ("ids", "shown"), [([0, 3, 7], [0, 3, 7]), (range(5, 45), range(5, 45, 3))]
)
def test_both_axes_of_the_cosines_carry_ids_not_places(monkeypatch, tmp_path, ids, shown):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: kept.append(self))
    size = len(ids)
    layer = {
        "name": "moe",
        "ids": list(ids),
        "load": [1 / size] * size,
        "saliency": {"reap": [1.0] * size},
        "similarity": [[1.0 if e == o else 0.5 for o in range(size)] for e in range(size)],
    }
    draw([layer], tmp_path / "seen.png")
    cosines = kept[0].axes[1]
    for axis in (cosines.xaxis, cosines.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == [str(id) for id in shown]
