"""Plots: they draw what happened and nothing else, on any axes, without choosing a backend."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from growmoe.report import plot_accuracy, plot_lifelines, plot_load, plots
from growmoe.report.plots import save


def event(step, act, ids=(), parents=(), child=None, accepted=True, layer="moe"):
    return {
        "step": step,
        "layer": layer,
        "act": act,
        "ids": list(ids),
        "parents": list(parents),
        "child": child,
        "accepted": accepted,
        "reason": "",
        "signals": {},
        "change": None,
    }


LIFE = [
    event(0, "init", ids=[0, 1]),
    event(10, "spawn", ids=[0], parents=[0], child=2),
    event(15, "spawn", child=3, accepted=False),
    event(20, "freeze", ids=[1]),
    event(25, "prune", ids=[0], accepted=False),
    event(30, "merge", ids=[0, 2], parents=[0, 2], child=4),
    event(40, "thaw", ids=[1]),
    event(50, "prune", ids=[1]),
    event(60, "spawn", child=5),
]


def spans(ax):
    """{row: (start, end)} of the drawn lives."""
    rows = {}
    for patch in ax.patches:
        if isinstance(patch, Rectangle):
            row = round(patch.get_y() + patch.get_height() / 2)
            left, right = patch.get_x(), patch.get_x() + patch.get_width()
            old = rows.get(row, (left, right))
            rows[row] = (min(old[0], left), max(old[1], right))
    return rows


def points(ax, label):
    line = next(line for line in ax.lines if line.get_label() == label)
    return list(zip(*line.get_data(), strict=True))


def test_lives_run_from_birth_to_death():
    rows = spans(plot_lifelines(LIFE))
    names = [0, 1, 2, 4, 5]
    end = rows[names.index(5)][1]
    assert rows == {0: (0, 30), 1: (0, 50), 2: (10, 30), 3: (30, end), 4: (60, end)}


def test_every_accepted_act_is_marked_and_no_refused_one():
    ax = plot_lifelines(LIFE)
    assert points(ax, "birth") == [(10, 2), (60, 4)]
    assert points(ax, "birth by merge") == [(30, 3)]
    assert points(ax, "freeze") == [(20, 1)] and points(ax, "thaw") == [(40, 1)]
    assert points(ax, "death") == [(50, 1)]


def test_lines_lead_from_every_parent_to_the_child():
    ax = plot_lifelines(LIFE)
    links = {
        (line.get_xdata()[0], *line.get_ydata())
        for line in ax.lines
        if line.get_color() == "#888888"
    }
    assert links == {(10, 0, 2), (30, 0, 3), (30, 2, 3)}


def test_width_follows_the_load():
    history = [{"step": 5, "load": {0: 0.9, 1: 0.1}}, {"step": 60, "load": {"1": 1.0}}]
    heights = {
        (round(p.get_y() + p.get_height() / 2), p.get_x()): p.get_height()
        for p in plot_lifelines(LIFE, history).patches
    }
    assert heights[0, 0] > heights[1, 0] > 0
    assert heights[1, 40] > heights[1, 0]


def test_experts_of_several_layers_are_kept_apart():
    events = [event(0, "init", ids=[0, 1], layer="a"), event(0, "init", ids=[0, 1], layer="b")]
    ax = plot_lifelines(events)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["a:0", "a:1", "b:0", "b:1"]


@pytest.mark.parametrize("count", [1, 10, 100])
def test_labels_of_experts_do_not_overlap(count):
    events = [event(0, "init", ids=[0])]
    events += [event(i, "spawn", ids=[0], parents=[0], child=i) for i in range(1, count)]
    ax = plot_lifelines(events)
    ax.figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert boxes and not any(
        a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.width and b.width
    )


def test_no_events_and_no_load_still_give_axes():
    assert isinstance(plot_lifelines([]), Axes)
    assert isinstance(plot_load([]), Axes)
    assert isinstance(plot_accuracy({"stream": "none", "methods": {}}), Axes)


def test_load_is_stacked_to_the_whole():
    history = [{"step": 0, "load": {0: 1.0}}, {"step": 10, "load": {0: 0.25, 1: 0.75}}]
    ax = plot_load(history)
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in ax.collections]
    assert tops == pytest.approx([1.0, 1.0])
    assert ax.get_xlim() == (0, 10)


RESULTS = {
    "stream": "tiny",
    "methods": {
        "several": {
            "seeds": [
                {"accuracy_matrix": [[0.9, 0.0], [0.5, 0.7]], "test_counts": [1, 1]},
                {"accuracy_matrix": [[0.7, 0.0], [0.5, 0.9]], "test_counts": [1, 1]},
            ]
        },
        "single": {"seeds": [{"accuracy_matrix": [[1.0, 0], [0.0, 1.0]], "test_counts": [1, 3]}]},
    },
}


def test_accuracy_is_over_the_classes_seen_with_a_band_where_there_are_seeds():
    ax = plot_accuracy(RESULTS)
    several, single = ax.lines
    assert list(several.get_ydata()) == pytest.approx([80, 65])
    assert list(single.get_ydata()) == pytest.approx([100, 75])
    assert len(ax.collections) == 1


def test_given_axes_are_drawn_on_and_given_back():
    ax = Figure().add_subplot()
    history = [{"step": 0, "load": {0: 1.0}}]
    assert plot_accuracy(RESULTS, ax) is ax
    assert plot_lifelines(LIFE, history, ax=ax) is ax
    assert plot_load(history, ax) is ax


def test_a_plot_can_be_saved(tmp_path):
    assert save(plot_accuracy, tmp_path / "a.png", RESULTS).read_bytes()[:4] == b"\x89PNG"


def test_no_backend_is_chosen():
    code = Path(plots.__file__).read_text()
    assert "matplotlib.use" not in code and "import pyplot" not in code
