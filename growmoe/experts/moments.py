"""An expert that is a sufficient statistic: what was routed to it, summed up.

Legend: R rows, D features, G = D + 1 (the features and a constant 1), C labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_stamps = itertools.count()


class Moments(nn.Module):
    """A closed-form expert of one label: count, sum and second moment of its inputs.

    In training mode, a forward adds its rows to `moment`, the sum over rows of [x, 1]ᵀ [x, 1],
    whose corner is the count. Sums do not depend on the order of the inputs, so it cannot forget,
    and merging two of them is exact addition. It has no parameters; `ClosedFormGate` solves heads
    from its moments. Its output is its label, one-hot.

    Args:
        num_labels: C.
        label: what it is for, in [0, C).
        d_model: D.

    Buffers: ``moment`` float32 [G, G], ``label`` int64 [].
    """

    moment: Tensor
    label: Tensor

    def __init__(
        self,
        num_labels: int,
        label: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label < num_labels:
            raise ValueError(f"Moments: label must be in [0, {num_labels}), got {label!r}")
        self.num_labels, self.d_model = num_labels, d_model
        size = d_model + 1
        self.register_buffer("moment", torch.zeros(size, size, device=device))
        self.register_buffer("label", torch.tensor(label, device=device))
        self.touch()

    def touch(self) -> None:
        """Tell those who derived something from the moments that these have changed."""
        self.stamp = next(_stamps)

    @property
    def count(self) -> float:
        """How many rows it has summed up."""
        return float(self.moment[-1, -1])

    @torch.no_grad()
    def forward(self, x_RD: Tensor) -> Tensor:
        """float32 [R, D] -> [R, C]."""
        if self.training and len(x_RD):
            x_RG = F.pad(x_RD.float(), (0, 1), value=1.0)
            self.moment.addmm_(x_RG.T, x_RG)
            self.touch()
        return F.one_hot(self.label, self.num_labels).to(x_RD.dtype).expand(len(x_RD), -1)

    @property
    def merge_key(self) -> int:
        """Only experts of one label can be merged."""
        return int(self.label)

    def cloned(self, noise: float, generator: torch.Generator) -> Moments:
        """A child of the same label that begins with nothing: the parent's inputs stay its own."""
        return Moments(self.num_labels, int(self.label), self.d_model, device=self.moment.device)

    def fresh(self, d_model: int, d_out: int, **place: Any) -> Moments:
        """An empty expert of this label."""
        return self.cloned(0.0, place["generator"])

    @torch.no_grad()
    def merged(self, others: Sequence[Moments], weights: Sequence[float]) -> Moments:
        """The sum of all moments: exactly what one expert would hold that had seen all the rows.

        Args:
            others: of the same label.
            weights: the rows each received, self first; more than it summed up if it was frozen.

        Raises:
            ValueError: experts of different labels.
        """
        labels = {int(body.label) for body in (self, *others)}
        if len(labels) > 1:
            raise ValueError(f"merge: experts of different labels {sorted(labels)}")
        result = self.cloned(0.0, torch.Generator())
        for body, rows in zip((self, *others), weights, strict=True):
            # one that was frozen stands for more rows than it summed up
            result.moment.add_(body.moment, alpha=max(1.0, rows / max(body.count, 1.0)))
        return result

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from the Gaussian with these moments, as evidence without examples: [count, D]."""
        n = self.moment[-1, -1].double()
        mean_D = self.moment[-1, :-1].double() / n
        cov_DD = self.moment[:-1, :-1].double() / n - mean_D[:, None] * mean_D
        value_D, vector_DD = torch.linalg.eigh(cov_DD)
        draw = torch.randn(count, len(mean_D), generator=generator, dtype=torch.float64)
        draw = draw.to(cov_DD.device) * value_D.clamp_min(0).sqrt()
        return (mean_D + draw @ vector_DD.T).float()

    def _apply(self, fn: Any, recurse: bool = True) -> Moments:
        # moves with the model, but .bfloat16() would stop the sums
        moment, label = self.moment, self.label
        super()._apply(fn, recurse)
        self.moment = moment.to(self.moment.device)
        self.label = label.to(self.label.device)
        self.touch()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.touch()  # another process has counted its own stamps

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.touch()

    def extra_repr(self) -> str:
        return f"label={int(self.label)}, count={self.count:.0f}"
