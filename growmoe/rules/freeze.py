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
        z: the same in standard errors (`Signals.loss_z`): a slow but steady fall is no standstill.
        min_losses: losses an expert must have seen; at least a few hundred, since the slow mean
            looks back about 200.
    """

    slope: float = 0.02
    z: float = 1.0
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
            if slope < self.slope and abs(signals.loss_z(id)) < self.z:
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


@dataclass(frozen=True)
class FreezeSettled:
    """An expert that sums up its inputs has seen enough of them.

    The moments of n rows in D dimensions, and what is solved from them, have a relative sampling
    error of about D/n in mean square; more rows cost work and hardly change them.

    Args:
        rows_per_feature: n/D at which an expert is settled.
        novelty: not while its inputs lie further than this from what it knows, in standard
            deviations of the usual distance (running mean); below what `ThawOnNovelty` thaws at.
    """

    rows_per_feature: float = 6.0
    novelty: float = 0.5

    def __post_init__(self) -> None:
        positive(self, rows_per_feature=self.rows_per_feature)

    def propose(self, signals: Signals) -> list[Proposal]:
        proposals = []
        for id, frozen in zip(signals.ids, signals.frozen, strict=True):
            ratio = signals.of(id)["rows"] / signals.d_model
            moving = signals.of(id)["novelty"] > self.novelty
            if not frozen and not moving and ratio >= self.rows_per_feature:
                reason = f"settled: {ratio:.1f} >= {self.rows_per_feature} rows per feature"
                proposals.append(Proposal("freeze", (id,), reason, {"rows_per_feature": ratio}))
        return proposals


@dataclass(frozen=True)
class ThawOnNovelty:
    """A frozen expert's inputs have moved away from what it knows.

    Args:
        z: running mean of its inputs' distance, in standard deviations of the usual distance.
        recent: training forwards within which it must have received some: an old signal is none.
    """

    z: float = 1.0
    recent: int = 8

    def __post_init__(self) -> None:
        positive(self, z=self.z)

    def propose(self, signals: Signals) -> list[Proposal]:
        proposals = []
        for id, frozen in zip(signals.ids, signals.frozen, strict=True):
            z = signals.of(id)["novelty"]
            if frozen and z > self.z and signals.of(id)["idle"] < self.recent:
                reason = f"its inputs have moved: z {z:.2f} > {self.z:.2f}"
                proposals.append(Proposal("thaw", (id,), reason, {"novelty": z}))
        return proposals
