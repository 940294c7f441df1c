"""Accuracy over experiences, every method in a look of its own that it keeps in every plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from growmoe.continual.methods import METHODS, controls
from growmoe.continual.metrics import accuracy_by_experience, mean_ci95
from growmoe.report.plots import OKABE_ITO

from matplotlib.figure import Figure  # isort: skip - the line above says what to install

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = OKABE_ITO[:7]  # without yellow, which is faint on white
_MARKERS = "osD^vPX<"
_DASHES = ("-", "--", "-.", ":")
_CLOSE = 0.12  # methods so near the best one are shown again, larger
_BANDS = 10
_PALE = "#DDDDDD"


def look(method: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """The colour, marker and dashes of a method: the same whatever else is drawn.

    Args:
        method: its name; one that the bench does not know gets a look from its letters.
        known: the names in order; the bench's methods and controls if left out.
    """
    names = [*METHODS, *controls()] if known is None else list(known)
    i = names.index(method) if method in names else len(names) + sum(map(ord, method))
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)],
    }


def plot_accuracy(results: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Accuracy on all classes seen so far, after each experience, for every method.

    Args:
        results: the content of a bench's results.json.
        ax: where to draw; without it a new figure, in which the best methods are shown once more,
            larger, where several are close to one another.

    Returns:
        The axes: one line for each method, a band of the 95% confidence interval over seeds (above
        ten methods for growmoe alone).
    """
    curves = {name: _curve(entry["seeds"]) for name, entry in results["methods"].items()}
    best = max((mean[-1] for mean, _ in curves.values()), default=0.0)
    close = {name for name, (mean, _) in curves.items() if mean[-1] > best - _CLOSE}
    zoomed = None
    if ax is None:
        panels = 2 if 1 < len(close) < len(curves) else 1
        height = max(3.6, 0.9 + 0.17 * len(curves))
        figure = Figure(figsize=(2.2 + 3.3 * panels, height), layout="constrained")
        first, *rest = figure.subplots(1, panels, squeeze=False)[0]
        ax, zoomed = first, rest[0] if rest else None
    _draw(ax, curves)
    ax.set_ylim(0, 102)
    ax.set_ylabel("accuracy on all classes seen (%)")
    ax.set_title(str(results["stream"]), loc="left", fontsize=10)
    outer = ax
    if zoomed is not None:
        top = {name: curves[name] for name in curves if name in close}
        _draw(zoomed, top, among=list(curves))
        lowest = 100 * min(mean.min() for mean, _ in top.values())
        zoomed.set_ylim(np.floor(lowest) - 1, 100.5)
        zoomed.set_title(f"those within {100 * _CLOSE:.0f} points of the best", loc="left",
                         fontsize=9)  # fmt: skip
        outer = zoomed
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # In the order of the lines' right ends, so that a line is found beside its name.
        order = np.argsort([-mean[-1] for mean, _ in curves.values()], kind="stable")
        outer.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False,
                     title="at the end (%)", alignment="left", loc="center left", fontsize=8,
                     bbox_to_anchor=(1.0, 0.5), handlelength=3)  # fmt: skip
    return ax


def mark_boundaries(ax: Axes, steps: Sequence[float]) -> Axes:
    """Draw a pale line wherever an experience ended, behind all else; gives the axes back."""
    for step in steps:
        ax.axvline(step, color=_PALE, lw=1.0, zorder=0)
    return ax


def _curve(cells: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half-width over seeds after each experience."""
    curves = np.array(
        [accuracy_by_experience(cell["accuracy_matrix"], cell["test_counts"]) for cell in cells]
    )
    mean, half = np.array([mean_ci95(column) for column in curves.T]).T
    return mean, half


def _draw(
    ax: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    among: Sequence[str] | None = None,
) -> None:
    names = list(curves) if among is None else list(among)
    last = 1
    for name, (mean, half) in curves.items():
        # Side by side, so that equal methods do not hide one another.
        aside = min(0.07, 0.4 / len(names)) * (names.index(name) - (len(names) - 1) / 2)
        x = np.arange(1, len(mean) + 1) + aside
        last = max(last, len(mean))
        style, own = look(name), name == "growmoe"
        ax.plot(x, 100 * mean, ms=6 if own else 4.5, lw=2.0 if own else 1.1, mec="white", mew=0.4,
                zorder=3 if own else 2, label=f"{name}  {100 * mean[-1]:.1f}", **style)  # fmt: skip
        # bands of very many methods would hide the lines
        if np.isfinite(half).all() and (own or len(names) <= _BANDS):
            low, high = np.clip([mean - half, mean + half], 0, 1)
            ax.fill_between(x, 100 * low, 100 * high, color=style["color"], alpha=0.15, lw=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xticks(range(1, last + 1))
    ax.set_xlabel("experiences learned")
    ax.grid(axis="y", color=_PALE, lw=0.6)
    ax.set_axisbelow(True)
