"""Keeps an optimizer in step with the experts: newborns join, the dead leave, the idle stay put.

Parameters are followed by identity. What each state entry means is stated once, in `STATE_ENTRIES`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
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
    optimizers = [_unwrapped(o) for o in optimizers]
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(o).__name__}")
        if isinstance(o, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS keeps one history for all parameters together and cannot follow experts "
                "that are born and die; use an elementwise optimizer"
            )
        entries = _entries(o)
        if entries is None:
            raise ValueError(
                f"{type(o).__name__}: the meaning of its state entries is not known; add them to "
                "growmoe.optim.STATE_ENTRIES"
            )
        for state in o.state.values():
            unknown = set(state) - set(entries)
            if unknown:
                raise ValueError(
                    f"{type(o).__name__}: the meaning of state entries {sorted(unknown)} is not "
                    "known; add them to growmoe.optim.STATE_ENTRIES"
                )
    return optimizers


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper such as Accelerate's or Lightning's."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and inner.param_groups is getattr(
        optimizer, "param_groups", None
    ):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


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

    Those that an optimizer already holds are left as they are.

    Args:
        parent: whose groups and moments it inherits; None for a fresh one, which takes the median
            step and the mean second moment of its siblings.
        siblings: the layer's other experts.
    """
    relatives = [*([] if parent is None else [parent]), *siblings]
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in newborn.learned().items():
        if id(p) in held:
            continue  # a thawed expert may be known already
        for place in _places(optimizers, name, p, relatives):
            optimizer, group, index, relative, relative_name = place
            for key, value in _parallel_lists(optimizer, group):
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


Place = tuple[Optimizer, dict[str, Any], int, Expert, str]


def _places(
    optimizers: Sequence[Optimizer], name: str, p: nn.Parameter, relatives: Sequence[Expert]
) -> list[Place]:
    """In each optimizer, the group in which a relative's parameter of that name lies.

    A parameter that no relative has, of a newborn of another kind, goes where the relatives keep
    what is most like it.
    """
    where = {
        (id(o), id(q)): (o, group, i)
        for o in optimizers
        for group in o.param_groups
        for i, q in enumerate(group["params"])
    }

    def first(o: Optimizer, like: Callable[[str, nn.Parameter], bool]) -> list[Place]:
        for relative in relatives:
            for other, q in relative.learned().items():
                if like(other, q) and (id(o), id(q)) in where:
                    return [(*where[id(o), id(q)], relative, other)]
        return []

    if any(name in relative.learned() for relative in relatives):
        return [place for o in optimizers for place in first(o, lambda other, _: other == name)]
    room = _room(name)
    for like in (
        lambda other, q: _room(other) == room and q.dim() == p.dim(),
        lambda other, q: _room(other) == room,
        lambda other, q: q.dim() == p.dim(),
    ):
        for o in optimizers:
            if isinstance(o, torch.optim.Muon) and p.dim() != 2:
                continue  # it takes matrices alone
            if place := first(o, like):
                return place
    return []


def _room(name: str) -> str:
    return name.split(".")[0]


def _parallel_lists(optimizer: Optimizer, group: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """The lists of a group that run along with its params, such as param_names."""
    return [
        (key, value)
        for key, value in group.items()
        if key != "params"
        and key not in optimizer.defaults  # betas may be a list as well
        and isinstance(value, list)
        and len(value) == len(group["params"])
    ]


Source = tuple[nn.Parameter, dict[str, Any]]


@torch.no_grad()
def _inherit(
    optimizer: Optimizer,
    name: str,
    p: nn.Parameter,
    parent: Expert | None,
    siblings: Sequence[Expert],
) -> dict[str, Any]:
    sources: list[Source] = []
    if parent is not None:
        sources = _sources(optimizer, name, [parent])  # one with a history speaks alone
    sources = _contemporaries(sources or _sources(optimizer, name, siblings))
    if not sources:
        return {}
    meanings = _entries(optimizer) or {}
    state: dict[str, Any] = {}
    for key, example in sources[0][1].items():
        known = [(q, s) for q, s in sources if s.get(key) is not None]
        if not known:
            state[key] = example
        elif meanings[key] == "clock":
            clock = known[0][1][key]
            state[key] = clock.clone() if isinstance(clock, Tensor) else clock
        elif meanings[key] == "first":
            state[key] = _zeros(example, p)
        elif meanings[key] == "weight":
            state[key] = p.detach().clone()
        else:
            mean = _mean(key, known, p)
            if mean is None:
                return {}
            state[key] = mean
    return state


def _sources(optimizer: Optimizer, name: str, relatives: Sequence[Expert]) -> list[Source]:
    """What the optimizer keeps about the relatives' parameters of that name, else of that room."""
    same_name = any(name in relative.learned() for relative in relatives)
    return [
        (q, optimizer.state[q])
        for relative in relatives
        for other, q in relative.learned().items()
        if (other == name if same_name else _room(other) == _room(name)) and optimizer.state.get(q)
    ]


def _contemporaries(sources: list[Source]) -> list[Source]:
    """The source of median step, then those within a factor of two of it.

    A second moment fits only the clock it grew up with, so older and younger ones have no say.
    """
    if not all("step" in state for _, state in sources):
        return sources
    aged = sorted(sources, key=lambda source: float(source[1]["step"]))
    middle = aged[(len(aged) - 1) // 2 :][:1]
    return middle + [
        source
        for source in aged
        if source[1] is not middle[0][1]
        and 0.5 <= float(source[1]["step"]) / max(float(middle[0][1]["step"]), 1e-9) <= 2
    ]


def _zeros(example: Tensor, p: Tensor) -> Tensor:
    shape = p.shape if example.dim() else ()
    return torch.zeros(shape, dtype=example.dtype, device=example.device)


def _mean(key: str, sources: Sequence[Source], p: Tensor) -> Tensor | None:
    """The mean of the tensors of the newborn's shape, else of all values; None if none fits."""
    fitting = [state[key] for q, state in sources if q.shape == p.shape]
    if fitting:
        return torch.stack([v.double() for v in fitting]).mean(0).to(fitting[0].dtype)
    q, example = sources[0][0], sources[0][1][key]
    if example.shape == q.shape:
        shape = tuple(p.shape)
    elif q.dim() == p.dim():  # row or column means of a matrix (Adafactor)
        dims = zip(example.shape, q.shape, p.shape, strict=True)
        shape = tuple(new if here == old else here for here, old, new in dims)
    else:
        return None
    mean = torch.stack([state[key].double().mean() for _, state in sources]).mean()
    return mean.to(example.dtype).expand(shape).contiguous()


def dismiss(optimizers: Sequence[Optimizer], dead: Iterable[nn.Parameter]) -> None:
    """Drop dead parameters with all that the optimizers keep about them."""
    gone = {id(p) for p in dead}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            keep = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            for _, value in _parallel_lists(optimizer, group):
                value[:] = [value[i] for i in keep]
            group["params"][:] = [group["params"][i] for i in keep]
        for p in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[p]


def guard(optimizer: Optimizer, model: nn.Module) -> _Handle:
    """Before each step, restore None where an idle expert's gradient became zeros.

    `zero_grad(set_to_none=False)` and DistributedDataParallel leave zeros, with which momentum and
    weight decay would move an expert that received no input. `Organizer` does this by itself; call
    it in a loop without one. A gradient that came from elsewhere, such as a penalty on the weights,
    is not zero and stays. Not covered: a step that a `GradScaler` skipped, followed by
    `zero_grad(set_to_none=False)`: then an expert hit in the skipped step may move in the next.

    It also makes a step between a forward and its backward raise where the optimizer is fused.

    Returns:
        A handle; its `remove()` ends it.
    """
    layers = [weakref.ref(layer) for layer in moe_layers(model).values()]
    seen: weakref.WeakKeyDictionary[Expert, int] = weakref.WeakKeyDictionary()

    def before_step(*_: Any) -> None:
        for reference in layers:
            layer = reference()
            if layer is not None:
                _restore_none(layer, seen)

    def after_step(*_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                # fused kernels do not count their writes, which a backward must be able to notice
                increment_version([p for p in group["params"] if p.grad is not None])

    pre, post = (
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(after_step),
    )
    return _Handle(pre, post)


class _Handle:
    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _restore_none(layer: MoE, seen: MutableMapping[Expert, int]) -> None:
    idle: list[nn.Parameter] = []
    for expert in layer.experts.values():
        if expert.frozen:
            for p in expert.parameters():
                p.grad = None
        if expert.touches == seen.get(expert, 0):
            idle.extend(p for p in expert.body.parameters() if p.grad is not None)
        seen[expert] = expert.touches
    if not idle:
        return
    # rare, so it may wait for the device
    nonzero = torch.stack([(p.grad != 0).any() for p in idle]).tolist()  # type: ignore[union-attr]
    for p, moved in zip(idle, nonzero, strict=True):
        if not moved:
            p.grad = None
