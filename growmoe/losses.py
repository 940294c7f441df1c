"""Auxiliary losses of the gate, as plain functions of what it decided."""

from __future__ import annotations

import torch
from torch import Tensor

from growmoe.assignment import Assignment


def balance_loss(probs_TE: Tensor, assignment: Assignment) -> Tensor:
    """Switch load balance: E · Σ_e f_e · P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    f_e is the share of the routed rows that went to expert e, P_e the mean over tokens of its
    probability, scores normalised over the experts. It is 1 when both are uniform.

    Args:
        probs_TE: float [T, E], the gate's probabilities or scores over all experts.
        assignment: what was chosen; no gradient flows through it.

    Returns:
        A scalar; 0 if nothing was routed.
    """
    share_E = assignment.counts_E.to(probs_TE.dtype)
    share_E = share_E / share_E.sum().clamp_min(1)
    probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    mean_E = probs_TE.sum(0) / max(len(probs_TE), 1)
    return assignment.num_experts * (share_E * mean_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)² (Zoph et al. 2022, 2202.08906, eq. 5).

    Args:
        logits_TE: float [T, E].

    Returns:
        A scalar; 0 without tokens.
    """
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(len(logits_TE), 1)
