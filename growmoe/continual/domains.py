"""Domains found without labels of them: a gate that knows what is new, and what stands behind it.

Legend: N inputs, V the view (what novelty is judged by), D features, E domains, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import surgery
from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.experts.moments import Moments
from growmoe.lineage import Event, Lineage
from growmoe.moe import MoE
from growmoe.organizer import Organizer
from growmoe.routers.closed_form import ClosedFormGate, scaled_moments, solve_blocks
from growmoe.routers.gate import Context, Entry
from growmoe.routers.router import Router, Routing
from growmoe.rules import Rule

PRIOR_ROWS = 5.0  # what a newborn's parent tells it of usual distances counts as so many rows
KNOWN_ROWS = 20.0  # rows of a label before its distances are trusted


class Domain(nn.Module):
    """An expert for one domain: statistics of each label, and what is usual in it.

    Inputs are [view, features], [N, V + D]. Its heads are solved from an inner `MoE` of `Moments`,
    one for each label it has seen. What is usual is judged by the view: the distance of an input
    to the mean of its label, by the covariance within labels of this domain alone,

        s = log mean_v (Lᵀ (v − μ_label))_v² / ((1 + 1/n_label) · n/(n − V)),   z = (s − mean s) / sd s

    with the running mean and deviation of s over the label's own rows, each scored before it is
    summed up. A newborn takes its parent's covariance and distances as a prior.

    Args:
        num_labels: C.
        view: V.
        d_model: V + D.
        gate: of the inner mixture.
        rules: of the inner mixture.
        seed: of the inner mixture.
        blocks: of the features (`Moments`).
    """

    count_C: Tensor
    sum_CV: Tensor
    cross_VV: Tensor
    score_3C: Tensor
    prior_VV: Tensor

    def __init__(
        self,
        num_labels: int,
        view: int,
        d_model: int,
        gate: ClosedFormGate,
        rules: Sequence[Rule],
        seed: int,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_labels, self.view, self.d_model = num_labels, view, d_model
        self.blocks = None if blocks is None else tuple(blocks)
        self.rules, self.seed = list(rules), seed
        self.gate = ClosedFormGate(gate.shortlist, gate.ridge, gate.local_ridge)
        self.register_buffer("count_C", torch.zeros(num_labels))
        self.register_buffer("sum_CV", torch.zeros(num_labels, view))
        self.register_buffer("cross_VV", torch.zeros(view, view))
        self.register_buffer("score_3C", torch.zeros(3, num_labels))  # rows, mean, variance
        self.register_buffer("prior_VV", torch.zeros(view, view))
        self.layer: MoE | None = None
        self.organizer: Organizer | None = None
        self.name = "domain"
        self._whitening: tuple[Tensor, Tensor] | None = None

    # What is usual here.

    def covariance(self) -> Tensor:
        """Within labels, shrunk to the parent's as if that were V rows more: [V, V]."""
        n = float(self.count_C.sum())
        mean_CV = self.sum_CV / self.count_C.clamp_min(1)[:, None]
        within_VV = self.cross_VV - self.sum_CV.T @ mean_CV
        prior = float(self.view) if self.prior_VV.any() else 0.0
        cov_VV = (within_VV + prior * self.prior_VV) / max(n + prior, 1.0)
        floor = 0.02 * cov_VV.diagonal().mean() + 1e-8
        return cov_VV + floor * torch.eye(self.view)

    def score(self, view_NV: Tensor) -> Tensor:
        """s to every label's mean: [N, C]; those of labels never seen mean nothing."""
        white_VV, mean_CV = self._white()
        distance_NC = torch.cdist(view_NV @ white_VV, mean_CV).square() / self.view
        # what an estimate from few rows adds to the distance of a row that it has not seen
        rows = float(self.count_C.sum()) + (self.view if self.prior_VV.any() else 0.0)
        few_C = (1 + 1 / self.count_C.clamp_min(1)) * rows / max(rows - self.view, rows / 4, 1.0)
        return (distance_NC / few_C).clamp_min(1e-9).log()

    def _white(self) -> tuple[Tensor, Tensor]:
        """What whitens views within labels [V, V], and the whitened means of the labels [C, V]."""
        if self._whitening is None:
            factor_VV, info = torch.linalg.cholesky_ex(self.covariance().double())
            if info > 0:
                factor_VV = self.covariance().diagonal().sqrt().diag().double()
            white_VV = torch.linalg.solve_triangular(
                factor_VV, torch.eye(self.view, dtype=torch.float64), upper=False
            ).T.float()
            mean_CV = self.sum_CV / self.count_C.clamp_min(1)[:, None]
            self._whitening = white_VV, mean_CV @ white_VV
        return self._whitening

    def novelty(self, view_NV: Tensor, label_N: Tensor) -> Tensor:
        """z of each input among those of its label: [N]; NaN where this domain cannot tell."""
        rows_C, mean_C, var_C = self.score_3C
        known_C = (self.count_C >= 2) & (
            rows_C >= (PRIOR_ROWS if self.prior_VV.any() else KNOWN_ROWS)
        )
        score_N = self.score(view_NV).gather(1, label_N[:, None])[:, 0]
        z_N = (score_N - mean_C[label_N]) / var_C[label_N].sqrt().clamp_min(0.05)
        return torch.where(known_C[label_N], z_N, torch.nan)

    def distance(self, other: Domain) -> float:
        """Mahalanobis distance of the other's label means from its own, by its own covariance.

        The root mean square over the labels that both know, less what sampling alone explains;
        infinite if there are none.
        """
        both_C = (self.count_C >= 2) & (other.count_C >= 2)
        if not both_C.any():
            return float("inf")
        mine_CV, theirs_CV = (
            d.sum_CV[both_C] / d.count_C[both_C, None] @ self._white()[0] for d in (self, other)
        )
        chance_C = 1 / self.count_C[both_C] + 1 / other.count_C[both_C]
        apart_C = (mine_CV - theirs_CV).square().sum(1) - self.view * chance_C
        return float(apart_C.mean().clamp_min(0).sqrt())

    def _sum_up(self, view_NV: Tensor, label_N: Tensor, times: float = 1.0) -> None:
        self.count_C.index_add_(0, label_N, torch.full((len(label_N),), times))
        self.sum_CV.index_add_(0, label_N, view_NV, alpha=times)
        self.cross_VV.addmm_(view_NV.T, view_NV, alpha=times)
        self._whitening = None

    def _calibrate(self, view_NV: Tensor, label_N: Tensor) -> None:
        score_N = self.score(view_NV).gather(1, label_N[:, None])[:, 0]
        for label in label_N.unique().tolist():
            if self.count_C[label] < 2:
                continue
            rows, mean, var = self.score_3C[:, label].tolist()
            s = score_N[label_N == label]
            if rows >= KNOWN_ROWS:  # clipped, so that what is foreign does not become usual
                sd = max(var**0.5, 0.05)
                s = s.clamp(mean - 3 * sd, mean + 3 * sd)
            # the last quarter of its rows: distances shrink while the estimate gets better
            rate = min(1.0, max(4 * len(s) / (rows + len(s)), 0.005 * len(s)))
            apart = float(s.mean()) - mean
            spread = float((s - mean).square().mean()) if rows else float(s.var(correction=0))
            self.score_3C[0, label] = rows + len(s)
            self.score_3C[1, label] = mean + rate * apart
            self.score_3C[2, label] = max(
                0.0, (1 - rate) * var + rate * spread - (rate * apart) ** 2
            )

    # What it learns.

    @torch.no_grad()
    def learn(self, x_NI: Tensor, label_N: Tensor) -> list[Event]:
        """Sum up rows [view, features] and their labels; the inner organizer may act."""
        view_NV, x_ND = x_NI[:, : self.view], x_NI[:, self.view :]
        for part in torch.arange(len(label_N)).split(64):  # each scored before it is summed up
            self._calibrate(view_NV[part], label_N[part])
            self._sum_up(view_NV[part], label_N[part])
        events: list[Event] = []
        if self.layer is None or self.organizer is None:
            events += self._begin(x_ND.shape[1], int(label_N[0]))
        assert self.layer is not None and self.organizer is not None
        self.layer.train()
        known = {_label(e) for e in self.layer.experts.values()}
        for label in sorted(set(label_N.tolist()) - known):
            events.append(
                surgery.spawn(
                    self.layer,
                    expert=self._kind(label, x_ND.shape[1]),
                    admitted=True,
                    step=self.organizer.steps,
                    reason=f"label {label} has no expert",
                    signals={"label": float(label)},
                )
            )
        self.layer(x_ND, context=label_N)
        return events + self.organizer.step()

    @torch.no_grad()
    def take_back(self, x_NI: Tensor, label_N: Tensor) -> None:
        """Undo `learn` for rows that turn out to belong elsewhere: sums can be subtracted."""
        assert self.layer is not None
        for expert in self.layer.experts.values():
            rows_NI = x_NI[label_N == _label(expert)]
            if len(rows_NI) and not expert.frozen:
                cast(Moments, expert.body).add(rows_NI[:, self.view :], times=-1.0)
                expert.statistics.view()["rows"] -= len(rows_NI)
        self._sum_up(x_NI[:, : self.view], label_N, times=-1.0)

    def _kind(self, label: int, width: int) -> Callable[[], Moments]:
        return partial(Moments, self.num_labels, label, width, self.blocks)

    def _begin(self, width: int, label: int) -> list[Event]:
        self.layer = MoE(
            width,
            self._kind(label, width),
            num_experts=1,
            router=self.gate,
            d_out=self.num_labels,
            balance_loss=0.0,
            warmup=1,
            evidence="moments",
            seed=self.seed,
        )
        named = nn.ModuleDict({self.name: self.layer})
        self.organizer = Organizer(named, rules=self.rules, max_experts=1024, every=8, budget=4)
        self.layer.lineage = Lineage(replace(e, layer=self.name) for e in self.layer.lineage)
        return list(self.layer.lineage)

    def forward(self, x_NI: Tensor) -> Tensor:
        """Scores [N, C] in eval mode; zeros in training, when `learn` is what counts."""
        if self.training or self.layer is None:
            return x_NI.new_zeros(len(x_NI), self.num_labels)
        scores: Tensor = self.layer.eval()(x_NI[:, self.view :])
        return scores

    def totals(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each block of features: moment [G_b, G_b], and sums by label [C, G_b], in float64."""
        moments: list[Tensor] = []
        sums: list[Tensor] = []
        assert self.layer is not None
        for expert in self.layer.experts.values():
            parts, totals = scaled_moments(expert)
            if not moments:
                moments = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
                sums = [m.new_zeros(self.num_labels, len(m)) for m in moments]
            for b, (moment_GG, total_G) in enumerate(zip(parts, totals, strict=True)):
                moments[b] += moment_GG
                sums[b][_label(expert)] += total_G
        return moments, sums

    @property
    def stamp(self) -> tuple[float, ...]:
        """Changes whenever what it has summed up changes."""
        return tuple(self.count_C.tolist())

    # What surgery asks of a kind.

    merge_key = "domain"

    def _empty(self) -> Domain:
        return Domain(
            self.num_labels,
            self.view,
            self.d_model,
            self.gate,
            self.rules,
            self.seed,
            self.blocks,
        ).train(self.training)

    def cloned(self, noise: float, generator: torch.Generator) -> Domain:
        """A child that has seen nothing, with this domain's idea of what is usual as a prior."""
        child = self._empty()
        child.prior_VV.copy_(self.covariance())
        child.score_3C.copy_(self.score_3C)
        child.score_3C[0].clamp_(max=PRIOR_ROWS)
        return child

    def fresh(self, d_model: int, d_out: int, **place: Any) -> Domain:
        """An empty domain."""
        return self._empty()

    @torch.no_grad()
    def merged(self, others: Sequence[Domain], weights: Sequence[float]) -> Domain:
        """The sum of all statistics: exactly what one domain would hold that had seen all rows."""
        result = self._empty()
        result.name = self.name
        for body in (self, *others):
            result.count_C += body.count_C
            result.sum_CV += body.sum_CV
            result.cross_VV += body.cross_VV
        rows_C = sum(body.score_3C[0] for body in (self, *others))
        assert isinstance(rows_C, Tensor)
        mean_C = sum(b.score_3C[0] * b.score_3C[1] for b in (self, *others)) / rows_C.clamp_min(1)
        square_C = sum(
            b.score_3C[0] * (b.score_3C[2] + (b.score_3C[1] - mean_C).square())
            for b in (self, *others)
        )
        result.score_3C.copy_(torch.stack([rows_C, mean_C, square_C / rows_C.clamp_min(1)]))
        for body in (self, *others):
            for expert in [] if body.layer is None else body.layer.experts.values():
                label, theirs = _label(expert), cast(Moments, expert.body)
                if result.layer is None:
                    result._begin(theirs.d_model, label)
                assert result.layer is not None
                mine = {_label(e): e for e in result.layer.experts.values()}
                if label not in mine:
                    surgery.spawn(
                        result.layer,
                        expert=self._kind(label, theirs.d_model),
                        admitted=True,
                        reason="merged",
                    )
                    mine = {_label(e): e for e in result.layer.experts.values()}
                cast(Moments, mine[label].body).panels.add_(theirs.panels)
                cast(Moments, mine[label].body).touch()
                for field in ("rows", "hits"):
                    mine[label].statistics.view()[field] += expert.statistics[field]
        return result

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from each label's Gaussian, the view at its mean: evidence without examples."""
        assert self.layer is not None
        label_N = torch.multinomial(self.count_C.clamp_min(0), count, True, generator=generator)
        view_CV = self.sum_CV / self.count_C.clamp_min(1)[:, None]
        draws = []
        for expert in self.layer.experts.values():
            n = int((label_N == _label(expert)).sum())
            if n:
                x_ND = cast(Moments, expert.body).sample(n, generator)
                draws.append(torch.cat([view_CV[_label(expert)].expand(n, -1), x_ND], 1))
        return torch.cat(draws)

    def extra_repr(self) -> str:
        return f"rows={float(self.count_C.sum()):.0f}, labels={int((self.count_C > 0).sum())}"


class DomainGate(Router):
    """Chooses among `Domain` experts: by novelty while it learns, by least squares to predict.

    In training, with the labels as context, each input has a likelihood exp(−z²/2) under each
    domain (`Domain.novelty`); a domain that cannot tell yet is given z = `novel`. The domains'
    shares of the recent inputs are found by EM, with the running shares as a prior, and an input
    goes to the domain with the largest share · likelihood. So one change in the middle of a batch,
    a gradual one and a return are the same to it. What lies further than `novel` from every domain
    is novel (`growmoe.signals`), unless a newborn domain is there to take it.

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
        self, novel: float = 1.3, settled: int = 256, memory: float = 16.0, ridge: float = 0.3
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
        z_TE = torch.stack([_domain(e).novelty(view_TV, label_T) for e in experts], 1)
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
        """`Domain.distance` of each from each, [E, E]."""
        domains = [_domain(e) for e in experts]
        return torch.tensor([[j.distance(i) for j in domains] for i in domains])

    def _logits(self, x_TD: Tensor, experts: Sequence[Expert]) -> Tensor:
        known = [i for i, e in enumerate(experts) if _domain(e).layer is not None]
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


def _label(expert: Expert) -> int:
    return int(cast(Moments, expert.body).label)
