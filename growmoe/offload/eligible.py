"""What can be offloaded: which tensors of which experts, and how many fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from growmoe.experts.bank import ExpertBank
from growmoe.live import refuse_parallel_wrappers
from growmoe.moe import MoE
from growmoe.offload.bank import OffloadedBank
from growmoe.offload.cold import Tensors
from growmoe.routers.closed_form import ClosedFormGate

_id = id  # `id` is an expert's, here as everywhere


def check_layer(name: str, layer: MoE) -> None:
    """Raise ValueError if this kind of layer cannot be offloaded, or is already."""
    if isinstance(layer.experts, OffloadedBank):
        raise ValueError(f"offload: layer {name!r} is offloaded already; restore() it first")
    if type(layer.experts) is not ExpertBank:
        raise ValueError(f"offload: layer {name!r} has a {type(layer.experts).__name__}")
    if isinstance(layer.router, ClosedFormGate):
        raise ValueError(f"offload: the router of layer {name!r} decides by its experts' weights")
    refuse_parallel_wrappers(layer)


def tensors_of(name: str, layer: MoE) -> dict[int, Tensors]:
    """Parameters and buffers of each expert's body by name, a tied one by its first name.

    Raises:
        ValueError: one that is not a plain tensor with values.
    """
    result: dict[int, Tensors] = {}
    for expert in layer.experts.values():
        own: dict[int, tuple[str, Tensor]] = {}
        for n, t in (*expert.body.named_parameters(), *expert.body.named_buffers()):
            where = f"expert {expert.id} of layer {name!r}: {n}"
            if type(t) not in (Tensor, nn.Parameter, nn.Buffer) or t.layout is not torch.strided:
                raise ValueError(f"offload: {where} is a {type(t).__name__}, not a plain tensor")
            if t.device.type not in ("cpu", "cuda"):
                raise ValueError(f"offload: {where} is on {t.device}, where it has no values")
            if t.is_inference():
                raise ValueError(f"offload: {where} was made in inference mode; clone it outside")
            if not t.numel():
                continue
            own.setdefault(_id(t), (n, t))
        if own:
            result[expert.id] = dict(own.values())
    return result


def budgets_of(
    held: Mapping[str, dict[int, Tensors]], cache: int | None, cache_bytes: int | None
) -> dict[str, tuple[int, dict[int, int]]]:
    """Each layer's capacity and its experts' costs, in experts or in bytes.

    Raises:
        ValueError: a layer's share of cache_bytes does not hold its largest expert.
    """
    if cache is not None:
        return {name: (cache, dict.fromkeys(of, 1)) for name, of in held.items()}
    sizes = {
        name: {id: sum(t.nbytes for t in own.values()) for id, own in of.items()}
        for name, of in held.items()
    }
    total = max(1, sum(sum(of.values()) for of in sizes.values()))
    budgets = {}
    for name, of in sizes.items():
        share = cast(int, cache_bytes) * sum(of.values()) // total
        largest = max(of.values(), default=0)
        if share < largest:
            raise ValueError(
                f"offload: of cache_bytes={cache_bytes}, {share} are for layer {name!r}, whose "
                f"largest expert has {largest}"
            )
        budgets[name] = (share, of)
    return budgets


def refuse_sharing(model: nn.Module, layers: Mapping[str, MoE]) -> None:
    """Refuse experts any of whose modules or memory is also someone else's.

    Raises:
        ValueError: naming two of those that share; also an expert that holds a mixture of its own.
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for expert in layer.experts.values():
            owner = f"expert {expert.id} of layer {name!r}"
            for module in expert.body.modules():
                if isinstance(module, MoE):
                    raise ValueError(f"offload: {owner} holds a mixture of its own")
                if owners.setdefault(_id(module), owner) != owner:
                    raise ValueError(f"offload: {owner} shares a module with another")
    bodies = {_id(e.body) for layer in layers.values() for e in layer.experts.values()}
    outside: set[int] = set()
    todo = [model]
    while todo:
        module = todo.pop()
        if _id(module) in owners and _id(module) not in bodies:
            raise ValueError(
                f"offload: {owners[_id(module)]} shares a module with the rest of the model"
            )
        if _id(module) not in outside | bodies:
            outside.add(_id(module))
            todo.extend(module.children())
    spans = []
    for module in model.modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for n, t in own:
            if t is None or not t.numel() or t.layout is not torch.strided or t.is_meta:
                continue
            reach = 1 + sum((k - 1) * s for k, s in zip(t.shape, t.stride(), strict=True))
            start = t.data_ptr()
            owner = owners.get(_id(module), "")
            spans.append((str(t.device), start, start + reach * t.element_size(), owner, n, _id(t)))
    spans.sort()
    last = ("", 0, 0, "", "", 0)
    for span in spans:
        if span[0] == last[0] and span[1] < last[2]:
            same = span[3] == last[3] and span[5] == last[5]
            if not same and (span[3] or last[3]):
                this, that = (f"{s[4]} of {s[3] or 'the rest of the model'}" for s in (span, last))
                raise ValueError(f"offload: {this} shares memory with {that} (tied, or views)")
        if span[0] != last[0] or span[2] > last[2]:
            last = span
