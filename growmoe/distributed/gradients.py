"""Means of gradients: of what every worker has, and of experts that several hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from growmoe.distributed.bank import ShardedBank
from growmoe.distributed.workers import Workers

Parameters = list[nn.Parameter]


@torch.no_grad()
def average_replicated(parameters: Parameters, workers: Workers) -> None:
    """The mean over all workers; None stays where none of them has a gradient."""
    if not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    has = workers.total(has.to(torch.int32), "gradients")
    groups: dict[Any, Parameters] = {}
    for p, count in zip(parameters, has.tolist(), strict=True):
        if count:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            groups.setdefault((p.grad.dtype, p.device), []).append(p)
    for members in groups.values():
        flat = torch.cat([p.grad.flatten() for p in members])  # type: ignore[union-attr]
        flat = workers.total(flat, "gradients") / workers.size
        for p, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]


@torch.no_grad()
def average_copies(banks: Iterable[ShardedBank], workers: Workers) -> None:
    """The mean over an expert's holders; None stays where none of them has a gradient.

    Those that the workers of our seat hold and no others, as in a mesh, go in one all-reduce; each
    of the others by its lead.
    """
    seat = workers.everywhere(workers.seats([workers.rank]))
    of_seat: list[Parameters] = []
    for bank in banks:
        for id, expert in bank.items():
            ranks = bank.holders[id]
            learned = [p for p in expert.body.parameters() if p.requires_grad]
            if len(ranks) < 2 or workers.rank not in ranks or not learned:
                continue
            if set(ranks) == set(seat):
                of_seat.append(learned)
            else:
                _unpack(_sum_by_lead(_pack([learned]), ranks, workers), [learned], len(ranks))
    if of_seat:
        total = workers.total(_pack(of_seat), "gradients", seat=True)
        _unpack(total, of_seat, len(seat))


def _pack(experts: Sequence[Parameters]) -> Tensor:
    """All gradients in one, then for each expert whether it has any."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for ps in experts for p in ps]
    has = [any(p.grad is not None for p in ps) for ps in experts]
    return torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor(has)])


def _unpack(total: Tensor, experts: Sequence[Parameters], copies: int) -> None:
    has = total[-len(experts) :].tolist()
    parts = iter(total.split([*(p.numel() for ps in experts for p in ps), len(experts)]))
    for parameters, count in zip(experts, has, strict=True):
        for p in parameters:
            part = next(parts)
            if count:
                p.grad = (part / copies).view_as(p).to(p.dtype)


def _sum_by_lead(flat: Tensor, ranks: Sequence[int], workers: Workers) -> Tensor:
    lead, group = ranks[0], workers.group
    if workers.rank == lead:
        for other in ranks[1:]:
            part = torch.empty_like(flat)
            distributed.recv(part, group=group, group_src=other)
            flat += part
        for other in ranks[1:]:
            distributed.send(flat, group=group, group_dst=other)
    else:
        distributed.send(flat, group=group, group_dst=lead)
        distributed.recv(flat, group=group, group_src=lead)
    workers.sent["gradients"] += flat.nbytes * (len(ranks) - 1 if workers.rank == lead else 1)
    return flat
