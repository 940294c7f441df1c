"""What kind of forward this is, as far as torch tells only in private."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, without importing the compiler, half of torch's time to import.

    While it is not imported, nothing compiles.
    """
    disabled: Callable[P, T] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None and "torch._dynamo.eval_frame" in sys.modules:
            disabled = torch.compiler.disable(function)
        return (disabled or function)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # not traced into
    return call


def recomputing() -> bool:
    """Whether a backward is running: activation checkpointing repeats forwards in it."""
    return torch._C._current_graph_task_id() != -1


def transforming() -> bool:
    """Whether a functorch transform is at work, under which records cannot be written."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; under a functorch transform nobody can tell."""
    # a sum is not finite if any value is not: one pass without a temporary, then make sure
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return bool(x.detach().sum().isfinite()) or bool(x.detach().isfinite().all())
