"""The processes that share a model's experts, and how rows move between them.

Legend: W workers, S rows that arrive at this worker's experts, others as in `growmoe.assignment`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh


class Workers:
    """A process group, always named explicitly, and the bytes this worker sends to the others.

    The group may be a mesh of replicas by seats: worker `rank` sits on seat `rank % width` of
    replica `rank // width`. Every replica holds all experts, each on the same seat, and rows stay
    within their replica.

    Attributes:
        rank, size: in the group.
        replicas: how often every expert is held.
        width: workers of a replica; equal to `size` where there is but one.
        rows_group: the workers of this replica, among which rows travel.
        seat_group: those of the same seat, which hold the same experts.
        sent: bytes by purpose ("rows", "gradients", "signals", "experts"), those of a ring for
            all-reduce. What travels as Python objects is counted by its tensors.

    Raises:
        ValueError: the group does not divide into so many replicas, or a mesh has not two axes.
    """

    def __init__(self, group: Any = None, replicas: int = 1) -> None:
        self.sent: Counter[str] = Counter()
        self.queued = False  # whether gradients are averaged at the end of the running backward
        self.after_backward: Callable[[], None] = lambda: None
        if isinstance(group, DeviceMesh):
            group, replicas = _flat(group)
        self.group = distributed.group.WORLD if group is None else group
        self.rank, self.size = (
            distributed.get_rank(self.group),
            distributed.get_world_size(self.group),
        )
        if replicas < 1 or self.size % replicas:
            raise ValueError(f"{self.size} workers do not divide into {replicas} replicas")
        self.replicas, self.width = replicas, self.size // replicas
        self.rows_group = self.seat_group = self.group
        if replicas > 1:
            first = self.rank - self.rank % self.width
            self.rows_group = self._among(range(first, first + self.width))
            self.seat_group = self._among(range(self.rank % self.width, self.size, self.width))

    def _among(self, ranks: Sequence[int]) -> Any:
        own: Any = self.group
        everywhere = [distributed.get_global_rank(own, r) for r in ranks]
        return distributed.new_group(everywhere, use_local_synchronization=True)

    def leave(self) -> None:
        """Let go of the group, and of the model: a graph that the model keeps holds us, and Python
        cannot see that cycle."""
        self.group = self.rows_group = self.seat_group = None
        self.after_backward = lambda: None

    def everywhere(self, seats: Sequence[int]) -> tuple[int, ...]:
        """The ranks on these seats, those of the first replica first."""
        return tuple(r * self.width + s for r in range(self.replicas) for s in seats)

    def seats(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The seats of these ranks, each once, in order."""
        return tuple(dict.fromkeys(r % self.width for r in ranks))

    def nearest(self, rank: int, ranks: Sequence[int]) -> tuple[int, ...]:
        """Those of the ranks in `rank`'s replica; all of them if there are none."""
        near = tuple(r for r in ranks if r // self.width == rank // self.width)
        return near or tuple(ranks)

    def __deepcopy__(self, memo: Any) -> Workers:
        return self

    def total(self, value: Tensor, purpose: str = "signals", *, seat: bool = False) -> Tensor:
        """The sum over all workers, the same bits on each; the argument is left as it is.

        Args:
            seat: over those of the same seat alone.
        """
        size, group = (self.replicas, self.seat_group) if seat else (self.size, self.group)
        if size == 1:
            return value
        value = value.contiguous().clone()
        distributed.all_reduce(value, group=group)
        self.sent[purpose] += 2 * (size - 1) * value.nbytes // size
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


def _flat(mesh: DeviceMesh) -> tuple[Any, int]:
    """All workers of a mesh as one group, and the length of its first axis."""
    if mesh.ndim != 2:
        raise ValueError(f"a mesh of two axes is needed, replicas by experts; this has {mesh.ndim}")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(
            f"the ranks of the mesh must ascend, as init_device_mesh has them: {ranks}"
        )
    whole = ranks == list(range(distributed.get_world_size()))
    group = None if whole else distributed.new_group(ranks, use_local_synchronization=True)
    return group, mesh.size(0)


@dataclass(frozen=True)
class Plan:
    """How the rows of one forward go to their experts.

    Attributes:
        order: int64 [R], this worker's rows sorted by where they go, then by expert.
        send: rows for each worker of this replica.
        receive: rows from each of them.
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
            self.arriving, self.rows, plan.receive, plan.send, workers.rows_group, async_op=True
        )
        width = rows.element_size() * rows.shape[1:].numel()
        workers.sent["rows"] += width * (sum(plan.send) - plan.send[workers.rank % workers.width])

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
