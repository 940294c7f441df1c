"""Experts take mixtures of tokens, and tokens take mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.cosine import refuse_second_layer
from growmoe.routers.gate import Context, Entry, stacked, wide
from growmoe.routers.router import Router, Routing


@dataclass(frozen=True)
class SoftAssignment(Assignment):
    """Rows that are mixtures: B sequences of N tokens, E experts with S slots each.

    R = E · B · S rows, by expert, then sequence, then slot. For the signals each row stands for
    the token that has the largest part in it, with the row's whole combine weight.

    Attributes:
        dispatch_BNES: float, how much of each token is in each slot; sums to 1 over N.
        combine_BNES: float, how much of each slot a token takes; sums to 1 over E and S.
    """

    dispatch_BNES: Tensor | None = None
    combine_BNES: Tensor | None = None

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """The slots' mixtures of tokens: [T, D] -> [R, D]."""
        assert self.dispatch_BNES is not None
        b, n, _, _ = self.dispatch_BNES.shape
        x_BND = x_TD.view(b, n, x_TD.shape[1])
        slot_EBSD = torch.einsum("bnes,bnd->ebsd", self.dispatch_BNES.to(x_TD.dtype), x_BND)
        return slot_EBSD.reshape(-1, x_TD.shape[1])

    def combine(self, out_RD: Tensor) -> Tensor:
        """The tokens' mixtures of slots: [R, D] -> [T, D]."""
        assert self.combine_BNES is not None
        b, _, e, s = self.combine_BNES.shape
        out_EBSD = out_RD.view(e, b, s, out_RD.shape[1])
        y_BND = torch.einsum("bnes,ebsd->bnd", self.combine_BNES.to(out_RD.dtype), out_EBSD)
        return y_BND.reshape(self.num_tokens, out_RD.shape[1])


class SoftMoE(Router):
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, eqs. 1 to 3 and section 2.3).

    With X the tokens of a sequence and Φ the experts' slots, logits = scale · l2(X) · l2(Φ). The
    slots are X̃ = softmax over tokens (logits)ᵀ X, expert e computes its own, and
    Y = softmax over slots (logits) Ỹ. Nothing is discrete, every expert has the same load, and a
    token's output depends on its whole sequence.

    A sequence is the last dimension but one of the layer's input, or the context's "length".

    Args:
        slots: slots of each expert; the paper has tokens / experts of them for the cost of k = 1.

    Raises:
        ValueError: slots is not a positive integer.
    """

    sees_future = True
    balances = True
    capped = False
    scale: Tensor

    def __init__(self, slots: int = 1) -> None:
        super().__init__()
        if not isinstance(slots, int) or slots < 1:
            raise ValueError(f"SoftMoE: slots must be a positive integer, got {slots!r}")
        self.slots = slots

    def entries(self, d_model: int) -> dict[str, Entry]:
        def fresh(generator: torch.Generator) -> Tensor:
            return torch.randn(self.slots, d_model, generator=generator) * d_model**-0.5

        def toward(mean_D: Tensor, keys_ESD: Tensor) -> Tensor:
            return mean_D.expand(self.slots, d_model).clone()

        return {"key": Entry(fresh, toward=toward)}

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        refuse_second_layer(self, "scale")
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        length = len(x_TD) if context is None else int(context.get("length", len(x_TD)))
        if length and len(x_TD) % length:
            raise ValueError(f"SoftMoE: {len(x_TD)} tokens are no whole sequences of {length}")
        x_BND, key_ESD = wide(
            x_TD.reshape(-1, max(length, 1), x_TD.shape[1]), stacked(experts, "key")
        )
        with torch.autocast(x_TD.device.type, enabled=False):
            unit_BND, unit_ESD = F.normalize(x_BND, dim=-1), F.normalize(key_ESD, dim=-1)
            logits_BNES = torch.einsum("bnd,esd->bnes", unit_BND, unit_ESD)
            logits_BNES = logits_BNES * self.scale.to(logits_BNES.dtype)
            dispatch_BNES = logits_BNES.softmax(1)
            admitted_BNES = logits_BNES + admission_E.to(logits_BNES).log()[:, None]
            combine_BNES = admitted_BNES.flatten(2).softmax(-1).view_as(logits_BNES)
        b, n, e, s = logits_BNES.shape
        first_B = torch.arange(b, device=x_TD.device)[:, None, None] * n
        nearest_BES = dispatch_BNES.argmax(1) + first_B if n else logits_BNES.new_zeros(b, e, s)
        assignment = SoftAssignment(
            token_R=nearest_BES.long().transpose(0, 1).reshape(-1),
            expert_R=torch.arange(e, device=x_TD.device).repeat_interleave(b * s),
            weight_R=combine_BNES.sum(1).transpose(0, 1).reshape(-1),
            counts_E=torch.full((e,), b * s, dtype=torch.int64, device=x_TD.device),
            num_tokens=len(x_TD),
            dispatch_BNES=dispatch_BNES,
            combine_BNES=combine_BNES,
        )
        probs_TE = combine_BNES.sum(-1).reshape(-1, e)
        return Routing(assignment, probs_TE, admitted_BNES.logsumexp(-1).reshape(-1, e))

    def extra_repr(self) -> str:
        return f"slots={self.slots}"
