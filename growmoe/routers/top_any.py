"""Each token takes every expert whose own threshold it passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, linear_key, stacked, wide
from growmoe.routers.router import Router, Routing, from_mask


class TopAny(Router):
    """Top-any gating (Guo et al. 2024, DynMoE, arXiv 2405.14297, eqs. 3 to 6).

    An expert is chosen where σ(cos(x, key_e)) > σ(threshold_e); a token that passes none takes the
    one it comes closest to. The n chosen have equal combine weights 1/n, whose gradient is that
    of σ(cos) − σ(threshold) (straight through), so that keys and thresholds are learned. In
    training its own loss, ‖K Kᵀ − I‖_F + mean ‖key‖ with K the normalised keys (eq. 7), keeps keys
    apart and short.

    In growmoe the number of experts changes by surgery, not by masks at set steps.

    Args:
        diversity: coefficient of that loss.

    Raises:
        ValueError: a negative coefficient.
    """

    def __init__(self, diversity: float = 0.01) -> None:
        super().__init__()
        if not diversity >= 0:
            raise ValueError(f"TopAny: diversity must not be negative, got {diversity!r}")
        self.diversity = diversity

    def entries(self, d_model: int) -> dict[str, Entry]:
        return {"key": linear_key(d_model), "threshold": Entry(lambda _: torch.zeros(()))}

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        x_TD, key_ED = wide(x_TD, stacked(experts, "key"))
        threshold_E = stacked(experts, "threshold").to(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            unit_ED = F.normalize(key_ED, dim=-1)
            cosine_TE = F.normalize(x_TD, dim=-1) @ unit_ED.T
            logits_TE = cosine_TE + admission_E.to(cosine_TE).log()
            scores_TE = cosine_TE.sigmoid()
            # a newborn passes its threshold only where σ(cos) times its admission does
            margin_TE = scores_TE * admission_E.to(cosine_TE) - threshold_E.sigmoid()
            margin_TE = torch.where(admission_E > 0, margin_TE, -torch.inf)
            best_T1 = margin_TE.argmax(-1, keepdim=True)
            chosen_TE = (margin_TE > 0).scatter(1, best_T1, True)
            through_TE = torch.where(admission_E > 0, margin_TE, 0.0)
            gate_TE = 1 + (through_TE - through_TE.detach())
            weight_TE = gate_TE / chosen_TE.sum(-1, keepdim=True)
            aux = None
            if self.training and self.diversity:
                gram_EE = unit_ED @ unit_ED.T
                identity_EE = torch.eye(len(experts), device=gram_EE.device, dtype=gram_EE.dtype)
                apart = (gram_EE - identity_EE).square().sum().clamp_min(1e-12).sqrt()
                aux = self.diversity * (apart + key_ED.norm(dim=-1).mean())
        return Routing(from_mask(chosen_TE, weight_TE), scores_TE, logits_TE, aux=aux)

    def extra_repr(self) -> str:
        return f"diversity={self.diversity}"
