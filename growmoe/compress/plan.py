"""Which experts go: from saliencies and a budget to a plan that every layer can follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from growmoe.compress.layer import CompressError, Layer

PerLayer = Literal["uniform", "global", "searched"]


@dataclass(frozen=True)
class LayerSize:
    """What a plan must know of a layer.

    Attributes:
        ids: the living experts, ascending.
        k: the fewest that may be left.
        groups: consecutive groups of ids that must lose equally many.
        uniform: whether all layers must end with as many experts.
    """

    ids: tuple[int, ...]
    k: int
    groups: int = 1
    uniform: bool = False

    @classmethod
    def of(cls, layer: Layer) -> LayerSize:
        return cls(tuple(layer.ids), layer.k, layer.groups, layer.uniform)


@dataclass
class Plan:
    """Who goes.

    Attributes:
        remove: layer name -> ids, the first to go first.
        sizes: layer name -> what the layer is.
        reasons: layer name -> id -> why.
    """

    remove: dict[str, list[int]]
    sizes: dict[str, LayerSize]
    reasons: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        return sum(map(len, self.remove.values()))

    @property
    def total(self) -> int:
        return sum(len(size.ids) for size in self.sizes.values())

    @property
    def ratio(self) -> float:
        return self.removed / self.total

    def left(self, name: str) -> int:
        """How many experts the layer of this name keeps."""
        return len(self.sizes[name].ids) - len(self.remove.get(name, ()))


def check_budget(ratio: float | None, keep: int | None, max_loss: float | None) -> None:
    """Raise CompressError unless exactly one is given, in its range."""
    given = {"ratio": ratio, "keep": keep, "max_loss": max_loss}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CompressError(
            "give exactly one of ratio, keep and max_loss"
            + (f", not {' and '.join(named)}" if named else "")
        )
    if ratio is not None and not 0 < ratio < 1:
        raise CompressError(f"ratio must lie between 0 and 1, got {ratio}")
    if keep is not None and keep < 1:
        raise CompressError(f"keep must be at least 1, got {keep}")
    if max_loss is not None and not (max_loss > 0 and math.isfinite(max_loss)):
        raise CompressError(f"max_loss must be positive, in nats, got {max_loss}")


def uniform_budget(
    sizes: Mapping[str, LayerSize], ratio: float | None, keep: int | None
) -> dict[str, int]:
    """How many go from each layer: the same share of each, or all but `keep`.

    A share is rounded to the nearest count (halves up) that the layer's groups divide.

    Raises:
        CompressError: fewer than k would be left, more are to be kept than there are, or nothing
            would go anywhere.
    """
    budget = {}
    for name, size in sizes.items():
        number = len(size.ids)
        if keep is not None:
            if keep > number:
                raise CompressError(f"{name}: keep={keep}, but there are {number} experts")
            count = number - keep
            if count % size.groups:
                raise CompressError(
                    f"{name}: keep={keep} is not divisible by its {size.groups} groups of experts"
                )
        else:
            assert ratio is not None
            step = size.groups
            count = step * math.floor(ratio * number / step + 0.5)
        _check_left(name, size, number - count, ratio, keep)
        budget[name] = count
    if not any(budget.values()):
        raise CompressError(
            f"ratio={ratio} removes nothing: layers have "
            f"{max(len(s.ids) for s in sizes.values())} experts at most"
            if keep is None
            else f"keep={keep} removes nothing"
        )
    counts = {len(sizes[name].ids) - n for name, n in budget.items()}
    if len(counts) > 1 and any(size.uniform for size in sizes.values()):
        raise CompressError(
            f"layers would be left with different numbers of experts ({sorted(counts)}), which "
            "this kind of model cannot hold: use keep"
        )
    return budget


def _check_left(
    name: str, size: LayerSize, left: int, ratio: float | None, keep: int | None
) -> None:
    if left < size.k:
        asked = f"ratio={ratio}" if keep is None else f"keep={keep}"
        raise CompressError(
            f"{name}: {asked} would leave {left} of {len(size.ids)} experts, but each token takes "
            f"{size.k}"
        )


def lowest(
    saliency_E: Tensor, size: LayerSize, count: int, spared: Sequence[int] = ()
) -> list[int]:
    """The ids of the `count` lowest, as many from each group; `spared` positions never go.

    Raises:
        CompressError: too many are spared.
    """
    check_saliency(saliency_E, size)
    per_group = len(size.ids) // size.groups
    chosen: list[int] = []
    for group in range(size.groups):
        first = group * per_group
        may_go = [e for e in range(first, first + per_group) if e not in spared]
        take = count // size.groups
        if take > len(may_go):
            raise CompressError(
                f"{take} of {per_group} experts are to go, but {per_group - len(may_go)} are super "
                "experts, which must stay"
            )
        order = sorted(may_go, key=lambda e: (float(saliency_E[e]), e))
        chosen += order[:take]
    chosen.sort(key=lambda e: (float(saliency_E[e]), e))
    return [size.ids[e] for e in chosen]


def check_saliencies(saliencies: Mapping[str, Tensor], sizes: Mapping[str, LayerSize]) -> None:
    """Raise CompressError unless each layer has a number for each of its experts."""
    for name, size in sizes.items():
        if name not in saliencies:
            raise CompressError(f"{name}: there is no saliency for this layer")
        check_saliency(saliencies[name], size)


def check_saliency(saliency_E: Tensor, size: LayerSize) -> None:
    if saliency_E.shape != (len(size.ids),) or bool(saliency_E.isnan().any()):
        raise CompressError(
            f"a saliency must be {len(size.ids)} numbers, got {tuple(saliency_E.shape)}"
            + (" with NaN" if saliency_E.numel() and bool(saliency_E.isnan().any()) else "")
        )


def global_budget(
    saliencies: Mapping[str, Tensor],
    sizes: Mapping[str, LayerSize],
    ratio: float | None,
    keep: int | None,
    spared: Mapping[str, Sequence[int]],
) -> dict[str, int]:
    """How many go from each layer under one threshold for all.

    Saliencies are divided by their layer's mean, since outputs grow with depth and would empty
    the first layers; leave-one-out losses are comparable as they are, and are if any is negative.

    Raises:
        CompressError: layers must stay equal (`uniform`) or have groups, or too few can go.
    """
    total = sum(len(size.ids) for size in sizes.values())
    want = sum(uniform_budget(sizes, ratio, keep).values())
    if ratio is not None:
        want = math.floor(ratio * total + 0.5)
    for name, size in sizes.items():
        if size.uniform or size.groups > 1:
            raise CompressError(
                f"{name}: this kind of model needs the same number of experts in every layer; "
                "use per_layer='uniform'"
            )
    scale = {
        name: 1.0 if bool((s < 0).any()) else max(float(s.mean()), 1e-300)
        for name, s in saliencies.items()
    }
    order = sorted(
        (float(s[e]) / scale[name], i, e)
        for i, (name, s) in enumerate(saliencies.items())
        for e in range(len(s))
        if e not in spared.get(name, ())
    )
    names = list(saliencies)
    budget = dict.fromkeys(names, 0)
    gone = 0
    for _, i, _ in order:
        size = sizes[names[i]]
        if gone < want and len(size.ids) - budget[names[i]] > size.k:
            budget[names[i]] += 1
            gone += 1
    if gone < want:
        raise CompressError(f"{want} of {total} experts are to go, but only {gone} can")
    return budget


def make_plan(
    saliencies: Mapping[str, Tensor],
    sizes: Mapping[str, LayerSize],
    *,
    ratio: float | None = None,
    keep: int | None = None,
    per_layer: str = "uniform",
    spared: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """A plan from saliencies alone: the lowest of each layer, or the lowest of all.

    Args:
        saliencies: layer name -> float64 [E].
        ratio, keep: one of them: the share of all experts that goes, or how many a layer keeps
            (for "global", in the mean).
        spared: layer name -> positions that must stay.

    Raises:
        CompressError: the budget cannot be met.
    """
    check_budget(ratio, keep, None)
    if per_layer not in get_args(PerLayer):
        raise CompressError(
            f"per_layer must be one of {', '.join(get_args(PerLayer))}, got {per_layer!r}"
        )
    if per_layer == "searched":
        raise CompressError("per_layer='searched' needs the model: see growmoe.compress.search")
    spared = spared or {}
    check_saliencies(saliencies, sizes)
    budget = (
        uniform_budget(sizes, ratio, keep)
        if per_layer == "uniform"
        else global_budget(saliencies, sizes, ratio, keep, spared)
    )
    remove, reasons = {}, {}
    for name, size in sizes.items():
        s = saliencies[name]
        remove[name] = lowest(s, size, budget[name], spared.get(name, ()))
        rank = torch.argsort(s, stable=True).argsort(stable=True).tolist()
        reasons[name] = {
            id: f"saliency {float(s[e]):.4g}, rank {rank[e] + 1} of {len(size.ids)} from below"
            for e, id in enumerate(size.ids)
            if id in remove[name]
        }
    return Plan(remove, dict(sizes), reasons)
