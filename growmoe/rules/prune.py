"""When an expert should go."""

from __future__ import annotations

from dataclasses import dataclass

from growmoe.rules.rule import Proposal, positive
from growmoe.signals import Signals


@dataclass(frozen=True)
class PruneIdle:
    """An expert has received nothing for long. Consent keeps it if its inputs still need it.

    Args:
        steps: training forwards without a row after which to prune.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        positive(self, steps=self.steps)

    def propose(self, signals: Signals) -> list[Proposal]:
        idle = sorted(zip(signals.values["idle"], signals.ids, strict=True), reverse=True)
        return [
            Proposal("prune", (id,), f"idle for {i:.0f} >= {self.steps} steps", {"idle": i})
            for i, id in idle
            if i >= self.steps
        ]


@dataclass(frozen=True)
class PruneUseless:
    """Without the expert, the layer's output on the expert's own inputs hardly changes.

    Args:
        change: relative change of the output below which to prune.
        min_age: training forwards before an expert is judged.
    """

    change: float = 0.02
    min_age: int = 200

    def __post_init__(self) -> None:
        positive(self, change=self.change)

    def propose(self, signals: Signals) -> list[Proposal]:
        old = {id for id in signals.ids if signals.of(id)["age"] >= self.min_age}
        if not old:
            return []
        return [
            Proposal(
                "prune",
                (id,),
                f"its absence changes the output by {c:.2%} < {self.change:.2%}",
                {"usefulness": c},
            )
            for id, c in sorted(signals.usefulness().items(), key=lambda item: item[1])
            if id in old and c < self.change
        ]
