"""One streaming ridge-regression head on fixed features, as an Avalanche strategy.

Legend: N images, D features with a constant 1 among them, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual import require
from growmoe.continual.features import RandomPatchFeatures

require("avalanche.training.templates")

from avalanche.training.templates import SupervisedTemplate  # noqa: E402


@dataclass
class RidgeHead:
    """Least squares onto one-hot classes, from sums over the examples seen.

    W = (G + r tr(G)/D I)^-1 C with G = sum x x^T and C = sum x y^T: the sums do not depend on the
    order of the examples, so neither does W. Hoerl & Kennard 1970; in continual learning, ACIL
    (arXiv:2205.14922) and RanPAC (arXiv:2307.02251, equation 5).

    Attributes:
        G_DD: float32 [D, D].
        C_DK: float32 [D, K].
        ridge: r, relative to the mean of G's diagonal.
        W_DK: the weights of the last `solve`.
    """

    G_DD: Tensor
    C_DK: Tensor
    ridge: float
    W_DK: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_classes: int, ridge: float) -> RidgeHead:
        """A head that has seen nothing, for x of num_features without the constant."""
        d = num_features + 1
        cross = torch.zeros(d, num_classes)
        return cls(torch.zeros(d, d), cross, ridge, torch.zeros_like(cross))

    @torch.no_grad()
    def add(self, features_ND: Tensor, labels_N: Tensor) -> None:
        """Take examples in; features float32 [N, D - 1], labels int64 [N]."""
        x_ND = F.pad(features_ND, (0, 1), value=1.0)
        self.G_DD.addmm_(x_ND.T, x_ND)
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


class StreamingRidge(SupervisedTemplate):
    """A ridge head trained by one pass over the stream, without gradients or stored examples.

    Args:
        features: fitted on the first images of the stream when training begins.
        head: starts empty.
        generator: for fitting the features.
        kwargs: as for any Avalanche strategy; the batch size changes nothing but speed.
    """

    def __init__(
        self,
        *,
        features: RandomPatchFeatures,
        head: RidgeHead,
        generator: torch.Generator,
        **kwargs,
    ) -> None:
        super().__init__(
            model=nn.Identity(), optimizer=None, criterion=nn.CrossEntropyLoss(), **kwargs
        )
        self.features, self.head, self.generator = features, head, generator

    def make_optimizer(self, **kwargs) -> None:
        """Nothing here is trained by gradients."""

    def check_model_and_optimizer(self, **kwargs) -> None:
        """Nothing here is trained by gradients."""

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """The head has all classes from the start."""
        return self.model if model is None else model

    def _before_training_exp(self, **kwargs) -> None:
        super()._before_training_exp(**kwargs)
        if self.features.weight is None:
            # Avalanche stores an experience class by class: the first of a shuffled pass are meant.
            dataset = self.experience.dataset
            order = torch.randperm(len(dataset), generator=self.generator)
            first = [dataset[int(i)][0] for i in order[: self.features.fit_images]]
            self.features.fit(torch.stack(first), self.generator)

    def training_epoch(self, **kwargs) -> None:
        """Add every mini-batch to the sums."""
        for self.mbatch in self.dataloader:  # noqa: B020 - Avalanche's own idiom
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.head.add(self.features(self.mb_x), self.mb_y)
            self._after_training_iteration(**kwargs)

    def _after_training_exp(self, **kwargs) -> None:
        self.head.solve()
        super()._after_training_exp(**kwargs)

    def forward(self) -> Tensor:
        """Scores of the current mini-batch, [N, K]."""
        return self.head(self.features(self.mb_x))
