"""From a criterion by name and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from growmoe.compress import criteria
from growmoe.compress.calibrate import Batches, Loss, losses
from growmoe.compress.layer import CompressError, Layer, layers_of
from growmoe.compress.plan import LayerSize, Plan, make_plan, uniform_budget
from growmoe.compress.search import search
from growmoe.compress.statistics import LayerStatistics
from growmoe.compress.subset import naee

Progress = Callable[[float, str], None]
SHORTLIST = 8  # of each layer, for "greedy-loss"


@dataclass
class Evidence:
    """What a choice is made from.

    Attributes:
        statistics: of each layer, by name.
        batches: on which losses are compared.
        reference: the model before fine-tuning, for "router-norm".
    """

    model: nn.Module
    layers: Sequence[Layer]
    statistics: Mapping[str, LayerStatistics]
    batches: Batches
    loss: Loss
    reference: nn.Module | None = None
    seed: int = 0
    progress: Progress = lambda fraction, text: None
    sizes: dict[str, LayerSize] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = {layer.name: LayerSize.of(layer) for layer in self.layers}


def saliencies(evidence: Evidence, name: str) -> dict[str, Tensor]:
    """float64 [E] of each layer; none for "naee", which chooses whole subsets.

    Raises:
        CompressError: no such criterion, or it lacks what it needs.
    """
    if name not in criteria.CRITERIA:
        raise CompressError(f"no saliency {name!r}: choose from {', '.join(criteria.CRITERIA)}")
    if name == "naee":
        return {}
    if name == "router-norm":
        return _router_norms(evidence)
    if name in ("leave-one-out", "greedy-loss"):
        return _leave_one_out(evidence)
    generator = torch.Generator().manual_seed(evidence.seed)
    return {
        layer.name: criteria.saliency(name, layer, evidence.statistics[layer.name], generator)
        for layer in evidence.layers
    }


def _leave_one_out(evidence: Evidence) -> dict[str, Tensor]:
    total = sum(len(size.ids) for size in evidence.sizes.values())
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        evidence.progress(done / total, "leaving one out")

    return {
        layer.name: criteria.leave_one_out(
            evidence.model, layer, evidence.batches, evidence.loss, count
        )
        for layer in evidence.layers
    }


def _router_norms(evidence: Evidence) -> dict[str, Tensor]:
    if evidence.reference is None:
        raise CompressError("router-norm compares with the model before fine-tuning: give it")
    before = {layer.name: layer for layer in layers_of(evidence.reference)}
    result = {}
    for layer in evidence.layers:
        if layer.name not in before or before[layer.name].ids != layer.ids:
            raise CompressError(f"router-norm: the reference has not the experts of {layer.name}")
        rows = [
            torch.stack([x.router_row(id) for id in layer.ids]) for x in (layer, before[layer.name])
        ]
        result[layer.name] = criteria.router_norm_change(rows[0], rows[1])
    return result


def choose(
    evidence: Evidence,
    name: str,
    values: Mapping[str, Tensor],
    *,
    per_layer: str,
    ratio: float | None = None,
    keep: int | None = None,
    max_loss: float | None = None,
    spared: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Who goes, by a criterion's values and one of the three budgets.

    Raises:
        CompressError: the budget cannot be met.
    """
    spared = spared or {}
    if max_loss is not None and per_layer != "searched" and name != "greedy-loss":
        return _within_loss(evidence, name, values, per_layer, max_loss, spared)
    if name == "naee":
        if per_layer != "uniform":
            raise CompressError("naee chooses a subset of each layer: per_layer must be uniform")
        return _naee(evidence, ratio, keep, spared)
    if per_layer != "searched" and name != "greedy-loss":
        return make_plan(
            values, evidence.sizes, ratio=ratio, keep=keep, per_layer=per_layer, spared=spared
        )
    most = total = None
    if max_loss is None:
        budget = uniform_budget(evidence.sizes, ratio, keep)
        total = sum(budget.values())
        most = budget if per_layer == "uniform" else None
    return search(
        evidence.model,
        evidence.layers,
        evidence.batches,
        evidence.loss,
        values,
        total=total,
        most=most,
        max_loss=max_loss,
        shortlist=SHORTLIST if name == "greedy-loss" else 1,
        spared=spared,
        progress=evidence.progress,
    )


def _naee(
    evidence: Evidence, ratio: float | None, keep: int | None, spared: Mapping[str, Sequence[int]]
) -> Plan:
    budget = uniform_budget(evidence.sizes, ratio, keep)
    remove: dict[str, list[int]] = {}
    reasons: dict[str, dict[int, str]] = {}
    for i, layer in enumerate(evidence.layers):
        gone, gap, exhaustive = naee(
            layer,
            evidence.statistics[layer.name].sample_ND[:512],
            budget[layer.name],
            spared=spared.get(layer.name, ()),
        )
        how = "all subsets tried" if exhaustive else "greedy"
        remove[layer.name] = gone
        reasons[layer.name] = {id: f"output off by {gap:.2%} without these ({how})" for id in gone}
        evidence.progress((i + 1) / len(evidence.layers), "comparing subsets")
    return Plan(remove, evidence.sizes, reasons)


def _within_loss(
    evidence: Evidence,
    name: str,
    values: Mapping[str, Tensor],
    per_layer: str,
    max_loss: float,
    spared: Mapping[str, Sequence[int]],
) -> Plan:
    """The largest plan within `max_loss`, by bisection over how many experts a layer keeps."""
    base = float(losses(evidence.model, evidence.batches, evidence.loss).mean())
    number = min(len(size.ids) for size in evidence.sizes.values())
    least = max(size.k for size in evidence.sizes.values())
    step = max(size.groups for size in evidence.sizes.values())
    keeps = list(range(number - step, least - 1, -step))  # fewer and fewer
    best: Plan | None = None
    low, high = 0, len(keeps) - 1
    while low <= high:
        middle = (low + high) // 2
        plan = choose(
            evidence, name, values, per_layer=per_layer, keep=keeps[middle], spared=spared
        )
        rise = loss_without(evidence, plan) - base
        if rise <= max_loss:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise CompressError(
            f"max_loss={max_loss:g}: removing {step} of {number} experts per layer already costs "
            "more"
        )
    return best


def loss_without(evidence: Evidence, plan: Plan) -> float:
    """The mean loss were the plan carried out."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        for layer in evidence.layers:
            stack.enter_context(layer.masked(plan.remove[layer.name]))
        return float(losses(evidence.model, evidence.batches, evidence.loss).mean())
