"""Each token's experts are drawn: at random, or as the gate says; in training, or always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, Gate, Linear
from growmoe.routers.gumbel import gumbel_like
from growmoe.routers.router import Router, Routing, check_k

How = Literal["uniform", "sample", "best"]


class Stochastic(Router):
    """Stochastic routing in training, randomised routing at inference.

    "uniform": k experts at random, each with weight 1/k (THOR, Zuo et al. 2021, arXiv 2110.04260);
    "sample": k draws without replacement in proportion to the gate's probabilities, weighted by
    these over their sum; "best": the k most probable, weighted likewise.

    Args:
        k: experts per token.
        train, inference: how they are drawn in training and in eval mode. Inference by "sample" or
            "uniform" gives a model that answers differently each time, whose spread tells how sure
            it is.
        temperature: of the gate's probabilities; large is even.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k is not a positive integer, an unknown way, or a temperature not positive.
    """

    def __init__(
        self,
        k: int = 1,
        train: How = "sample",
        inference: How = "best",
        temperature: float = 1.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        for name, value in (("train", train), ("inference", inference)):
            if value not in get_args(How):
                raise ValueError(
                    f"Stochastic: {name} must be one of {get_args(How)}, got {value!r}"
                )
        if not temperature > 0:
            raise ValueError(f"Stochastic: temperature must be positive, got {temperature!r}")
        self.train_by, self.inference_by, self.temperature = train, inference, temperature
        self.balances = train == "uniform"  # and a balance loss would find nothing to change

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
        logits_TE = self.gate(x_TD, experts, admission_E, context) / self.temperature
        how = self.train_by if self.training else self.inference_by
        if how == "uniform":
            logits_TE = torch.zeros_like(logits_TE) + admission_E.to(logits_TE).log()
        probs_TE = logits_TE.softmax(-1)
        rank_TE = logits_TE if how == "best" else logits_TE + gumbel_like(logits_TE)
        chosen_TK = rank_TE.topk(self.k, dim=-1).indices
        weight_TK = probs_TE.gather(1, chosen_TK)
        if self.k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        elif how == "uniform":
            weight_TK = torch.ones_like(weight_TK)
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"k={self.k}, train={self.train_by!r}, inference={self.inference_by!r}"


class ExpertDropout(Gate):
    """Hides each expert from each token with probability p in training.

    So that no token relies on one expert alone. Hidden experts keep a logit far below all others:
    where fewer than k are left, the best of the hidden are chosen still.

    Args:
        p: probability.
        gate: whose logits; `Linear` if left out.

    Raises:
        ValueError: p is not in [0, 1).
    """

    def __init__(self, p: float = 0.1, gate: Gate | None = None) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"ExpertDropout: p must be in [0, 1), got {p!r}")
        self.p = p
        self.gate = Linear() if gate is None else gate

    def entries(self, d_model: int) -> dict[str, Entry]:
        return self.gate.entries(d_model)

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        self.gate.build(d_model, generator, device, dtype)

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        if not self.training or not self.p:
            return logits_TE
        hidden_TE = torch.rand_like(logits_TE) < self.p
        # a token from which all are hidden sees all
        hidden_TE &= ~(hidden_TE | (admission_E == 0)).all(-1, keepdim=True)
        return torch.where(hidden_TE, logits_TE - 1e4, logits_TE)

    def extra_repr(self) -> str:
        return f"p={self.p}"
