"""Sigmoid scores whose biases even out the load, with a choice among groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, Gate, stacked
from growmoe.routers.router import Router, Routing, check_k


class BiasBalanced(Router):
    """Auxiliary-loss-free balance (Wang et al. 2024, arXiv 2408.15664) with group-limited choice.

    As in DeepSeek-V3 (arXiv 2412.19437, eqs. 12 to 16). With s = σ(logits) and a bias b_e, which
    has no gradient:

    1. Experts lie in groups; a group's score is the sum of its two largest s + b; the
       `chosen_groups` best groups stay.
    2. In these the k largest s + b are chosen.
    3. The combine weights are s (without bias), divided by their sum, times `scale`.

    After each training forward b_e rises by `rate` if e had fewer rows than the mean, and falls if
    more. An expert's group is id mod `groups`; clones stay in their parent's.

    Args:
        k: experts per token.
        rate: γ; what a forward changes the biases by (0.001 in the paper).
        groups: how many groups.
        chosen_groups: how many of them a token may choose in; all if left out.
        scale: of the combine weights (2.5 in DeepSeek-V3).
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k, groups or chosen_groups out of range, or a negative rate.
    """

    balances = True

    def __init__(
        self,
        k: int = 2,
        rate: float = 0.001,
        groups: int = 1,
        chosen_groups: int | None = None,
        scale: float = 1.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"BiasBalanced: groups must be a positive integer, got {groups!r}")
        chosen_groups = groups if chosen_groups is None else chosen_groups
        if not isinstance(chosen_groups, int) or not 1 <= chosen_groups <= groups:
            raise ValueError(
                f"BiasBalanced: chosen_groups must be in 1..{groups}, got {chosen_groups!r}"
            )
        if not rate >= 0:
            raise ValueError(f"BiasBalanced: rate must not be negative, got {rate!r}")
        self.rate, self.groups, self.chosen_groups, self.scale = rate, groups, chosen_groups, scale

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k

    def entries(self, d_model: int) -> dict[str, Entry]:
        def nearest_mean(values_P: Tensor, weights_P: Tensor) -> Tensor:
            share_P = weights_P.double() / weights_P.sum()
            return (share_P * values_P.double()).sum().round().to(values_P.dtype)

        return {
            **super().entries(d_model),
            # in steps of `rate`: an integer is exact whatever the model's dtype
            "bias_steps": Entry(_zero, parameter=False, merge=nearest_mean),
            "bias_pending": Entry(_zero, parameter=False, merge=nearest_mean),
            "group": Entry(
                _zero,
                parameter=False,
                merge=lambda values_P, _: values_P[0],
                numbered=lambda id: torch.tensor(id % self.groups),
            ),
        }

    @torch.no_grad()
    def advance(self, experts: Sequence[Expert]) -> None:
        for expert in experts:
            if not expert.frozen:
                steps, pending = _counters(expert)
                steps += pending
                pending.zero_()

    @torch.no_grad()
    def observe(self, experts: Sequence[Expert], routing: Routing) -> None:
        counts_E = routing.assignment.counts_E.float()
        step_E = torch.sign(counts_E.mean() - counts_E).long()
        for expert, step in zip(experts, step_E.unbind(), strict=True):
            if not expert.frozen:
                _counters(expert)[1].copy_(step)

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        scores_TE = logits_TE.sigmoid()
        biased_TE = scores_TE.detach() + self.rate * stacked(experts, "bias_steps")
        # not admitted: below all others whatever its bias
        biased_TE = torch.where(logits_TE.isfinite(), biased_TE, -1e9)
        if self.chosen_groups < self.groups:
            biased_TE = self._within_groups(biased_TE, stacked(experts, "group"))
        chosen_TK = biased_TE.topk(self.k, dim=-1).indices
        weight_TK = scores_TE.gather(1, chosen_TK)
        weight_TK = self.scale * weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        return Routing(assignment, scores_TE, logits_TE)

    def _within_groups(self, biased_TE: Tensor, group_E: Tensor) -> Tensor:
        """Experts of other groups far below, but above those not admitted: [T, E] -> [T, E]."""
        score_GT = []
        for g in range(self.groups):
            own_TE = biased_TE.masked_fill(group_E != g, -torch.inf)
            top_T2 = own_TE.topk(min(2, own_TE.shape[1]), dim=-1).values
            # a group of one admitted expert counts that one; one without any is never chosen
            second_T1 = torch.where(top_T2[:, 1:] > -1e8, top_T2[:, 1:], 0.0)
            score_GT.append(top_T2[:, 0] + second_T1.sum(-1))
        best_TG = torch.stack(score_GT, 1).topk(self.chosen_groups, dim=-1).indices
        allowed_TE = (best_TG[:, :, None] == group_E).any(1)
        return torch.where(allowed_TE, biased_TE, biased_TE - 1e4)

    def extra_repr(self) -> str:
        text = f"k={self.k}, rate={self.rate}"
        if self.groups > 1:
            text += f", groups={self.groups}, chosen_groups={self.chosen_groups}"
        return text + (f", scale={self.scale}" if self.scale != 1 else "")


def _counters(expert: Expert) -> tuple[Tensor, Tensor]:
    entries: Any = expert.entries
    return entries.bias_steps, entries.bias_pending


def _zero(_: torch.Generator) -> Tensor:
    return torch.zeros((), dtype=torch.int64)
