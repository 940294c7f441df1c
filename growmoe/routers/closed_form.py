"""A gate that is solved, not trained, and so cannot forget.

Legend: T inputs, D features, G = D + 1, E experts, C labels, S experts on the shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.experts.moments import Moments
from growmoe.experts.statistics import NOVEL_Z, READY_HITS, RecordView, distance_z
from growmoe.routers.duel import Duel
from growmoe.routers.gate import Context, Entry
from growmoe.routers.ridge import solve_blocks
from growmoe.routers.router import Router, Routing


class ClosedFormGate(Router):
    """Chooses among `Moments` experts by least squares on what they have summed up.

    In training, with the labels as context, an input goes to the expert of its label that finds
    it least novel (`growmoe.signals`); what is novel to all of them goes to the youngest, if one
    was just born. An input whose label has no expert is not routed.

    Without context, a global head shortlists and local heads decide:

    1. W = (Σ_e M_e + r I)⁻¹ Σ_e M_e e_G y_eᵀ: ridge regression onto labels over everything all
       experts have seen, as RanPAC (arXiv 2307.02251, eq. 5) and ACIL (2205.14922) solve it, since
       the sum of the experts' moments is the moment of everything.
    2. The S best labels are each represented by their expert that finds the input least novel.
    3. Each pair (a, b) of these has a local head w, least squares onto ±1 on M_a + M_b alone: what
       separates two experts is told best by their own scatter, not by everyone's. The moments also
       tell how each of the two scores on it, with mean w·m and variance wᵀMw/n − (w·m)². Taken as
       Gaussians, these make the score s a log-likelihood ratio: ½ ln(v_b / v_a) +
       (s − μ_b)² / 2v_b − (s − μ_a)² / 2v_a, whichever of the two has had more inputs so far. The
       expert's weight is Σ over its opponents of σ(ratio), over the sum of all.

    Where the experts keep their features in blocks (`Moments`), each block has heads of its own;
    their mean score decides globally, their mean ratio locally. Heads are solved when first needed
    and kept until the moments behind them change.

    Args:
        shortlist: S.
        ridge: r of the global head, in average examples: r = ridge · mean diagonal / count.
        local_ridge: the same for the local heads.
    """

    wants = "label"
    balances = True  # by what the labels are; there is nothing to even out
    capped = False

    def __init__(self, shortlist: int = 4, ridge: float = 0.3, local_ridge: float = 2.0) -> None:
        super().__init__()
        if not isinstance(shortlist, int) or shortlist < 1:
            raise ValueError(f"shortlist must be a positive integer, got {shortlist!r}")
        if not (ridge > 0 and local_ridge > 0):
            raise ValueError(f"ridges must be positive, got {ridge!r} and {local_ridge!r}")
        self.shortlist, self.ridge, self.local_ridge = shortlist, ridge, local_ridge
        self._head: tuple[Any, Tensor] | None = None  # of whom, and the head
        self._duels: dict[Any, Duel] = {}

    def entries(self, d_model: int) -> dict[str, Entry]:
        """None: all that this gate knows of an expert is in its moments."""
        return {}

    @torch.no_grad()
    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        """Choose; the context's "label" is int64 [T], or absent to predict it.

        Raises:
            ValueError: no labels in training mode, or not one integer for each input.
        """
        label = None if context is None else context.get("label")
        if self.training and label is None:
            raise ValueError(
                "ClosedFormGate learns from labels: pass context=, or call eval() to predict"
            )
        if label is not None:
            label = torch.as_tensor(label, device=x_TD.device).reshape(-1)
            if len(label) != len(x_TD) or label.is_floating_point():
                raise ValueError(
                    f"context must be {len(x_TD)} integer labels, got {len(label)} of {label.dtype}"
                )
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._choose(x_TD.float(), experts, label)

    def _choose(self, x_TD: Tensor, experts: Sequence[Expert], label: Tensor | None) -> Routing:
        label_E = torch.stack([_body(e).label for e in experts])
        records = torch.stack([e.statistics.record for e in experts])
        z_TE = distance_z(RecordView(records, x_TD.shape[1]), x_TD)
        hits_E = RecordView(records, x_TD.shape[1])["hits"]
        if label is not None:
            return self._teach(z_TE, hits_E > READY_HITS, label_E, label)
        return self._predict(x_TD, experts, z_TE, hits_E > READY_HITS, label_E)

    def _teach(self, z_TE: Tensor, ready_E: Tensor, label_E: Tensor, label_T: Tensor) -> Routing:
        own_TE = label_E == label_T[:, None]
        settled_TE = z_TE.masked_fill(~(own_TE & ready_E), torch.inf)
        nearest_T, expert_T = settled_TE.min(1)
        newborn_TE = own_TE & ~ready_E
        youngest_T = len(label_E) - 1 - newborn_TE.flip(1).int().argmax(1)
        to_newborn_T = newborn_TE.any(1) & (nearest_T > NOVEL_Z)
        expert_T = torch.where(to_newborn_T, youngest_T, expert_T)
        known_T = own_TE.any(1)
        token_R = known_T.nonzero()[:, 0]
        assignment = Assignment.from_pairs(
            token_R,
            expert_T[token_R],
            torch.ones(len(token_R), device=z_TE.device),
            num_experts=len(label_E),
            num_tokens=len(label_T),
        )
        return Routing(assignment, own_TE.float(), -z_TE, candidates_TE=own_TE)

    def _predict(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        z_TE: Tensor,
        ready_E: Tensor,
        label_E: Tensor,
    ) -> Routing:
        alive = {_stamp(e) for e in experts}
        self._duels = {k: duel for k, duel in self._duels.items() if alive.issuperset(k)}
        x_TG = F.pad(x_TD, (0, 1), value=1.0)
        labels_C, index_E = label_E.unique(return_inverse=True)
        gate_TC = x_TG @ self._global_head(experts, index_E, len(labels_C))
        # who speaks for a label: its expert that finds the input least novel
        distance_TE = z_TE + torch.where(ready_E, 0.0, 1e6)
        speaker_TC = torch.stack(
            [
                (own := (index_E == c).nonzero()[:, 0])[distance_TE[:, own].argmin(1)]
                for c in range(len(labels_C))
            ],
            dim=1,
        )
        size = min(self.shortlist, len(labels_C))
        best_TS = gate_TC.topk(size, dim=1).indices
        expert_TS = speaker_TC.gather(1, best_TS)
        vote_TS = self._votes(x_TD, experts, expert_TS)
        assignment = Assignment.from_choice(expert_TS, vote_TS, len(experts))
        gate_TE = gate_TC[:, index_E]
        return Routing(assignment, gate_TE.softmax(1), gate_TE)

    def _votes(self, x_TD: Tensor, experts: Sequence[Expert], expert_TS: Tensor) -> Tensor:
        """Each shortlisted expert's share of the votes of the duels: [T, S]."""
        num_tokens, size = expert_TS.shape
        if size == 1:
            return torch.ones_like(expert_TS, dtype=x_TD.dtype)
        vote_TS = x_TD.new_zeros(num_tokens, size)
        for i, j in combinations(range(size), 2):
            low_T = torch.minimum(expert_TS[:, i], expert_TS[:, j])
            high_T = torch.maximum(expert_TS[:, i], expert_TS[:, j])
            pair_T = low_T * len(experts) + high_T
            low_wins_T = x_TD.new_empty(num_tokens)
            for pair in pair_T.unique().tolist():
                where = (pair_T == pair).nonzero()[:, 0]
                a, b = divmod(pair, len(experts))
                ratio_T = self._duel(experts[a], experts[b]).log_ratio(x_TD[where])
                low_wins_T[where] = torch.sigmoid(ratio_T)
            i_wins_T = torch.where(expert_TS[:, i] == low_T, low_wins_T, 1 - low_wins_T)
            vote_TS[:, i] += i_wins_T
            vote_TS[:, j] += 1 - i_wins_T
        return vote_TS / vote_TS.sum(1, keepdim=True)

    def _global_head(self, experts: Sequence[Expert], index_E: Tensor, labels: int) -> Tensor:
        def solve() -> Tensor:
            sums: list[Tensor] = []
            crosses: list[Tensor] = []
            for expert, c in zip(experts, index_E.tolist(), strict=True):
                moments, totals = scaled_moments(expert)
                if not sums:
                    sums = [torch.zeros_like(m, dtype=torch.float64) for m in moments]
                    crosses = [m.new_zeros(labels, len(m)) for m in sums]
                for b, (moment_GG, total_G) in enumerate(zip(moments, totals, strict=True)):
                    sums[b] += moment_GG
                    crosses[b][c] += total_G
            return solve_blocks(sums, [cross_CG.T for cross_CG in crosses], self.ridge)

        key = tuple(_stamp(e) for e in experts)
        if self._head is None or self._head[0] != key:
            self._head = key, solve()
        return self._head[1]

    def _duel(self, a: Expert, b: Expert) -> Duel:
        key = (_stamp(a), _stamp(b))
        if key not in self._duels:
            first, second = scaled_moments(a)[0], scaled_moments(b)[0]
            self._duels[key] = Duel.between(first, second, self.local_ridge)
        return self._duels[key]

    def head_numbers(self) -> int:
        """How many numbers the solved heads take."""
        head = 0 if self._head is None else self._head[1].numel()
        return head + sum(duel.numel() for duel in self._duels.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_head": None, "_duels": {}}

    def extra_repr(self) -> str:
        return f"shortlist={self.shortlist}, ridge={self.ridge}, local_ridge={self.local_ridge}"


def _body(expert: Expert) -> Moments:
    if not isinstance(expert.body, Moments):
        raise ValueError(
            f"ClosedFormGate chooses among Moments experts, expert {expert.id} is a "
            f"{type(expert.body).__name__}"
        )
    return expert.body


def scaled_moments(expert: Expert) -> tuple[list[Tensor], list[Tensor]]:
    """Moment and sum of each block, scaled up to all the expert received.

    So that one that was frozen keeps its say.
    """
    body, scale = _body(expert), _scale(expert)
    return [m * scale for m in body.moments()], [t * scale for t in body.totals()]


def _scale(expert: Expert) -> float:
    return max(1.0, expert.statistics["rows"] / max(_body(expert).count, 1.0))


def _stamp(expert: Expert) -> tuple[int, float]:
    return _body(expert).stamp, _scale(expert)
