"""What is usual in a domain: how far its inputs lie from the mean of their label.

Legend: N inputs, V the view (what novelty is judged by), C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PRIOR_ROWS = 200.0  # what a newborn inherits of usual distances counts as so many rows
CLIP = 2.0  # sd from the mean beyond which a distance counts as if it lay there
CLIPPED_SD = 0.96  # of a normal variable clipped so, in sd of the variable
STALE = 0.05  # growth of a domain's rows until its covariance is factored anew
KNOWN_VIEWS = 4  # rows for each number of a view before a covariance without prior is trusted
KNOWN_ROWS = 100.0  # rows of a label before its distances are trusted


class Usual(nn.Module):
    """Statistics of a domain's views, and the novelty of an input by them.

    The distance of an input to the mean of its label, by the covariance within labels of this
    domain alone,

        s = log mean_v (Lᵀ (v − μ_label))_v² / ((1 + 1/n_label) · n/(n − V))
        z = (s − mean s) / sd s

    with the running mean and deviation of s over the label's own rows, each scored before it is
    summed up. A newborn takes its parent's covariance and distances as a prior.

    Args:
        num_labels: C.
        view: V.
    """

    count_C: Tensor
    sum_CV: Tensor
    cross_VV: Tensor
    score_3C: Tensor
    prior_VV: Tensor

    def __init__(self, num_labels: int, view: int) -> None:
        super().__init__()
        self.num_labels, self.view = num_labels, view
        self.register_buffer("count_C", torch.zeros(num_labels))
        self.register_buffer("sum_CV", torch.zeros(num_labels, view))
        self.register_buffer("cross_VV", torch.zeros(view, view))
        self.register_buffer("score_3C", torch.zeros(3, num_labels))  # rows, mean, variance
        self.register_buffer("prior_VV", torch.zeros(view, view))
        self._whitening: tuple[float, Tensor] | None = None

    def covariance(self) -> Tensor:
        """Within labels, shrunk to the parent's as if that were V rows more: [V, V]."""
        n = float(self.count_C.sum())
        mean_CV = self.sum_CV / self.count_C.clamp_min(1)[:, None]
        within_VV = self.cross_VV - self.sum_CV.T @ mean_CV
        prior = float(self.view) if self.prior_VV.any() else 0.0
        cov_VV = (within_VV + prior * self.prior_VV) / max(n + prior, 1.0)
        floor = 0.02 * cov_VV.diagonal().mean() + 1e-8
        return cov_VV + floor * torch.eye(self.view)

    def score(self, view_NV: Tensor) -> Tensor:
        """s to every label's mean: [N, C]; those of labels never seen mean nothing."""
        white_VV, mean_CV = self._white()
        distance_NC = torch.cdist(view_NV @ white_VV, mean_CV).square() / self.view
        # what an estimate from few rows adds to the distance of a row that it has not seen
        rows = float(self.count_C.sum()) + (self.view if self.prior_VV.any() else 0.0)
        few_C = (1 + 1 / self.count_C.clamp_min(1)) * rows / max(rows - self.view, rows / 4, 1.0)
        return (distance_NC / few_C).clamp_min(1e-9).log()

    def _white(self) -> tuple[Tensor, Tensor]:
        """What whitens views within labels [V, V], and the whitened means of the labels [C, V]."""
        rows = float(self.count_C.sum())
        if self._whitening is None or abs(rows - self._whitening[0]) > STALE * self._whitening[0]:
            cov_VV = self.covariance().double()
            factor_VV, info = torch.linalg.cholesky_ex(cov_VV)
            if info > 0:
                factor_VV = cov_VV.diagonal().sqrt().diag()
            eye_VV = torch.eye(self.view, dtype=torch.float64)
            white_VV = torch.linalg.solve_triangular(factor_VV, eye_VV, upper=False).T.float()
            self._whitening = rows, white_VV
        white_VV = self._whitening[1]
        mean_CV = self.sum_CV / self.count_C.clamp_min(1)[:, None]
        return white_VV, mean_CV @ white_VV

    def novelty(self, view_NV: Tensor, label_N: Tensor) -> Tensor:
        """z of each input among those of its label: [N]; NaN where this domain cannot tell."""
        rows_C, mean_C, var_C = self.score_3C
        known_C = (self.count_C >= 2) & (rows_C >= KNOWN_ROWS)
        if not self.prior_VV.any():  # the first covariance must be there before it can judge
            known_C &= self.count_C.sum() >= KNOWN_VIEWS * self.view
        score_N = self.score(view_NV).gather(1, label_N[:, None])[:, 0]
        z_N = (score_N - mean_C[label_N]) / (var_C[label_N].sqrt() / CLIPPED_SD).clamp_min(0.05)
        return torch.where(known_C[label_N], z_N, torch.nan)

    def distance(self, other: Usual) -> float:
        """Mahalanobis distance of the other's label means from its own, by its own covariance.

        The root mean square over the labels that both know, less what sampling alone explains;
        infinite if there are none.
        """
        both_C = (self.count_C >= 2) & (other.count_C >= 2)
        if not both_C.any():
            return float("inf")
        mine_CV, theirs_CV = (
            d.sum_CV[both_C] / d.count_C[both_C, None] @ self._white()[0] for d in (self, other)
        )
        chance_C = 1 / self.count_C[both_C] + 1 / other.count_C[both_C]
        apart_C = (mine_CV - theirs_CV).square().sum(1) - self.view * chance_C
        return float(apart_C.mean().clamp_min(0).sqrt())

    def add(self, view_NV: Tensor, label_N: Tensor) -> None:
        """Take rows in."""
        for part in torch.arange(len(label_N)).split(64):  # each scored before it is summed up
            self._calibrate(view_NV[part], label_N[part])
            self._sum_up(view_NV[part], label_N[part])

    def take_back(self, view_NV: Tensor, label_N: Tensor) -> None:
        """Take rows out of the sums again."""
        self._sum_up(view_NV, label_N, times=-1.0)

    def child(self) -> Usual:
        """One that has seen nothing, with this one's idea of what is usual as a prior."""
        child = Usual(self.num_labels, self.view)
        child.prior_VV.copy_(self.covariance())
        child.score_3C.copy_(self.score_3C)
        child.score_3C[0].clamp_(max=PRIOR_ROWS)
        return child

    def merged(self, others: Sequence[Usual]) -> Usual:
        """The sum of all, and the mean of their distances."""
        result, parts = Usual(self.num_labels, self.view), (self, *others)
        for part in parts:
            result.count_C += part.count_C
            result.sum_CV += part.sum_CV
            result.cross_VV += part.cross_VV
        rows_PC = torch.stack([part.score_3C[0] for part in parts])
        mean_PC = torch.stack([part.score_3C[1] for part in parts])
        var_PC = torch.stack([part.score_3C[2] for part in parts])
        rows_C = rows_PC.sum(0)
        mean_C = (rows_PC * mean_PC).sum(0) / rows_C.clamp_min(1)
        square_C = (rows_PC * (var_PC + (mean_PC - mean_C).square())).sum(0)
        result.score_3C.copy_(torch.stack([rows_C, mean_C, square_C / rows_C.clamp_min(1)]))
        return result

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_whitening": None}

    def _sum_up(self, view_NV: Tensor, label_N: Tensor, times: float = 1.0) -> None:
        self.count_C.index_add_(0, label_N, torch.full((len(label_N),), times))
        self.sum_CV.index_add_(0, label_N, view_NV, alpha=times)
        self.cross_VV.addmm_(view_NV.T, view_NV, alpha=times)
        if times < 0:
            self._whitening = None

    def _calibrate(self, view_NV: Tensor, label_N: Tensor) -> None:
        score_N = self.score(view_NV).gather(1, label_N[:, None])[:, 0]
        for label in label_N.unique().tolist():
            if self.count_C[label] < 2:
                continue
            rows, mean, var = self.score_3C[:, label].tolist()
            s = score_N[label_N == label]
            if rows >= KNOWN_ROWS:  # clipped, so that what is foreign does not become usual
                sd = max(var**0.5 / CLIPPED_SD, 0.05)
                s = s.clamp(mean - CLIP * sd, mean + CLIP * sd)
            # the last quarter of its rows: distances shrink while the estimate gets better
            rate = min(1.0, max(4 * len(s) / (rows + len(s)), 0.005 * len(s)))
            apart = float(s.mean()) - mean
            spread = float((s - mean).square().mean()) if rows else float(s.var(correction=0))
            self.score_3C[0, label] = rows + len(s)
            self.score_3C[1, label] = mean + rate * apart
            self.score_3C[2, label] = max(
                0.0, (1 - rate) * var + rate * spread - (rate * apart) ** 2
            )
