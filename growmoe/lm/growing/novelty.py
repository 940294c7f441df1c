"""Whether a path still explains what comes: a cumulative sum of how far losses lie above the usual.

Page's test (Page 1954, Continuous inspection schemes, Biometrika 41) on the z-scores of batches:

    S ← max(0, S + min(z, cap) − slack)        alarm when S > threshold

A strong change is found after a few batches and a weak one after more, with the same settings; one
odd batch, however odd, is no alarm.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Suspicion:
    """The cumulative sum and its settings, in standard deviations of a path's loss per batch.

    Args:
        slack: a batch is unusual if its loss lies further above the usual than this.
        cap: no batch counts for more than this.
        threshold: of the sum.

    Attributes:
        sum: S.
    """

    slack: float = 2.5
    cap: float = 5.0
    threshold: float = 8.0
    sum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.slack < self.cap:
            raise ValueError(f"slack must lie between 0 and cap={self.cap!r}, got {self.slack!r}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold!r}")

    def unusual(self, z: float) -> bool:
        return z > self.slack

    def observe(self, z: float) -> bool:
        """Take in the z-score of a batch; whether the alarm is raised."""
        self.sum = max(0.0, self.sum + min(z, self.cap) - self.slack)
        return self.sum > self.threshold

    def clear(self) -> None:
        self.sum = 0.0
