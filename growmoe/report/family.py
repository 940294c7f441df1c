"""The family tree of experts: who was born of whom, as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growmoe.lineage import Lineage
from growmoe.report.lives import fate, plain, replay
from growmoe.report.style import GREY, OKABE_ITO, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FATES = {
    "alive": ("o", OKABE_ITO[2]),
    "frozen": ("s", OKABE_ITO[5]),
    "merged": ("D", OKABE_ITO[3]),
    "pruned": ("X", OKABE_ITO[1]),
}


def plot_lineage(events: Lineage | Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Experts as a family tree: generations from left to right, children beside their parents.

    An expert stands beside its first parent; dotted lines lead to the others. Marks tell what
    became of it.

    Args:
        events: a lineage, or its events as dicts (`Event.to_json`); refused ones draw nothing.
        ax: where to draw.
    """
    lives, _ = replay(plain(events))
    children: dict[Any, list[Any]] = {}
    for id, life in lives.items():
        children.setdefault(life.parents[0] if life.parents else None, []).append(id)
    depth: dict[Any, int] = {}
    row: dict[Any, float] = {}
    # a loop, not a recursion: a line of descent may be thousands long
    stack = [(id, 0) for id in reversed(children.get(None, []))]
    while stack:
        id, generation = stack.pop()
        depth[id], row[id] = generation, float(len(row))
        stack += [(child, generation + 1) for child in reversed(children.get(id, []))]
    count = len(row)
    ax = new_axes(ax, 6.5, min(max(1.4 + 0.26 * count, 2.4), 12.0))
    ax.spines[["left"]].set_visible(False)
    for style, others in (("-", False), (":", True)):
        x: list[float] = []
        y: list[float] = []
        for id, life in lives.items():
            for parent in life.parents[1:] if others else life.parents[:1]:
                x += [depth[parent], depth[parent], depth[id], math.nan]
                y += [row[parent], row[id], row[id], math.nan]
        ax.plot(x, y, style, color=GREY, lw=0.9, zorder=1)
    size = 7 if count <= 40 else 4
    for name, (marker, colour) in _FATES.items():
        mine = [id for id in lives if fate(lives[id]) == name]
        if mine:
            ax.plot([depth[i] for i in mine], [row[i] for i in mine], ls="", marker=marker,
                    ms=size, color=colour, label=name, zorder=2)  # fmt: skip
    for id, life in lives.items() if count <= 60 else ():
        born = "" if life.act == "init" else f"  born at {life.birth:g}"
        ax.annotate(f"{id}{born}", (depth[id], row[id]), xytext=(7, 0), va="center", fontsize=8,
                    textcoords="offset points")  # fmt: skip
    ax.set_ylim(count - 0.4, -0.6)
    ax.set_xlim(-0.3, max(depth.values(), default=0) + 1.2)
    ax.set_yticks([])
    ax.set_xticks(range(max(depth.values(), default=0) + 1))
    ax.set_xlabel("generation")
    if lives:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
    return ax
