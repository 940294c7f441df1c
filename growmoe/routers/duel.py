"""What tells two experts apart that know the moments of what each received.

Legend: N inputs, D features, B blocks of features, G_b features of a block and a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growmoe.routers.ridge import solve_ridge

_PRIOR_ROWS = 20.0  # a score's variance counts as if so many rows of both had been seen besides


@dataclass(frozen=True)
class Duel:
    """A head for each block of features, and how the inputs of two experts score on it.

    Attributes:
        heads: [G_b] for each block, the constant last.
        mean_2B: mean score of the first and of the second expert's inputs.
        var_2B: their variance.
    """

    heads: list[Tensor]
    mean_2B: Tensor
    var_2B: Tensor

    @classmethod
    def between(cls, first: Sequence[Tensor], second: Sequence[Tensor], ridge: float) -> Duel:
        """Least squares onto ±1.

        Args:
            first: moment [G_b, G_b] of one expert in each block, with the count in its corner.
            second: of the other.
            ridge: as for `solve_ridge`.
        """
        heads = [
            solve_ridge(m_GG + n_GG, (m_GG[-1] - n_GG[-1])[:, None], ridge)[:, 0]
            for m_GG, n_GG in zip(first, second, strict=True)
        ]
        scored = [
            _scored(head_G, torch.stack(pair))
            for head_G, *pair in zip(heads, first, second, strict=True)
        ]
        mean_2B, var_2B = (torch.stack(each, 1) for each in zip(*scored, strict=True))
        return cls(heads, mean_2B, var_2B)

    def log_ratio(self, x_ND: Tensor) -> Tensor:
        """Log-likelihood ratio of the first expert over the second, the blocks' mean: [N].

        Each block's score is taken as Gaussian, with each expert's mean and variance.
        """
        parts = x_ND.split([len(head_G) - 1 for head_G in self.heads], dim=1)
        score_NB = torch.stack(
            [x @ head_G[:-1] + head_G[-1] for x, head_G in zip(parts, self.heads, strict=True)], 1
        )
        surprise_2NB = (score_NB - self.mean_2B[:, None]) ** 2 / self.var_2B[:, None]
        surprise_2NB = surprise_2NB + self.var_2B[:, None].log()
        return (surprise_2NB[1] - surprise_2NB[0]).mean(1) / 2

    def numel(self) -> int:
        """How many numbers it takes."""
        return sum(head_G.numel() for head_G in self.heads) + 2 * self.mean_2B.numel()


def _scored(head_G: Tensor, moment_2GG: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of two experts' scores: [2], [2]."""
    head_G, moment_2GG = head_G.double(), moment_2GG.double()
    count_2 = moment_2GG[:, -1, -1].clamp_min(1)
    sum_2G = moment_2GG @ head_G
    mean_2 = sum_2G[:, -1] / count_2
    square_2 = sum_2G @ head_G / count_2
    var_2 = (square_2 - mean_2**2).clamp_min(0)
    both = (count_2 * var_2).sum() / count_2.sum()
    # two rows have no variance, and then any distance would decide with certainty
    floor = 1e-4 * (mean_2[0] - mean_2[1]) ** 2 + 1e-9
    var_2 = (count_2 * var_2 + _PRIOR_ROWS * both) / (count_2 + _PRIOR_ROWS)
    return mean_2.float(), var_2.clamp_min(floor).float()
