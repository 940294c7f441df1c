"""One streaming ridge-regression head on fixed features.

Legend: N images, D features with a constant 1 among them, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.continual.intake import Features, Intake
from growmoe.experts.moments import Moments


@dataclass
class RidgeHead:
    """Least squares onto one-hot classes, from sums over the examples seen.

    W = (G + r tr(G)/D I)^-1 C with G = sum x x^T and C = sum x y^T: the sums do not depend on the
    order of the examples, so neither does W. Hoerl & Kennard 1970; in continual learning, ACIL
    (arXiv:2205.14922) and RanPAC (arXiv:2307.02251, equation 5).

    Attributes:
        sums: G, of which little more than half is kept (`Moments`).
        C_DK: float32 [D, K].
        ridge: r, relative to the mean of G's diagonal.
        W_DK: the weights of the last `solve`.
    """

    sums: Moments
    C_DK: Tensor
    ridge: float
    W_DK: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_classes: int, ridge: float) -> RidgeHead:
        """A head that has seen nothing, for x of num_features without the constant."""
        cross = torch.zeros(num_features + 1, num_classes)
        return cls(Moments(1, 0, num_features), cross, ridge, torch.zeros_like(cross))

    @property
    def G_DD(self) -> Tensor:
        """float32 [D, D]: a copy."""
        return self.sums.moment

    @torch.no_grad()
    def add(self, features_ND: Tensor, labels_N: Tensor) -> None:
        """Take examples in; features float32 [N, D - 1], labels int64 [N]."""
        x_ND = F.pad(features_ND, (0, 1), value=1.0)
        self.sums.add(features_ND)
        self.C_DK.addmm_(x_ND.T, F.one_hot(labels_N, self.C_DK.shape[1]).float())

    @torch.no_grad()
    def solve(self) -> None:
        """Bring the weights up to date with the sums."""
        gram = self.G_DD.double()
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
        self.W_DK = torch.cholesky_solve(self.C_DK.double(), factor).float()

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Scores, float32 [N, K]."""
        return F.pad(features_ND, (0, 1), value=1.0) @ self.W_DK


class RidgeClassifier:
    """A ridge head on fixed features, learned by one pass over a stream.

    Args:
        features: fitted on the first `early` images, which wait until then.
        num_classes: K.
        ridge: as for `RidgeHead`.
        early: how many images wait.
        seed: of the features.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        ridge: float,
        early: int = 1000,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.head = RidgeHead.zeros(features.num_features, num_classes, ridge)
        self._intake = Intake(features, early, seed)
        self._solved = False

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """Take in a labelled batch once: images float32 [N, 1, H, W], labels int64 [N]."""
        for x_ND, y_N in self._intake(images, labels):
            self.head.add(x_ND, y_N)
            self._solved = False

    @property
    def ready(self) -> bool:
        """Whether its features are fitted; before, a prediction would fit them on fewer images."""
        return self._intake.fitted

    def finish(self) -> None:
        """Bring the weights up to date, as a prediction does."""
        for x_ND, y_N in self._intake.flush():
            self.head.add(x_ND, y_N)
            self._solved = False
        if not self._solved:
            self.head.solve()
            self._solved = True

    def __call__(self, images: Tensor) -> Tensor:
        """Scores, float32 [N, K]."""
        self.finish()
        return self.head(self.features(images))
