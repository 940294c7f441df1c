"""Heat maps: accuracy on each experience after each, and which expert takes what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.moe import MoE
from growmoe.report.style import HEAT, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED = 12  # rows up to which every cell shows its number


def plot_accuracy_matrix(accuracy_matrix: ArrayLike, ax: Axes | None = None) -> Axes:
    """Accuracy on each experience (columns) after each one learned (rows), as numbers and shades.

    Args:
        accuracy_matrix: R, [T, T], from 0 to 1; what lies above the diagonal was not yet learned.
        ax: where to draw.

    Raises:
        ValueError: it is no square matrix.
    """
    r_TT = np.asarray(accuracy_matrix, dtype=float)
    if r_TT.ndim != 2 or r_TT.shape[0] != r_TT.shape[1]:
        raise ValueError(f"accuracy_matrix must be [T, T], got shape {r_TT.shape}")
    ax = new_axes(ax, 4.6, 3.8)
    image = _heat(ax, 100 * r_TT, "{:.0f}", high=100.0)
    ax.set_xlabel("tested on experience")
    ax.set_ylabel("after experience")
    count = len(r_TT)
    ticks = np.arange(0, count, max(1, count // 10))
    ax.set_xticks(ticks, [str(i + 1) for i in ticks])
    ax.set_yticks(ticks, [str(i + 1) for i in ticks])
    _bar(ax, image, "accuracy (%)")
    return ax


def plot_routing(
    counts: ArrayLike,
    experts: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The share of each group's inputs (a column: a class, a domain) that each expert (row) takes.

    Args:
        counts: [E, G], as `count_routing` gives it; a column is divided by its sum.
        experts: the names of the rows.
        groups: the names of the columns.
        ax: where to draw.

    Raises:
        ValueError: counts are no matrix, or the names do not fit it.
    """
    count_EG = np.asarray(counts, dtype=float)
    if count_EG.ndim != 2:
        raise ValueError(f"counts must be [E, G], got shape {count_EG.shape}")
    for name, given, length in (
        ("experts", experts, count_EG.shape[0]),
        ("groups", groups, count_EG.shape[1]),
    ):
        if given is not None and len(given) != length:
            raise ValueError(f"{name} must be {length} names, got {len(given)}")
    share_EG = 100 * count_EG / np.maximum(count_EG.sum(0), 1e-12)
    rows, columns = share_EG.shape
    size = (1.8 + 0.42 * min(columns, 20), 1.2 + 0.3 * min(rows, 24))
    ax = new_axes(ax, max(size[0], 4.0), max(size[1], 2.4))
    image = _heat(ax, share_EG, "{:.0f}", high=100.0)
    ax.set_xlabel("group")
    ax.set_ylabel("expert")
    for axis, names, length in (
        (ax.xaxis, groups, columns),
        (ax.yaxis, experts, rows),
    ):
        ticks = np.arange(0, length, max(1, -(-length // 24)))
        axis.set_ticks(ticks, [str(i if names is None else names[i]) for i in ticks])
    if any(len(str(g)) > 4 for g in groups or ()):
        ax.tick_params(axis="x", rotation=35)
    _bar(ax, image, "share of the group (%)")
    return ax


def _heat(ax: Axes, values: np.ndarray, number: str, high: float) -> Any:
    image = ax.imshow(values, cmap=HEAT, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    ax.tick_params(length=0)
    if max(values.shape) <= _NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            colour = "black" if value > 0.55 * high else "white"
            ax.text(j, i, number.format(value), ha="center", va="center", color=colour, fontsize=8)
    return image


def _bar(ax: Axes, image: Any, label: str) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.02)


@torch.no_grad()
def count_routing(layer: MoE, x: Tensor, group: Tensor, context: Any = None) -> Tensor:
    """How many inputs of each group each expert receives, in eval mode.

    Args:
        layer: any mixture.
        x: its inputs, [..., D].
        group: int64 [...], a class or domain for each.
        context: what the router is told, if anything.

    Returns:
        float32 [E, G], G = the largest group + 1; experts in the order of `layer.experts`. A row of
        an input that goes to several experts counts for each.

    Raises:
        ValueError: not one group for each input, or the layer's rows are no tokens (Soft MoE).
    """
    group_T = group.reshape(-1)
    tokens = x.numel() // max(x.shape[-1], 1)
    if len(group_T) != tokens:
        raise ValueError(f"group has {len(group_T)} values, x has {tokens} inputs")
    training = layer.training
    layer.eval()
    try:
        assignment = layer.route(x.reshape(-1, x.shape[-1]), context=context).assignment
    finally:
        layer.train(training)
    if type(assignment) is not Assignment:
        raise ValueError("the router mixes inputs: its rows belong to no single input")
    groups = int(group_T.max()) + 1 if tokens else 0
    counts = torch.zeros(len(layer.experts) * groups)
    place_R = assignment.expert_R.cpu() * groups + group_T.cpu()[assignment.token_R.cpu()]
    return counts.index_add_(0, place_R, torch.ones(len(place_R))).view(-1, groups)
