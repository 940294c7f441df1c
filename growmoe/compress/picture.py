"""The picture of `growmoe inspect`: each layer's load, and how alike its experts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(layers: Sequence[dict[str, Any]], path: Path) -> None:
    """Load and saliencies relative to their mean on the left, cosines of outputs on the right."""
    figure = Figure(figsize=(10, 2.8 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(2.2, 1))
    for (left, right), layer in zip(axes, layers, strict=True):
        places = range(len(layer["ids"]))
        if layer["load"] is not None:
            mean = 1 / len(layer["ids"])
            left.bar(places, [v / mean for v in layer["load"]], color="0.8", label="load")
        for name, values in layer["saliency"].items():
            mean = sum(values) / len(values) or 1.0
            left.plot(places, [v / mean for v in values], "o", markersize=4, label=name)
        left.set_xticks(list(places), [str(id) for id in layer["ids"]], fontsize=6)
        left.set_title(layer["name"], fontsize=9)
        left.set_ylabel("relative to the mean", fontsize=8)
        left.set_xlabel("expert", fontsize=8)
        left.set_ylim(bottom=0)
        left.legend(fontsize=7)
        if layer["similarity"] is None:
            right.set_axis_off()
            continue
        # without the diagonal, and as far as they go: all ones there would pale the rest
        others = [
            [v if e != o else math.nan for o, v in enumerate(row)]
            for e, row in enumerate(layer["similarity"])
        ]
        most = max((abs(v) for row in others for v in row if not math.isnan(v)), default=1.0)
        image = right.imshow(others, vmin=-most, vmax=most, cmap="RdBu_r")
        right.set_title("cosine of outputs", fontsize=9)
        right.set_facecolor("0.8")  # of the diagonal, where white would read as 0
        shown = list(places)[:: math.ceil(len(places) / 16)]
        ids = [str(layer["ids"][place]) for place in shown]
        right.set_xticks(shown, ids, fontsize=6)
        right.set_yticks(shown, ids, fontsize=6)
        right.set_xlabel("expert", fontsize=8)
        figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=100)
