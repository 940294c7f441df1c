"""The plot of the lives of experts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from growmoe.lineage import Lineage
from growmoe.report.lives import Life, plain, replay
from growmoe.report.style import GREY, OKABE_ITO, new_axes

from matplotlib.patches import Rectangle  # isort: skip - the line above says what is missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIVED, _FROZEN = OKABE_ITO[0], OKABE_ITO[5]
_NAMED_EXPERTS = 40

_MARKS = {
    "spawn": ("birth", "o", OKABE_ITO[2], OKABE_ITO[2]),
    "merge": ("birth by merge", "D", OKABE_ITO[3], OKABE_ITO[3]),
    "freeze": ("freeze", "s", _FROZEN, "white"),
    "thaw": ("thaw", "^", OKABE_ITO[4], OKABE_ITO[4]),
    "prune": ("death", "X", OKABE_ITO[1], OKABE_ITO[1]),
}


def plot_lifelines(
    events: Lineage | Sequence[Mapping[str, Any]],
    load_history: Sequence[Mapping[str, Any]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The life of each expert as a horizontal line from birth to death, with its descent.

    Args:
        events: a layer's lineage, or the events of layers as dicts; refused ones draw nothing.
        load_history: [{"step": int, "load": {expert id: share}}]; lines are as wide as the load.
            Where the events are of several layers, the keys are "layer:id".
        ax: where to draw.

    Returns:
        The axes: dark lines are learning experts, pale ones frozen; thin grey lines lead from
        parents to children.
    """
    events = plain(events)
    lives, marks = replay(events)
    count = len(lives)
    ax = new_axes(ax, 6.5, float(np.clip(1.2 + 0.2 * count, 2.4, 9.0)))
    ax.set_xlabel("step")
    ax.set_ylabel("expert")
    if not lives:
        ax.text(0.5, 0.5, "no experts", ha="center", va="center", transform=ax.transAxes)
        return ax
    history = sorted(load_history or [], key=lambda entry: entry["step"])
    steps = [event["step"] for event in events] + [entry["step"] for entry in history]
    start, end = min(steps), max(steps)
    end = end + max(1.0, 0.04 * (end - start))
    row = {expert: i for i, expert in enumerate(lives)}
    inches = ax.get_window_extent().height / ax.figure.dpi
    pitch = 72 * 0.9 * inches / (count + 1)  # points per row
    size = float(np.clip(0.5 * pitch, 2.2, 6.0))

    for expert, life in lives.items():
        for parent in life.parents:
            ax.plot([life.birth, life.birth], [row[parent], row[expert]], color=GREY,
                    lw=min(0.8, 0.2 * pitch), zorder=1)  # fmt: skip
        stop = end if life.death is None else life.death
        _draw_life(ax, life, row[expert], stop, history)
    for act, (label, marker, edge, face) in _MARKS.items():
        places = [(step, row[expert]) for what, step, expert in marks if what == act]
        if places:
            ax.plot(*zip(*places, strict=True), ls="", marker=marker, ms=size, mec=edge, mfc=face,
                    mew=0.8, label=label, zorder=4)  # fmt: skip
    ax.set_ylim(count - 0.4, -0.6)
    ax.set_xlim(start - 0.01 * (end - start), end)
    if count <= _NAMED_EXPERTS:
        ax.set_yticks(range(count), [str(expert) for expert in lives], fontsize=min(8, pitch * 0.8))
    else:
        ids = list(lives)
        shown = range(0, count, 10)
        ax.set_yticks(shown, [str(ids[i]) for i in shown], fontsize=8)
    ax.tick_params(axis="y", length=0)
    handles, labels = ax.get_legend_handles_labels()
    handles += [ax.plot([], [], color=c, lw=2.5)[0] for c in (_LIVED, _FROZEN)]
    labels += ["learning", "frozen"]
    if history:
        labels[-2] = "learning (width: load)"
    ax.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4,
              frameon=False, fontsize=8, columnspacing=1.2, handletextpad=0.5)  # fmt: skip
    return ax


def _draw_life(
    ax: Axes, life: Life, y: int, stop: float, history: Sequence[Mapping[str, Any]]
) -> None:
    """One life as a ribbon whose width follows the load and whose colour follows freezing."""
    cuts = {life.birth, stop, *(edge for span in life.frozen for edge in span if edge < stop)}
    cuts |= {entry["step"] for entry in history if life.birth < entry["step"] < stop}
    for left, right in itertools.pairwise(sorted(cuts)):
        middle = (left + right) / 2
        frozen = any(a <= middle < b for a, b in life.frozen)
        half = _thickness(life.expert, right, history) / 2
        ribbon = Rectangle(
            (left, y - half),
            right - left,
            2 * half,
            color=_FROZEN if frozen else _LIVED,
            lw=0,
            zorder=2,
            antialiased=False,
        )
        ax.add_patch(ribbon)


def _thickness(expert: Any, step: float, history: Sequence[Mapping[str, Any]]) -> float:
    """Share of a row's height for the load that was recorded first at `step` or later."""
    if not history:
        return 0.3
    entry = next((e for e in history if e["step"] >= step), history[-1])
    share = entry["load"].get(expert, entry["load"].get(str(expert), 0.0))
    # The root, so that small loads stay visible beside large ones.
    return 0.1 + 0.75 * float(np.sqrt(min(1.0, max(0.0, share))))
