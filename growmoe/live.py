"""Who else holds a layer's parameters: optimizers and parallel wrappers alive in this process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def refuse_unseen_optimizers(layer: nn.Module, seen: Sequence[Optimizer]) -> None:
    """Refuse to change a layer's structure behind the back of an optimizer that trains it.

    Newborns would not train, and the dead would keep their state.

    Raises:
        ValueError: an optimizer that is alive holds parameters of the layer and is not in `seen`.
    """
    mine = {id(p) for p in layer.parameters()}

    def unseen() -> list[Optimizer]:
        return [
            o
            for o in _alive(Optimizer)
            if not any(_same(o, s) for s in seen)
            and any(id(p) in mine for g in getattr(o, "param_groups", ()) for p in g["params"])
        ]

    if not mine or not unseen():
        return
    gc.collect()  # one that is only waiting to be collected does not count
    for optimizer in unseen():
        raise ValueError(
            f"an optimizer ({type(optimizer).__name__}) trains this layer: pass it as optimizer=, "
            "so that it learns of the change (growmoe.load takes one, load_state_dict cannot)"
        )


def _same(optimizer: Optimizer, other: Optimizer) -> bool:
    # Accelerate and Lightning wrap an optimizer in one that hands out its parameter groups
    mine = getattr(optimizer, "param_groups", None)
    return optimizer is other or (mine is not None and mine is other.param_groups)


def refuse_parallel_wrappers(layer: nn.Module) -> None:
    """Refuse to change structure where a wrapper has its own list of the parameters.

    Raises:
        ValueError: the layer lies in DistributedDataParallel or FSDP.
    """
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return  # neither wrapper works without a process group
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrappers = [
        *_alive(DistributedDataParallel),
        *_alive(FullyShardedDataParallel),
        *_alive(FSDPModule),
    ]
    sharded = any(isinstance(p, DTensor) for p in layer.parameters())
    if sharded or any(m is layer for w in wrappers for m in w.modules()):
        raise ValueError(
            "the layer is wrapped in DistributedDataParallel or FSDP, which keeps its own list of "
            "the parameters and would not learn of the change; change the structure before wrapping"
        )


def _alive(cls: type) -> list[Any]:
    """All instances of a class that the garbage collector knows."""
    classes: set[type] = set()
    todo = [cls]
    while todo:
        c = todo.pop()
        if c not in classes:
            classes.add(c)
            todo.extend(c.__subclasses__())
    # not isinstance, which is many times slower over a million objects
    return [o for o in gc.get_objects() if type(o) in classes]
