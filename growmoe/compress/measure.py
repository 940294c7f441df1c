"""What a cut cost: paired differences of the loss, per domain, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats
from torch import Tensor, nn

from growmoe.compress.calibrate import Batches, Loss, losses


@dataclass(frozen=True)
class Change:
    """The loss before and after on the same samples, in the loss's units (nats per token).

    Attributes:
        before, after: means.
        change: after − before.
        low, high: 95% confidence interval of the change, by Student's t over samples; NaN for one.
        samples: how many.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        bounds = f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.before:.4f} -> {self.after:.4f} ({self.change:+.4f} {bounds})"


def paired(before_N: Tensor, after_N: Tensor) -> Change:
    """The change between two losses of the same samples, float64 [N] each."""
    if before_N.shape != after_N.shape or not len(before_N):
        raise ValueError(f"pairs of losses: got {len(before_N)} and {len(after_N)}")
    mean, low, high = interval(after_N - before_N)
    return Change(float(before_N.mean()), float(after_N.mean()), mean, low, high, len(before_N))


def interval(value_N: Tensor) -> tuple[float, float, float]:
    """Mean and 95% confidence interval by Student's t; the interval of one value is NaN."""
    number, mean = len(value_N), float(value_N.double().mean())
    if number < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, number - 1)) * float(value_N.double().std()) / number**0.5
    return mean, mean - half, mean + half


def losses_by_domain(
    model: nn.Module, domains: Mapping[str, Batches], loss: Loss
) -> dict[str, Tensor]:
    return {name: losses(model, batches, loss) for name, batches in domains.items()}


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Change]:
    return {name: paired(before[name], after[name]) for name in before}
