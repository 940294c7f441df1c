"""Lets the first images of a stream wait until features are fitted on them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Features(Protocol):
    """Fixed features, fitted once on the first images of a stream, without labels."""

    @property
    def num_features(self) -> int: ...

    @property
    def blocks(self) -> tuple[int, ...]: ...

    @property
    def memory_bytes(self) -> int: ...

    def settings(self) -> dict[str, Any]: ...

    def fit(self, images: Tensor, generator: torch.Generator) -> Features: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class Intake:
    """Images in, features out; the first `early` images come out only once there are as many.

    Args:
        features: fitted here, then fixed.
        early: how many images wait.
        seed: of the generator that the features are fitted with.
    """

    def __init__(self, features: Features, early: int, seed: int) -> None:
        if early < 1:
            raise ValueError(f"early must be positive, got {early!r}")
        self.features, self.early, self.seed = features, early, seed
        self.fitted = False
        self._waiting: list[Batch] = []
        self._shape: tuple[int, ...] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> list[Batch]:
        """Take a batch in.

        Args:
            images: float32 [N, 1, H, W].
            labels: int64 [N].

        Returns:
            Batches of features [N, D] and labels that are ready, in the order they came.

        Raises:
            ValueError: as many labels as images are needed, and finite images.
        """
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
        self.check(images)
        if not len(labels):
            return []
        self._shape = tuple(images.shape[1:])
        if self.fitted:
            return [(self.features(images), labels)]
        self._waiting.append((images, labels))
        if sum(len(y) for _, y in self._waiting) < self.early:
            return []
        return self.flush()

    def check(self, images: Tensor) -> None:
        """Raise ValueError if images are not finite, or of another shape than those before."""
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
            raise ValueError(f"images must be a float tensor [N, ...], got {images!r:.80}")
        if not images.isfinite().all():
            raise ValueError("images hold NaN or infinite values")
        if self._shape is not None and tuple(images.shape[1:]) != self._shape:
            raise ValueError(f"images were {self._shape}, are {tuple(images.shape[1:])}")

    @property
    def waiting_bytes(self) -> int:
        """What the waiting images take, as 4 bytes a number."""
        return sum(4 * images.numel() + 8 * labels.numel() for images, labels in self._waiting)

    def flush(self) -> list[Batch]:
        """Fit on what has come so far, if that is still to be done, and give it out."""
        waiting = self._waiting
        if self.fitted or not any(len(y) for _, y in waiting):
            return []
        first = torch.cat([images for images, _ in waiting])
        self.features.fit(first, torch.Generator().manual_seed(self.seed))
        self.fitted, self._waiting = True, []
        return [(self.features(images), labels) for images, labels in waiting if len(labels)]
