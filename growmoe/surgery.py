"""The only code that changes structure: spawn, merge, prune, freeze, thaw.

Each happens whole or not at all. Survivors keep their Parameter objects, weights, router entries,
statistics and optimizer state to the last bit; `optimizer` (one or a sequence) learns of newborns
and forgets the dead. Each act is written into the layer's lineage and returned as an `Event`.

Raised by all of them, before anything changes:
    ValueError: ids unknown or dead, repeated or none; too few experts left for the router; an
        optimizer that trains the layer was not passed, or cannot follow (LBFGS); the layer lies in
        DistributedDataParallel or FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe import optim
from growmoe.consent import output_change
from growmoe.experts.expert import Expert, clone_body, merged_body
from growmoe.experts.statistics import Statistics, merged_statistics
from growmoe.lineage import Event
from growmoe.live import refuse_parallel_wrappers, refuse_unseen_optimizers
from growmoe.moe import MoE

Optimizers = Optimizer | Sequence[Optimizer] | None


class Refused(ValueError):
    """The act would change the layer's output by more than was tolerated.

    Attributes:
        change: the relative change that was measured; None where evidence is lacking.
    """

    def __init__(self, message: str, change: float | None) -> None:
        super().__init__(message)
        self.change = change


def spawn(
    layer: MoE,
    parent: int | None = None,
    optimizer: Optimizers = None,
    *,
    expert: nn.Module | Callable[[], nn.Module] | None = None,
    noise: float = 0.05,
    toward: Tensor | None = None,
    admitted: bool = False,
    step: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
) -> Event:
    """An expert is born: a perturbed clone of `parent`, or a fresh one.

    The birth changes no output (but for rounding in the gate's softmax): the newborn's logit is
    masked and let in over the layer's `warmup` training forwards. A clone inherits its parent's
    optimizer clock and second moments, a fresh one its siblings', and both start without momentum.

    Args:
        parent: the id to clone; None for a fresh expert.
        expert: the kind of a fresh expert, as for `MoE`; the layer's first if left out.
        noise: standard deviation of a clone's perturbation, relative to each weight's RMS.
        toward: float [D], the mean of the inputs it is born for; its router entries turn there.
        admitted: take part at once; then the output does change.
        step, reason, signals: for the lineage.

    Raises:
        ValueError: see the module; also both `parent` and `expert`, a negative noise, or `toward`
            of another shape.
    """
    _check_layer(layer)
    if parent is not None:
        _check_ids(layer, [parent])
        if expert is not None:
            raise ValueError("spawn: a clone is of its parent's kind; give parent or expert")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"spawn: noise must not be negative, and finite, got {noise}")
    if toward is not None and not (
        isinstance(toward, Tensor) and toward.shape == (layer.d_model,) and toward.isfinite().all()
    ):
        raise ValueError(
            f"spawn: toward must be a tensor of {layer.d_model} finite numbers, got {toward!r:.80}"
        )
    with _transaction(layer, optimizer, None if parent is None else [parent]) as optimizers:
        living = list(layer.experts.values())
        mother = None if parent is None else layer.experts[parent]
        if mother is None:
            newborn = layer.newborn(expert, admission=float(admitted), toward=toward)
        else:
            body = clone_body(mother.body, noise, layer.generator)
            newborn = _make(layer, body, [mother], float(admitted), _trainable(mother), toward)
        layer.experts.replace([*living, newborn])
        optim.welcome(optimizers, newborn, mother, living)
        parents = () if parent is None else (parent,)
        return _log(
            layer, step, "spawn", parents=parents, child=newborn.id, reason=reason, signals=signals
        )


def merge(
    layer: MoE,
    ids: Sequence[int],
    optimizer: Optimizers = None,
    *,
    body: nn.Module | None = None,
    weights: Sequence[float] | None = None,
    tolerance: float | None = None,
    step: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
) -> Event:
    """Several experts become one, with a new id.

    Weights are averaged by the number of rows each received, after the hidden units of the others
    are aligned to those of the busiest. The expert's body and the shares can be given instead. The
    child is admitted as far as the most admitted of its parents, and is frozen if all of them were.
    The event tells how much the layer's output changed on its experts' evidence.

    Args:
        ids: two or more, of one kind and shape.
        body: of the one they become, in place of the aligned mean.
        weights: a share for each id, not negative, in place of the rows each received.
        tolerance: refuse if the output would change by more than this (see `growmoe.consent`).
        step, reason, signals: for the lineage.

    Raises:
        ValueError: see the module; also fewer than two ids, different kinds or shapes, or weights
            that are no shares.
        Refused: the change exceeds `tolerance`, or evidence is lacking.
    """
    _check_ids(layer, ids)
    if len(ids) < 2:
        raise ValueError(f"merge: at least two experts, got {list(ids)}")
    if weights is not None and (
        len(weights) != len(ids) or not sum(weights) > 0 or any(not w >= 0 for w in weights)
    ):
        raise ValueError(f"merge: weights must be {len(ids)} shares, got {list(weights)}")
    rest = [e for e in layer.experts.values() if e.id not in ids]
    _check_left(layer, len(rest) + 1, "merge", ids)
    with _transaction(layer, optimizer, ids) as optimizers:
        share = {id: layer.experts[id].statistics["rows"] for id in ids}
        if weights is not None:
            share = {id: float(w) for id, w in zip(ids, weights, strict=True)}
        elif not any(share.values()):
            share = dict.fromkeys(ids, 1.0)
        parents = [layer.experts[id] for id in sorted(ids, key=lambda id: (-share[id], id))]
        shares = [share[e.id] for e in parents]
        if body is None:
            body = merged_body([e.body for e in parents], shares)
        child = _make(layer, body, parents, None, _trainable(parents[0]), weights=shares)
        if all(e.frozen for e in parents):
            child.freeze()
        change = _consent(layer, [*rest, child], parents, tolerance, f"merge {list(ids)}")
        layer.experts.replace([*rest, child])
        # aligned to the busiest parent, so its moments fit unit by unit
        optim.welcome(optimizers, child, parents[0], [*parents[1:], *rest])
        dead = _died(layer, parents)
        optim.dismiss(optimizers, dead)
        event = _log(layer, step, "merge", ids, tuple(ids), child.id, reason, signals, change)
        _drop_gradients(dead)
        return event


def prune(
    layer: MoE,
    ids: Sequence[int],
    optimizer: Optimizers = None,
    *,
    tolerance: float | None = None,
    step: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
) -> Event:
    """Experts go, with their optimizer state; their inputs are routed to the others.

    The event tells how much the layer's output changed on its experts' evidence.

    Args:
        tolerance: refuse if the output would change by more than this (see `growmoe.consent`).
        step, reason, signals: for the lineage.

    Raises:
        ValueError: see the module; also if only newborns would be left that the gate does not
            admit yet.
        Refused: the change exceeds `tolerance`, or evidence is lacking.
    """
    _check_ids(layer, ids)
    dead = [layer.experts[id] for id in ids]
    rest = [e for e in layer.experts.values() if e.id not in ids]
    _check_left(layer, len(rest), "prune", ids)
    if not any(e.admission > 0 for e in rest):
        raise ValueError(
            f"prune: layer {layer.name!r} would be left with newborns alone "
            f"({[e.id for e in rest]}), which the gate has not admitted yet"
        )
    with _transaction(layer, optimizer) as optimizers:
        change = _consent(layer, rest, dead, tolerance, f"prune {list(ids)}")
        layer.experts.replace(rest)
        gone = _died(layer, dead)
        optim.dismiss(optimizers, gone)
        event = _log(layer, step, "prune", ids, reason=reason, signals=signals, change=change)
        _drop_gradients(gone)
        return event


def freeze(
    layer: MoE,
    ids: Sequence[int],
    *,
    step: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
) -> Event:
    """Experts stand still: weights, router entries and buffers. Pending gradients are dropped.

    Raises:
        ValueError: ids unknown, dead, repeated or none.
    """
    _check_ids(layer, ids)
    event = _log(layer, step, "freeze", ids, reason=reason, signals=signals)
    for id in ids:
        layer.experts[id].freeze()
    return event


def thaw(
    layer: MoE,
    ids: Sequence[int],
    optimizer: Optimizers = None,
    *,
    step: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
) -> Event:
    """Frozen experts learn again: what was trainable before `freeze` is trainable again.

    Their running losses begin anew, since the old ones speak of another time. Parameters that
    `optimizer` does not hold, because it was built while they were frozen, join it.

    Raises:
        ValueError: ids unknown, dead, repeated or none.
    """
    _check_ids(layer, ids)
    optimizers = optim.as_optimizers(optimizer)
    event = _log(layer, step, "thaw", ids, reason=reason, signals=signals)
    for id in ids:
        layer.experts[id].thaw()
        others = [e for e in layer.experts.values() if e.id != id]
        optim.welcome(optimizers, layer.experts[id], None, others)
        layer.experts[id].statistics.view()["loss_count"] = 0.0
    return event


def _check_layer(layer: MoE) -> None:
    if not isinstance(layer, MoE):
        raise ValueError(
            f"surgery is on a growmoe.MoE layer, got {type(layer).__name__}; pass the layer itself"
        )


def _check_ids(layer: MoE, ids: Sequence[int]) -> None:
    _check_layer(layer)
    if not isinstance(ids, Collection) or not all(type(id) is int for id in ids):
        raise ValueError(f"ids must be a sequence of integers, got {ids!r}")
    if not ids:
        raise ValueError("ids: at least one expert must be named")
    if len(set(ids)) != len(ids):
        raise ValueError(f"ids: {list(ids)} names an expert twice")
    for id in ids:
        if id not in layer.experts:
            was = "dead" if 0 <= id < layer.next_id else "unknown"
            raise ValueError(
                f"layer {layer.name!r} has no expert {id} ({was}); the living are "
                f"{list(layer.experts)}"
            )


def _check_left(layer: MoE, left: int, act: str, ids: Sequence[int]) -> None:
    needed = layer.router.min_experts
    if left < needed:
        raise ValueError(
            f"{act} {list(ids)}: {layer.router} needs at least {needed} experts, but layer "
            f"{layer.name!r} would have {left}"
        )


@contextmanager
def _transaction(
    layer: MoE, optimizer: Optimizers, ids: Sequence[int] | None = ()
) -> Iterator[list[Optimizer]]:
    """Check who else holds the layer; on any error put everything back.

    `ids` are those whose weights and moments are needed, None all.
    """
    optimizers = optim.as_optimizers(optimizer)
    refuse_parallel_wrappers(layer)
    refuse_unseen_optimizers(layer, optimizers)
    experts, next_id = list(layer.experts.values()), layer.next_id
    generator, events = layer.generator.get_state(), len(layer.lineage)
    rollback = optim.Rollback(optimizers)
    try:
        # inference tensors have no version counters and could never be trained
        with torch.inference_mode(False), layer.gathered(ids, optimizers):
            yield optimizers
    except BaseException:
        layer.experts.replace(experts)
        layer.next_id = next_id
        layer.generator.set_state(generator)
        del layer.lineage.events[events:]
        rollback.restore()
        raise


def _trainable(model: Expert) -> set[str]:
    """What may be trained in a child of this expert, whether or not it is frozen now."""
    if model.frozen:
        return set(model.get_extra_state()["trainable"])
    return {name for name, p in model.learned().items() if p.requires_grad}


@torch.no_grad()
def _make(
    layer: MoE,
    body: nn.Module,
    parents: Sequence[Expert],
    admission: float | None,
    trainable: set[str],
    toward: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Expert:
    """A clone of one parent or the merger of several, not yet in the layer."""
    first = parents[0]
    entries: dict[str, Tensor] = {}
    for name, entry in layer.router_entries.items():
        values = torch.stack([getattr(e.entries, name).detach() for e in parents])
        if len(parents) > 1:
            share = torch.tensor(weights, dtype=torch.float64, device=values.device)
            value = entry.merge(values, share)
        elif toward is not None and entry.toward is not None:
            value = entry.toward(toward.to(values), values)
        else:
            value = entry.clone(values[0], layer.generator)
        value = value.to(values.dtype).clone()
        entries[name] = nn.Parameter(value) if entry.parameter else value
    if len(parents) > 1:
        statistics = merged_statistics([e.statistics for e in parents], layer.generator)
    else:
        device = first.statistics.record.device
        statistics = Statistics(layer.d_model, layer.evidence_rows, device)
    if admission is None:
        admission = max(e.admission for e in parents)
    expert = Expert(layer.next_id, body, entries, statistics, admission)
    layer.next_id += 1
    for name, p in expert.learned().items():
        p.requires_grad_(name in trainable)
    return expert.train(layer.training)


def _consent(
    layer: MoE,
    after: Sequence[Expert],
    concerned: Sequence[Expert],
    tolerance: float | None,
    act: str,
) -> float | None:
    change, lacking = output_change(layer, after, concerned)
    if tolerance is not None and change is None:
        raise Refused(f"{act}: {lacking}", None)
    if tolerance is not None and change is not None and not change <= tolerance:
        raise Refused(
            f"{act}: the output would change by {change:.2%}, {tolerance:.2%} is tolerated", change
        )
    return change


def _died(layer: MoE, experts: Sequence[Expert]) -> list[nn.Parameter]:
    """The parameters that went with these experts: not those tied to what is left."""
    left = {id(p) for p in layer.parameters()}
    return [p for expert in experts for p in expert.parameters() if id(p) not in left]


def _drop_gradients(dead: Sequence[nn.Parameter]) -> None:
    for p in dead:
        p.grad = None


def _log(
    layer: MoE,
    step: int | None,
    act: Any,
    ids: Sequence[int] = (),
    parents: tuple[int, ...] = (),
    child: int | None = None,
    reason: str = "",
    signals: dict[str, float] | None = None,
    change: float | None = None,
) -> Event:
    when = layer.steps if step is None else step
    event = Event(
        when, layer.name, act, tuple(ids), parents, child, reason, dict(signals or {}), change
    )
    return layer.lineage.add(event)
