"""Each token takes its k best experts by a gate whose noise is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, Gate, stacked, wide
from growmoe.routers.router import Router, Routing, check_k


class NoisyTopK(Router):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, eqs. 3 to 5, appendix A).

    H(x)_e = logit_e + normal draw · softplus(x · noise_e), in training; the k largest, softmax over
    these. Its own losses keep the load even: `importance` · CV²(Σ gate values) and
    `load` · CV²(Load), where Load_e is the sum over tokens of the probability that e would be
    among the k best were its noise drawn again: Φ((logit_e − kth best of the others) / sd_e).

    Args:
        k: experts per token.
        importance, load: coefficients of its losses (0.1 each in the paper).
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k is not a positive integer, or a coefficient is negative.
    """

    balances = True

    def __init__(
        self, k: int = 2, importance: float = 0.1, load: float = 0.1, gate: Gate | None = None
    ) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        if not (importance >= 0 and load >= 0):
            raise ValueError(
                f"NoisyTopK: coefficients must not be negative, got {importance!r} and {load!r}"
            )
        self.importance, self.load = importance, load

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k

    def entries(self, d_model: int) -> dict[str, Entry]:
        # zero as in the paper, so that training begins with the same noise for all
        return {**super().entries(d_model), "noise": Entry(lambda _: torch.zeros(d_model))}

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        clean_TE = self.gate(x_TD, experts, admission_E, context)
        noisy_TE, sd_TE = clean_TE, torch.zeros_like(clean_TE)
        if self.training:
            x_wide_TD, noise_ED = wide(x_TD, stacked(experts, "noise"))
            with torch.autocast(x_TD.device.type, enabled=False):
                sd_TE = F.softplus(x_wide_TD @ noise_ED.T).to(clean_TE.dtype)
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * sd_TE
        top_TK, chosen_TK = noisy_TE.topk(self.k, dim=-1)
        assignment = Assignment.from_choice(chosen_TK, top_TK.softmax(-1), len(experts))
        aux = None
        if self.training and len(x_TD) and (self.importance or self.load):
            importance_E = assignment.dense().sum(0)
            load_E = smooth_load(clean_TE, noisy_TE, sd_TE, self.k)
            aux = self.importance * cv_squared(importance_E) + self.load * cv_squared(load_E)
        return Routing(assignment, noisy_TE.softmax(-1), noisy_TE, aux=aux)

    def extra_repr(self) -> str:
        return f"k={self.k}, importance={self.importance}, load={self.load}"


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, sd_TE: Tensor, k: int) -> Tensor:
    """Expected number of tokens of each expert, from [T, E] (appendix A, eqs. 8 to 10): [E].

    With as many experts as k, all tokens.
    """
    num_experts = clean_TE.shape[1]
    if num_experts <= k:
        return clean_TE.new_full((num_experts,), float(len(clean_TE)))
    top_TK = noisy_TE.topk(k + 1, dim=-1).values
    # the kth best of the others: the (k+1)th of all for one among the k best, else the kth
    inside_TE = noisy_TE >= top_TK[:, k - 1 : k]
    rival_TE = torch.where(inside_TE, top_TK[:, k:], top_TK[:, k - 1 : k])
    # an expert not admitted has no chance; one whose rivals are not admitted is certain
    admitted_TE, rivals_TE = clean_TE.isfinite(), rival_TE.isfinite()
    gap_TE = torch.where(admitted_TE & rivals_TE, clean_TE - rival_TE, 0.0)
    chance_TE = torch.special.ndtr(gap_TE / sd_TE.clamp_min(1e-6))
    chance_TE = torch.where(admitted_TE, torch.where(rivals_TE, chance_TE, 1.0), 0.0)
    return chance_TE.sum(0)


def cv_squared(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation, variance / mean²: [E] -> scalar; 0 if all are 0.

    The variance is that of the E values themselves (1/E, not 1/(E − 1)), so that of one expert
    is 0.
    """
    mean = value_E.mean()
    return (value_E - mean).square().mean() / mean.square().clamp_min(1e-20)
