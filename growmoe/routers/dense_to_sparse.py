"""Every token begins with every expert, and ends with few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.cosine import refuse_second_layer
from growmoe.routers.gate import Context, Gate
from growmoe.routers.gumbel import gumbel_like
from growmoe.routers.router import Router, Routing, from_mask


class DenseToSparse(Router):
    """Dense-to-sparse gate (Nie et al. 2021, EvoMoE, arXiv 2112.14397, section 3.3).

    p = softmax((logits + Gumbel noise) / τ), noise in training only; a token takes the experts
    with p > `threshold`, and its best in any case; the combine weights are p. τ falls
    exponentially from `start` to `end` over `steps` training forwards, so that at first nearly all
    experts pass and at last nearly always one.

    Args:
        steps: training forwards over which τ falls.
        start, end: τ at the first forward and from `steps` on (2 and 0.3 in the paper).
        threshold: what p must exceed; half of 1/E if left out.
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: steps is not a positive integer, or not start >= end > 0.
    """

    anneal_steps: Tensor

    def __init__(
        self,
        steps: int = 1000,
        start: float = 2.0,
        end: float = 0.3,
        threshold: float | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"DenseToSparse: steps must be a positive integer, got {steps!r}")
        if not start >= end > 0:
            raise ValueError(f"DenseToSparse: needs start >= end > 0, got {start!r} and {end!r}")
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"DenseToSparse: threshold must be in [0, 1), got {threshold!r}")
        self.steps, self.start, self.end, self.threshold = steps, start, end, threshold

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        refuse_second_layer(self, "anneal_steps")
        super().build(d_model, generator, device, dtype)
        # -1: the first training forward makes it 0
        self.register_buffer("anneal_steps", torch.tensor(-1, device=device))

    def advance(self, experts: Sequence[Expert]) -> None:
        self.anneal_steps += 1

    def temperature(self) -> Tensor:
        """τ now: a float64 scalar."""
        done = (self.anneal_steps.double() / self.steps).clamp(0, 1)
        return self.start * torch.exp(done * math.log(self.end / self.start))

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        drawn_TE = logits_TE + gumbel_like(logits_TE) if self.training else logits_TE
        probs_TE = (drawn_TE / self.temperature().to(drawn_TE.dtype)).softmax(-1)
        # experts admitted so far, so that a birth does not move it
        threshold = 0.5 / admission_E.sum() if self.threshold is None else self.threshold
        best_T1 = probs_TE.argmax(-1, keepdim=True)
        chosen_TE = (probs_TE > threshold).scatter(1, best_T1, True)
        return Routing(from_mask(chosen_TE, probs_TE), probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, start={self.start}, end={self.end}, threshold={self.threshold}"
