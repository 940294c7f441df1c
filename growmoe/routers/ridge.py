"""Ridge regression from moments.

Legend: G features and a constant, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def solve_blocks(moments: Sequence[Tensor], targets: Sequence[Tensor], ridge: float) -> Tensor:
    """`solve_ridge` for each block, as one head on all features: the mean of the blocks' scores.

    Args:
        moments: float [G_b, G_b] for each block.
        targets: float [G_b, C] for each block.

    Returns:
        float32 [Σ (G_b - 1) + 1, C].
    """
    heads = [solve_ridge(m, t, ridge) for m, t in zip(moments, targets, strict=True)]
    constant_1C = torch.stack([head[-1] for head in heads]).sum(0, keepdim=True)
    return torch.cat([*(head[:-1] for head in heads), constant_1C]) / len(heads)


def solve_ridge(moment_GG: Tensor, target_GC: Tensor, ridge: float) -> Tensor:
    """(M + r I)⁻¹ B in float64, r = ridge · mean diagonal / count; the constant is not shrunk.

    Args:
        moment_GG: [G, G], with the count in its corner.
        target_GC: [G, C].

    Returns:
        float32 [G, C].
    """
    moment_GG = moment_GG.double().clone()
    diagonal_G = moment_GG.diagonal()
    count = diagonal_G[-1].clone().clamp_min(1)
    penalty = ridge * diagonal_G[:-1].mean() / count
    # a floor keeps the factor positive where features are constant or nothing was seen
    diagonal_G[:-1] += penalty + 1e-9 * count
    diagonal_G[-1] += 1e-9 * count
    factor_GG, info = torch.linalg.cholesky_ex(moment_GG)
    jitter = 1e-9 * diagonal_G.mean()
    while info > 0 and jitter.isfinite():  # float32 sums of features that hardly vary
        diagonal_G += jitter
        jitter = 10 * jitter
        factor_GG, info = torch.linalg.cholesky_ex(moment_GG)
    return torch.cholesky_solve(target_GC.double(), factor_GG).float()
