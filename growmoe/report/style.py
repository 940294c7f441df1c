"""The look that all plots share: colours that colour-blind readers can tell apart, plain axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ImportError(
        f"growmoe's plots need {error.name}, which is not installed: pip install 'growmoe[report]'"
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
MARKERS = "osD^vPX*"
GREY = "#888888"
PALE = "#DDDDDD"
HEAT = "cividis"  # even in lightness for every kind of sight


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of so many inches; no upper and right edge."""
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
