"""Tokens and experts are matched so that every expert has the same load."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy  # its rooms are loaded at their first use: a second less to import growmoe
import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Gate
from growmoe.routers.router import Router, Routing, check_k


class Sinkhorn(Router):
    """Sinkhorn routing (Clark et al. 2022, arXiv 2202.01169, section 4.1).

    In training each token takes the k experts with the largest entries of the transport plan Π
    between tokens and experts: exp(logits) scaled until all rows and all columns have equal sums.
    The combine weight is the softmax probability. In eval mode the k largest logits.

    What a token is given in training depends on the whole batch.

    Args:
        k: experts per token.
        iterations: the most scalings of rows and columns (they stop within 1e-4).
        gate: how logits come about; `Linear` if left out.

    Raises:
        ValueError: k or iterations not a positive integer.
    """

    sees_future = True
    balances = True

    def __init__(self, k: int = 1, iterations: int = 100, gate: Gate | None = None) -> None:
        super().__init__(gate)
        self.k = check_k(self, k)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"Sinkhorn: iterations must be a positive integer, got {iterations!r}")
        self.iterations = iterations

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
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        probs_TE = logits_TE.softmax(-1)
        plan_TE = logits_TE.detach()
        if self.training and len(x_TD):
            admission_E = admission_E.to(plan_TE)
            plan_TE = transport_plan(plan_TE, self.iterations, admission_E / admission_E.sum())
        chosen_TK = plan_TE.topk(self.k, dim=-1).indices
        weight_TK = probs_TE.gather(1, chosen_TK)
        if self.k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        return Routing(assignment, probs_TE, logits_TE)

    def extra_repr(self) -> str:
        return f"k={self.k}, iterations={self.iterations}"


@torch.no_grad()
def transport_plan(
    logits_TE: Tensor, iterations: int = 100, share_E: Tensor | None = None
) -> Tensor:
    """log Π, with Π ∝ exp(logits), row sums 1/T and column sums `share` (Sinkhorn 1964).

    Args:
        logits_TE: float [T, E]; -inf where an expert cannot be chosen.
        share_E: float [E], the columns' sums; 1/E if left out. A column with 0 stays empty.
    """
    num_tokens, num_experts = logits_TE.shape
    if share_E is None:
        share_E = logits_TE.new_full((num_experts,), 1 / num_experts)
    row, column_E = -math.log(max(num_tokens, 1)), share_E.log()
    plan_TE = logits_TE.log_softmax(-1) + row
    for _ in range(iterations):
        sums_E = plan_TE.logsumexp(0)
        plan_TE = plan_TE + torch.where(sums_E.isfinite(), column_E - sums_E, 0.0)
        off_T = plan_TE.logsumexp(1, keepdim=True) - row
        plan_TE = plan_TE - off_T
        if not plan_TE.is_cuda and off_T.abs().max() < 1e-4:
            break
    return plan_TE


class BASE(Router):
    """Balanced assignment (Lewis et al. 2021, BASE layers, arXiv 2103.16716, eqs. 1 to 3).

    In training the tokens are divided so that the sum of the logits is largest while every expert
    has the same number (where T is no multiple of E, one more for some), solved exactly by
    scipy's `linear_sum_assignment` on the CPU: time grows with T² · E, so it is for batches of a
    few thousand tokens. In eval mode each token takes its best expert. The combine weight is
    σ(logit).

    What a token is given in training depends on the whole batch.

    Args:
        gate: how logits come about; `Linear` if left out.
    """

    k = 1
    sees_future = True
    balances = True
    capped = False

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        logits_TE = self.gate(x_TD, experts, admission_E, context)
        if self.training and len(x_TD):
            share_E = [e.admission for e in experts]
            chosen_T = balanced_assignment(logits_TE, share_E)
        else:
            chosen_T = logits_TE.argmax(-1)
        chosen_T1 = chosen_T[:, None]
        scores_TE = logits_TE.sigmoid()
        assignment = Assignment.from_choice(chosen_T1, scores_TE.gather(1, chosen_T1), len(experts))
        return Routing(assignment, scores_TE, logits_TE)


@torch.no_grad()
def balanced_assignment(logits_TE: Tensor, share_E: Sequence[float] | None = None) -> Tensor:
    """The expert of each token, with the largest sum of logits under equal loads: int64 [T].

    Args:
        logits_TE: float [T, E].
        share_E: the experts' loads in proportion to each other; equal if left out. Each expert has
            its share rounded down or up.
    """
    num_tokens, num_experts = logits_TE.shape
    share_E = [1.0] * num_experts if share_E is None else list(share_E)
    even = [num_tokens * share / sum(share_E) for share in share_E]
    fewest = torch.tensor([math.floor(n + 1e-9) for n in even])
    most = torch.tensor([math.ceil(n - 1e-9) for n in even])
    # places that must be taken, then those that may be left; nobody takes what is left
    owner_P = torch.arange(num_experts).repeat_interleave(fewest)
    owner_P = torch.cat([owner_P, torch.arange(num_experts).repeat_interleave(most - fewest)])
    score_PP = torch.zeros(len(owner_P), len(owner_P), dtype=torch.float64)
    score_PP[num_tokens:, : int(fewest.sum())] = -1e12
    score_PP[:num_tokens] = logits_TE.double().cpu().nan_to_num(neginf=-1e9)[:, owner_P]
    _, place_P = scipy.optimize.linear_sum_assignment(score_PP.numpy(), maximize=True)
    return owner_P[torch.from_numpy(place_P)[:num_tokens]].to(logits_TE.device)
