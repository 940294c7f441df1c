"""Whether a path's text still comes: a cumulative sum of how far batches lie above the usual.

Page's test (Page 1954, Continuous inspection schemes, Biometrika 41) on z-scores of how unlike the
path's text each batch is (see `PathRouter.distance`):

    S ← max(0, S + min(z, cap) − slack)        alarm when S > threshold

A strong change is found after a few batches and a weak one after more, with the same settings; one
odd batch, however odd, is no alarm.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Suspicion:
    """The cumulative sum and its settings, in standard deviations of a path's own batches.

    Args:
        slack: a batch is unusual if it lies further above the usual than this.
        cap: no batch counts for more than this.
        threshold: of the sum.
        novel: text is new, not one that has returned or an odd piece of its own, if its batches lie
            on average further above what is usual for all paths than this. It is more than `slack`
            because a path that has rested does not know the documents that come next.

    Attributes:
        sum: S.
    """

    slack: float = 2.5
    cap: float = 5.0
    threshold: float = 8.0
    novel: float = 5.0
    sum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.slack < self.cap:
            raise ValueError(f"slack must lie between 0 and cap={self.cap!r}, got {self.slack!r}")
        for name in ("threshold", "novel"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    def unusual(self, z: float) -> bool:
        return z > self.slack

    def observe(self, z: float) -> bool:
        """Take in the z-score of a batch; whether the alarm is raised."""
        self.sum = max(0.0, self.sum + min(z, self.cap) - self.slack)
        return self.sum > self.threshold

    def clear(self) -> None:
        self.sum = 0.0
