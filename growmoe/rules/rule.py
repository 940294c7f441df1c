"""What a rule is: signals in, proposals out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from growmoe.signals import Signals


@dataclass(frozen=True)
class Proposal:
    """What a rule would do to one layer, and why.

    Attributes:
        act: "spawn", "merge", "prune", "freeze" or "thaw".
        ids: the experts concerned; for a spawn the parent, or none for a fresh expert.
        reason: why, with its numbers, for a person.
        signals: the values behind it.
        toward: float [D], for a spawn: the mean of the inputs the newborn is for.
    """

    act: Literal["spawn", "merge", "prune", "freeze", "thaw"]
    ids: tuple[int, ...]
    reason: str
    signals: dict[str, float] = field(default_factory=dict)
    toward: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ids, tuple):
            raise ValueError(f"Proposal: ids must be a tuple, got {self.ids!r}")
        fewest, most = {
            "spawn": (0, 1),
            "merge": (2, None),
            "prune": (1, None),
            "freeze": (1, None),
            "thaw": (1, None),
        }.get(self.act, (None, None))
        if fewest is None:
            raise ValueError(f"Proposal: unknown act {self.act!r}")
        if len(self.ids) < fewest or (most is not None and len(self.ids) > most):
            raise ValueError(f"Proposal: {self.act} does not go with ids {self.ids}")


class Rule(Protocol):
    """A small object without state that reads signals. It never touches the model."""

    def propose(self, signals: Signals) -> list[Proposal]:
        """Proposals for one layer, the most urgent first."""
        ...


def positive(rule: object, **values: float) -> None:
    """Raise ValueError for any value that is not a positive number."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{type(rule).__name__}: {name} must be positive, got {value!r}")
