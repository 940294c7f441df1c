"""Budgets found by the loss itself: which layer, and which expert of it, can best do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from growmoe.compress.calibrate import Batches, Loss, losses
from growmoe.compress.layer import CompressError, Layer
from growmoe.compress.plan import LayerSize, Plan, check_saliencies


def search(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    loss: Loss,
    saliencies: Mapping[str, Tensor],
    *,
    total: int | None = None,
    most: Mapping[str, int] | None = None,
    max_loss: float | None = None,
    shortlist: int = 1,
    spared: Mapping[str, Sequence[int]] | None = None,
    removed: Callable[[str, int], None] = lambda name, position: None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> Plan:
    """Experts go one by one, each time the one without which the mean loss is lowest.

    Looked at are the `shortlist` least salient of each layer. With 1 the saliency ranks within a
    layer and the loss decides between layers; with more the loss decides within too, and what it
    said is what an expert is ranked by from then on.

    Args:
        total: how many go.
        most: how many may go from each layer; all but k if left out.
        max_loss: stop before the loss rises by more than this, in nats.
        spared: layer name -> positions that must stay.
        removed: told the layer and position of each expert when it goes.

    Raises:
        CompressError: fewer than `total` can go, or not one within `max_loss`.
    """
    sizes = {layer.name: LayerSize.of(layer) for layer in layers}
    for name, size in sizes.items():
        if most is None and (size.uniform or size.groups > 1):
            raise CompressError(
                f"{name}: this kind of model needs the same number of experts in every layer; "
                "use per_layer='uniform'"
            )
    check_saliencies(saliencies, sizes)
    rank = {name: saliencies[name].clone() for name in sizes}
    gone: dict[str, list[int]] = {name: [] for name in sizes}
    reasons: dict[str, dict[int, str]] = {name: {} for name in sizes}
    base = now = float(losses(model, batches, loss).mean())
    while total is None or sum(map(len, gone.values())) < total:
        tried = []
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.masked([layer.ids[e] for e in gone[layer.name]]))
            for layer in layers:
                size = sizes[layer.name]
                free = _free(
                    size, gone[layer.name], (spared or {}).get(layer.name, ()), most, layer
                )
                free.sort(key=lambda e: (float(rank[layer.name][e]), e))
                for e in free[:shortlist]:
                    # with those that are gone, so that too few left is noticed
                    out = [size.ids[g] for g in (*gone[layer.name], e)]
                    with layer.masked(out):
                        value = float(losses(model, batches, loss).mean())
                    tried.append((value, layer.name, e))
                    if shortlist > 1:
                        rank[layer.name][e] = value - now
        if not tried:
            break
        value, name, e = min(tried)
        if max_loss is not None and value - base > max_loss:
            break
        gone[name].append(e)
        removed(name, e)
        reasons[name][sizes[name].ids[e]] = (
            f"loss {value - now:+.5f} without it, after those before"
        )
        now = value
        count = sum(map(len, gone.values()))
        progress(count / (total or sum(len(s.ids) for s in sizes.values())), "searching")
    count = sum(map(len, gone.values()))
    if total is not None and count < total:
        raise CompressError(f"{total} experts are to go, but only {count} can")
    if not count:
        raise CompressError(f"not one expert can go within max_loss={max_loss:g}")
    remove = {name: [sizes[name].ids[e] for e in positions] for name, positions in gone.items()}
    return Plan(remove, sizes, reasons)


def _free(
    size: LayerSize,
    gone: Sequence[int],
    spared: Sequence[int],
    most: Mapping[str, int] | None,
    layer: Layer,
) -> list[int]:
    """Positions that may go next."""
    number = len(size.ids)
    room = number - size.k if most is None else most[layer.name]
    per_group, room_per_group = number // size.groups, room // size.groups
    full = {
        g for g in range(size.groups) if sum(e // per_group == g for e in gone) >= room_per_group
    }
    return [
        e for e in range(number) if e not in gone and e not in spared and e // per_group not in full
    ]
