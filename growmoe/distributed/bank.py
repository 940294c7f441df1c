"""The bank of a layer whose experts live on several workers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from growmoe.assignment import Assignment
from growmoe.distributed.carried import bytes_of, pack, release, size_of, unpack
from growmoe.distributed.workers import Moving, Plan, Workers, from_experts, to_experts
from growmoe.experts.bank import ExpertBank
from growmoe.experts.expert import Expert

Holders = dict[int, tuple[int, ...]]


class SharedExpert(Expert):
    """An expert that lives on some workers and is known to all; an `Expert` becomes one."""

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] -> [R, O].

        Raises:
            RuntimeError: it lives on another worker, and not all ask it together.
        """
        bank: ShardedBank = self.__dict__["_home"]
        return bank.ask(self, x_RD)


@dataclass(frozen=True)
class Tally:
    """Who sent how many rows where in one forward.

    Attributes:
        counts_E: int64 [E], this worker's, the very tensor of its assignment.
        counts_WE: int64 [W, E], every worker's.
        rows: of all workers.
        tokens: of all workers.
    """

    counts_E: Tensor
    counts_WE: Tensor
    rows: int
    tokens: int


class ShardedBank(ExpertBank):
    """An `ExpertBank` that runs rows on the workers that hold their experts.

    Every worker knows all experts, as modules whose weights are real on their holders alone.

    Attributes:
        workers: who shares.
        holders: id -> the ranks that hold it; the first leads. Several where it is replicated.
        tally: of the last forward.
        meanwhile: called once while rows are under way to the experts.
    """

    workers: Workers
    holders: Holders
    tally: Tally | None
    meanwhile: Callable[[], None] | None

    def enter(self, workers: Workers, holders: Mapping[int, Sequence[int]]) -> None:
        self.workers, self.holders = workers, {id: tuple(h) for id, h in holders.items()}
        self.tally, self.meanwhile = None, None
        self._asking = self._running = False
        self._routes: tuple[Any, Tensor, int] | None = None
        for expert in self.values():
            self._adopt(expert)

    def _adopt(self, expert: Expert) -> None:
        expert.__class__ = SharedExpert
        expert.__dict__["_home"] = self  # not a submodule

    def holds(self, id: int) -> bool:
        return self.workers.rank in self.holders[id]

    def local(self) -> list[Expert]:
        """The experts that this worker runs, ascending."""
        return [e for id, e in self.items() if self.holds(id)]

    # The computation.

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Each row through its expert, wherever that is: [T, D] -> [R, O].

        Raises:
            RuntimeError: workers disagree about the experts, or on whether they want gradients.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("experts on several workers cannot run under a functorch transform")
        if self.workers.size == 1:
            counts_E = assignment.counts_E
            rows, tokens = len(assignment.token_R), assignment.num_tokens
            self.tally = Tally(counts_E, counts_E[None], rows, tokens)
            self._meanwhile()
            self._running = True
            try:
                return super().forward(x_TD, assignment)
            finally:
                self._running = False
        x_RD = assignment.dispatch(x_TD)
        dest_WE, fingerprint = self._where()
        wanted = self._count(assignment, x_RD, fingerprint)
        plan, counts_L, share = self._plan(assignment, dest_WE, x_RD.dtype)
        moving = Moving(self.workers, x_RD, plan)
        self._meanwhile()
        x_SD, token = to_experts(x_RD, moving, self.workers, share, wanted)
        y_SO = x_SD.new_zeros(0, self.d_out)
        experts = self.local()
        if experts:
            self._running = True
            try:
                none = counts_L[:0]
                y_SO = self.run(experts, x_SD, Assignment(none, none, none, counts_L, 0))
            finally:
                self._running = False
        kind = x_RD.device.type
        if torch.is_autocast_enabled(kind) and x_RD.dtype is not torch.float64:
            y_SO = y_SO.to(torch.get_autocast_dtype(kind))
        else:
            y_SO = y_SO.to(x_RD.dtype)
        return from_experts(y_SO, token, plan, self.workers, share)

    def _meanwhile(self) -> None:
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            call()

    def _where(self) -> tuple[Tensor, int]:
        """Where each worker sends the rows of each expert, int64 [W, E], and a check sum."""
        key = (tuple(self.holders[id] for id in self), tuple(self), self.workers.size)
        if self._routes is None or self._routes[0] != key:
            near = [[self.workers.nearest(s, h) for h in key[0]] for s in range(key[2])]
            dest = [[s if s in h else h[s % len(h)] for h in of] for s, of in enumerate(near)]
            device = next(self.buffers()).device
            check = zlib.crc32(repr(key).encode())
            self._routes = (key, torch.tensor(dest, dtype=torch.int64, device=device), check)
        return self._routes[1], self._routes[2]

    def _count(self, a: Assignment, x_RD: Tensor, fingerprint: int) -> bool:
        """Tell each other the counts; whether anyone needs the gradient of its rows."""
        learning = torch.is_grad_enabled()
        head = a.counts_E.new_tensor(
            [fingerprint, learning, learning and x_RD.requires_grad, a.num_tokens]
        )
        all_WX = self.workers.every(torch.cat([head, a.counts_E]))
        counts_WE = all_WX[:, 4:]
        heads = [*all_WX[:, :4].tolist()]
        for rank, (check, grad, *_) in enumerate(heads):
            if (check, grad) != (fingerprint, int(learning)):
                what = "experts or placements" if check != fingerprint else "gradient modes"
                raise RuntimeError(
                    f"workers {self.workers.rank} and {rank} run a layer with different {what}"
                )
        tokens = sum(h[3] for h in heads)
        self.tally = Tally(a.counts_E, counts_WE, int(counts_WE.sum()), tokens)
        return any(h[2] for h in heads)

    def _plan(
        self, a: Assignment, dest_WE: Tensor, dtype: torch.dtype
    ) -> tuple[Plan, Tensor, float | Tensor]:
        """How rows go, the rows of each local expert, and the share of gradients (see below)."""
        assert self.tally is not None
        workers, counts_WE = self.workers, self.tally.counts_WE
        rank, size, width = workers.rank, workers.size, workers.width
        local = torch.tensor([self.holds(id) for id in self], device=counts_WE.device)
        own_dest_R = dest_WE[rank][a.expert_R]
        order = own_dest_R.argsort(stable=True)
        send = torch.zeros(size, dtype=torch.int64, device=order.device)
        send.scatter_add_(0, own_dest_R, torch.ones_like(own_dest_R))
        here_WL = torch.where(dest_WE == rank, counts_WE, 0)[:, local]
        expert_WL = torch.arange(here_WL.shape[1], device=order.device).expand_as(here_WL)
        expert_S = expert_WL.flatten().repeat_interleave(here_WL.flatten())
        arranged = expert_S.argsort(stable=True)
        counts_L = here_WL.sum(0)
        # a worker's loss is a mean over its own tokens, the whole loss the mean of theirs; the
        # gradients of replicas are averaged after backward, so each counts for all of them
        share: float | Tensor = 1 / size
        copies = [len(self.holders[id]) for id in self if self.holds(id)]
        if max(copies, default=1) > 1:
            copies_L = torch.tensor(copies, dtype=dtype, device=order.device)
            share = (copies_L / size).repeat_interleave(counts_L)[:, None]
        replica = slice(rank - rank % width, rank - rank % width + width)
        sent, received = send[replica].tolist(), here_WL.sum(1)[replica].tolist()
        return Plan(order, sent, received, arranged), counts_L, share

    # Experts asked by themselves, as consent does.

    def ask(self, expert: Expert, x_RD: Tensor) -> Tensor:
        if self._running or (self.holds(expert.id) and not self._asking):
            return expert.body(x_RD)  # type: ignore[no-any-return]
        lead = self.holders[expert.id][0]
        if not self._asking:
            raise RuntimeError(
                f"expert {expert.id} lives on worker {lead}, this is {self.workers.rank}; inside "
                "`with layer.gathered():` on all workers it can be asked"
            )
        y_RO = x_RD.new_zeros(len(x_RD), self.d_out)
        if self.workers.rank == lead:
            y_RO.copy_(expert.body(x_RD))
        distributed.broadcast(y_RO, group=self.workers.group, group_src=lead)
        return y_RO

    @contextmanager
    def asking(self) -> Iterator[None]:
        before, self._asking = self._asking, True
        try:
            yield
        finally:
            self._asking = before

    # Experts that come, go and move.

    def replace(self, experts: Sequence[Expert]) -> None:
        """Hold these from now on; a newborn goes to the worker with the least load."""
        super().replace(experts)
        for expert in self.values():
            if type(expert) is Expert:
                seats = self.workers.seats([self._lightest(expert.id)])
                self.holders[expert.id] = self.workers.everywhere(seats)
                self._adopt(expert)

    def _lightest(self, newborn: int) -> int:
        loads = [[0.0, 0, rank] for rank in range(self.workers.size)]
        for id, expert in self.items():
            if id != newborn:
                for rank in self.holders.get(id, ()):  # none yet: born at the same time
                    loads[rank][0] += expert.statistics["load"] / len(self.holders[id])
                    loads[rank][1] += 1
        return int(min(loads)[2])

    def bring(self, ids: Sequence[int], optimizers: Sequence[Optimizer]) -> None:
        """Copy these experts to every worker; `settle` lets go of them again."""
        for id in ids:
            lead, expert = self.holders[id][0], self[id]
            mine = self.workers.rank == lead
            packet = pack(expert, optimizers) if mine else None
            packet = self.workers.told(packet, lead)
            if mine:
                self.workers.sent["experts"] += bytes_of(packet) * (self.workers.size - 1)
            if not self.holds(id):
                unpack(packet, expert, optimizers)

    def settle(self, optimizers: Sequence[Optimizer]) -> None:
        """Let go of every expert that is not held here."""
        for id, expert in self.items():
            if not self.holds(id):
                release(expert, optimizers)
        self._layout, self._laid_out = [], []  # pools would keep the memory

    def move(self, holders: Mapping[int, Sequence[int]], optimizers: Sequence[Optimizer]) -> int:
        """Move experts to new holders; returns the bytes of weights that went between workers."""
        moved, rank, group = 0, self.workers.rank, self.workers.group
        for id, expert in self.items():
            old, new = self.holders[id], tuple(holders[id])
            for receiver in sorted(set(new) - set(old)):
                moved += size_of(expert)
                source = self.workers.nearest(receiver, old)[0]
                if rank == source:
                    packet = pack(expert, optimizers)
                    self.workers.sent["experts"] += bytes_of(packet)
                    distributed.send_object_list([packet], group=group, group_dst=receiver)
                elif rank == receiver:
                    box: list[Any] = [None]
                    distributed.recv_object_list(box, group=group, group_src=source)
                    unpack(box[0], expert, optimizers)
        self.holders |= {id: tuple(holders[id]) for id in self}
        self.settle(optimizers)
        return moved

    def _apply(self, fn: Any, recurse: bool = True) -> ShardedBank:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.settle(())  # the fill would otherwise become as large as the weights
        self._routes = None
        return self
