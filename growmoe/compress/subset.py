"""NAEE: the experts of a layer whose output without the others is nearest to the whole layer's.

min_S ‖F(X) − F_S(X)‖_F over subsets S of the layer's experts, X inputs of the layer
(Lu et al. 2024, arXiv 2402.14800, eq. 3). Exhaustive where there are few subsets, greedy where not.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import combinations

import torch
from torch import Tensor

from growmoe.compress.layer import CompressError, Layer, outputs_of

MOST_SUBSETS = 20_000


@torch.no_grad()
def naee(
    layer: Layer,
    x_ND: Tensor,
    count: int,
    *,
    spared: Collection[int] = (),
    most_subsets: int = MOST_SUBSETS,
) -> tuple[list[int], float, bool]:
    """The `count` experts to remove.

    Args:
        x_ND: inputs of the layer.
        spared: positions that must stay.
        most_subsets: above this many subsets, experts go one by one, each time the one without
            which the output is nearest.

    Returns:
        Their ids, ‖F − F_S‖_F / ‖F‖_F, and whether all subsets were tried.

    Raises:
        CompressError: there are no inputs, or the layer has groups of experts.
    """
    if not len(x_ND):
        raise CompressError(f"{layer.name}: no inputs were kept to compare outputs on")
    if layer.groups > 1:
        raise CompressError(f"{layer.name}: NAEE does not know groups of experts")
    ids = layer.ids
    free = [e for e in range(len(ids)) if e not in spared]
    if count > len(free):
        raise CompressError(f"{layer.name}: {count} experts are to go, {len(free)} may")
    out_ETO = outputs_of(layer, x_ND)
    whole_TO = _mixed(layer.weights(x_ND), out_ETO)
    size = float(whole_TO.norm().clamp_min(1e-30))

    def gap(gone: Collection[int]) -> float:
        weight_TE = layer.weights(x_ND, [ids[e] for e in gone])
        return float((_mixed(weight_TE, out_ETO) - whole_TO).norm()) / size

    exhaustive = math.comb(len(free), count) <= most_subsets
    if exhaustive:
        best = min(combinations(free, count), key=gap)
    else:
        gone: list[int] = []
        for _ in range(count):
            rest = [e for e in free if e not in gone]
            gone.append(min(rest, key=lambda e: gap([*gone, e])))
        best = tuple(gone)
    return [ids[e] for e in best], gap(best), exhaustive


def _mixed(weight_TE: Tensor, out_ETO: Tensor) -> Tensor:
    return torch.einsum("te,eto->to", weight_TE.to(out_ETO), out_ETO)
