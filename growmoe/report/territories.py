"""The plot of who rules where: experts' territories in a plane of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from growmoe.moe import MoE
from growmoe.report.style import OKABE_ITO, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@torch.no_grad()
def plot_territories(
    layer: MoE,
    points: Tensor | None = None,
    extent: tuple[float, float, float, float] | None = None,
    ax: Axes | None = None,
    *,
    resolution: int = 120,
) -> Axes:
    """Colour each place of a plane by the expert with the largest weight there.

    An expert has the colour of its id, so that it keeps it from picture to picture; it is named
    in the middle of what it rules.

    Args:
        layer: a mixture over inputs of width 2.
        points: [N, 2], inputs to mark.
        extent: (left, right, bottom, top); that of the points, with a margin, if left out.
        ax: where to draw.
        resolution: places along each side.

    Raises:
        ValueError: the layer's inputs are not of width 2, or neither points nor extent are given.
    """
    if layer.d_model != 2:
        raise ValueError(f"territories are of a plane, but the layer's inputs have {layer.d_model}")
    if extent is None:
        if points is None or not len(points):
            raise ValueError("plot_territories needs points or an extent")
        low, high = points.amin(0), points.amax(0)
        margin = 0.15 * (high - low) + 1e-3
        (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    else:
        left, right, bottom, top = extent
    x, y = np.linspace(left, right, resolution), np.linspace(bottom, top, resolution)
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)).float()
    training = layer.training
    layer.eval()
    try:
        weight_TE = layer.route(grid.to(next(layer.parameters()).device)).assignment.dense().cpu()
    finally:
        layer.train(training)
    weight, first = weight_TE.max(1)
    ids = list(layer.experts)
    owner = np.array(ids)[first.numpy()].reshape(resolution, resolution)
    ax = new_axes(ax, 4.4, 4.0)
    shade = np.zeros((resolution, resolution, 4))
    for id in ids:
        shade[owner == id, :3] = _rgb(colour_of(id))
    # the surer the choice, the stronger the colour
    shade[..., 3] = 0.15 + 0.55 * weight.clamp(0, 1).numpy().reshape(resolution, resolution)
    ax.imshow(shade, origin="lower", extent=(left, right, bottom, top), aspect="auto")
    for id in ids:
        rows, columns = np.nonzero(owner == id)
        if len(rows) > resolution**2 // 200:
            # the owned place nearest to the middle: a territory may be bent round another's
            middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            ax.text(x[columns[middle]], y[rows[middle]], str(id), ha="center", va="center",
                    fontsize=11, fontweight="bold")  # fmt: skip
    if points is not None:
        across, along = points[:, :2].T.cpu().numpy()
        ax.scatter(across, along, s=5, color="black", alpha=0.35, linewidths=0)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    return ax


def colour_of(id: int) -> str:
    """The colour of an expert with this id; black is left to points and text."""
    palette = [*OKABE_ITO[:6], OKABE_ITO[7]]
    return palette[id % len(palette)]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
