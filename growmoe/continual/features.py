"""Fixed features that are fitted on the first inputs of a stream, for heads in closed form.

`default_features` chooses by the shape of the inputs. Legend: N images, P places of a patch in an
image, F filters, Q pixels of a patch in all channels, G grid cells a side, K components a cell,
D features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.continual.cell import tensor_bytes
from growmoe.continual.intake import Features

_CHUNK = 8  # images at a time: their responses stay in the cache


def default_features(shape: Sequence[int]) -> Features:
    """Patches of three sizes for images [C, H, W], random ReLU units for everything else.

    The same for every stream: a row of a table, [D] or [1, 1, D], has no patches.
    """
    if len(shape) == 3 and min(shape[1:]) >= 6:
        return MultiScaleFeatures.for_images(shape[1], shape[2])
    return RandomUnits(math.prod(shape))


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
    def blocks(self) -> tuple[int, ...]:
        """Features of one block are multiplied with each other (`growmoe.experts.moments`)."""
        return (self.num_features,)

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
            images: float32 [N, C, H, W] in [0, 1].
            generator: decides which patches are drawn.

        Returns:
            self, fitted.

        Raises:
            ValueError: the images are not [N, C, H, W], or smaller than a patch on a grid.
        """
        least = self.patch_size + self.grid - 1
        if images.dim() != 4 or min(images.shape[2:]) < least:
            raise ValueError(
                f"images must be [N, C, H, W] with sides of at least {least}, "
                f"got {tuple(images.shape)}"
            )
        size = self.patch_size
        rows, columns = images.shape[2] - size + 1, images.shape[3] - size + 1
        patch_PQ = _patches(images, size)
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
            images: float32 [N, C, H, W] in [0, 1].

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
            response_PF = torch.addmm(self._bias_F, _patches(part, size), self._filter_QF).relu_()
            mean, square = (F.avg_pool2d(image, size, 1).mean(1) for image in (part, part.square()))
            variance_P1 = (square - mean.square()).clamp_(min=0).reshape(-1, 1)
            response_PF.mul_(variance_P1.add_(self._floor).rsqrt_())
            torch.matmul(
                self._pool_SP,
                response_PF.view(len(part), places, -1),
                out=pooled[start : start + _CHUNK],
            )
        return pooled.sqrt_()


@dataclass
class MultiScaleFeatures:
    """Random patches of several sizes on several grids, side by side, in two blocks.

    The largest patches are a block of their own, all others the first: features of different blocks
    are never multiplied. Of three scales that saves four ninths of the second moments, and costs
    0.15 points of accuracy; each scale by itself would save two thirds and cost 0.4 (Fashion-MNIST,
    held-out train images, `benchmarks/gate_choices.py`).

    Attributes:
        scales: each is fitted on its own; their features follow each other.
    """

    scales: tuple[RandomPatchFeatures, ...]
    _scale: tuple[float, ...] = field(default=(), init=False, repr=False)

    @classmethod
    def for_images(cls, height: int, width: int) -> MultiScaleFeatures:
        """Patches of a seventh, a fifth and a third of the side, on 3 by 3 and 4 by 4 grids.

        At most 783 features each, and no more than pixels.
        """
        side = min(height, width)
        pixels = min(784, height * width)
        scales = []
        for share, grid, filters in ((1 / 7, 3, 128), (0.21, 4, 128), (0.32, 3, 192)):
            scales.append(
                RandomPatchFeatures(
                    patch_size=max(3, round(share * side)),
                    components=max(1, pixels // grid**2),
                    filters=filters,
                    grid=grid,
                )
            )
        return cls(tuple(scales))

    @property
    def fitted(self) -> bool:
        return bool(self._scale)

    @property
    def blocks(self) -> tuple[int, ...]:
        *others, last = (features.num_features for features in self.scales)
        return (sum(others), last) if others else (last,)

    @property
    def first_scale(self) -> int:
        """How many features the smallest patches have; they come first."""
        return self.scales[0].num_features

    @property
    def num_features(self) -> int:
        return sum(self.blocks)

    @property
    def memory_bytes(self) -> int:
        return sum(features.memory_bytes for features in self.scales)

    def settings(self) -> dict[str, Any]:
        return {"scales": [features.settings() for features in self.scales]}

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> MultiScaleFeatures:
        """As `RandomPatchFeatures.fit`; features of each scale get unit mean variance."""
        for features in self.scales:
            features.fit(images, generator)
        self._scale = tuple(
            1 / max(float(features(images).std()), 1e-12) for features in self.scales
        )
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [N, C, H, W] in [0, 1] -> [N, D]."""
        if not self.fitted:
            raise RuntimeError("MultiScaleFeatures must be fitted before it is called")
        return torch.cat(
            [f(images) * scale for f, scale in zip(self.scales, self._scale, strict=True)], dim=1
        )


@dataclass
class RandomUnits:
    """Standardised inputs beside random ReLU units of them, for vectors and rows of tables.

    Attributes:
        width: numbers in an input.
        units: how many (Rahimi & Recht 2008, "Weighted sums of random kitchen sinks").
    """

    width: int
    units: int = 512
    _mean_D: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)
    _precision_D: Tensor = field(init=False, repr=False)
    _weight_DU: Tensor = field(init=False, repr=False)
    _bias_U: Tensor = field(init=False, repr=False)

    @property
    def fitted(self) -> bool:
        return len(self._mean_D) > 0

    @property
    def num_features(self) -> int:
        return self.width + self.units

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.num_features,)

    @property
    def memory_bytes(self) -> int:
        if not self.fitted:
            return 0
        return tensor_bytes(self._mean_D, self._precision_D, self._weight_DU, self._bias_U)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "units": self.units}

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> RandomUnits:
        """Take mean and deviation of the inputs, float32 [N, ...], and draw the units."""
        x_ND = images.flatten(1)
        if x_ND.shape[1] != self.width:
            raise ValueError(f"inputs must have {self.width} numbers, got {x_ND.shape[1]}")
        deviation_D = x_ND.std(0, correction=0)
        usual = deviation_D[deviation_D > 0].median() if (deviation_D > 0).any() else 1.0
        self._mean_D = x_ND.mean(0)
        # what hardly varied at first may vary later, and must not be blown up then
        self._precision_D = 1 / deviation_D.clamp_min(0.1 * float(usual))
        self._weight_DU = torch.randn(self.width, self.units, generator=generator)
        self._weight_DU /= self.width**0.5
        self._bias_U = torch.randn(self.units, generator=generator)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """[N, ...] -> [N, D]."""
        if not self.fitted:
            raise RuntimeError("RandomUnits must be fitted before it is called")
        x_ND = (images.flatten(1) - self._mean_D) * self._precision_D
        return torch.cat([x_ND, (x_ND @ self._weight_DU + self._bias_U).relu_()], dim=1)


def _patches(images: Tensor, size: int) -> Tensor:
    """Every patch of every image, its channels one after another: [N P, Q]."""
    if images.shape[1] == 1:
        return images[:, 0].unfold(1, size, 1).unfold(2, size, 1).reshape(-1, size**2)
    patch = images.unfold(2, size, 1).unfold(3, size, 1)
    return patch.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * size**2)


def _cell(rows: int, columns: int, grid: int, i: int, j: int) -> Tensor:
    """The mean over one cell of the pooling grid, as weights [rows, columns]."""
    top, bottom = round(i * rows / grid), round((i + 1) * rows / grid)
    left, right = round(j * columns / grid), round((j + 1) * columns / grid)
    weight = torch.zeros(rows, columns)
    weight[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    return weight
