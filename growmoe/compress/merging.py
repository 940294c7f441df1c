"""One expert for several: the weighted mean of their aligned weights, and its router row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from growmoe.compress.criteria import reap
from growmoe.compress.grouping import GROUPINGS, Groups
from growmoe.compress.layer import CompressError, Layer
from growmoe.compress.statistics import LayerStatistics
from growmoe.experts.expert import merged_body

Rows = Literal["mean", "first"]
# whose router row a merged expert has, as each method has it
ROWS: dict[str, Rows] = {"m-smoe": "mean", "hc-smoe": "mean", "ream": "first", "frequency": "mean"}
METHODS = tuple(GROUPINGS)


def groups_of(method: str, layer: Layer, statistics: LayerStatistics, left: int) -> Groups:
    """The groups of a method by name; see `growmoe.compress.grouping`.

    Raises:
        CompressError: no such method, or an expert that got no input and nothing to go by.
    """
    if method not in GROUPINGS:
        raise CompressError(f"no merging method {method!r}: choose from {', '.join(GROUPINGS)}")
    if layer.groups > 1:
        raise CompressError(
            f"{layer.name}: merging would leave its {layer.groups} groups of experts unequal"
        )
    return GROUPINGS[method](layer, statistics, left)


def share_of(method: str, statistics: LayerStatistics) -> list[float]:
    """The weight of each expert in a mean: its REAP saliency for REAM, else its frequency."""
    value_E = reap(statistics) if method == "ream" else statistics.count
    return [max(v, 1e-6) for v in value_E.tolist()]  # a group of the unused is a plain mean


def merge_groups(
    layer: Layer,
    groups: Groups,
    share: Sequence[float],
    rows: Rows = "mean",
    reason: str = "",
) -> None:
    """Merge each group of two or more; hidden units are aligned to its first expert's.

    Args:
        share: the weight of each expert in the means, by position in `layer.ids`.
        rows: whether the merged expert's router row is the weighted mean, or its first expert's.

    Raises:
        CompressError: experts of different kinds; nothing has changed then.
    """
    carry_out(layer, merged_groups(layer, groups, share), rows, reason)


@dataclass(frozen=True)
class Merged:
    """A group of experts, the weight of each, and the body that they become."""

    ids: list[int]
    weights: list[float]
    body: nn.Module


def merged_groups(layer: Layer, groups: Groups, share: Sequence[float]) -> list[Merged]:
    """What each group of two or more becomes; the layer stays as it is.

    Raises:
        CompressError: experts of different kinds.
    """
    position = {id: e for e, id in enumerate(layer.ids)}
    found = []
    for group in groups:
        if len(group) > 1:
            weights = [share[position[id]] for id in group]
            body = mean_body([layer.ffn(id) for id in group], weights)
            found.append(Merged(group, weights, body))
    return found


def carry_out(layer: Layer, merged: Sequence[Merged], rows: Rows, reason: str) -> None:
    for group in merged:
        first = [1.0] + [0.0] * (len(group.ids) - 1)
        kept = group.weights if rows == "mean" else first
        layer.merge(group.ids, group.body, kept, reason=reason)


def mean_body(bodies: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """The weighted mean, hidden units aligned to the first's (Hungarian; `FFN.merged`)."""
    try:
        return merged_body(bodies, weights)
    except ValueError as error:
        raise CompressError(str(error)) from error
