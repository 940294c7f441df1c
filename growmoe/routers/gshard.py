"""Each token takes its best expert, and its second best by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context
from growmoe.routers.router import Router, Routing, from_mask


class GShard(Router):
    """Top-2 with a random second (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1).

    The two largest softmax probabilities, divided by their sum, are the combine weights g1 and g2.
    In training the second expert is used with probability min(1, 2 · g2), since one with a small
    weight is hardly worth its work; in eval mode always. The paper adds a capacity of twice the
    balanced load.
    """

    k = 2
    min_experts = 2

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        top_T2, expert_T2 = probs_TE.topk(2, dim=-1)
        weight_T2 = top_T2 / top_T2.sum(-1, keepdim=True).clamp_min(1e-20)
        used_T2 = torch.ones_like(expert_T2, dtype=torch.bool)
        if self.training:
            draw_T = torch.rand(len(x_TD), device=x_TD.device, dtype=weight_T2.dtype)
            used_T2[:, 1] = draw_T < 2 * weight_T2[:, 1]
        used_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, expert_T2, used_T2)
        weight_TE = torch.zeros_like(probs_TE).scatter(1, expert_T2, weight_T2)
        return Routing(from_mask(used_TE, weight_TE), probs_TE, logits_TE)
