"""When an expert should stand still, and when it should learn again."""

from __future__ import annotations

from dataclasses import dataclass

from growmoe.rules.rule import Proposal, positive
from growmoe.signals import Signals


@dataclass(frozen=True)
class FreezeConverged:
    """The loss of an expert's inputs has stopped moving.

    Args:
        slope: relative difference of the fast and slow running losses below which it stands still.
        min_losses: losses an expert must have seen; at least a few hundred, since the slow mean
            looks back about 200.
    """

    slope: float = 0.02
    min_losses: int = 500

    def __post_init__(self) -> None:
        positive(self, slope=self.slope, min_losses=self.min_losses)

    def propose(self, signals: Signals) -> list[Proposal]:
        proposals = []
        for id, frozen in zip(signals.ids, signals.frozen, strict=True):
            v = signals.of(id)
            if frozen or v["loss_count"] < self.min_losses:
                continue
            slope = abs(v["loss_fast"] - v["loss_slow"]) / max(abs(v["loss_slow"]), 1e-12)
            if slope < self.slope:
                reason = f"loss moves by {slope:.2%} < {self.slope:.2%}"
                proposals.append(Proposal("freeze", (id,), reason, {"slope": slope}))
        return proposals


@dataclass(frozen=True)
class ThawOnDrift:
    """The loss of a frozen expert's inputs rises significantly.

    Args:
        z: standard errors by which the fast loss must exceed the slow one (`Signals.loss_z`).
    """

    z: float = 5.0

    def __post_init__(self) -> None:
        positive(self, z=self.z)

    def propose(self, signals: Signals) -> list[Proposal]:
        proposals = []
        for id, frozen in zip(signals.ids, signals.frozen, strict=True):
            z = signals.loss_z(id)
            if frozen and z > self.z:
                reason = f"loss rose: z {z:.1f} > {self.z:.1f}"
                proposals.append(Proposal("thaw", (id,), reason, {"loss_z": z}))
        return proposals
