"""What novelty is judged by: a short summary of each input, put before its features.

Legend: N inputs, D features, V the view, R raw numbers of an input, K components.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growmoe.continual.cell import tensor_bytes
from growmoe.continual.intake import Features


class View:
    """Principal components of the first scale of features, and random projections of the input.

    The components show a change in what the features see; the projections show one that the
    features hardly see, such as another order of the pixels. Both are fitted with the features, on
    the first inputs of a stream.

    Args:
        features: what the view is put before.
        size: at most so many components, and as many projections.
    """

    def __init__(self, features: Features, size: int = 128) -> None:
        self.features, self.size = features, size
        self._mean_D, self._component_DK = torch.zeros(0), torch.zeros(0, 0)
        self._projection_RK = torch.zeros(0, 0)

    @property
    def width(self) -> int:
        """V."""
        return self._component_DK.shape[1] + self._projection_RK.shape[1]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of the features."""
        return tuple(getattr(self.features, "blocks", (self.features.num_features,)))

    @property
    def _seen(self) -> int:
        """How many of the features the components are of: the first scale's, or all."""
        seen: int = getattr(self.features, "first_scale", self.features.num_features)
        return seen

    @property
    def num_features(self) -> int:
        """V + D."""
        return self.width + self.features.num_features

    @property
    def memory_bytes(self) -> int:
        own = tensor_bytes(self._mean_D, self._component_DK, self._projection_RK)
        return own + self.features.memory_bytes

    def settings(self) -> dict[str, Any]:
        """Every number that decides the view but the seed, as JSON."""
        return {"size": self.size, **self.features.settings()}

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> View:
        """Fit the features, then the view, on float32 [N, ...]."""
        self.features.fit(images, generator)
        first_ND = self.features(images)[:, : self._seen]
        self._mean_D = first_ND.mean(0)
        size = min(self.size, max(1, len(first_ND) - 1), self._seen)
        _, _, vector_KD = torch.linalg.svd(first_ND - self._mean_D, full_matrices=False)
        self._component_DK = vector_KD[:size].T.contiguous()
        raw_NR = images.flatten(1)
        numbers = raw_NR.shape[1]
        drawn_RK = torch.randn(numbers, min(self.size, numbers), generator=generator)
        # as large as the components, so that neither counts for more
        spread = ((first_ND - self._mean_D) @ self._component_DK).std(correction=0)
        scale = spread / (raw_NR @ drawn_RK).std(0, correction=0).mean().clamp_min(1e-6)
        self._projection_RK = drawn_RK * scale if torch.isfinite(scale) else drawn_RK
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[N, ...] -> [view, features]: [N, V + D]."""
        x_ND = self.features(images)
        component_NK = (x_ND[:, : self._seen] - self._mean_D) @ self._component_DK
        return torch.cat([component_NK, images.flatten(1) @ self._projection_RK, x_ND], dim=1)
