"""Prune, merge and inspect a model in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.compress import criteria
from growmoe.compress.calibrate import Batches, Loss, collect, losses, next_token_loss
from growmoe.compress.choose import Evidence, Progress, choose, saliencies
from growmoe.compress.grouping import output_similarity
from growmoe.compress.layer import CompressError, Layer, layers_of
from growmoe.compress.least_squares import check_fits, match_outputs, mixtures
from growmoe.compress.measure import changes, losses_by_domain
from growmoe.compress.merging import METHODS, ROWS, carry_out, groups_of, merged_groups, share_of
from growmoe.compress.plan import LayerSize, PerLayer, Plan, check_budget, uniform_budget
from growmoe.compress.report import Inspection, LayerReport, Report, peak_memory
from growmoe.compress.statistics import LayerStatistics


def _silent(fraction: float, text: str) -> None:
    pass


def prune(
    model: nn.Module,
    calibration: Batches,
    *,
    ratio: float | None = None,
    keep: int | None = None,
    max_loss: float | None = None,
    saliency: str | Mapping[str, Tensor] = "reap",
    per_layer: PerLayer = "uniform",
    selection: Batches | None = None,
    evaluation: Mapping[str, Batches] | None = None,
    loss: Loss = next_token_loss,
    guard: bool = True,
    match: bool = False,
    novices: bool | None = None,
    reference: nn.Module | None = None,
    seed: int = 0,
    progress: Progress = _silent,
) -> Report:
    """Remove experts of a trained model, in place.

    Args:
        model: with growmoe layers, or a transformers model of a known family.
        calibration: batches that the loss takes; by default token ids, int64 [B, S + 1].
        ratio, keep, max_loss: exactly one: the share of experts to remove, how many each layer
            keeps, or by how much the mean loss on `selection` may rise (nats per token).
        saliency: a name of `CRITERIA`, or numbers [E] by layer name; the lowest go.
        per_layer: "uniform" removes as many from each layer, "global" the lowest of all layers
            under one threshold, "searched" one at a time where the loss rises least.
        selection: batches on which losses are compared; `calibration` if left out.
        evaluation: domain -> batches on which the loss is reported, used for nothing else.
        loss: (model, batch) -> the loss of each sample [B].
        guard: never remove super experts (`criteria.super_experts`).
        match: fit the survivors' last matrices to what the whole layers gave, by least squares.
        novices: put each removed expert's mean output in its place; by default for "mone" alone.
        reference: the model before fine-tuning, for "router-norm".
        seed: of "random" and of the sample of inputs that is kept.
        progress: told a fraction and what is being done.

    Raises:
        CompressError: the budget, the criterion or the model does not allow it; nothing has
            changed then.
    """
    check_budget(ratio, keep, max_loss)
    name = saliency if isinstance(saliency, str) else "given"
    if isinstance(saliency, str) and name not in criteria.CRITERIA:
        raise CompressError(f"no saliency {name!r}: choose from {', '.join(criteria.CRITERIA)}")
    clock = time.perf_counter()
    layers = layers_of(model)
    if match:
        check_fits(layers)
    if max_loss is None:  # refused before anything is computed
        uniform_budget({layer.name: LayerSize.of(layer) for layer in layers}, ratio, keep)
    start = _start(model, layers, calibration, evaluation, loss, name == "taylor", seed, progress)
    evidence = Evidence(
        model,
        layers,
        start.statistics,
        calibration if selection is None else selection,
        loss,
        reference,
        seed,
        progress,
    )
    values = saliencies(evidence, name) if isinstance(saliency, str) else dict(saliency)
    spared = criteria.super_experts(start.statistics) if guard else {}
    plan = choose(
        evidence,
        name,
        values,
        per_layer=per_layer,
        ratio=ratio,
        keep=keep,
        max_loss=max_loss,
        spared=spared,
    )
    target = mixtures(model, layers, calibration, loss) if match else None
    novices = name == "mone" if novices is None else novices
    remove(layers, plan, start.statistics if novices else None, name)
    gaps = {}
    if target is not None:
        gaps = match_outputs(model, layers, target, calibration, loss, progress=progress)
    settings = {
        "saliency": name,
        "ratio": ratio,
        "keep": keep,
        "max_loss": max_loss,
        "per_layer": per_layer,
        "guard": guard,
        "match": match,
        "novices": novices,
        "seed": seed,
    }
    rows = [
        LayerReport(
            name=layer.name,
            experts_before=len(plan.sizes[layer.name].ids),
            experts_after=plan.left(layer.name),
            removed=plan.remove[layer.name],
            reasons=plan.reasons.get(layer.name, {}),
            saliency=_by_id(plan.sizes[layer.name].ids, values.get(layer.name)),
            load=_by_id(plan.sizes[layer.name].ids, start.statistics[layer.name].count),
            spared=[plan.sizes[layer.name].ids[e] for e in spared.get(layer.name, [])],
            gap=gaps.get(layer.name),
        )
        for layer in layers
    ]
    return _finish("prune", settings, rows, start, model, calibration, evaluation, loss, clock)


def merge(
    model: nn.Module,
    calibration: Batches,
    *,
    ratio: float | None = None,
    keep: int | None = None,
    method: str = "hc-smoe",
    evaluation: Mapping[str, Batches] | None = None,
    loss: Loss = next_token_loss,
    match: bool = False,
    seed: int = 0,
    progress: Progress = _silent,
) -> Report:
    """Merge experts of a trained model until the budget is met, in place.

    Args:
        ratio, keep: one of them, as for `prune`; each layer loses as many.
        method: "m-smoe", "hc-smoe", "ream" or "frequency" (see `growmoe.compress.grouping`).
        match: fit the merged model's last matrices to what the whole layers gave, by least
            squares.

    For all else see `prune`.

    Raises:
        CompressError: as `prune`; also experts that are not of one kind.
    """
    check_budget(ratio, keep, None)
    if method not in METHODS:
        raise CompressError(f"no merging method {method!r}: choose from {', '.join(METHODS)}")
    clock = time.perf_counter()
    layers = layers_of(model)
    sizes = {layer.name: LayerSize.of(layer) for layer in layers}
    budget = uniform_budget(sizes, ratio, keep)
    if match:
        check_fits(layers)
    start = _start(model, layers, calibration, evaluation, loss, False, seed, progress)
    grouped = {
        layer.name: groups_of(
            method, layer, start.statistics[layer.name], len(layer.ids) - budget[layer.name]
        )
        for layer in layers
    }
    merged = {
        layer.name: merged_groups(
            layer, grouped[layer.name], share_of(method, start.statistics[layer.name])
        )
        for layer in layers
    }
    target = mixtures(model, layers, calibration, loss) if match else None
    for layer in layers:
        carry_out(layer, merged[layer.name], ROWS[method], f"compress: {method}")
    gaps = {}
    if target is not None:
        gaps = match_outputs(model, layers, target, calibration, loss, progress=progress)
    rows = [
        LayerReport(
            name=layer.name,
            experts_before=len(sizes[layer.name].ids),
            experts_after=len(grouped[layer.name]),
            merged=[group for group in grouped[layer.name] if len(group) > 1],
            load=_by_id(sizes[layer.name].ids, start.statistics[layer.name].count),
            gap=gaps.get(layer.name),
        )
        for layer in layers
    ]
    settings = {"method": method, "ratio": ratio, "keep": keep, "match": match, "seed": seed}
    return _finish("merge", settings, rows, start, model, calibration, evaluation, loss, clock)


def inspect(
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    saliency: Sequence[str] = ("reap", "mone", "aimer"),
    loss: Loss = next_token_loss,
    seed: int = 0,
    progress: Progress = _silent,
) -> Inspection:
    """The layers of a model: experts, load, saliencies, and how alike experts are.

    Args:
        calibration: without it only what needs no data is told.

    Raises:
        CompressError: no mixture of experts, or no such saliency.
    """
    layers = layers_of(model)
    known = (*criteria.FROM_STATISTICS, "aimer")
    for name in saliency:
        if name not in known:
            raise CompressError(f"no saliency {name!r} here: choose from {', '.join(known)}")
    statistics: Mapping[str, LayerStatistics] = {}
    if calibration is not None:
        gradients = "taylor" in saliency
        statistics, _ = collect(
            model, layers, calibration, loss, gradients=gradients, seed=seed, progress=progress
        )
    else:
        saliency = [name for name in saliency if name == "aimer"]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer in layers:
        seen = statistics.get(layer.name)
        values = {
            name: criteria.saliency(name, layer, seen, generator)  # type: ignore[arg-type]
            for name in saliency
        }
        rows.append(
            {
                "name": layer.name,
                "ids": layer.ids,
                "k": layer.k,
                "parameters": sum(p.numel() for p in layer.ffn(layer.ids[0]).parameters()),
                "load": None if seen is None else (seen.count / seen.count.sum()).tolist(),
                "saliency": {name: value.tolist() for name, value in values.items()},
                "similarity": None if seen is None else output_similarity(layer, seen).tolist(),
            }
        )
    return Inspection(rows, _parameters(model))


def remove(
    layers: Sequence[Layer],
    plan: Plan,
    novices: Mapping[str, LayerStatistics] | None,
    name: str,
) -> None:
    """Carry a plan out; with the statistics of `novices`, mean outputs stand for those removed."""
    for layer in layers:
        gone = plan.remove[layer.name]
        if not gone:
            continue
        if novices is None:
            layer.prune(gone, reason=f"compress: {name}")
            continue
        mean_EO = novices[layer.name].mean_output_EO
        for id in gone:
            value_O = mean_EO[plan.sizes[layer.name].ids.index(id)]
            layer.novice(id, value_O.float(), reason=f"compress: {name}")


class _start:
    """The model as it was: what a report compares with."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        calibration: Batches,
        evaluation: Mapping[str, Batches] | None,
        loss: Loss,
        gradients: bool,
        seed: int,
        progress: Progress,
    ) -> None:
        self.parameters = _parameters(model)
        self.by_domain = losses_by_domain(model, evaluation or {}, loss)
        self.statistics, self.calibration_N = collect(
            model, layers, calibration, loss, gradients=gradients, seed=seed, progress=progress
        )


def _finish(
    act: str,
    settings: dict[str, Any],
    rows: list[LayerReport],
    start: _start,
    model: nn.Module,
    calibration: Batches,
    evaluation: Mapping[str, Batches] | None,
    loss: Loss,
    clock: float,
) -> Report:
    after = losses_by_domain(model, evaluation or {}, loss)
    domains = changes(start.by_domain, after)
    domains |= changes(
        {"(calibration)": start.calibration_N}, {"(calibration)": losses(model, calibration, loss)}
    )
    return Report(
        act=act,
        settings=settings,
        layers=rows,
        domains=domains,
        parameters_before=start.parameters,
        parameters_after=_parameters(model),
        seconds=time.perf_counter() - clock,
        peak_memory=peak_memory(),
    )


def _by_id(ids: Sequence[int], value_E: Tensor | None) -> dict[int, float]:
    return {} if value_E is None else dict(zip(ids, value_E.tolist(), strict=True))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
