"""Shares a model's experts out among workers, and keeps what is not shared out the same."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from growmoe.distributed.bank import Holders
from growmoe.distributed.carried import has_own_tensors, size_of
from growmoe.distributed.gradients import average_copies, average_replicated
from growmoe.distributed.layer import ParallelMoE
from growmoe.distributed.placement import Placement, evenly, imbalance, place
from growmoe.distributed.workers import Workers
from growmoe.live import refuse_parallel_wrappers
from growmoe.moe import MoE, moe_layers
from growmoe.optim import as_optimizers
from growmoe.routers.closed_form import ClosedFormGate


def expert_parallel(
    model: nn.Module,
    group: Any = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    replicas: int = 1,
    placement: Mapping[str, Mapping[int, Sequence[int] | int]] | None = None,
) -> Parallel:
    """Share every bank's experts out among the workers of a process group.

    Each worker then trains on its own part of the batch. Rows travel to the worker that holds
    their expert and back; all else in the model, routing keys included, is replicated, and its
    gradients are averaged at the end of each backward. So if each worker's loss is the mean over
    its tokens, and all have equally many, training equals that of one process with all of them.
    Every worker must do the same things in the same order: forwards, backwards, steps of the
    organizer, surgery.

    Args:
        model: the same on each worker; its values are taken from the first.
        group: of `torch.distributed`; the default group if left out. A `DeviceMesh` of two axes
            gives replicas by experts: each row of the mesh holds every expert once, tokens travel
            within a row, and the gradients of an expert are averaged over its column.
        optimizer: one or several; moments move with the experts. Pass each that holds experts.
        replicas: into how many such rows to divide a plain group.
        placement: {layer: {id: rank or ranks}}; several ranks replicate an expert. Experts left out
            are spread by number, in order of id. With replicas, ranks are those within a row, here
            as in `place`, `pin` and `rebalance`.

    Returns:
        A handle to balance, clip, save and load with.

    Raises:
        ValueError: no MoE layer, a layer that cannot be shared out (offloaded, wrapped in
            DistributedDataParallel or FSDP, a router that reads its experts' weights), a
            placement of unknown experts or ranks, or workers that do not divide into replicas.
        RuntimeError: no process group, or the workers' models or versions differ.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "expert_parallel: call torch.distributed.init_process_group first (Ray Train, "
            "torchrun and others do it for you)"
        )
    optimizers = as_optimizers(optimizer)
    workers = Workers(group, replicas)
    problem = _problem(model)
    for rank, other in enumerate(workers.objects(problem)):
        if other is not None:  # on all workers, or the others would wait
            raise ValueError(f"expert_parallel: worker {rank}: {other}")
    _same_everywhere(model, workers)
    layers = moe_layers(model)
    chosen: dict[str, Holders] = {}
    for name, layer in layers.items():
        given = dict((placement or {}).get(name, {}))
        chosen[name] = {
            id: _ranks(given.pop(id, rank), id, workers)
            for id, rank in evenly(list(layer.experts), workers.width).items()
        }
        if given:
            raise ValueError(f"placement: layer {name!r} has no experts {sorted(given)}")
    if placement and set(placement) - set(layers):
        raise ValueError(
            f"placement: the model has no layers {sorted(set(placement) - set(layers))}"
        )
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            distributed.broadcast(t, group=workers.group, group_src=0)
    for name, layer in layers.items():
        layer.set_extra_state(workers.told(layer.get_extra_state(), 0))
        layer.__class__ = ParallelMoE
        cast(ParallelMoE, layer).enter(workers, chosen[name])
        cast(ParallelMoE, layer).experts.settle(optimizers)
    return Parallel(model, workers, optimizers)


class Parallel:
    """A model whose experts are shared out.

    Attributes:
        workers: the group, and the bytes sent.
        layers: by name.
    """

    def __init__(self, model: nn.Module, workers: Workers, optimizers: list[Optimizer]) -> None:
        self.model, self.workers, self.optimizers = model, workers, optimizers
        self.layers = cast("dict[str, ParallelMoE]", moe_layers(model))
        self.pinned: dict[str, dict[int, tuple[int, ...]]] = {}
        self._uneven: dict[str, int] = {}
        workers.after_backward = self._average

    def holders(self) -> dict[str, Holders]:
        """{layer: {id: ranks}}."""
        return {
            name: {id: layer.experts.holders[id] for id in layer.experts}
            for name, layer in self.layers.items()
        }

    def loads(self) -> dict[str, dict[int, float]]:
        """{layer: {id: running share of the layer's rows}}."""
        return {
            name: {id: e.statistics["load"] for id, e in layer.experts.items()}
            for name, layer in self.layers.items()
        }

    def imbalance(self) -> dict[str, float]:
        """{layer: load of the busiest worker over the mean}, by the running loads."""
        held, loads = self.holders(), self.loads()
        return {n: imbalance(held[n], loads[n], self.workers.size) for n in self.layers}

    # Gradients.

    def replicated(self) -> Iterator[nn.Parameter]:
        """The parameters that every worker has: all but those of the experts' bodies."""
        bodies = {
            id(p)
            for layer in self.layers.values()
            for e in layer.experts.values()
            for p in e.body.parameters()
        }
        return (p for p in self.model.parameters() if id(p) not in bodies)

    def _average(self) -> None:
        self.workers.queued = False
        average_replicated([p for p in self.replicated() if p.requires_grad], self.workers)
        average_copies([layer.experts for layer in self.layers.values()], self.workers)

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients, every expert counted once: a float64 scalar."""
        own = [
            p
            for layer in self.layers.values()
            for id, e in layer.experts.items()
            if layer.experts.holders[id][0] == self.workers.rank
            for p in e.body.parameters()
        ]
        everyone = list(self.replicated())
        device = everyone[0].device if everyone else torch.device("cpu")

        def squares(parameters: Sequence[nn.Parameter]) -> Tensor:
            return sum(
                (p.grad.double().square().sum() for p in parameters if p.grad is not None),
                torch.zeros((), dtype=torch.float64, device=device),
            )

        return (squares(everyone) + self.workers.total(squares(own))).sqrt()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, over all workers' experts; returns the norm."""
        norm = self.gradient_norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_(scale.to(p.grad))
        return norm

    @torch.no_grad()
    def share_overflow(self) -> bool:
        """After backward with a `GradScaler`: what overflowed anywhere overflows everywhere.

        Else one worker would skip the step and the others not. Returns whether any did.
        """
        norm = self.gradient_norm()
        if bool(norm.isfinite()):
            return False
        for p in self.replicated():
            if p.grad is not None:
                p.grad.fill_(torch.inf)
                break
        return True

    @contextmanager
    def states_open(self) -> Iterator[None]:
        """Inside, `state_dict` and `load_state_dict` speak of what is here, and NaN elsewhere."""
        banks = [layer.experts for layer in self.layers.values()]
        for bank in banks:
            bank.__dict__["_open"] = True
        try:
            yield
        finally:
            for bank in banks:
                bank.__dict__["_open"] = False

    @contextmanager
    def without_bodies(self) -> Iterator[None]:
        """Inside, the model's `state_dict` is of what is replicated alone."""
        bodies = [e.body for layer in self.layers.values() for e in layer.experts.values()]
        with self.states_open():
            for body in bodies:
                body.__dict__["state_dict"] = lambda *_, **__: None
            try:
                yield
            finally:
                for body in bodies:
                    del body.__dict__["state_dict"]

    # Placement.

    def pin(self, layer: str, id: int, ranks: int | Sequence[int]) -> None:
        """Have an expert stay on these workers; the next `rebalance` brings it there."""
        if id not in self.layers[layer].experts:
            raise ValueError(f"pin: layer {layer!r} has no expert {id}")
        self.pinned.setdefault(layer, {})[id] = _ranks(ranks, id, self.workers)

    def place(self, holders: Mapping[str, Mapping[int, Sequence[int]]]) -> int:
        """Move experts, with moments and pending gradients; returns the bytes of weights moved."""
        moved = 0
        for name, wanted in holders.items():
            bank = self.layers[name].experts
            whole = {
                id: _ranks(wanted[id], id, self.workers) if id in wanted else bank.holders[id]
                for id in bank
            }
            moved += bank.move(whole, self.optimizers)
        return moved

    def rebalance(self, tolerance: float = 1.1, replicas: int = 0) -> dict[str, Placement]:
        """Even out the workers' loads, moving as little as needed.

        Args:
            tolerance: load of the busiest worker over the mean to be content with.
            replicas: how many further copies of hot experts a layer may have.

        Returns:
            What was done with each layer.
        """
        loads, plans, workers = self.loads(), {}, self.workers
        for name, layer in self.layers.items():
            sizes = {id: size_of(e) for id, e in layer.experts.items()}
            pinned = {
                id: workers.seats(ranks)
                for id, ranks in self.pinned.get(name, {}).items()
                if id in layer.experts
            }
            # the replicas of a mesh are alike: planned is one of them
            held = {id: workers.seats(layer.experts.holders[id]) for id in layer.experts}
            plans[name] = place(
                loads[name], held, workers.width, sizes,
                pinned=pinned, tolerance=tolerance, replicas=replicas,
            )  # fmt: skip
            holders = {id: workers.everywhere(r) for id, r in plans[name].holders.items()}
            layer.experts.move(holders, self.optimizers)
        return plans

    def step(
        self, *, tolerance: float = 1.3, patience: int = 3, **options: Any
    ) -> dict[str, Placement]:
        """Call every so many steps: rebalance if a layer was uneven `patience` times in a row."""
        for name, ratio in self.imbalance().items():
            self._uneven[name] = self._uneven.get(name, 0) + 1 if ratio > tolerance else 0
        if max(self._uneven.values(), default=0) < patience:
            return {}
        self._uneven.clear()
        return self.rebalance(**options)


def _ranks(value: int | Sequence[int], id: int, workers: Workers) -> tuple[int, ...]:
    """Where an expert is held, if a replica has it on these of its ranks."""
    ranks, width = (value,) if isinstance(value, int) else tuple(value), workers.width
    if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= r < width for r in ranks):
        raise ValueError(f"placement: expert {id} on {value!r}, but there are ranks 0..{width - 1}")
    return workers.everywhere(ranks)


def _problem(model: nn.Module) -> str | None:
    """Why the model cannot be shared out."""
    layers = moe_layers(model)
    if not layers:
        return f"{type(model).__name__} has no MoE layer"
    for name, layer in layers.items():
        if type(layer) is not MoE:
            return (
                f"layer {name!r} is a {type(layer).__name__}, shared out already or of another kind"
            )
        if type(layer.experts).__name__ != "ExpertBank":
            return f"the experts of layer {name!r} are offloaded: restore() them first"
        if isinstance(layer.router, ClosedFormGate):
            return f"the router of layer {name!r} decides by its experts' weights"
        try:
            refuse_parallel_wrappers(layer)
        except ValueError as error:
            return str(error)
        for expert in layer.experts.values():
            if any(isinstance(m, MoE) for m in expert.body.modules()):
                return f"expert {expert.id} of layer {name!r} holds a mixture of its own"
            if why := has_own_tensors(expert):
                return f"expert {expert.id} of layer {name!r}: {why}"
    owners = [p for e in _experts(layers) for p in e.body.parameters()]
    if len({id(p) for p in owners}) < len(owners):
        return "experts share parameters (tied)"
    return None


def _experts(layers: Mapping[str, MoE]) -> Iterator[Any]:
    return (e for layer in layers.values() for e in layer.experts.values())


def _same_everywhere(model: nn.Module, workers: Workers) -> None:
    own = sys.modules["growmoe"].__version__  # the package itself lies above this room
    versions = {"growmoe": own, "torch": torch.__version__.split("+")[0]}
    workers.agree({**versions, "python": platform.python_version()[:4]}, "versions")
    tensors = (*model.named_parameters(), *model.named_buffers())
    workers.agree([(n, str(t.dtype), tuple(t.shape)) for n, t in tensors], "models")
    experts = {
        name: (layer.next_id, layer.steps, [e.get_extra_state() for e in layer.experts.values()])
        for name, layer in moe_layers(model).items()
    }
    workers.agree(experts, "experts")
