"""Everything a surgery must leave alone, copied to the last bit, to be compared afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe.experts.expert import Expert
from growmoe.moe import MoE, moe_layers


def copied(value: Any) -> Any:
    """A deep copy of plain values and tensors; tensors keep dtype and value."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(v) for v in value]
    return value


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places at which two copies differ in type, shape or any bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(bits(a), bits(b)) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}/{i}")
        ]  # fmt: skip
    return [] if type(a) is type(b) and (a == b or a != a) else [f"{where}: {a!r} -> {b!r}"]


def bits(t: Tensor) -> Tensor:
    """Bytes, so that NaN equals itself and -0 differs from 0."""
    return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t


def of_expert(expert: Expert, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """An expert: objects, weights, entries, statistics, gradients, place in optimizers."""
    learned = expert.learned()
    place: dict[int, list[str]] = {}
    for o, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            for p, name in zip(group["params"], names, strict=True):
                place.setdefault(id(p), []).append(f"optimizer {o}, group {g}, name {name}")
    return {
        "object": id(expert),
        "id": expert.id,
        "frozen": expert.frozen,
        "admission": expert.admission,
        "parameters": {n: id(p) for n, p in learned.items()},
        "requires_grad": {n: p.requires_grad for n, p in learned.items()},
        "weights": copied(dict(expert.named_parameters())),
        "buffers": copied(dict(expert.named_buffers())),
        "gradients": {n: copied(p.grad) for n, p in learned.items()},
        "place": {n: place.get(id(p), []) for n, p in learned.items()},
        "state": {n: [copied(o.state.get(p, {})) for o in optimizers] for n, p in learned.items()},
    }


def of_experts(
    layer: MoE, optimizers: Sequence[Optimizer], ids: Iterable[int] | None = None
) -> dict[int, dict[str, Any]]:
    """id -> snapshot of the experts named, by default all the living."""
    return {
        i: of_expert(layer.experts[i], optimizers) for i in (layer.experts if ids is None else ids)
    }


def of_everything(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """Model, optimizers, lineages, id counters, generators and torch's own random state."""
    layers = moe_layers(model)
    return {
        "experts": {name: of_experts(layer, optimizers) for name, layer in layers.items()},
        "parameters": {n: [id(p), copied(p), copied(p.grad)] for n, p in model.named_parameters()},
        "buffers": copied(dict(model.named_buffers())),
        "groups": [
            [{k: [id(p) for p in v] if k == "params" else copied(v) for k, v in g.items()}
             for g in o.param_groups]
            for o in optimizers
        ],
        "states": [{str(id(p)): copied(s) for p, s in o.state.items()} for o in optimizers],
        "lineages": {name: [str(e) for e in layer.lineage] for name, layer in layers.items()},
        "counters": {name: [layer.next_id, layer.steps] for name, layer in layers.items()},
        "generators": {name: layer.generator.get_state() for name, layer in layers.items()},
        "random": torch.get_rng_state(),
    }  # fmt: skip
