"""The layer whose experts live on several workers: its signals and losses are of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from growmoe.assignment import Assignment
from growmoe.distributed.bank import ShardedBank
from growmoe.distributed.workers import Workers
from growmoe.experts.expert import Expert
from growmoe.live import refuse_parallel_wrappers
from growmoe.losses import balance_loss, gshard_loss
from growmoe.moe import MoE
from growmoe.routers.router import Routing
from growmoe.signals import Recorder


class SharedRecorder(Recorder):
    """A `Recorder` that writes what happened to the rows of all workers, the same on each."""

    def enter(self, bank: ShardedBank) -> None:
        self.__dict__["bank"] = bank  # not a submodule
        self._known: tuple[Tensor, Tensor, int] | None = None

    def _counts(self, assignment: Assignment) -> tuple[Tensor, int]:
        tally = self.__dict__["bank"].tally
        if tally.counts_E is assignment.counts_E:
            return tally.counts_WE.sum(0), tally.rows
        if self._known is None or self._known[0] is not assignment.counts_E:
            total_E = self._total(assignment.counts_E)
            self._known = (assignment.counts_E, total_E, int(total_E.sum()))
        return self._known[1:]

    def _total(self, value: Tensor) -> Tensor:
        workers: Workers = self.__dict__["bank"].workers
        return workers.total(value)

    def _at(self, value_TX: Tensor, assignment: Assignment, row_N: Tensor) -> Tensor:
        tally, rank = self.__dict__["bank"].tally, self.__dict__["bank"].workers.rank
        total_E, own_E = tally.counts_WE.sum(0), tally.counts_E
        expert_N = torch.searchsorted(total_E.cumsum(0), row_N, right=True)
        # an expert's rows come from the workers in order
        first_E = total_E.cumsum(0) - total_E + tally.counts_WE[:rank].sum(0)
        place_N = row_N - first_E[expert_N]
        mine_N = (place_N >= 0) & (place_N < own_E[expert_N])
        own_row_N = ((own_E.cumsum(0) - own_E)[expert_N] + place_N)[mine_N]
        found_NX = torch.zeros(len(row_N), value_TX.shape[1], device=value_TX.device)
        found_NX[mine_N] = value_TX[assignment.token_R[own_row_N]].float()
        return self._total(found_NX)

    @torch.no_grad()
    def observe_loss(self, experts: Sequence[Expert], loss: Tensor) -> None:
        if loss.numel() == 1:  # a mean over this worker's tokens
            loss = self._total(loss.detach().double().to(self.novel.device))
            loss = loss / self.__dict__["bank"].workers.size
        super().observe_loss(experts, loss)


class ParallelMoE(MoE):
    """A `MoE` among whose workers the experts are shared out; a layer becomes one.

    The balance losses of Switch and GShard are those of all workers' tokens together; a capacity,
    other losses and routers that compare tokens with each other see each worker's own.
    """

    experts: ShardedBank

    def enter(self, workers: Workers, holders: dict[int, tuple[int, ...]]) -> None:
        self.experts.__class__ = ShardedBank
        self.experts.enter(workers, holders)
        self.recorder.__class__ = SharedRecorder
        cast(SharedRecorder, self.recorder).enter(self.experts)
        self._checked: tuple[int, ...] = ()
        self.experts.register_state_dict_pre_hook(_refuse_state)
        self.experts.register_load_state_dict_pre_hook(_refuse_state)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """[..., D] -> [..., O]; the shared expert runs while rows are under way."""
        self._check(x)
        x_TD = x.reshape(-1, self.d_model)
        shared: list[Tensor | None] = []
        self.experts.meanwhile = lambda: shared.append(self._run_shared(x_TD))
        try:
            routing, out_RO = self._rows(x, context)
        finally:
            self.experts.meanwhile = None
        y_TO = self._add_shared(x_TD, routing.assignment.combine(out_RO), shared[0])
        return y_TO.reshape(*x.shape[:-1], *y_TO.shape[1:])

    def _rows(self, x: Tensor, context: Any) -> tuple[Routing, Tensor]:
        ids = tuple(self.experts)
        if ids != self._checked:
            refuse_parallel_wrappers(self)
            self._checked = ids
        return super()._rows(x, context)

    def _of_all(self, routing: Routing) -> Routing:
        assert self.experts.tally is not None
        count_E, _ = self.recorder._counts(routing.assignment)
        tokens = self.experts.tally.tokens
        return replace(
            routing, assignment=replace(routing.assignment, counts_E=count_E, num_tokens=tokens)
        )

    def _seen_by(self, loss: Callable[[Routing], Tensor], routing: Routing) -> Routing:
        return self._of_all(routing) if loss in (balance_loss, gshard_loss) else routing

    @contextmanager
    def gathered(
        self, ids: Sequence[int] | None = (), optimizers: Sequence[Optimizer] = ()
    ) -> Iterator[None]:
        bank = self.experts
        bank.bring(list(bank) if ids is None else sorted(ids), optimizers)
        try:
            with bank.asking():
                yield
        finally:
            if ids is None or ids:
                bank.settle(optimizers)
        bank.workers.agree(
            [len(self.lineage), self.next_id, list(bank), self.generator.get_state().sum().item()],
            f"states of layer {self.name!r}",
        )


def _refuse_state(bank: ShardedBank, *_: Any) -> None:
    if not bank.__dict__.get("_open", False):
        raise RuntimeError(
            "the experts live on several workers: use growmoe.distributed.save and load"
        )
