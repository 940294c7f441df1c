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
        if len(old) < 2:
            return []
        similarity_EE = signals.similarity()
        pairs = [(float(similarity_EE[i, j]), i, j) for i in old for j in old if i < j]
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
