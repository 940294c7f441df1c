"""Fixed image features from random whitened patches, for heads that are solved in closed form.

Legend: N images, P places of a patch in an image, F filters, Q pixels of a patch, G grid cells a
side, K components a cell, D features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.continual.cell import tensor_bytes

_CHUNK = 8  # images at a time: their responses stay in the cache


@dataclass
class RandomPatchFeatures:
    """Convolution with random ZCA-whitened patches, ReLU, pooling, square root, projection.

    Coates & Ng 2012 ("Learning feature representations with k-means", sections 2 and 3.2), with
    patches drawn at random in place of centroids (Coates & Ng 2011, "The importance of encoding
    versus training with sparse coding and vector quantization", section 3). The pooled responses
    of every grid cell are projected onto the same K principal components. No label is used and
    nothing is trained: `fit` looks at a few images, the first of a stream, and never again.

    Attributes:
        patch_size: side of a patch in pixels.
        components: K; None keeps all F responses of a cell unprojected.
        filters: F, the number of random patches.
        grid: G, the pooling grid is G by G.
        contrast: added to the variance of a patch before its root is divided by, relative to the
            mean variance of a patch.
        whitening: added to the eigenvalues of the patch covariance, relative to their mean.
        fit_patches: so many patches are drawn for the covariance.
    """

    patch_size: int = 6
    components: int | None = 87
    filters: int = 256
    grid: int = 3
    contrast: float = 0.01
    whitening: float = 0.03
    fit_patches: int = 20000
    _filter_QF: Tensor | None = field(default=None, init=False, repr=False)
    _bias_F: Tensor = field(init=False, repr=False)
    _pool_SP: Tensor = field(init=False, repr=False)
    _mean_F: Tensor = field(init=False, repr=False)
    _component_FK: Tensor = field(init=False, repr=False)
    _floor: float = field(default=0.0, init=False, repr=False)

    @classmethod
    def for_images(cls, height: int, width: int, **options: Any) -> RandomPatchFeatures:
        """Patches of a fifth of the side, and as many features as pixels."""
        options.setdefault("components", max(1, height * width // cls.grid**2))
        return cls(patch_size=max(3, round(0.2 * min(height, width))), **options)

    @property
    def fitted(self) -> bool:
        return self._filter_QF is not None

    @property
    def num_features(self) -> int:
        """D = G² K."""
        return self.grid**2 * min(self.components or self.filters, self.filters)

    @property
    def memory_bytes(self) -> int:
        """What the fitted filters and projection take."""
        if self._filter_QF is None:
            return 0
        return tensor_bytes(self._filter_QF, self._bias_F, self._mean_F, self._component_FK)

    def settings(self) -> dict[str, Any]:
        """Every number that decides the features but the seed, as JSON."""
        names = (
            "patch_size",
            "components",
            "filters",
            "grid",
            "contrast",
            "whitening",
            "fit_patches",
        )
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> RandomPatchFeatures:
        """Draw the filters from these images, and find the components of their responses.

        Args:
            images: float32 [N, 1, H, W] in [0, 1].
            generator: decides which patches are drawn.

        Returns:
            self, fitted.

        Raises:
            ValueError: the images are not [N, 1, H, W], or smaller than a patch on a grid.
        """
        least = self.patch_size + self.grid - 1
        if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < least:
            raise ValueError(
                f"images must be [N, 1, H, W] with sides of at least {least}, "
                f"got {tuple(images.shape)}"
            )
        size = self.patch_size
        rows, columns = images.shape[2] - size + 1, images.shape[3] - size + 1
        patch_PQ = images[:, 0].unfold(1, size, 1).unfold(2, size, 1).reshape(-1, size**2)
        patch_PQ = patch_PQ[
            torch.randint(len(patch_PQ), (4 * self.fit_patches,), generator=generator)
        ]
        # flat patches, such as empty corners, whiten to noise
        std_P = patch_PQ.std(1)
        if std_P.max() > 0:
            patch_PQ = patch_PQ[std_P > 0.5 * std_P[std_P > 0].median()][: self.fit_patches]
        self._floor = self.contrast * float(patch_PQ.var(1).mean()) + 1e-8
        mean_Q = patch_PQ.mean(0)
        patch_PQ = patch_PQ - mean_Q
        value_Q, vector_QQ = torch.linalg.eigh((patch_PQ.T @ patch_PQ / len(patch_PQ)).double())
        scale_Q = (value_Q + self.whitening * value_Q.mean() + 1e-12).rsqrt()
        zca_QQ = (vector_QQ * scale_Q @ vector_QQ.T).float()
        chosen_F = torch.randint(len(patch_PQ), (self.filters,), generator=generator)
        filter_FQ = F.normalize(patch_PQ[chosen_F] @ zca_QQ, dim=1) @ zca_QQ
        self._filter_QF = filter_FQ.T.contiguous()
        self._bias_F = -(mean_Q @ self._filter_QF)
        self._pool_SP = torch.stack(
            [
                _cell(rows, columns, self.grid, i, j).flatten()
                for i, j in itertools.product(range(self.grid), repeat=2)
            ]
        )
        pooled_NF = self._pooled(images).flatten(0, 1)
        self._mean_F = pooled_NF.mean(0)
        self._component_FK = torch.eye(self.filters)
        if self.components is not None:
            apart_NF = (pooled_NF - self._mean_F).double()
            _, vector_FF = torch.linalg.eigh(apart_NF.T @ apart_NF)
            self._component_FK = vector_FF.flip(1)[:, : self.components].float().contiguous()
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: float32 [N, 1, H, W] in [0, 1].

        Returns:
            float32 [N, D], of mean 0 on the images of `fit`.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if not self.fitted:
            raise RuntimeError("RandomPatchFeatures must be fitted before it is called")
        apart = self._pooled(images) - self._mean_F
        return (apart if self.components is None else apart @ self._component_FK).flatten(1)

    def _pooled(self, images: Tensor) -> Tensor:
        """Pooled responses, float32 [N, G², F]."""
        assert self._filter_QF is not None
        size, cells, places = self.patch_size, *self._pool_SP.shape
        pooled = torch.empty(len(images), cells, self.filters)
        for start in range(0, len(images), _CHUNK):
            part = images[start : start + _CHUNK]
            patch_PQ = part[:, 0].unfold(1, size, 1).unfold(2, size, 1).reshape(-1, size**2)
            response_PF = torch.addmm(self._bias_F, patch_PQ, self._filter_QF).relu_()
            mean, square = (F.avg_pool2d(image, size, 1) for image in (part, part.square()))
            variance_P1 = (square - mean.square()).clamp_(min=0).reshape(-1, 1)
            response_PF.mul_(variance_P1.add_(self._floor).rsqrt_())
            torch.matmul(
                self._pool_SP,
                response_PF.view(len(part), places, -1),
                out=pooled[start : start + _CHUNK],
            )
        return pooled.sqrt_()


def _cell(rows: int, columns: int, grid: int, i: int, j: int) -> Tensor:
    """The mean over one cell of the pooling grid, as weights [rows, columns]."""
    top, bottom = round(i * rows / grid), round((i + 1) * rows / grid)
    left, right = round(j * columns / grid), round((j + 1) * columns / grid)
    weight = torch.zeros(rows, columns)
    weight[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    return weight
