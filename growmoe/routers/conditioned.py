"""Logits that depend on where a token comes from: its task, client or modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, ContextMissing, Entry, Gate, Linear, stacked, told, wide


class Conditioned(Gate):
    """Adds to another gate's logits a learned bias of each expert for each value of the context.

    A sparse form of the task-conditioned gates of Kudugunta et al. 2021 (Task-MoE, arXiv
    2110.03742) and, with `by="modality"`, of modality-aware routing. What the caller does not
    know gets no bias, so that the gate then is the plain one.

    Args:
        num: how many values the context takes, 0 to num − 1.
        by: what of the context: "task", "client", "modality" or any name the caller uses.
        gate: the gate whose logits are conditioned; `Linear` if left out.
        alone: the bias alone decides, not the token.

    Raises:
        ValueError: num is not a positive integer; a value of the context out of range.
    """

    def __init__(
        self, num: int, by: str = "task", gate: Gate | None = None, alone: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(num, int) or num < 1:
            raise ValueError(f"Conditioned: num must be a positive integer, got {num!r}")
        self.num, self.by, self.alone = num, by, alone
        self.gate = Linear() if gate is None else gate

    def entries(self, d_model: int) -> dict[str, Entry]:
        def fresh(generator: torch.Generator) -> Tensor:
            # the gate's own entries tell experts apart, unless there are none
            return torch.randn(self.num, generator=generator) * (0.1 if self.alone else 0.0)

        own = {} if self.alone else self.gate.entries(d_model)
        return {**own, f"{self.by}_bias": Entry(fresh)}

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        if not self.alone:
            self.gate.build(d_model, generator, device, dtype)

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        (bias_EC,) = wide(stacked(experts, f"{self.by}_bias"))
        if self.alone:
            logits_TE = bias_EC.new_zeros(len(x_TD), len(experts)) + admission_E.to(bias_EC).log()
        else:
            logits_TE = self.gate(x_TD, experts, admission_E, context)
        try:
            value_T = told(context, self.by, len(x_TD), x_TD.device)
        except ContextMissing:
            if self.alone:
                raise
            return logits_TE
        if len(value_T) and not 0 <= int(value_T.min()) <= int(value_T.max()) < self.num:
            raise ValueError(f"Conditioned: {self.by!r} must be in 0..{self.num - 1}")
        return logits_TE + bias_EC.T[value_T].to(logits_TE.dtype)

    def extra_repr(self) -> str:
        return f"num={self.num}, by={self.by!r}, alone={self.alone}"
