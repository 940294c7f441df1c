"""The processes that share a model's experts, and how rows move between them.

Legend: W workers, S rows that arrive at this worker's experts, others as in `growmoe.assignment`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class Workers:
    """A process group, always named explicitly, and the bytes this worker sends to the others.

    Attributes:
        rank, size: in the group.
        sent: bytes by purpose ("rows", "gradients", "signals", "experts"), those of a ring for
            all-reduce. What travels as Python objects is counted by its tensors.
    """

    def __init__(self, group: Any = None) -> None:
        self.sent: Counter[str] = Counter()
        self.queued = False  # whether gradients are averaged at the end of the running backward
        self.after_backward: Callable[[], None] = lambda: None
        self.regroup(group)

    def regroup(self, group: Any = None) -> None:
        """Go on in another group, as after the death of a worker."""
        self.group = distributed.group.WORLD if group is None else group
        self.rank, self.size = (
            distributed.get_rank(self.group),
            distributed.get_world_size(self.group),
        )

    def leave(self) -> None:
        """Let go of the group, and of the model: a graph that the model keeps holds us, and Python
        cannot see that cycle."""
        self.group, self.after_backward = None, lambda: None

    def __deepcopy__(self, memo: Any) -> Workers:
        return self

    def total(self, value: Tensor, purpose: str = "signals") -> Tensor:
        """The sum over all workers, the same bits on each; the argument is left as it is."""
        if self.size == 1:
            return value
        value = value.contiguous().clone()
        distributed.all_reduce(value, group=self.group)
        self.sent[purpose] += 2 * (self.size - 1) * value.nbytes // self.size
        return value

    def every(self, value: Tensor) -> Tensor:
        """Each worker's value: [...] -> [W, ...]."""
        result = value.new_empty(self.size, *value.shape)
        distributed.all_gather_into_tensor(
            result.flatten(), value.contiguous().flatten(), self.group
        )
        self.sent["signals"] += (self.size - 1) * value.nbytes
        return result

    def objects(self, value: Any) -> list[Any]:
        """Each worker's plain value."""
        result = [None] * self.size
        distributed.all_gather_object(result, value, group=self.group)
        return result

    def told(self, value: Any, source: int) -> Any:
        """What worker `source` has, on all."""
        box = [value]
        distributed.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    def agree(self, value: Any, what: str) -> None:
        """Raise RuntimeError on all workers if they do not have the same."""
        values = self.objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise RuntimeError(
                    f"workers 0 and {rank} have different {what}: {values[0]!r:.200} and "
                    f"{other!r:.200}"
                )

    def average_after_backward(self) -> None:
        """Call `after_backward` once, when the running backward has ended."""
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)


@dataclass(frozen=True)
class Plan:
    """How the rows of one forward go to their experts.

    Attributes:
        order: int64 [R], this worker's rows sorted by where they go, then by expert.
        send: rows for each worker.
        receive: rows from each worker.
        arranged: int64 [S], what arrives sorted by expert, then by the worker it comes from. So
            each expert sees its rows in the order of one process with all the tokens.
    """

    order: Tensor
    send: list[int]
    receive: list[int]
    arranged: Tensor

    def reversed(self) -> Plan:
        return Plan(_inverse(self.arranged), self.receive, self.send, _inverse(self.order))


def _inverse(order: Tensor) -> Tensor:
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


class Moving:
    """Rows under way; `wait` gives them."""

    def __init__(self, workers: Workers, rows: Tensor, plan: Plan) -> None:
        self.plan, self.rows = plan, rows.detach()[plan.order]
        self.arriving = rows.new_empty(sum(plan.receive), *rows.shape[1:])
        self.work = distributed.all_to_all_single(
            self.arriving, self.rows, plan.receive, plan.send, workers.group, async_op=True
        )
        width = rows.element_size() * rows.shape[1:].numel()
        workers.sent["rows"] += width * (sum(plan.send) - plan.send[workers.rank])

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.arriving[self.plan.arranged]


def to_experts(
    x_RD: Tensor, moving: Moving, workers: Workers, share: float | Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """What arrives, [S, D], and a token by which `from_experts` makes its backward run here.

    The backward must run on every worker, or those that wait for it wait for ever: also on one
    whose experts got no rows or are all frozen.

    Args:
        share: what gradients were multiplied with on their way to the experts, taken out again.
        wanted: whether any worker needs the gradient of its rows.
    """
    anchor = x_RD.new_zeros((), requires_grad=torch.is_grad_enabled())
    return _ToExperts.apply(x_RD, anchor, moving, workers, share, wanted)  # type: ignore[no-any-return]


def from_experts(
    y_SO: Tensor, token: Tensor, plan: Plan, workers: Workers, share: float | Tensor
) -> Tensor:
    """The experts' outputs back at the rows they came from: [S, O] -> [R, O].

    Args:
        share: gradients are multiplied with it on their way to the experts.
    """
    return _FromExperts.apply(y_SO, token, plan, workers, share)  # type: ignore[no-any-return]


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, anchor, moving, workers, share, wanted):
        ctx.plan, ctx.workers, ctx.share, ctx.wanted = moving.plan, workers, share, wanted
        return moving.wait(), anchor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD, _):
        grad_RD = None
        if ctx.wanted:
            grad_RD = Moving(ctx.workers, grad_SD / ctx.share, ctx.plan.reversed()).wait()
        return grad_RD, None, None, None, None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_SO, token, plan, workers, share):
        ctx.plan, ctx.workers, ctx.share = plan, workers, share
        ctx.token = token
        return Moving(workers, y_SO, plan.reversed()).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        ctx.workers.average_after_backward()
        grad_SO = Moving(ctx.workers, grad_RO, ctx.plan).wait() * ctx.share
        return grad_SO, torch.zeros_like(ctx.token), None, None, None
