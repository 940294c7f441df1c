"""Chooses among domains: by what is usual in them while they learn, by least squares to predict.

Legend: T inputs, V the view, D features, E domains, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.continual.domains import Domain
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry
from growmoe.routers.ridge import solve_blocks
from growmoe.routers.router import Router, Routing


class DomainGate(Router):
    """Chooses among `Domain` experts: by novelty while it learns, by least squares to predict.

    In training, with the labels as context, each input has a likelihood exp(−z²/2) under each
    domain (`Usual.novelty`); a domain that cannot tell yet is given z = `novel`. The domains'
    shares of the recent inputs are found by EM, with the running shares as a prior, and an input
    goes to the domain with the largest share · likelihood. So one change in the middle of a batch,
    a gradual one and a return are the same to it. What lies further than `novel` from every domain
    is novel, unless a newborn domain is there to take it: a sixteenth of what a domain knows, and
    half or more of what is new. `growmoe.signals` keeps the share among the last 512 or so.

    To predict, W = (Σ_d M_d + r I)⁻¹ Σ_d Σ_c s_dc e_dcᵀ: ridge regression onto pairs of domain and
    label over everything all domains have seen; an input goes to the domain of its best pair. It
    is solved from the sums that the domains hold, so it forgets nothing and no domain's weight
    depends on when it came.

    Args:
        novel: standard deviations beyond which an input is novel to a domain.
        settled: rows before a newborn stops taking whatever is novel.
        memory: rows that the running shares count for.
        ridge: as `ClosedFormGate`'s.
    """

    wants = "label"
    balances = True
    capped = False

    def __init__(
        self, novel: float = 1.6, settled: int = 256, memory: float = 16.0, ridge: float = 0.3
    ) -> None:
        super().__init__()
        if not (novel > 0 and settled >= 0 and memory > 0 and ridge > 0):
            raise ValueError(
                "DomainGate: novel, memory and ridge must be positive and settled not negative"
            )
        self.novel, self.settled, self.memory, self.ridge = novel, settled, memory, ridge
        self._solved: tuple[Any, Tensor] | None = None
        self._share: dict[int, float] = {}

    def entries(self, d_model: int) -> dict[str, Entry]:
        """A domain's running share of the inputs."""
        return {
            "share": Entry(
                fresh=lambda _: torch.tensor(0.5),
                parameter=False,
                clone=lambda value, _: torch.full_like(value, 0.5),
                merge=lambda values, weights: values.sum(),
            )
        }

    @torch.no_grad()
    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        """Choose; the context's "label" is int64 [T], or absent to predict.

        The context may also name the "domain", an expert's id, that all inputs belong to.
        """
        label = None if context is None else context.get("label")
        if self.training and label is not None:
            forced = None if context is None else context.get("domain")
            return self._teach(x_TD, experts, torch.as_tensor(label), forced)
        logits_TE = self._logits(x_TD, experts)
        weight_T1 = x_TD.new_ones(len(x_TD), 1)
        choice_T1 = logits_TE.argmax(1, keepdim=True)
        assignment = Assignment.from_choice(choice_T1, weight_T1, len(experts))
        return Routing(assignment, logits_TE.softmax(1), logits_TE)

    def _teach(
        self, x_TD: Tensor, experts: Sequence[Expert], label_T: Tensor, forced: int | None
    ) -> Routing:
        view_TV = x_TD[:, : _domain(experts[0]).view]
        z_TE = torch.stack([_domain(e).usual.novelty(view_TV, label_T) for e in experts], 1)
        unsure_TE = z_TE.isnan()
        z_TE = torch.where(unsure_TE, self.novel, z_TE)
        log_TE = -0.5 * z_TE.clamp(0, 8).square()
        prior_E = torch.stack([cast(Tensor, e.entries.share) for e in experts]).float() + 0.02
        prior_E = prior_E / prior_E.sum()
        share_E = prior_E
        for _ in range(8):
            post_TE = (log_TE + share_E.log()).softmax(1)
            share_E = (self.memory * prior_E + post_TE.sum(0)) / (self.memory + len(x_TD))
        choice_T = (log_TE + share_E.log()).argmax(1)
        novel_T = z_TE.amin(1) > self.novel
        young = [
            i
            for i, e in enumerate(experts)
            if e.id > experts[0].id and e.statistics["rows"] < self.settled
        ]
        if young:
            choice_T = torch.where(novel_T, young[-1], choice_T)
            novel_T = torch.zeros_like(novel_T)
        if forced is not None:
            where = [e.id for e in experts].index(forced)
            choice_T = torch.full_like(choice_T, where)
        self._share = {e.id: float(s) for e, s in zip(experts, share_E, strict=True)}
        weight_T1 = x_TD.new_ones(len(x_TD), 1)
        assignment = Assignment.from_choice(choice_T[:, None], weight_T1, len(experts))
        return Routing(assignment, post_TE, log_TE, novel_T=novel_T)

    def observe(self, experts: Sequence[Expert], routing: Routing) -> None:
        """Keep the shares."""
        for expert in experts:
            share = cast(Tensor, expert.entries.share)
            share.fill_(self._share.get(expert.id, float(share)))

    def overlap(self, experts: Sequence[Expert]) -> Tensor:
        """`Usual.distance` of each from each, [E, E]."""
        domains = [_domain(e) for e in experts]
        return torch.tensor([[j.usual.distance(i.usual) for j in domains] for i in domains])

    def _logits(self, x_TD: Tensor, experts: Sequence[Expert]) -> Tensor:
        known = [i for i, e in enumerate(experts) if _domain(e).known]
        logits_TE = x_TD.new_full((len(x_TD), len(experts)), -1e4)
        if len(known) < 2:
            logits_TE[:, known or [0]] = 0.0
            return logits_TE
        stamp = tuple((experts[i].id, _domain(experts[i]).stamp) for i in known)
        if self._solved is None or self._solved[0] != stamp:
            self._solved = stamp, self._solve([_domain(experts[i]) for i in known])
        width = self._solved[1].shape[0]
        x_TG = F.pad(x_TD[:, -(width - 1) :], (0, 1), value=1.0)
        pair_TEC = (x_TG @ self._solved[1]).unflatten(1, (len(known), -1))
        logits_TE[:, known] = pair_TEC.amax(2)
        return logits_TE

    def _solve(self, domains: Sequence[Domain]) -> Tensor:
        moments: list[Tensor] = []
        sums: list[list[Tensor]] = []
        for domain in domains:
            parts, totals = domain.totals()
            moments = (
                parts if not moments else [m.add_(p) for m, p in zip(moments, parts, strict=True)]
            )
            sums.append(totals)
        targets = [torch.cat(by_domain).T for by_domain in zip(*sums, strict=True)]
        return solve_blocks(moments, targets, self.ridge)

    def head_numbers(self) -> int:
        """How many numbers the solved head takes."""
        return 0 if self._solved is None else self._solved[1].numel()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_solved": None}

    def extra_repr(self) -> str:
        return f"novel={self.novel}, settled={self.settled}, memory={self.memory}"


def _domain(expert: Expert) -> Domain:
    if not isinstance(expert.body, Domain):
        raise ValueError(
            f"DomainGate chooses among Domain experts, expert {expert.id} is a "
            f"{type(expert.body).__name__}"
        )
    return expert.body
