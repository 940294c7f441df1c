"""Logits by angle: how long an input or a key is does not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, Gate, linear_key, stacked, wide


class Cosine(Gate):
    """Cosine gate (Chi et al. 2022, X-MoE, arXiv 2204.09179, eq. 4).

    logit_e = cos(W x, key_e) · scale, with W a projection to fewer dimensions and a learned scale
    (1/τ in the paper). A linear gate's logits grow with the norms of keys and tokens, which lets
    one expert win everywhere; these do not.

    Args:
        d_proj: the projection's width; E/2 in the paper. No projection if left out.
        scale: the initial scale.
        largest: the scale's upper bound.

    Raises:
        ValueError: a width or scale that is not positive, or it already belongs to a layer.
    """

    projection: Tensor | None
    log_scale: Tensor

    def __init__(
        self, d_proj: int | None = None, scale: float = 10.0, largest: float = 100.0
    ) -> None:
        super().__init__()
        if d_proj is not None and (not isinstance(d_proj, int) or d_proj < 1):
            raise ValueError(f"Cosine: d_proj must be a positive integer, got {d_proj!r}")
        if not 0 < scale <= largest:
            raise ValueError(f"Cosine: scale must be in (0, {largest}], got {scale!r}")
        self.d_proj, self.scale, self.largest = d_proj, scale, largest
        self.register_parameter("projection", None)

    def entries(self, d_model: int) -> dict[str, Entry]:
        if self.d_proj is None:
            return {"key": linear_key(d_model)}

        def toward(mean_D: Tensor, keys_EP: Tensor) -> Tensor:
            assert self.projection is not None
            return self.projection.detach().to(mean_D) @ mean_D

        return {"key": Entry(linear_key(self.d_proj).fresh, toward=toward)}

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        refuse_second_layer(self, "log_scale")
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(self.scale), device=device, dtype=dtype)
        )
        if self.d_proj is not None:
            draw_PD = torch.randn(self.d_proj, d_model, generator=generator) * d_model**-0.5
            self.projection = nn.Parameter(draw_PD.to(device=device, dtype=dtype))

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        x_TD, keys_EP, log_scale = wide(x_TD, stacked(experts, "key"), self.log_scale)
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.projection is not None:
                x_TD = x_TD @ self.projection.to(x_TD.dtype).T
            cosine_TE = F.normalize(x_TD, dim=-1) @ F.normalize(keys_EP, dim=-1).T
            logits_TE = cosine_TE * log_scale.clamp_max(math.log(self.largest)).exp()
        return logits_TE + admission_E.to(logits_TE).log()

    def extra_repr(self) -> str:
        return f"d_proj={self.d_proj}, scale={self.scale}"


def refuse_second_layer(module: nn.Module, made: str) -> None:
    """Raise ValueError if `build` was here before: its parameters are another layer's."""
    if hasattr(module, made):
        raise ValueError(
            f"this {type(module).__name__} already belongs to a layer; give each layer its own "
            "(copy.deepcopy before it is first used)"
        )
