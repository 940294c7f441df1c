"""Each expert takes its best tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing


class ExpertChoice(Router):
    """Expert choice routing (Zhou et al. 2022, arXiv 2202.09368).

    Each of E experts takes the ceil(T · capacity / E) tokens that score highest for it, so the
    load is balanced by construction and a token gets any number of experts, none included. The
    combine weight is the token's softmax probability of the expert. While a newborn is let in,
    shares are in proportion to the experts' admission.

    Which tokens an expert takes depends on the whole batch, later tokens included, so it must not
    be used in a causal model.

    Args:
        capacity: the mean number of experts per token.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: capacity is not positive.
    """

    sees_future = True
    balances = True
    capped = False

    def __init__(self, capacity: float = 2.0, gate: Gate | None = None) -> None:
        super().__init__(gate)
        if not 0 < capacity < math.inf:
            raise ValueError(f"ExpertChoice: capacity must be positive, got {capacity!r}")
        self.capacity = capacity

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        num_tokens, num_experts = probs_TE.shape
        admitted = sum(e.admission for e in experts)
        shares = [
            min(num_tokens, math.ceil(num_tokens * self.capacity * e.admission / admitted))
            for e in experts
        ]
        largest = max(shares)
        weight_EC, token_EC = probs_TE.T.topk(largest, dim=-1)
        index_R = torch.cat([torch.arange(n) + e * largest for e, n in enumerate(shares)]).to(
            x_TD.device
        )
        assignment = Assignment.from_pairs(
            token_R=token_EC.reshape(-1)[index_R],
            expert_R=index_R // max(largest, 1),
            weight_R=weight_EC.reshape(-1)[index_R],
            num_experts=num_experts,
            num_tokens=num_tokens,
        )
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}"
