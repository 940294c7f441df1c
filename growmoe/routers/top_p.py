"""Each token takes as many experts as it needs to be sure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing, from_mask


class TopP(Router):
    """Top-p routing (Huang et al. 2024, arXiv 2403.07652, eqs. 3 to 6).

    A token takes the fewest experts whose softmax probabilities sum to at least p, so that one the
    gate is unsure of gets more of them. The combine weights are the probabilities. Its own loss,
    `entropy` times the gate's mean entropy, keeps it from being unsure of everything.

    Args:
        p: the threshold (0.4 in the paper).
        entropy: coefficient of the entropy (1e-4 in the paper).
        most: the most experts of a token; all if left out.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: p is not in (0, 1], a negative coefficient, or most below 1.
    """

    def __init__(
        self,
        p: float = 0.4,
        entropy: float = 1e-4,
        most: int | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        if not 0 < p <= 1:
            raise ValueError(f"TopP: p must be in (0, 1], got {p!r}")
        if not entropy >= 0:
            raise ValueError(f"TopP: entropy must not be negative, got {entropy!r}")
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"TopP: most must be a positive integer, got {most!r}")
        self.p, self.entropy, self.most = p, entropy, most

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        sorted_TE, order_TE = probs_TE.detach().sort(dim=-1, descending=True, stable=True)
        before_TE = sorted_TE.cumsum(-1) - sorted_TE
        needed_TE = (before_TE < self.p) & (sorted_TE > 0)
        needed_TE[:, 0] = True
        if self.most is not None:
            needed_TE[:, self.most :] = False
        chosen_TE = torch.zeros_like(needed_TE).scatter(1, order_TE, needed_TE)
        aux = None
        if self.training and self.entropy and len(x_TD):
            aux = self.entropy * torch.special.entr(probs_TE).sum(-1).mean()
        return Routing(from_mask(chosen_TE, probs_TE), probs_TE, logits_TE, aux=aux)

    def extra_repr(self) -> str:
        return f"p={self.p}, entropy={self.entropy}, most={self.most}"
