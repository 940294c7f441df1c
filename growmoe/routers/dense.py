"""Every token takes every expert: the soft mixture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context
from growmoe.routers.router import Router, Routing, from_all


class Dense(Router):
    """The soft mixture of all experts (Jacobs et al. 1991, Adaptive Mixtures of Local Experts).

    The combine weights are the softmax over all experts. Nothing is saved by it: every expert
    computes every token.
    """

    balances = True  # all experts have all tokens
    capped = False

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        return Routing(from_all(probs_TE), probs_TE, logits_TE)
