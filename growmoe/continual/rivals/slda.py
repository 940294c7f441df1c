"""Deep streaming linear discriminant analysis (Hayes & Kanan 2020, arXiv:1909.01520).

Legend: N images, D features, K classes; mu_KD the class means, c_K their counts, S_DD the sum of
the weighted scatter, so that the paper's Sigma is S_DD / n after n examples; e the shrinkage.

Avalanche's own updates example by example and inverts Sigma before every mini-batch, which takes
minutes here; this one takes a mini-batch at once, with the same result to rounding. Classes not
seen yet are never predicted (Avalanche gives them a score of 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.intake import Features, Intake
from growmoe.continual.rivals.learner import Learner


class StreamingLDA(Learner):
    """Streaming LDA on fixed features.

    Args:
        features: fitted on the first `early` images.
        num_classes: K.
        shrinkage: e.
        early: how many images wait for the features.
        seed: of the features.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        shrinkage: float = 1e-4,
        early: int = 256,
        seed: int = 0,
    ) -> None:
        self.features, self.shrinkage = features, shrinkage
        self._intake = Intake(features, early, seed)
        width = features.num_features
        self.mu_KD = torch.zeros(num_classes, width)
        self.c_K = torch.zeros(num_classes)
        self.S_DD = torch.zeros(width, width)
        self.n = 0
        self._head: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def learn(self, images: Tensor, labels: Tensor) -> None:
        for x_ND, y_N in self._intake(images, labels):
            self._add(x_ND, y_N)

    def _add(self, x_ND: Tensor, y_N: Tensor) -> None:
        # before each example: the mean of its class (equation 2), and the number of examples
        apart_ND = torch.empty_like(x_ND)
        for k in y_N.unique().tolist():
            rows = (y_N == k).nonzero().flatten()
            x, count = x_ND[rows], self.c_K[k]
            sums = self.mu_KD[k] * count + torch.cat([torch.zeros_like(x[:1]), x]).cumsum(0)
            counts = (count + torch.arange(len(rows) + 1)).unsqueeze(1)
            apart_ND[rows] = x - sums[:-1] / counts[:-1].clamp(min=1)
            self.mu_KD[k], self.c_K[k] = sums[-1] / counts[-1], counts[-1]
        n_N1 = (self.n + torch.arange(len(y_N))).unsqueeze(1)
        self.S_DD.addmm_((apart_ND * (n_N1 / (n_N1 + 1))).T, apart_ND)  # equation 3
        self.n += len(y_N)
        self._head = None

    def _solve(self) -> tuple[Tensor, Tensor]:
        sigma = self.S_DD.double() / max(self.n, 1)
        sigma = (1 - self.shrinkage) * sigma
        sigma.diagonal().add_(self.shrinkage)
        W_DK = torch.cholesky_solve(self.mu_KD.double().T, torch.linalg.cholesky(sigma)).float()
        b_K = -0.5 * (self.mu_KD.T * W_DK).sum(0)
        return W_DK, b_K.masked_fill(self.c_K == 0, -torch.inf)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        for x_ND, y_N in self._intake.flush():
            self._add(x_ND, y_N)
        if self._head is None:
            self._head = self._solve()
        W_DK, b_K = self._head
        return self.features(images) @ W_DK + b_K

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=4 * self.num_parameters,
            buffers=self.features.memory_bytes,
            statistics=tensor_bytes(self.mu_KD, self.c_K, self.S_DD),
        )

    @property
    def num_parameters(self) -> int:
        return self.mu_KD.numel() + self.c_K.numel()
