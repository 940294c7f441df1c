"""Each token takes its one best expert, found by a jittered gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing


class Switch(Router):
    """Switch routing: k = 1 (Fedus et al. 2021, arXiv 2101.03961, eqs. 1 and 2).

    The combine weight is the softmax probability of the expert, not 1, so that the gate learns
    from the task. The paper adds `Capacity(1.25)` and the balance loss, which the layer does.

    Args:
        jitter: ε; in training the gate sees its input times a uniform draw from
            [1 − ε, 1 + ε] for each value (appendix C; 0.01 there).
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: the jitter is not in [0, 1).
    """

    k = 1

    def __init__(self, jitter: float = 0.01, gate: Gate | None = None) -> None:
        super().__init__(gate)
        if not 0 <= jitter < 1:
            raise ValueError(f"Switch: jitter must be in [0, 1), got {jitter!r}")
        self.jitter = jitter

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        if self.training and self.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        weight_T1, expert_T1 = probs_TE.max(-1, keepdim=True)
        assignment = Assignment.from_choice(expert_T1, weight_T1, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"jitter={self.jitter}"
