"""How many rows an expert takes in a forward, and what happens to those beyond.

Legend: T tokens, E experts, R rows chosen, C rows an expert takes, P rows that found no place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.routers.router import Routing

Drop = Literal["position", "gate"]


class Capacity:
    """Each expert takes at most C = ⌈factor · R / E⌉ rows (GShard, arXiv 2006.16668).

    A row beyond that is dropped, or goes to the token's next choice. A token without any row gets
    0 from the layer, so that with the usual residual connection it passes through unchanged;
    `layer.recorder.dropped` counts rows and tokens dropped.

    Args:
        factor: room relative to a balanced load; or "adaptive": the running mean of max load /
            mean load plus a tenth, between 1 and `most`, so that room follows the load (in the
            spirit of Tutel, arXiv 2206.03382).
        drop: whom an overfull expert keeps: "position", the first in the batch; "gate", those
            with the largest combine weights.
        reroute: a row that found no place goes to the token's best expert by logit that it does
            not have yet and that has room, as often as needed; its weight changes in proportion
            to the gate's probability.
        eval_factor: the factor in eval mode; None for no limit.
        most: the largest adaptive factor.

    Whom an expert keeps by gate, and where there is room to reroute to, depend on later tokens:
    these are refused in a causal model.

    Raises:
        ValueError: a factor that is not positive, or an unknown way to drop.
    """

    def __init__(
        self,
        factor: float | Literal["adaptive"] = 1.25,
        drop: Drop = "position",
        reroute: bool = False,
        eval_factor: float | None = None,
        most: float = 4.0,
    ) -> None:
        for name, value in (("factor", factor), ("eval_factor", eval_factor), ("most", most)):
            if value is None or (name == "factor" and value == "adaptive"):
                continue
            if isinstance(value, str) or not 0 < value < math.inf:
                raise ValueError(f"Capacity: {name} must be positive, got {value!r}")
        if drop not in get_args(Drop):
            raise ValueError(f"Capacity: drop must be one of {get_args(Drop)}, got {drop!r}")
        self.factor, self.drop, self.reroute = factor, drop, bool(reroute)
        self.eval_factor, self.most = eval_factor, most

    @property
    def sees_future(self) -> bool:
        """Whether what becomes of a token depends on later ones."""
        return self.drop == "gate" or self.reroute

    def __call__(self, routing: Routing, training: bool, imbalance: Tensor) -> Routing:
        """The routing with what overflows dropped or rerouted.

        Args:
            imbalance: float32 scalar, the running max load / mean load, for an adaptive factor.
        """
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return routing
        a = routing.assignment
        balanced = len(a.token_R) / a.num_experts
        room: int | Tensor
        if isinstance(factor, str):
            room = ((1.1 * imbalance).clamp(1, self.most) * balanced).ceil().long()
        else:
            room = math.ceil(factor * balanced)
            if room >= a.num_tokens:  # no expert has a token twice
                return routing
        place_R = self._place(a)
        if not self.reroute:
            return replace(routing, assignment=a.keep(place_R < room))
        return replace(routing, assignment=_reroute(routing, place_R, room, self._order))

    def _place(self, a: Assignment) -> Tensor:
        """Each row's place in its expert's queue, from 0: int64 [R]."""
        return _queue(a.expert_R, a.num_experts, self._order(a.weight_R))

    def _order(self, weight_R: Tensor) -> Tensor | None:
        """The order in which rows are served, None for that in which they stand."""
        if self.drop == "position":
            return None
        single_R = weight_R if weight_R.dim() == 1 else weight_R.mean(1)
        return single_R.detach().argsort(descending=True, stable=True)

    def __repr__(self) -> str:
        return (
            f"Capacity(factor={self.factor!r}, drop={self.drop!r}, reroute={self.reroute}, "
            f"eval_factor={self.eval_factor})"
        )


def _queue(expert_R: Tensor, num_experts: int, order_R: Tensor | None) -> Tensor:
    served_R = torch.arange(len(expert_R), device=expert_R.device) if order_R is None else order_R
    by_expert_R = served_R[expert_R[served_R].argsort(stable=True)]
    sorted_R = expert_R[by_expert_R]
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_R.device)
    counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R))
    start_E = counts_E.cumsum(0) - counts_E
    place_R = torch.empty_like(expert_R)
    place_R[by_expert_R] = torch.arange(len(expert_R), device=expert_R.device) - start_E[sorted_R]
    return place_R


def _reroute(
    routing: Routing,
    place_R: Tensor,
    room: int | Tensor,
    order: Callable[[Tensor], Tensor | None],
) -> Assignment:
    """Rounds in which every row without a place asks its token's best untried expert with room."""
    a = routing.assignment
    in_token_order = (a.token_R * a.num_experts + a.expert_R).argsort(stable=True)
    token_R, expert_R = a.token_R[in_token_order], a.expert_R[in_token_order]
    weight_R, kept_R = a.weight_R[in_token_order], (place_R < room)[in_token_order]
    probs_TE = routing.probs_TE
    # weight = scale · probability, whatever the router divided by
    scale_R = weight_R / _like(probs_TE[token_R, expert_R], weight_R).clamp_min(1e-20)
    taken_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    taken_TE[token_R, expert_R] = True
    open_TE = routing.logits_TE.isfinite() & ~taken_TE
    free_E = room - torch.zeros_like(a.counts_E).scatter_add_(0, expert_R, kept_R.long())
    for _ in range(a.num_experts):
        asks_R = (~kept_R).nonzero()[:, 0]
        open_TE = open_TE & (free_E > 0)
        token_P = token_R[asks_R]
        # one row of a token asks in each round, so that two never get the same expert
        first_P = torch.ones_like(token_P, dtype=torch.bool)
        first_P[1:] = token_P[1:] != token_P[:-1]
        hopeful_P = first_P & open_TE[token_P].any(1)
        asks_R, token_P = asks_R[hopeful_P], token_P[hopeful_P]
        if not len(asks_R):
            break
        best_P = routing.logits_TE[token_P].masked_fill(~open_TE[token_P], -torch.inf).argmax(1)
        new_weight_P = scale_R[asks_R] * _like(probs_TE[token_P, best_P], weight_R)
        place_P = _queue(best_P, a.num_experts, order(new_weight_P))
        open_TE[token_P, best_P] = False
        accepted_P = place_P < free_E[best_P]
        into_R, into_E = asks_R[accepted_P], best_P[accepted_P]
        expert_R = expert_R.index_copy(0, into_R, into_E)
        weight_R = weight_R.index_copy(0, into_R, new_weight_P[accepted_P])
        kept_R = kept_R.index_fill(0, into_R, True)
        free_E = free_E.scatter_add(0, into_E, -torch.ones_like(into_E))
    return Assignment.from_pairs(
        token_R[kept_R], expert_R[kept_R], weight_R[kept_R], a.num_experts, a.num_tokens
    )


def _like(prob_R: Tensor, weight_R: Tensor) -> Tensor:
    return prob_R.to(weight_R.dtype).view(-1, *[1] * (weight_R.dim() - 1))
