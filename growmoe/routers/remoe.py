"""Each token takes every expert whose logit is positive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.cosine import refuse_second_layer
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing, from_mask


class ReMoE(Router):
    """ReLU routing with an adaptive L1 penalty (Wang et al. 2024, ReMoE, arXiv 2412.14711).

    The combine weights are relu(logits): differentiable everywhere, and a token takes as many
    experts as have a positive one. The penalty (eqs. 7 to 10)

        λ_i · mean over tokens of Σ_e f_e · relu(logit_e),   f_e = rows of e · E / (k · T)

    is heavier for busy experts and so evens out the load. λ_0 = `initial`; after each forward it
    is multiplied by `rate` if a token had more than k experts in the mean, divided by it if fewer.
    Training begins dense and becomes sparse by itself.

    Args:
        k: mean experts per token to aim for.
        initial: λ_0 (1e-8 in the paper).
        rate: α (1.2 in the paper).
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k or initial is not positive, or the rate not above 1.
    """

    balances = True
    lambda_steps: Tensor
    lambda_pending: Tensor

    def __init__(
        self, k: float = 2, initial: float = 1e-8, rate: float = 1.2, gate: Gate | None = None
    ) -> None:
        super().__init__(gate)
        if not (k > 0 and initial > 0 and rate > 1):
            raise ValueError(
                f"ReMoE: k and initial must be positive and rate above 1, got k={k!r}, "
                f"initial={initial!r}, rate={rate!r}"
            )
        self.k, self.initial, self.rate = k, initial, rate

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        refuse_second_layer(self, "lambda_steps")
        super().build(d_model, generator, device, dtype)
        # λ = initial · rate^steps: an integer is exact whatever the model's dtype
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("lambda_steps", zero)
        self.register_buffer("lambda_pending", zero.clone())

    @torch.no_grad()
    def advance(self, experts: Sequence[Expert]) -> None:
        self.lambda_steps += self.lambda_pending
        self.lambda_pending.zero_()

    @torch.no_grad()
    def observe(self, experts: Sequence[Expert], routing: Routing) -> None:
        rows, tokens = routing.assignment.counts_E.sum(), routing.assignment.num_tokens
        if tokens:
            self.lambda_pending.copy_(torch.sign(rows - self.k * tokens))

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        # the log of the admission is for a softmax; here a share of the logit is let in
        admission_E = admission_E.to(logits_TE)
        plain_TE = torch.where(admission_E > 0, logits_TE - admission_E.log(), 0.0)
        weight_TE = plain_TE.relu() * admission_E
        assignment = from_mask(weight_TE > 0, weight_TE)
        aux = None
        if self.training and len(x_TD):
            count_E = assignment.counts_E.to(weight_TE.dtype)
            load_E = count_E * (len(experts) / (self.k * len(x_TD)))
            strength = self.initial * self.rate ** self.lambda_steps.to(weight_TE.dtype)
            aux = strength * (load_E * weight_TE).sum(-1).mean()
        return Routing(assignment, weight_TE, logits_TE, aux=aux)

    def extra_repr(self) -> str:
        return f"k={self.k}, initial={self.initial}, rate={self.rate}"
