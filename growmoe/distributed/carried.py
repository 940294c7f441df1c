"""An expert as a thing that is picked up and carried: its weights, moments and pending gradients.

What the routers and the signals keep about an expert is the same on every worker and stays; only
the tensors of its body travel, with what the optimizers keep about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe.experts.expert import Expert

Packet = dict[str, Any]


def tensors_of(expert: Expert) -> dict[str, Tensor]:
    """Parameters and buffers of the body, by name."""
    return {**dict(expert.body.named_parameters()), **dict(expert.body.named_buffers())}


def size_of(expert: Expert) -> int:
    """Bytes of the body, wherever it is."""
    return sum(t.numel() * t.element_size() for t in tensors_of(expert).values())


@torch.no_grad()
def pack(expert: Expert, optimizers: Sequence[Optimizer], device: Any = None) -> Packet:
    """A copy of all that travels, by name: "body", "grad", and "state" for each optimizer."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device or value.device, copy=True)

    body = dict(expert.body.named_parameters())
    return {
        "body": {n: copied(t) for n, t in tensors_of(expert).items()},
        "grad": {n: copied(p.grad) for n, p in body.items() if p.grad is not None},
        "state": [
            {
                n: {k: copied(v) for k, v in o.state[p].items()}
                for n, p in body.items()
                if p in o.state
            }
            for o in optimizers
        ],
    }


@torch.no_grad()
def unpack(packet: Packet, expert: Expert, optimizers: Sequence[Optimizer]) -> None:
    """Take in what `pack` gave; the Parameter objects stay. The packet is not kept."""
    for name, t in tensors_of(expert).items():
        t.data = packet["body"][name].to(t.device, copy=True)
    for name, p in expert.body.named_parameters():
        grad = packet["grad"].get(name)
        p.grad = None if grad is None else grad.to(p.device, copy=True)
        for o, states in zip(optimizers, packet["state"], strict=False):
            o.state.pop(p, None)
            if name in states:
                o.state[p] = {k: _beside(v, p) for k, v in states[name].items()}


def _beside(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    # scalars stay where the optimizer had them: clocks on the CPU
    return value.clone() if value.dim() == 0 else value.to(p.device, copy=True)


@torch.no_grad()
def release(expert: Expert, optimizers: Sequence[Optimizer]) -> None:
    """Let go of the memory: every tensor keeps its shape and becomes one NaN, seen everywhere."""
    for t in tensors_of(expert).values():
        nothing = float("nan") if t.is_floating_point() else 0
        t.data = torch.full((), nothing, dtype=t.dtype, device=t.device).expand(t.shape)
    for p in expert.body.parameters():
        p.grad = None
        for o in optimizers:
            o.state.pop(p, None)


def materialize(expert: Expert) -> None:
    """Give an expert that was released memory again, to be filled."""
    for t in tensors_of(expert).values():
        if t.untyped_storage().nbytes() < t.nbytes:
            t.data = torch.zeros(t.shape, dtype=t.dtype, device=t.device)


def tensors_in(packet: Packet) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a packet by their path, in order."""

    def walk(where: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield where, value
        elif isinstance(value, Mapping):
            for k, v in value.items():
                yield from walk(f"{where}/{k}", v)
        elif isinstance(value, (list, tuple)):
            for k, v in enumerate(value):
                yield from walk(f"{where}/{k}", v)

    yield from walk("", packet)


def bytes_of(packet: Packet) -> int:
    return sum(t.nbytes for _, t in tensors_in(packet))


def same(a: Packet | None, b: Packet) -> bool:
    """Whether two packets agree in every bit."""
    if a is None:
        return False
    of_a, of_b = dict(tensors_in(a)), dict(tensors_in(b))
    return of_a.keys() == of_b.keys() and all(
        t.shape == of_b[n].shape and torch.equal(_bits(t), _bits(of_b[n])) for n, t in of_a.items()
    )


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t


def has_own_tensors(expert: Expert) -> str | None:
    """Why an expert cannot be carried: a tensor of its body that is no plain one of its own."""
    for name, t in tensors_of(expert).items():
        if type(t) not in (Tensor, nn.Parameter, nn.Buffer) or t.layout is not torch.strided:
            return f"{name} is a {type(t).__name__}, not a plain tensor"
    return None
