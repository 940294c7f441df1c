"""The plot of figures over time, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from growmoe.continual.metrics import mean_ci95
from growmoe.report.style import MARKERS, OKABE_ITO, PALE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(
    curves: Mapping[str, ArrayLike],
    x: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    xlabel: str = "step",
    ylabel: str = "",
) -> Axes:
    """One line for each name: the mean over seeds, in a band of its 95% confidence interval.

    Args:
        curves: name -> [N], or [S, N] for S seeds.
        x: [N]; 1 to N if left out.
        ax: where to draw.
        xlabel: what x is.
        ylabel: what the curves are.

    Raises:
        ValueError: curves are neither [N] nor [S, N], or not as long as x.
    """
    ax = new_axes(ax, 5.5, 3.4)
    for i, (name, values) in enumerate(curves.items()):
        value_SN = np.atleast_2d(np.asarray(values, dtype=float))
        places = np.arange(1, value_SN.shape[-1] + 1) if x is None else np.asarray(x, dtype=float)
        if value_SN.ndim != 2 or value_SN.shape[1] != len(places):
            raise ValueError(f"{name!r} has shape {np.shape(values)}, x has {len(places)} values")
        mean, half = np.array([mean_ci95(column) for column in value_SN.T]).reshape(-1, 2).T
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        marker = MARKERS[i % len(MARKERS)] if len(places) <= 25 else ""
        ax.plot(places, mean, "-" if i < len(OKABE_ITO) else "--", marker=marker, ms=4.5, lw=1.3,
                color=colour, label=name)  # fmt: skip
        if np.isfinite(half).all():
            ax.fill_between(places, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    if curves:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax
