"""Keeps an optimizer in step with the experts: newborns join, the dead leave, the idle stay put.

Parameters are followed by identity. What each state entry means is stated once, in `STATE_ENTRIES`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from growmoe.experts.expert import Expert
from growmoe.moe import MoE, moe_layers

Meaning = Literal["clock", "first", "second", "weight"]

# clock:  a count of steps or what grows with it. A newborn takes its parent's or the siblings'
#         median, so that bias corrections and schedules agree with the second moments.
# first:  a mean of gradients or of updates. A newborn starts at zero: they were not its own.
# second: a scale of gradients or of updates. A newborn inherits it: with a clock and no scale its
#         first steps would be many times too large, with a scale and no clock too small.
# weight: a mean of the weights themselves. A newborn starts at its own.
# Entries that are None or absent stay so.
STATE_ENTRIES: dict[str, dict[str, Meaning]] = {
    "SGD": {"momentum_buffer": "first"},
    "Adam": {
        "step": "clock",
        "exp_avg": "first",
        "exp_avg_sq": "second",
        "max_exp_avg_sq": "second",
    },
    "NAdam": {"step": "clock", "mu_product": "clock", "exp_avg": "first", "exp_avg_sq": "second"},
    "RAdam": {"step": "clock", "exp_avg": "first", "exp_avg_sq": "second"},
    "Adamax": {"step": "clock", "exp_avg": "first", "exp_inf": "second"},
    "Adadelta": {"step": "clock", "square_avg": "second", "acc_delta": "second"},
    "Adagrad": {"step": "clock", "sum": "second"},
    "RMSprop": {
        "step": "clock",
        "square_avg": "second",
        "momentum_buffer": "first",
        "grad_avg": "first",
    },
    "Rprop": {"step": "clock", "prev": "first", "step_size": "second"},
    "ASGD": {"step": "clock", "eta": "clock", "mu": "clock", "ax": "weight"},
    "Adafactor": {"step": "clock", "row_var": "second", "col_var": "second", "variance": "second"},
    "Muon": {"momentum_buffer": "first"},
}


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One, several or no optimizers as a list, each of a kind that can be followed.

    Raises:
        ValueError: something else, or an optimizer whose state mixes parameters (LBFGS) or whose
            entries are not in `STATE_ENTRIES`.
    """
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(o).__name__}")
        if isinstance(o, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS keeps one history for all parameters together and cannot follow experts "
                "that are born and die; use an elementwise optimizer"
            )
        entries = _entries(o)
        for state in o.state.values():
            unknown = set(state) - set(entries or ())
            if entries is None or unknown:
                raise ValueError(
                    f"{type(o).__name__}: the meaning of state entries {sorted(unknown)} is not "
                    "known; add them to growmoe.optim.STATE_ENTRIES"
                )
    return optimizers


def _entries(optimizer: Optimizer) -> dict[str, Meaning] | None:
    for cls in type(optimizer).__mro__:
        if cls.__name__ in STATE_ENTRIES:
            return STATE_ENTRIES[cls.__name__]
    return None


class Rollback:
    """The optimizers' groups and states as they were, to be put back if a surgery fails."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.saved = [
            (
                o,
                [{k: list(v) for k, v in g.items() if isinstance(v, list)} for g in o.param_groups],
                dict(o.state),
            )
            for o in optimizers
        ]

    def restore(self) -> None:
        for optimizer, groups, state in self.saved:
            for group, lists in zip(optimizer.param_groups, groups, strict=True):
                for key, value in lists.items():
                    group[key][:] = value
            optimizer.state.clear()
            optimizer.state.update(state)


def welcome(
    optimizers: Sequence[Optimizer],
    newborn: Expert,
    parent: Expert | None,
    siblings: Sequence[Expert],
) -> None:
    """Append a newborn's parameters to the groups of its parent, or of its siblings.

    Args:
        parent: whose groups and moments it inherits; None for a fresh one, which takes the median
            step and the mean second moment of its siblings.
        siblings: the layer's other experts.
    """
    for name, p in newborn.learned().items():
        models = [parent] if parent is not None else []
        relatives = [*models, *siblings]
        for optimizer in optimizers:
            place = _place(optimizer, name, relatives)
            if place is None:
                continue
            group, index, relative, relative_name = place
            # every list that runs along with params, such as param_names, grows with it
            for key, value in group.items():
                if (
                    key != "params"
                    and isinstance(value, list)
                    and len(value) == len(group["params"])
                ):
                    old = value[index]
                    if key == "param_names":
                        old = old.replace(
                            f"experts.{relative.id}.{relative_name}", f"experts.{newborn.id}.{name}"
                        )
                    value.append(old)
            group["params"].append(p)
            state = _inherit(optimizer, name, p, parent, siblings)
            if state:
                optimizer.state[p] = state


def _place(
    optimizer: Optimizer, name: str, relatives: Sequence[Expert]
) -> tuple[dict[str, Any], int, Expert, str] | None:
    """The group in which a relative's parameter of that name lies, else any of its kind."""
    where = {
        id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])
    }
    room = name.split(".")[0]
    for same_name in (True, False):
        for relative in relatives:
            for other, p in relative.learned().items():
                alike = other == name if same_name else other.split(".")[0] == room
                if alike and id(p) in where:
                    return *where[id(p)], relative, other
    return None


@torch.no_grad()
def _inherit(
    optimizer: Optimizer,
    name: str,
    p: nn.Parameter,
    parent: Expert | None,
    siblings: Sequence[Expert],
) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    for relatives in ([parent] if parent is not None else [], siblings):
        for relative in relatives:
            q = relative.learned().get(name)
            if q is not None and q in optimizer.state and optimizer.state[q]:
                sources.append(optimizer.state[q])
        if sources:
            break  # a parent with a history speaks alone
    if not sources:
        return {}
    meanings = _entries(optimizer) or {}
    state: dict[str, Any] = {}
    for key, example in sources[0].items():
        values = [s[key] for s in sources if s.get(key) is not None]
        if not values:
            state[key] = example
        elif meanings[key] == "clock":
            state[key] = _median(values)
        elif meanings[key] == "first":
            state[key] = _zeros(example, p)
        elif meanings[key] == "weight":
            state[key] = p.detach().clone()
        else:
            state[key] = _mean(values, p)
    return state


def _median(values: list[Any]) -> Any:
    middle = sorted(values, key=float)[(len(values) - 1) // 2]
    return middle.clone() if isinstance(middle, Tensor) else middle


def _zeros(example: Tensor, p: Tensor) -> Tensor:
    shape = p.shape if example.dim() else ()
    return torch.zeros(shape, dtype=example.dtype, device=example.device)


def _mean(values: list[Tensor], p: Tensor) -> Tensor:
    """The mean of the siblings' tensors of the newborn's shape, else of all their values."""
    same = [v for v in values if v.shape == values[0].shape]
    mean = torch.stack([v.double() for v in same]).mean(0)
    example = values[0]
    elementwise = example.dim() == p.dim()
    if elementwise and example.shape != p.shape and not _factored(example, p):
        mean = mean.mean().expand(p.shape)
    return mean.to(example.dtype).contiguous().clone()


def _factored(value: Tensor, p: Tensor) -> bool:
    """Whether `value` holds row or column means of a matrix of p's shape (Adafactor)."""
    return all(v in (1, s) for v, s in zip(value.shape, p.shape, strict=True))


def dismiss(optimizers: Sequence[Optimizer], dead: Iterable[Expert]) -> None:
    """Drop the parameters of dead experts with all that the optimizers keep about them."""
    gone = {id(p) for expert in dead for p in expert.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            keep = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            total = len(group["params"])
            for value in group.values():
                if isinstance(value, list) and len(value) == total:
                    value[:] = [value[i] for i in keep]
        for p in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[p]


def guard(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Before each step, restore None where an idle expert's gradient became zeros.

    `zero_grad(set_to_none=False)` and DistributedDataParallel leave zeros, with which momentum and
    weight decay would move an expert that received no input. `Organizer` does this by itself; call
    it in a loop without one. A gradient that came from elsewhere, such as a penalty on the weights,
    is not zero and stays. Not covered: a step that a `GradScaler` skipped, followed by
    `zero_grad(set_to_none=False)`: then an expert hit in the skipped step may move in the next.

    Returns:
        A handle; its `remove()` ends it.
    """
    layers = [weakref.ref(layer) for layer in moe_layers(model).values()]

    def before_step(*_: Any) -> None:
        for reference in layers:
            layer = reference()
            if layer is not None:
                _restore_none(layer)

    return optimizer.register_step_pre_hook(before_step)


def _restore_none(layer: MoE) -> None:
    idle: list[nn.Parameter] = []
    for expert in layer.experts.values():
        if not expert.touched:
            idle.extend(p for p in expert.body.parameters() if p.grad is not None)
        expert.touched = False
    if not idle:
        return
    # rare, so it may wait for the device
    nonzero = torch.stack([(p.grad != 0).any() for p in idle]).tolist()  # type: ignore[union-attr]
    for p, moved in zip(idle, nonzero, strict=True):
        if not moved:
            p.grad = None
