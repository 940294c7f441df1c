"""When an expert should be born."""

from __future__ import annotations

from dataclasses import dataclass

from growmoe.rules.rule import Proposal, positive
from growmoe.signals import Signals


@dataclass(frozen=True)
class SpawnOnNovelty:
    """Inputs arrive that no expert explains: spawn from the nearest one, its key turned to them.

    Args:
        share: running share (over about 8 forwards) of novel inputs above which to spawn; an
            input is novel if it lies more than 2 sd from every expert (see `growmoe.signals`).
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        positive(self, share=self.share)

    def propose(self, signals: Signals) -> list[Proposal]:
        if signals.novel_share <= self.share or signals.novel_mean is None:
            return []
        parents = () if signals.novel_nearest is None else (signals.novel_nearest,)
        return [
            Proposal(
                "spawn",
                parents,
                f"novel inputs {signals.novel_share:.0%} > {self.share:.0%}",
                {"novel_share": signals.novel_share, "novel_count": signals.novel_count},
                toward=signals.novel_mean,
            )
        ]


@dataclass(frozen=True)
class SplitOnNovelty:
    """What an expert receives has become novel to it and to all that might have taken it instead.

    Unlike `SpawnOnNovelty` it judges each expert by its own rows, for gates that route by what an
    expert knows (`ClosedFormGate`): a domain may be new to one label's experts alone.

    Args:
        share: running share (over about 8 forwards) of the expert's rows that are novel, above
            which to spawn from it.
        min_hits: forwards that hit the expert before it is judged.
    """

    share: float = 0.25
    min_hits: int = 30

    def __post_init__(self) -> None:
        positive(self, share=self.share)

    def propose(self, signals: Signals) -> list[Proposal]:
        novel = []
        for id in signals.ids:
            v = signals.of(id)
            if v["hits"] >= self.min_hits and v["novel"] > self.share:
                novel.append((v["novel"], id))
        return [
            Proposal(
                "spawn",
                (id,),
                f"{n:.0%} > {self.share:.0%} of its inputs are novel",
                {"novel": n, "novelty": signals.of(id)["novelty"]},
            )
            for n, id in sorted(novel, reverse=True)
        ]


@dataclass(frozen=True)
class SpawnOnOverload:
    """An expert receives many times its fair share of the rows: clone it.

    A clone starts with nearly its parent's key. With k = 1 the two soon share the load; with k >= 2
    an input may choose both until their keys part, and the parent's load falls late. A load cannot
    exceed 1/k, so `factor` must be below E/k to ever fire.

    Args:
        factor: load · E above which to spawn; 1 is a fair share.
        min_age: training forwards before an expert is judged.
    """

    factor: float = 2.0
    min_age: int = 100

    def __post_init__(self) -> None:
        positive(self, factor=self.factor)

    def propose(self, signals: Signals) -> list[Proposal]:
        experts = len(signals.ids)
        over = []
        for id in signals.ids:
            v = signals.of(id)
            relative = v["load"] * experts
            if v["age"] >= self.min_age and relative > self.factor:
                over.append((relative, id))
        return [
            Proposal("spawn", (id,), f"load {r:.2f} > {self.factor:.2f} fair shares", {"load": r})
            for r, id in sorted(over, reverse=True)
        ]


@dataclass(frozen=True)
class SpawnOnLoss:
    """The loss of an expert's inputs rises significantly: clone it, so that the clone can adapt.

    Args:
        z: standard errors by which the fast loss must exceed the slow one (`Signals.loss_z`).
    """

    z: float = 5.0

    def __post_init__(self) -> None:
        positive(self, z=self.z)

    def propose(self, signals: Signals) -> list[Proposal]:
        risen = sorted(((signals.loss_z(id), id) for id in signals.ids), reverse=True)
        return [
            Proposal(
                "spawn",
                (id,),
                f"loss {signals.of(id)['loss_fast']:.3g} rose from "
                f"{signals.of(id)['loss_slow']:.3g}: z {z:.1f} > {self.z:.1f}",
                {"loss_z": z, **_losses(signals, id)},
            )
            for z, id in risen
            if z > self.z
        ]


def _losses(signals: Signals, id: int) -> dict[str, float]:
    v = signals.of(id)
    return {"loss_fast": v["loss_fast"], "loss_slow": v["loss_slow"]}
