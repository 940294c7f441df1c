"""The plot of accuracies: a method keeps its look, and what is close together is shown apart."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from growmoe.continual.methods import METHODS, controls
from growmoe.report.accuracy import look, mark_boundaries, plot_accuracy
from growmoe.report.plots import plot_lifelines


def results(**finals):
    return {
        "stream": "tiny",
        "methods": {
            name.replace("_", "-"): {
                "seeds": [
                    {"accuracy_matrix": [[1.0, 0.0], [final, final]], "test_counts": [1, 1]}
                    for final in (value, value - 0.01)
                ]
            }
            for name, value in finals.items()
        },
    }


def colours(ax):
    return {line.get_label().split()[0]: line.get_color() for line in ax.lines}


def test_a_method_looks_the_same_whatever_else_is_drawn():
    few = colours(plot_accuracy(results(replay=0.8, growmoe=0.9)))
    many = colours(plot_accuracy(results(naive=0.2, ewc=0.3, growmoe=0.9, replay=0.8, joint=0.9)))
    assert few.items() <= many.items()


def test_no_two_methods_of_the_bench_look_alike():
    looks = [tuple(look(name).values()) for name in [*METHODS, *controls()]]
    assert len(set(looks)) == len(looks)
    assert look("mine") == look("mine")  # one of the user's own


def test_the_best_are_shown_again_larger_where_they_are_close():
    figure = plot_accuracy(results(growmoe=0.9, replay=0.88, naive=0.2)).figure
    whole, zoomed = figure.axes
    assert whole.get_ylim() == (0, 102) and len(whole.lines) == 3
    assert len(zoomed.lines) == 2 and 80 < zoomed.get_ylim()[0] < 88
    assert len(plot_accuracy(results(growmoe=0.9, naive=0.2)).figure.axes) == 1
    assert len(plot_accuracy(results(growmoe=0.9, naive=0.2, ewc=0.89), Figure().add_subplot())
               .figure.axes) == 1  # fmt: skip


def test_the_legend_does_not_overlap_and_stands_in_the_order_of_the_ends():
    names = {name.replace("-", "_"): 0.2 + 0.03 * i for i, name in enumerate(METHODS)}
    figure = plot_accuracy(results(**names)).figure
    figure.draw_without_rendering()
    texts = figure.axes[-1].get_legend().get_texts()
    assert [text.get_text().split()[0] for text in texts] == list(METHODS)[::-1]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert figure.bbox.y0 <= boxes[-1].y0 and boxes[0].y1 <= figure.bbox.y1
    shifts = [abs(line.get_xdata()[0] - 1) for line in figure.axes[0].lines]
    assert max(shifts) < 0.25  # each stays at its experience


def test_boundaries_are_drawn_behind_the_lives():
    events = [{"step": 0, "layer": "moe", "act": "init", "ids": [0], "accepted": True}]
    ax = mark_boundaries(plot_lifelines(events), [10, 20])
    assert [line.get_xdata()[0] for line in ax.lines if line.get_zorder() == 0] == [10, 20]
