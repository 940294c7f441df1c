"""Each token draws its experts, with gradients straight through the draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing, check_k, from_all


class Gumbel(Router):
    """Gumbel-softmax routing (Jang et al. 2016, arXiv 1611.01144; Maddison et al., 1611.00712).

    p = softmax((logits + Gumbel noise) / temperature); without noise in eval mode.

    hard (straight through): the k experts of largest p, which are k draws without replacement
    from softmax(logits / temperature) (Kool et al. 2019, 1903.06059). Each has the combine weight
    1/k, with the gradient of p/k. Weights that sum to 1 for k = 1 and a gate that still learns:
    what a top-1 router upcycled from a dense block needs.

    soft: every expert with weight p, as the relaxation has it; every expert computes every token.

    Args:
        k: experts per token, if hard.
        temperature: small is decided, large is even.
        hard: see above.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k is not a positive integer, or the temperature not positive.
    """

    def __init__(
        self,
        k: int = 1,
        temperature: float = 1.0,
        hard: bool = True,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        if not temperature > 0:
            raise ValueError(f"Gumbel: temperature must be positive, got {temperature!r}")
        self.temperature, self.hard = temperature, hard
        self.capped = hard

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k if self.hard else 1

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        drawn_TE = logits_TE + gumbel_like(logits_TE) if self.training else logits_TE
        probs_TE = (drawn_TE / self.temperature).softmax(-1)
        if not self.hard:
            return Routing(from_all(probs_TE), probs_TE, logits_TE)
        chosen_TK = drawn_TE.topk(self.k, dim=-1).indices
        p_TK = probs_TE.gather(1, chosen_TK)
        admitted_TK = drawn_TE.gather(1, chosen_TK).isfinite()
        share_TK = admitted_TK / admitted_TK.sum(-1, keepdim=True).clamp_min(1)
        weight_TK = share_TK.to(p_TK.dtype) * (1 + (p_TK - p_TK.detach()))
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"k={self.k}, temperature={self.temperature}, hard={self.hard}"


def gumbel_like(x: Tensor) -> Tensor:
    """Standard Gumbel draws −log(−log u)."""
    return -torch.empty_like(x).exponential_().log()
