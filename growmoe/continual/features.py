"""Fixed image features from random whitened patches, for heads that are solved in closed form.

Legend: N images, P patches, F filters, Q = patch_size squared, G grid cells a side, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.continual.cell import tensor_bytes

_CHUNK = 16  # images at a time: their responses stay in the cache


@dataclass
class RandomPatchFeatures:
    """Convolution with random ZCA-whitened patches, two-sided threshold, pooling, square root.

    Coates & Ng 2012 ("Learning feature representations with k-means", sections 2 and 3.2), with
    patches drawn at random in place of centroids (Coates & Ng 2011, "The importance of encoding
    versus training with sparse coding and vector quantization", section 3). No label is used and
    nothing is trained: `fit` looks at the first images of the stream alone.

    Attributes:
        filters: F, the number of random patches.
        patch_size: side of a patch in pixels.
        grid: G, the pooling grid is G by G.
        threshold: alpha in max(0, z - alpha) and max(0, -z - alpha).
        contrast: added to the variance of a patch before its root is divided by.
        whitening: added to the eigenvalues of the patch covariance.
        fit_images: at most so many images are looked at.
        fit_patches: so many patches are drawn from them for the covariance.
        weight: [F, 1, patch_size, patch_size], whitening included, after `fit`.
        bias: [F], after `fit`.
    """

    filters: int = 128
    patch_size: int = 6
    grid: int = 3
    threshold: float = 0.25
    contrast: float = 0.01
    whitening: float = 0.1
    fit_images: int = 2000
    fit_patches: int = 20000
    weight: Tensor | None = field(default=None, init=False, repr=False)
    bias: Tensor | None = field(default=None, init=False, repr=False)

    @classmethod
    def for_images(cls, height: int, width: int) -> RandomPatchFeatures:
        """The same features at the scale of the images: fewer, smaller patches below 16 pixels."""
        return cls() if min(height, width) >= 16 else cls(filters=64, patch_size=3)

    @property
    def num_features(self) -> int:
        """D = 2 F G^2."""
        return 2 * self.filters * self.grid**2

    def settings(self) -> dict[str, int | float]:
        """The attributes that decide the features, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def memory_bytes(self) -> int:
        """What the fitted filters take."""
        return sum(tensor_bytes(t) for t in (self.weight, self.bias) if t is not None)

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> RandomPatchFeatures:
        """Draw the filters from the first `fit_images` images.

        Args:
            images: float32 [N, 1, H, W] in [0, 1].
            generator: decides which patches are drawn.

        Returns:
            self, fitted.

        Raises:
            ValueError: the images are not [N, 1, H, W], or smaller than a patch.
        """
        if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images must be [N, 1, H, W] with sides of at least {self.patch_size}, "
                f"got {tuple(images.shape)}"
            )
        images = images[: self.fit_images]
        columns = images.shape[3] - self.patch_size + 1
        places = (images.shape[2] - self.patch_size + 1) * columns
        image_P = torch.randint(len(images), (self.fit_patches,), generator=generator)
        place_P = torch.randint(places, (self.fit_patches,), generator=generator)
        windows = images[:, 0].unfold(1, self.patch_size, 1).unfold(2, self.patch_size, 1)
        patch_PQ = windows[image_P, place_P // columns, place_P % columns].flatten(1).double()
        patch_PQ = patch_PQ - patch_PQ.mean(1, keepdim=True)
        patch_PQ = patch_PQ / (patch_PQ.square().mean(1, keepdim=True) + self.contrast).sqrt()
        mean_Q = patch_PQ.mean(0)
        value_Q, vector_QQ = torch.linalg.eigh((patch_PQ - mean_Q).T.cov())
        scale_Q = (value_Q.clamp(min=0) + self.whitening).rsqrt()
        zca_QQ = vector_QQ * scale_Q @ vector_QQ.T
        # Flat patches whiten to noise: filters are drawn among the half with the most contrast.
        vivid = patch_PQ.square().sum(1).argsort(descending=True)[: self.fit_patches // 2]
        chosen_F = vivid[torch.randperm(len(vivid), generator=generator)[: self.filters]]
        filter_FQ = F.normalize((patch_PQ[chosen_F] - mean_Q) @ zca_QQ, dim=1)
        weight_FQ = filter_FQ @ zca_QQ
        self.bias = -(weight_FQ @ mean_Q).float()
        # Taking a patch's mean away equals taking the filter's mean away.
        weight_FQ = weight_FQ - weight_FQ.mean(1, keepdim=True)
        self.weight = weight_FQ.float().view(-1, 1, self.patch_size, self.patch_size)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: float32 [N, 1, H, W] in [0, 1].

        Returns:
            float32 [N, D], not negative.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if self.weight is None or self.bias is None:
            raise RuntimeError("RandomPatchFeatures must be fitted before it is called")
        return torch.cat([self._features(part) for part in images.split(_CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        mean = F.avg_pool2d(images, self.patch_size, 1)
        variance = (F.avg_pool2d(images.square(), self.patch_size, 1) - mean.square()).clamp(min=0)
        response = F.conv2d(images, self.weight).mul_((variance + self.contrast).rsqrt())
        shrunk = F.softshrink(response.add_(self.bias.view(-1, 1, 1)), self.threshold)
        # shrunk = above - below, so that pooling it gives the second side without a second pass.
        both = F.adaptive_avg_pool2d(shrunk, self.grid).flatten(1)
        above = F.adaptive_avg_pool2d(shrunk.relu_(), self.grid).flatten(1)
        below = (above - both).clamp_(min=0)
        return torch.cat([above, below], 1).sqrt_()
