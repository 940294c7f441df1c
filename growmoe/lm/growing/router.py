"""Chooses paths for sequences: as it is told, or by the trigrams that each path has learned.

T tokens    E experts    B sequences    P tokens before each    H buckets
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers import Entry, Router, Routing
from growmoe.routers.gate import Context, stacked, told

ALL = -1  # in place of a path's id: every path runs


class PathRouter(Router):
    """Sends all tokens of a sequence through one path, or through all of them.

    The context's "path" is the id for each sequence, or `ALL`, which weighs them equally. What it
    knows of a path is how often each trigram of tokens (hashed into H buckets) was learned by it:
    sums, which do not depend on the order of the stream, and which a merge adds exactly. `scores`
    judges by them, as a naive Bayes classifier with one half added to each count, and `distance`
    tells how unlike all of them a batch is.

    Args:
        buckets: H.
    """

    balances = True
    capped = False
    wants = "path"

    def __init__(self, buckets: int = 1 << 14) -> None:
        super().__init__()
        if not isinstance(buckets, int) or buckets < 1:
            raise ValueError(f"PathRouter: buckets must be a positive integer, got {buckets!r}")
        self.buckets = buckets

    def entries(self, d_model: int) -> dict[str, Entry]:
        def none(*_: object) -> Tensor:
            return torch.zeros(self.buckets)

        # a clone has learned none of its parent's text
        return {
            "trigrams": Entry(
                none, parameter=False, clone=none, merge=lambda values, weights: values.sum(0)
            )
        }

    def build(self, *_: object, **__: object) -> None:
        """It has nothing of its own."""

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        known = ALL if context is None or context.get("path") is None else context["path"]
        path_T = told({"path": known}, "path", len(x_TD), x_TD.device)
        id_E = torch.tensor([e.id for e in experts], device=x_TD.device)
        chosen_TE = path_T[:, None] == id_E
        if not bool((chosen_TE.any(1) | (path_T == ALL)).all()):
            unknown = sorted(set(path_T.tolist()) - {ALL} - set(id_E.tolist()))
            raise ValueError(f"path: no path {unknown}; the living are {id_E.tolist()}")
        weight_TE = torch.where((path_T == ALL)[:, None], 1 / len(experts), chosen_TE.float())
        token_R, expert_R = weight_TE.nonzero(as_tuple=True)
        assignment = Assignment.from_pairs(
            token_R, expert_R, weight_TE[token_R, expert_R], len(experts), len(x_TD)
        )
        return Routing(assignment, weight_TE, weight_TE.log())

    @torch.no_grad()
    def learn(self, expert: Expert, token_BS: Tensor) -> None:
        """Count the trigrams of what an expert learns: int [B, S]."""
        counts_H = cast(Tensor, expert.entries.trigrams)
        trigram = self._hash(token_BS).reshape(-1)
        counts_H.index_add_(0, trigram, torch.ones_like(trigram, dtype=counts_H.dtype))

    @torch.no_grad()
    def scores(self, token_BP: Tensor, experts: Sequence[Expert]) -> Tensor:
        """Log-likelihood of tokens under each path's counts: int [B, P], P >= 3 -> [B, E]."""
        return self._frequencies(experts).log()[:, self._hash(token_BP)].sum(-1).T

    @torch.no_grad()
    def distance(self, token_BS: Tensor, experts: Sequence[Expert], share_E: Tensor) -> float:
        """How unlike the text of paths a batch is: 1 − Σ_h √(p_h q_h), in [0, 1].

        The squared Hellinger distance between the frequencies p of its trigrams and those q of what
        the paths have learned, mixed by shares that sum to 1. Unlike a loss, it also rises where
        new text is easier than the old. A small batch lies further from everything than a large
        one, so only batches of one size compare.
        """
        frequency_EH = self._frequencies(experts)
        q_H = share_E.to(frequency_EH) @ frequency_EH
        count_H = self._hash(token_BS).flatten().bincount(minlength=self.buckets)
        return 1.0 - float((count_H / count_H.sum() * q_H).sqrt().sum())

    def _frequencies(self, experts: Sequence[Expert]) -> Tensor:
        counts_EH = stacked(experts, "trigrams").double() + 0.5
        return counts_EH / counts_EH.sum(1, keepdim=True)

    def _hash(self, token_BS: Tensor) -> Tensor:
        a, b, c = token_BS[:, :-2].long(), token_BS[:, 1:-1].long(), token_BS[:, 2:].long()
        mixed = (a * 0x9E3779B1 + b * 0x85EBCA77 + c * 0xC2B2AE3D) & 0x7FFFFFFF
        return (mixed ^ (mixed >> 15)) % self.buckets

    def extra_repr(self) -> str:
        return f"buckets={self.buckets}"
