"""RanPAC's head (McDonnell et al. 2023, arXiv:2307.02251): random projections, then ridge.

Legend: N images, D features, M random features, K classes. h = relu(x W) with W_DM drawn once from
a normal distribution and never trained; G = sum h h^T, C = sum h y^T; W_out = (G + lambda I)^-1 C
(equations 5 and 6, phase 2). The features come first, in place of the paper's pretrained network;
its lambda is chosen on held-out examples of every task, here it is one number for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.intake import Features, Intake
from growmoe.continual.ridge import RidgeHead
from growmoe.continual.rivals.learner import Learner, held_bytes


class RanPAC(Learner):
    """One closed-form head on a random projection of fixed features.

    Args:
        features: fitted on the first `early` images.
        num_classes: K.
        projected: M.
        ridge: lambda, relative to the mean of G's diagonal.
        early: how many images wait for the features.
        seed: of the features and of the projection.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        projected: int,
        ridge: float,
        early: int = 256,
        seed: int = 0,
    ) -> None:
        self.features = features
        self._intake = Intake(features, early, seed)
        generator = torch.Generator().manual_seed(seed)
        self.W_DM = torch.randn(features.num_features, projected, generator=generator)
        self.head = RidgeHead.zeros(projected, num_classes, ridge)
        self._solved = False

    @torch.no_grad()
    def learn(self, images: Tensor, labels: Tensor) -> None:
        for x_ND, y_N in self._intake(images, labels):
            self.head.add(self.project(x_ND), y_N)
            self._solved = False

    def project(self, x_ND: Tensor) -> Tensor:
        """h, [N, M]."""
        return torch.relu_(x_ND @ self.W_DM)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        for x_ND, y_N in self._intake.flush():
            self.head.add(self.project(x_ND), y_N)
            self._solved = False
        if not self._solved:
            self.head.solve()
            self._solved = True
        return self.head(self.project(self.features(images)))

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=tensor_bytes(self.head.W_DK),
            buffers=self.features.memory_bytes + tensor_bytes(self.W_DM),
            statistics=held_bytes(self.head) - tensor_bytes(self.head.W_DK),
        )

    @property
    def num_parameters(self) -> int:
        return self.head.W_DK.numel()
