"""The plot of a language model's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growmoe.report.plots import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss(lines: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Bits per byte on the validation part of each domain over the steps.

    Args:
        lines: of a run's metrics.jsonl.
        ax: where to draw.

    Returns:
        The axes: a line for each domain, named at its right end's value in the legend.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(6.5, 3.6), layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    found = [line for line in lines if line["kind"] == "evaluation"]
    names = list(found[0]["bits_per_byte"]) if found else []
    for i, name in enumerate(names):
        bits = [line["bits_per_byte"][name] for line in found]
        steps = [line["step"] for line in found]
        style = "-" if i < len(OKABE_ITO) else "--"
        ax.plot(steps, bits, style, marker="o", ms=3.5, lw=1.3,
                color=OKABE_ITO[i % len(OKABE_ITO)], label=f"{name}  {bits[-1]:.2f}")  # fmt: skip
    ax.set_xlabel("step")
    ax.set_ylabel("bits per byte (validation)")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)
    if names:
        ax.legend(frameon=False, title="at the end", alignment="left", loc="center left",
                  bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return ax
