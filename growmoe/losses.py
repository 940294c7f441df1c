"""Auxiliary losses, as plain functions: of what a gate decided, or of the experts themselves.

    p_te  the gate's probability (or score) of expert e for token t, scores divided by their sum
    c_e   rows routed to expert e     R = Σ c_e     f_e = c_e / R     P_e = mean over tokens of p_te

Those of the gate take a `Routing` and can be given to a layer: `MoE(losses={entropy_loss: 0.01})`.
Counts have no gradient; where a formula is of counts alone, it flows through the combine weights.
All are 0 where nothing was routed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.experts.expert import Expert
from growmoe.routers.noisy_topk import cv_squared
from growmoe.routers.router import Routing


def balance_loss(routing: Routing) -> Tensor:
    """Switch load balance: E · Σ_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    It is 1 when both are uniform, and at most E.
    """
    return routing.assignment.num_experts * (_share(routing) * _mean_probs(routing)).sum()


def gshard_loss(routing: Routing) -> Tensor:
    """Mean probability times mean count: (1/E) Σ_e (c_e/T) P_e (GShard, 2006.16668, algorithm 1).

    Unlike the Switch loss it grows with the number of experts per token, and not with E.
    """
    a = routing.assignment
    count_E = a.counts_E.to(routing.probs_TE.dtype) / max(a.num_tokens, 1)
    return (count_E * _mean_probs(routing)).mean()


def importance_loss(routing: Routing) -> Tensor:
    """CV² of the experts' importance, the sum of their gate values (1701.06538, eq. 7).

    The gate values are the combine weights, so an expert that was not chosen adds nothing.
    """
    return cv_squared(_mass(routing))


def load_loss(routing: Routing) -> Tensor:
    """Squared relative load: Σ_e (c_e/B − 1)², with B = R/E the balanced load.

    E times the CV² of the counts. Its gradient is that of the same formula with each row counted
    as its combine weight over that weight's value.
    """
    a = routing.assignment
    weight_R = _single(a.weight_R)
    one_R = weight_R / weight_R.detach().clamp_min(1e-9)  # 1, with the weight's gradient
    balanced = max(len(weight_R), 1) / a.num_experts
    soft_E = _by_expert(one_R, routing)
    count_E = a.counts_E.to(soft_E.dtype)
    through_E = count_E + soft_E - soft_E.detach()
    return (through_E / balanced - 1).square().sum() if len(weight_R) else weight_R.sum()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss: mean of logsumexp(logits)² over tokens (ST-MoE, 2202.08906, eq. 5)."""
    logits_TE = routing.logits_TE
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(len(logits_TE), 1)


def entropy_loss(routing: Routing) -> Tensor:
    """Mean over tokens of the gate's entropy −Σ_e p log p, in nats: small for decided tokens.

    The dynamic loss of top-p routing (Huang et al. 2024, arXiv 2403.07652, eq. 6).
    """
    return _entropy(_probs(routing)).sum() / max(len(routing.probs_TE), 1)


def mutual_information_loss(routing: Routing) -> Tensor:
    """−I(token; expert) = mean over tokens of H(p_t) − H(P), in nats (Mod-Squad, 2212.08066).

    Least, −log E, where every token is decided and all experts are used alike.
    """
    return entropy_loss(routing) - _entropy(_mean_probs(routing))


def weight_diversity(experts: Sequence[Expert]) -> Tensor:
    """Mean over pairs of experts of their weights' squared cosine: 0 if orthogonal, 1 if alike.

    After Liu et al. 2023 (arXiv 2310.09762), who make the experts' weights orthogonal. Hidden
    units have no order, so two experts may compute the same and still have a low value: see
    `output_diversity`.

    Args:
        experts: all of one shape, as in `layer.experts.values()`.

    Raises:
        ValueError: experts of different sizes.
    """
    weights = [torch.cat([p.flatten() for p in e.body.parameters()]) for e in experts]
    if len({len(w) for w in weights}) > 1:
        raise ValueError("weight_diversity: the experts have different numbers of weights")
    return _mean_pair_cosine_squared(torch.stack(weights)[:, None])


def output_diversity(experts: Sequence[Expert], x_TD: Tensor) -> Tensor:
    """Mean over pairs of experts and inputs of their outputs' squared cosine.

    All experts run on all inputs, so give it a few.

    Args:
        x_TD: [T, D].
    """
    return _mean_pair_cosine_squared(torch.stack([e(x_TD) for e in experts]))


def _mean_pair_cosine_squared(value_ETD: Tensor) -> Tensor:
    unit_ETD = F.normalize(value_ETD, dim=-1)
    cosine_TEE = torch.einsum("etd,ftd->tef", unit_ETD, unit_ETD)
    pairs = len(value_ETD) * (len(value_ETD) - 1)
    off_TEE = cosine_TEE - torch.diag_embed(cosine_TEE.diagonal(dim1=1, dim2=2))
    return off_TEE.square().sum() / max(pairs * value_ETD.shape[1], 1)


def _probs(routing: Routing) -> Tensor:
    probs_TE = routing.probs_TE
    return probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(1e-20)


def _mean_probs(routing: Routing) -> Tensor:
    return _probs(routing).sum(0) / max(len(routing.probs_TE), 1)


def _share(routing: Routing) -> Tensor:
    share_E = routing.assignment.counts_E.to(routing.probs_TE.dtype)
    return share_E / share_E.sum().clamp_min(1)


def _mass(routing: Routing) -> Tensor:
    return _by_expert(_single(routing.assignment.weight_R), routing)


def _single(weight_R: Tensor) -> Tensor:
    return weight_R if weight_R.dim() == 1 else weight_R.mean(1)


def _by_expert(value_R: Tensor, routing: Routing) -> Tensor:
    total_E = value_R.new_zeros(routing.assignment.num_experts)
    return total_E.index_add(0, routing.assignment.expert_R, value_R)


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs.clamp_min(1e-20)).sum(-1)
