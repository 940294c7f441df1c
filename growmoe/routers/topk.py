"""Each token takes its k best experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing, check_k

Score = Literal["softmax", "softmax_topk", "sigmoid"]


class TopK(Router):
    """Top-k routing by a linear gate (Shazeer et al. 2017, arXiv 1701.06538).

    Args:
        k: experts per token.
        score: how logits l become combine weights.
            "softmax": softmax over all experts, then the k largest (GShard, arXiv 2006.16668);
            "softmax_topk": the k largest logits, then softmax over these (Shazeer's KeepTopK);
            "sigmoid": sigmoid of each, then the k largest (DeepSeek-V3, arXiv 2412.19437).
        renormalize: divide the k weights by their sum; by default if k > 1. A single weight would
            always be 1, and the gate would learn nothing from the task.
        noise: standard deviation of Gaussian noise added to the logits in training, for the
            choice and the weights alike.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k is not a positive integer, an unknown score, or a negative noise.
    """

    def __init__(
        self,
        k: int = 2,
        score: Score = "softmax",
        renormalize: bool | None = None,
        noise: float = 0.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        if score not in get_args(Score):
            raise ValueError(f"TopK: score must be one of {get_args(Score)}, got {score!r}")
        if noise < 0:
            raise ValueError(f"TopK: noise must not be negative, got {noise!r}")
        self.score, self.noise = score, noise
        self.renormalize = k > 1 if renormalize is None else renormalize

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        if self.training and self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        probs_TE = logits_TE.sigmoid() if self.score == "sigmoid" else logits_TE.softmax(-1)
        chosen_TK = logits_TE.topk(self.k, dim=-1).indices
        if self.score == "softmax_topk":
            weight_TK = logits_TE.gather(1, chosen_TK).softmax(-1)
        else:
            weight_TK = probs_TE.gather(1, chosen_TK)
            if self.renormalize:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"k={self.k}, score={self.score}, renormalize={self.renormalize}, noise={self.noise}"
