"""Heat maps, territories, curves and family trees show what they are given, on any axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from bench_runs import event
from matplotlib.figure import Figure

import growmoe
from growmoe.report import (
    count_routing,
    plot_accuracy_matrix,
    plot_curves,
    plot_lifelines,
    plot_lineage,
    plot_routing,
    plot_territories,
)


def halves() -> growmoe.MoE:
    """Expert 0 takes the right half of the plane, expert 1 the left."""
    layer = growmoe.MoE(2, growmoe.FFN(4), 2, growmoe.TopK(1), seed=0)
    with torch.no_grad():
        layer.experts[0].entries.key.copy_(torch.tensor([5.0, 0.0]))
        layer.experts[1].entries.key.copy_(torch.tensor([-5.0, 0.0]))
    return layer


def test_routing_is_counted_by_expert_and_group_and_leaves_the_layer_as_it_was() -> None:
    layer = halves().train()
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 0.0], [3.0, 0.0]])
    counts = count_routing(layer, x, torch.tensor([0, 2, 2, 2]))
    assert counts.tolist() == [[1, 0, 2], [0, 0, 1]]
    assert layer.training and layer.experts[0].statistics["rows"] == 0
    with pytest.raises(ValueError, match="group has 3 values, x has 4 inputs"):
        count_routing(layer, x, torch.tensor([0, 1, 1]))
    soft = growmoe.MoE(2, growmoe.FFN(4), 2, growmoe.routers.SoftMoE(8))
    with pytest.raises(ValueError, match="mixes inputs"):
        count_routing(soft, x, torch.tensor([0, 1, 1, 1]))


def test_a_routing_map_shows_the_share_of_each_group() -> None:
    ax = plot_routing([[1, 3], [1, 1]], [7, 9], ["zeros", "ones"])
    np.testing.assert_allclose(ax.images[0].get_array(), [[50, 75], [50, 25]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["7", "9"]
    with pytest.raises(ValueError, match="groups must be 2 names, got 1"):
        plot_routing([[1, 3], [1, 1]], groups=["zeros"])


def test_an_accuracy_matrix_is_drawn_in_percent() -> None:
    ax = plot_accuracy_matrix([[0.9, 0.0], [0.5, 0.8]])
    np.testing.assert_allclose(ax.images[0].get_array(), [[90, 0], [50, 80]])
    assert "50" in [text.get_text() for text in ax.texts]
    with pytest.raises(ValueError, match=r"must be \[T, T\]"):
        plot_accuracy_matrix([[0.9, 0.0]])


def test_territories_are_named_where_they_lie() -> None:
    layer = halves()
    axes = Figure().add_subplot()
    ax = plot_territories(layer, extent=(-1, 1, -1, 1), ax=axes)
    assert ax is axes
    places = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert places["0"] > 0.2 and places["1"] < -0.2
    assert layer.experts[0].statistics["rows"] == 0
    with pytest.raises(ValueError, match="inputs have 3"):
        plot_territories(growmoe.MoE(3, growmoe.FFN(4), 2))
    with pytest.raises(ValueError, match="needs points or an extent"):
        plot_territories(layer)


def test_curves_have_a_band_over_seeds_and_none_for_one() -> None:
    ax = plot_curves({"a": [[1.0, 2.0], [3.0, 4.0]], "b": [1.0, 1.0]}, x=[10, 20])
    assert list(ax.lines[0].get_xdata()) == [10, 20]
    assert list(ax.lines[0].get_ydata()) == [2.0, 3.0]
    assert len(ax.collections) == 1
    with pytest.raises(ValueError, match="x has 3 values"):
        plot_curves({"a": [1.0, 2.0]}, x=[1, 2, 3])


@pytest.mark.slow
def test_a_family_tree_puts_children_beside_parents_and_survives_deep_descent() -> None:
    events = [event(0, "init", [0, 1]), event(5, "spawn", [1], 2), event(6, "merge", [0, 2], 3)]
    ax = plot_lineage(events)
    names = {text.get_text().split()[0]: text.xy for text in ax.texts}
    assert names == {"0": (0, 0), "3": (1, 1), "1": (0, 2), "2": (1, 3)}
    assert {line.get_label() for line in ax.lines if not line.get_label().startswith("_")} == {
        "alive", "merged",
    }  # fmt: skip
    deep = [event(0, "init", [0])] + [event(i, "spawn", [i - 1], i) for i in range(1, 1500)]
    assert plot_lineage(deep) is not None
    assert plot_lineage([]) is not None


def test_a_lineage_is_one_layers_though_it_learned_its_name_late() -> None:
    layer = halves()
    layer.name = "0"
    growmoe.surgery.spawn(layer, 1)
    ax = plot_lineage(layer.lineage)
    assert {text.get_text().split()[0] for text in ax.texts} == {"0", "1", "2"}
    ax = plot_lifelines(layer.lineage)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2"]
