"""The plot of the load of experts, and what the other plots of a layer share with it.

Every function draws on the axes it is given, or on a new figure, and gives the axes back. The
backend is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from growmoe.report.lifelines import plot_lifelines
from growmoe.report.style import OKABE_ITO, new_axes, save

from matplotlib.ticker import MaxNLocator, PercentFormatter  # isort: skip - as in lifelines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OKABE_ITO", "plot_lifelines", "plot_load", "save"]


def plot_load(load_history: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """The share of the inputs that each expert took, stacked over time.

    Args:
        load_history: [{"step": int, "load": {expert id: share}}].
        ax: where to draw.

    Returns:
        The axes: oldest expert at the bottom; colours repeat, white lines part neighbours, and
        an expert is named at its largest share where there is room.
    """
    ax = new_axes(ax, 6.5, 3.2)
    ax.set_xlabel("step")
    ax.set_ylabel("share of the load")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    history = sorted(load_history, key=lambda entry: entry["step"])
    experts = list(dict.fromkeys(str(e) for entry in history for e in entry["load"]))
    experts.sort(key=lambda e: (not e.isdigit(), int(e) if e.isdigit() else 0, e))
    if not experts:
        ax.text(0.5, 0.5, "no load", ha="center", va="center", transform=ax.transAxes)
        return ax
    loads = [{str(e): share for e, share in entry["load"].items()} for entry in history]
    shares = np.array([[load.get(e, 0.0) for load in loads] for e in experts])
    steps = np.array([entry["step"] for entry in history], dtype=float)
    if len(steps) == 1:
        steps, shares = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(shares, 2, axis=1)
    palette = OKABE_ITO[:6]
    colours = [palette[i % len(palette)] for i in range(len(experts))]
    ax.stackplot(steps, shares, colors=colours, edgecolor="white", lw=0.4, alpha=0.9)
    bottom = np.cumsum(shares, axis=0) - shares
    named: list[tuple[float, float]] = []
    window = np.ones(2 * (len(steps) // 20) + 1)
    for i in np.argsort(-shares.max(axis=1)):
        # Where the band is widest for a while, not for a moment.
        at = int(np.convolve(shares[i], window, "same").argmax())
        x = float(np.clip(steps[at], *_inset(steps)))
        y = float(bottom[i, at] + shares[i, at] / 2)
        near = (0.04 * (steps[-1] - steps[0]), 0.05)
        if shares[i, at] > 0.06 and not any(
            abs(x - u) < near[0] and abs(y - v) < near[1] for u, v in named
        ):
            named.append((x, y))
            ax.text(x, y, experts[i], ha="center", va="center", fontsize=7, color="black")
    ax.set_xlim(steps[0], steps[-1])
    ax.set_ylim(0, max(1.0, float(shares.sum(axis=0).max())))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return ax


def _inset(steps: np.ndarray) -> tuple[float, float]:
    margin = 0.02 * (steps[-1] - steps[0])
    return float(steps[0] + margin), float(steps[-1] - margin)
