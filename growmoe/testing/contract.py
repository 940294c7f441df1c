"""How a contract is checked, and what it says where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class BrokenContract(AssertionError):
    """A contract that does not hold; the message names it and says where."""


def holds(condition: object, message: str) -> None:
    """Raise `BrokenContract` unless the condition is true; not lost under `python -O`."""
    if not condition:
        raise BrokenContract(message)


def untouched(differences: Iterable[str], whose: str) -> None:
    """Raise unless there are no differences (of `growmoe.testing.snapshots.differences`)."""
    found = list(differences)
    holds(not found, f"{whose} changed: {', '.join(found[:4])}{' …' if len(found) > 4 else ''}")


def close(got: Tensor, want: Tensor, what: str, relative: float = 1e-4) -> None:
    """Raise unless two tensors differ by at most so much of the larger one's norm."""
    holds(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, want = got.detach().double(), want.detach().double()
    difference = float((got - want).norm())
    scale = max(float(want.norm()), 1e-3)
    holds(
        difference <= relative * scale,
        f"{what}: off by {difference / scale:.1e} of its norm, {relative:.0e} is rounding",
    )


def refused(act: Callable[[], Any], message: str) -> str:
    """Raise unless `act` raises ValueError; gives its message."""
    try:
        act()
    except ValueError as error:
        return str(error)
    raise BrokenContract(message)


def run_all(subject: Any, contracts: Iterable[Callable[[Any], None]], name: str) -> None:
    """Run all contracts on the subject; one error for all that do not hold.

    Raises:
        AssertionError: at least one does not hold, each on a line of its own.
    """
    broken: list[str] = []
    first: BaseException | None = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for contract in contracts:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                try:
                    contract(subject)
                except Exception as error:
                    first = first or error
                    said = str(error) if isinstance(error, BrokenContract) else repr(error)
                    broken.append(f"- {contract.__name__.replace('_', ' ')}: {said}")
    finally:
        torch.set_num_threads(threads)
    if broken:
        raise BrokenContract(f"{name} breaks the contract:\n" + "\n".join(broken)) from first
