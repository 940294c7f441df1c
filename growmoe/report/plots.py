"""Plots of accuracy over experiences, of the lives of experts and of their load.

Every function draws on the axes it is given, or on a new figure, and gives the axes back. The
colours are Okabe & Ito's, which colour-blind readers can tell apart. The backend is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from growmoe.continual.metrics import accuracy_by_experience, mean_ci95

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ModuleNotFoundError as error:
    raise ImportError(
        f"growmoe's plots need {error.name}, which is not installed: "
        "pip install 'growmoe[continual]'"
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, "Color Universal Design"; yellow last, for it is faint on white.
OKABE_ITO = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)
_MARKERS = "osD^vPX*"
_GREY = "#888888"
_LIVED, _FROZEN = OKABE_ITO[0], OKABE_ITO[5]
_NAMED_EXPERTS = 40


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is None:
        # A Figure of its own, so that no backend is chosen and nothing is kept alive by pyplot.
        ax = Figure(figsize=(width, height), layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save(plot: Callable[..., Axes], path: str | Path, *data: Any) -> Path:
    """Draw `plot(*data)` into a PNG file at 200 dots an inch; gives the path."""
    path = Path(path)
    figure = plot(*data).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=200)
    return path


def plot_accuracy(results: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Accuracy on all classes seen so far, after each experience, for every method.

    Args:
        results: the content of a bench's results.json.
        ax: where to draw.

    Returns:
        The axes: one line for each method, a band of the 95% confidence interval over seeds.
    """
    ax = _axes(ax, 5.5, 3.6)
    last = 1
    ends = []
    for i, (name, entry) in enumerate(results["methods"].items()):
        curves = np.array(
            [
                accuracy_by_experience(cell["accuracy_matrix"], cell["test_counts"])
                for cell in entry["seeds"]
            ]
        )
        mean, half = np.array([mean_ci95(column) for column in curves.T]).T
        # Side by side, so that equal methods do not hide one another.
        x = np.arange(1, len(mean) + 1) + 0.07 * (i - (len(results["methods"]) - 1) / 2)
        last = max(last, len(mean))
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        style = "-" if i < len(OKABE_ITO) else "--"
        ax.plot(x, 100 * mean, style, marker=_MARKERS[i % len(_MARKERS)], ms=5.5, lw=1.3,
                mec="white", mew=0.4,
                color=colour, label=f"{name}  {100 * mean[-1]:.1f}")  # fmt: skip
        if np.isfinite(half).all():
            low, high = np.clip([mean - half, mean + half], 0, 1)
            ax.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.18, lw=0)
        ends.append(mean[-1])
    ax.set_xticks(range(1, last + 1))
    ax.set_ylim(0, 102)
    ax.set_xlabel("experiences learned")
    ax.set_ylabel("accuracy on all classes seen (%)")
    ax.set_title(str(results["stream"]), loc="left", fontsize=10)
    ax.grid(axis="y", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # In the order of the lines' right ends, so that a line is found beside its name.
        order = np.argsort(ends)[::-1]
        ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False,
                  title="at the end (%)", alignment="left", loc="center left",
                  bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return ax


class _Life:
    """One expert from birth to death, with the spans in which it was frozen."""

    def __init__(self, expert: Any, birth: float, parents: Sequence[Any]) -> None:
        self.expert, self.birth, self.parents = expert, birth, list(parents)
        self.death: float | None = None
        self.frozen: list[list[float]] = []


def _lives(
    events: Sequence[Mapping[str, Any]],
) -> tuple[dict[Any, _Life], list[tuple[str, float, Any]]]:
    """Replay the accepted events into lives and the marks to draw on them."""
    layers = {event.get("layer") for event in events}
    several = len(layers) > 1
    lives: dict[Any, _Life] = {}
    marks: list[tuple[str, float, Any]] = []

    def key(layer: Any, expert: Any) -> Any:
        return f"{layer}:{expert}" if several else expert

    for event in events:
        if not event.get("accepted", True):
            continue
        step, act, layer = event["step"], event["act"], event.get("layer")
        ids = [key(layer, i) for i in event.get("ids") or ()]
        parents = [key(layer, i) for i in event.get("parents") or ()]
        if act == "init":
            for expert in ids:
                lives[expert] = _Life(expert, step, [])
        if act in ("spawn", "merge"):
            child = key(layer, event["child"])
            lives[child] = _Life(child, step, [p for p in parents if p in lives])
            marks.append((act, step, child))
        for expert in {"merge": parents, "prune": ids}.get(act, ()):
            if expert in lives:
                lives[expert].death = step
                if act == "prune":
                    marks.append((act, step, expert))
        for expert in ids if act in ("freeze", "thaw") else ():
            if expert in lives:
                spans = lives[expert].frozen
                if act == "freeze":
                    spans.append([step, np.inf])
                elif spans:
                    spans[-1][1] = step
                marks.append((act, step, expert))
    return lives, marks


_MARKS = {
    "spawn": ("birth", "o", OKABE_ITO[2], OKABE_ITO[2]),
    "merge": ("birth by merge", "D", OKABE_ITO[3], OKABE_ITO[3]),
    "freeze": ("freeze", "s", _FROZEN, "white"),
    "thaw": ("thaw", "^", OKABE_ITO[4], OKABE_ITO[4]),
    "prune": ("death", "X", OKABE_ITO[1], OKABE_ITO[1]),
}


def plot_lifelines(
    events: Sequence[Mapping[str, Any]],
    load_history: Sequence[Mapping[str, Any]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The life of each expert as a horizontal line from birth to death, with its descent.

    Args:
        events: a lineage; refused events draw nothing.
        load_history: [{"step": int, "load": {expert id: share}}]; lines are as wide as the load.
            Where the events are of several layers, the keys are "layer:id".
        ax: where to draw.

    Returns:
        The axes: dark lines are learning experts, pale ones frozen; thin grey lines lead from
        parents to children.
    """
    lives, marks = _lives(events)
    count = len(lives)
    ax = _axes(ax, 6.5, float(np.clip(1.2 + 0.2 * count, 2.4, 9.0)))
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
            ax.plot([life.birth, life.birth], [row[parent], row[expert]], color=_GREY,
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
    ax: Axes, life: _Life, y: int, stop: float, history: Sequence[Mapping[str, Any]]
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


def plot_load(load_history: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """The share of the inputs that each expert took, stacked over time.

    Args:
        load_history: [{"step": int, "load": {expert id: share}}].
        ax: where to draw.

    Returns:
        The axes: oldest expert at the bottom; colours repeat, white lines part neighbours, and
        an expert is named at its largest share where there is room.
    """
    ax = _axes(ax, 6.5, 3.2)
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
