"""When experts should become one."""

from __future__ import annotations

from dataclasses import dataclass

from growmoe.rules.rule import Proposal, positive
from growmoe.signals import Signals


@dataclass(frozen=True)
class MergeSimilar:
    """Two experts give nearly the same outputs on each other's inputs.

    Args:
        similarity: mean cosine of their outputs on the evidence of both, above which to merge.
        min_age: training forwards before an expert is judged, so that a clone may differ first.
    """

    similarity: float = 0.95
    min_age: int = 200

    def __post_init__(self) -> None:
        positive(self, similarity=self.similarity)

    def propose(self, signals: Signals) -> list[Proposal]:
        old = [i for i, age in enumerate(signals.values["age"]) if age >= self.min_age]
        if not _pairs(signals, old):
            return []
        similarity_EE = signals.similarity()
        pairs = [(float(similarity_EE[i, j]), i, j) for i, j in _pairs(signals, old)]
        return [
            Proposal(
                "merge",
                (signals.ids[i], signals.ids[j]),
                f"outputs alike: cosine {s:.3f} > {self.similarity:.3f}",
                {"similarity": s},
            )
            for s, i, j in sorted(pairs, key=lambda pair: -pair[0])
            if s > self.similarity
        ]


@dataclass(frozen=True)
class MergeOverlapping:
    """The inputs of two experts overlap: the mean of neither is novel to the other.

    For experts that are statistics (`Moments`), whose merger is exact; whether one expert can speak
    for both is left to consent.

    Args:
        z: standard deviations within which each mean must lie, by the other's measure.
        min_hits: forwards that hit an expert before it is judged.
    """

    z: float = 2.0
    min_hits: int = 30

    def __post_init__(self) -> None:
        positive(self, z=self.z)

    def propose(self, signals: Signals) -> list[Proposal]:
        old = [i for i, hits in enumerate(signals.values["hits"]) if hits >= self.min_hits]
        pairs = []
        for i, j in _pairs(signals, old):
            z = float(max(signals.overlap[i, j], signals.overlap[j, i]))
            if z < self.z:
                pairs.append((z, i, j))
        return [
            Proposal(
                "merge",
                (signals.ids[i], signals.ids[j]),
                f"inputs overlap: means within {z:.2f} < {self.z:.2f} sd",
                {"overlap": z},
            )
            for z, i, j in sorted(pairs)
        ]


def _pairs(signals: Signals, among: list[int]) -> list[tuple[int, int]]:
    """Pairs of positions whose experts can be merged."""
    groups = signals.groups
    return [(i, j) for i in among for j in among if i < j and groups[i] == groups[j]]
