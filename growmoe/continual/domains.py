"""A domain: an expert that knows what is usual in it and tells its labels apart.

Legend: N inputs, V the view (what novelty is judged by), D features, G = D + 1, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.usual import Usual
from growmoe.experts.expert import Expert
from growmoe.experts.moments import Moments, with_constant
from growmoe.lineage import Event, Lineage
from growmoe.moe import MoE
from growmoe.organizer import Organizer
from growmoe.routers.closed_form import ClosedFormGate, scaled_moments
from growmoe.routers.ridge import solve_blocks
from growmoe.rules import Rule

Totals = tuple[list[Tensor], list[Tensor]]


class Domain(nn.Module):
    """An expert for one domain: what is usual in it (`Usual`), and heads that tell its labels.

    Inputs are [view, features], [N, V + D]. The first domain of a stream has an expert for every
    label, an inner `MoE` of `Moments`; one that is born later sums all labels up together, which
    takes a C-th of the memory. On a few thousand inputs that costs a point or nothing; on more,
    experts of their own are better.

    Args:
        num_labels: C.
        view: V.
        d_model: V + D.
        gate: of the label experts.
        rules: on the label experts.
        seed: of the inner mixture.
        blocks: of the features (`Moments`).
        pooled: sum all labels up together.
    """

    def __init__(
        self,
        num_labels: int,
        view: int,
        d_model: int,
        gate: ClosedFormGate,
        rules: Sequence[Rule],
        seed: int,
        blocks: Sequence[int],
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.num_labels, self.view, self.d_model = num_labels, view, d_model
        self.gate, self.rules, self.seed, self.blocks = gate, list(rules), seed, tuple(blocks)
        self.usual = Usual(num_labels, view)
        self.heads: PooledHead | LabelExperts
        if pooled:
            self.heads = PooledHead(num_labels, self.blocks, gate.ridge)
        else:
            self.heads = LabelExperts(num_labels, self.blocks, gate, rules, seed)

    @property
    def name(self) -> str:
        """In lineages."""
        return self.heads.name

    @name.setter
    def name(self, value: str) -> None:
        self.heads.name = value

    @property
    def layer(self) -> MoE | None:
        """The mixture of label experts, if there is one."""
        return self.heads.layer

    @property
    def num_experts(self) -> int:
        """Label experts, or one for all."""
        return 1 if self.layer is None else len(self.layer.experts)

    @property
    def count_C(self) -> Tensor:
        """Rows of each label: float32 [C]."""
        return self.usual.count_C

    @property
    def known(self) -> bool:
        """Whether it has learned anything."""
        return bool(self.count_C.sum() > 0)

    @torch.no_grad()
    def learn(self, x_NI: Tensor, label_N: Tensor) -> list[Event]:
        """Sum up rows [view, features] and their labels; the inner organizer may act."""
        self.usual.add(x_NI[:, : self.view], label_N)
        return self.heads.learn(x_NI[:, self.view :], label_N)

    @torch.no_grad()
    def take_back(self, x_NI: Tensor, label_N: Tensor) -> None:
        """Undo `learn` for rows that turn out to belong elsewhere: sums can be subtracted."""
        self.usual.take_back(x_NI[:, : self.view], label_N)
        self.heads.take_back(x_NI[:, self.view :], label_N)

    def forward(self, x_NI: Tensor) -> Tensor:
        """Scores [N, C] in eval mode; zeros in training, when `learn` is what counts."""
        if self.training or not self.known:
            return x_NI.new_zeros(len(x_NI), self.num_labels)
        return self.heads.scores(x_NI[:, self.view :])

    def totals(self) -> Totals:
        """For each block of features: moment [G_b, G_b], and sums by label [C, G_b], in float64."""
        return self.heads.totals()

    def head_numbers(self) -> int:
        """How many numbers the solved heads take."""
        return self.heads.head_numbers()

    @property
    def stamp(self) -> tuple[float, ...]:
        """Changes whenever what it has summed up changes."""
        return tuple(self.count_C.tolist())

    # What surgery asks of a kind.

    merge_key = "domain"

    def _empty(self, pooled: bool) -> Domain:
        return Domain(
            self.num_labels,
            self.view,
            self.d_model,
            self.gate,
            self.rules,
            self.seed,
            self.blocks,
            pooled,
        ).train(self.training)

    def cloned(self, noise: float, generator: torch.Generator) -> Domain:
        """A child that has seen nothing, with this domain's idea of what is usual as a prior."""
        child = self._empty(pooled=True)
        child.usual = self.usual.child()
        return child

    def fresh(self, d_model: int, d_out: int, **place: Any) -> Domain:
        """An empty domain."""
        return self._empty(pooled=True)

    @torch.no_grad()
    def merged(self, others: Sequence[Domain], weights: Sequence[float]) -> Domain:
        """The sum of all statistics: what one domain would hold that had seen all rows.

        If one of them has label experts, so has the sum; what others summed up together is shared
        out by `PooledHead.by_label`.
        """
        bodies = (self, *others)
        result = self._empty(pooled=all(body.layer is None for body in bodies))
        result.name = self.name
        result.usual = self.usual.merged([other.usual for other in others])
        for body in bodies:
            if not body.known:
                continue
            if isinstance(result.heads, PooledHead):
                result.heads.add_totals(*body.totals())
            else:
                for label, moments in body.heads.by_label().items():
                    result.heads.add(label, moments)
        return result

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from each label's Gaussian, the view at its mean: evidence without examples."""
        rows_C = self.count_C.clamp_min(0)
        label_N = torch.multinomial(rows_C, count, True, generator=generator)
        mean_CV = self.usual.sum_CV / rows_C.clamp_min(1)[:, None]
        return torch.cat([mean_CV[label_N], self.heads.sample(label_N, generator)], 1)

    def extra_repr(self) -> str:
        return f"rows={float(self.count_C.sum()):.0f}, labels={int((self.count_C > 0).sum())}"


class LabelExperts(nn.Module):
    """An inner `MoE` of `Moments`, one for each label, behind a `ClosedFormGate`.

    Args:
        num_labels: C.
        blocks: of the features.
        gate: how the experts are chosen; a gate of its own with the same settings.
        rules: on the experts.
        seed: of the layer.
    """

    def __init__(
        self,
        num_labels: int,
        blocks: Sequence[int],
        gate: ClosedFormGate,
        rules: Sequence[Rule],
        seed: int,
    ) -> None:
        super().__init__()
        self.num_labels, self.blocks = num_labels, tuple(blocks)
        self.gate = ClosedFormGate(gate.shortlist, gate.ridge, gate.local_ridge)
        self.rules, self.seed, self.name = list(rules), seed, "domain"
        self.layer: MoE | None = None
        self.organizer: Organizer | None = None

    def learn(self, x_ND: Tensor, label_N: Tensor) -> list[Event]:
        """Sum up rows by label; a label's expert is born with its first row."""
        events: list[Event] = []
        if self.layer is None or self.organizer is None:
            self.layer, self.organizer = self._begin(int(label_N[0]))
            events += list(self.layer.lineage)
        self.layer.train()
        known = {_label(e) for e in self.layer.experts.values()}
        for label in sorted(set(label_N.tolist()) - known):
            events.append(
                surgery.spawn(
                    self.layer,
                    expert=self._kind(label),
                    admitted=True,
                    step=self.organizer.steps,
                    reason=f"label {label} has no expert",
                    signals={"label": float(label)},
                )
            )
        self.layer(x_ND, context=label_N)
        return events + self.organizer.step()

    def take_back(self, x_ND: Tensor, label_N: Tensor) -> None:
        """Subtract rows; what a frozen expert was given it did not sum up."""
        assert self.layer is not None
        for expert in self.layer.experts.values():
            rows_ND = x_ND[label_N == _label(expert)]
            if len(rows_ND) and not expert.frozen:
                cast(Moments, expert.body).add(rows_ND, times=-1.0)
                expert.statistics.view()["rows"] -= len(rows_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        """Each label's share of the votes: [N, C]."""
        assert self.layer is not None
        scores: Tensor = self.layer.eval()(x_ND)
        return scores

    def totals(self) -> Totals:
        """As `Domain.totals`."""
        assert self.layer is not None
        moments = [torch.zeros(g + 1, g + 1, dtype=torch.float64) for g in self.blocks]
        sums = [m.new_zeros(self.num_labels, len(m)) for m in moments]
        for expert in self.layer.experts.values():
            for b, (moment_GG, total_G) in enumerate(zip(*scaled_moments(expert), strict=True)):
                moments[b] += moment_GG
                sums[b][_label(expert)] += total_G
        return moments, sums

    def by_label(self) -> dict[int, list[Tensor]]:
        """Each label's moment in each block of features, [G_b, G_b]."""
        experts = () if self.layer is None else self.layer.experts.values()
        return {_label(expert): scaled_moments(expert)[0] for expert in experts}

    def add(self, label: int, moments: Sequence[Tensor]) -> None:
        """Add what was summed up of a label, as `by_label` gives it."""
        if self.layer is None:
            self.layer, self.organizer = self._begin(label)
        if label not in {_label(e) for e in self.layer.experts.values()}:
            surgery.spawn(self.layer, expert=self._kind(label), admitted=True, reason="merged")
        (expert,) = (e for e in self.layer.experts.values() if _label(e) == label)
        cast(Moments, expert.body).add_moments(moments)
        expert.statistics.view()["rows"] += float(moments[0][-1, -1])

    def sample(self, label_N: Tensor, generator: torch.Generator) -> Tensor:
        """Draws from the Gaussians of these labels: [N, D]."""
        assert self.layer is not None
        x_ND = torch.zeros(len(label_N), sum(self.blocks))
        for expert in self.layer.experts.values():
            rows_N = label_N == _label(expert)
            if rows_N.any():
                drawn = cast(Moments, expert.body).sample(int(rows_N.sum()), generator)
                x_ND[rows_N] = drawn
        return x_ND

    def head_numbers(self) -> int:
        """How many numbers the solved heads take."""
        return self.gate.head_numbers()

    def _kind(self, label: int) -> Callable[[], Moments]:
        return partial(Moments, self.num_labels, label, sum(self.blocks), self.blocks)

    def _begin(self, label: int) -> tuple[MoE, Organizer]:
        layer = MoE(
            sum(self.blocks),
            self._kind(label),
            num_experts=1,
            router=self.gate,
            d_out=self.num_labels,
            balance_loss=0.0,
            warmup=1,
            evidence="moments",
            seed=self.seed,
        )
        named = nn.ModuleDict({self.name: layer})
        organizer = Organizer(named, rules=self.rules, max_experts=1024, every=8, budget=4)
        layer.lineage = Lineage(replace(e, layer=self.name) for e in layer.lineage)
        return layer, organizer


class PooledHead(nn.Module):
    """One closed-form head: the moment of all rows together, and the sum of each label's.

    Args:
        num_labels: C.
        blocks: of the features.
        ridge: as `ClosedFormGate`'s.
    """

    sum_CG: Tensor
    layer = None

    def __init__(self, num_labels: int, blocks: Sequence[int], ridge: float) -> None:
        super().__init__()
        self.num_labels, self.blocks, self.ridge = num_labels, tuple(blocks), ridge
        self.moments = Moments(num_labels, 0, sum(blocks), blocks)
        self.register_buffer("sum_CG", torch.zeros(num_labels, sum(blocks) + len(self.blocks)))
        self.name = "domain"
        self._solved: tuple[int, Tensor] | None = None

    def learn(self, x_ND: Tensor, label_N: Tensor, times: float = 1.0) -> list[Event]:
        """Sum up rows."""
        self.moments.add(x_ND, times)
        one_NG = torch.cat(with_constant(x_ND.float(), self.blocks), 1)
        self.sum_CG.index_add_(0, label_N, one_NG, alpha=times)
        return []

    def take_back(self, x_ND: Tensor, label_N: Tensor) -> None:
        """Subtract rows."""
        self.learn(x_ND, label_N, times=-1.0)

    def add_totals(self, moments: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Add what another domain has summed up, as its `totals` give it."""
        self.moments.add_moments(moments)
        self.sum_CG += torch.cat(list(sums), 1).float()

    def scores(self, x_ND: Tensor) -> Tensor:
        """Least squares onto the labels: [N, C]."""
        if self._solved is None or self._solved[0] != self.moments.stamp:
            moments, sums = self.totals()
            head_GC = solve_blocks(moments, [s_CG.T for s_CG in sums], self.ridge)
            self._solved = self.moments.stamp, head_GC
        return F.pad(x_ND, (0, 1), value=1.0) @ self._solved[1]

    def totals(self) -> Totals:
        """As `Domain.totals`."""
        sums = self.sum_CG.double().split([width + 1 for width in self.blocks], dim=1)
        return [m.double() for m in self.moments.moments()], list(sums)

    def by_label(self) -> dict[int, list[Tensor]]:
        """As `LabelExperts.by_label`: each label's mean, and the scatter within all labels.

        Their sum over the labels is exact.
        """
        shares: dict[int, list[Tensor]] = {}
        for sum_CG, mean_CG, within_GG in self._scatter():
            for label in (sum_CG[:, -1] >= 0.5).nonzero()[:, 0].tolist():
                moment_GG = sum_CG[label][:, None] * mean_CG[label]
                shares.setdefault(label, []).append(moment_GG + sum_CG[label, -1] * within_GG)
        return shares

    def _scatter(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each block the labels' sums and means [C, G_b], and the scatter within a label."""
        for moment_GG, sum_CG in zip(*self.totals(), strict=True):
            mean_CG = sum_CG / sum_CG[:, -1:].clamp_min(1)
            within_GG = moment_GG - sum_CG.T @ mean_CG
            yield sum_CG, mean_CG, within_GG / moment_GG[-1, -1].clamp_min(1)

    def sample(self, label_N: Tensor, generator: torch.Generator) -> Tensor:
        """Draws around the labels' means with the scatter of all within labels: [N, D]."""
        draws = []
        for _, mean_CG, within_GG in self._scatter():
            mean_CD = mean_CG[:, :-1]
            value_D, vector_DD = torch.linalg.eigh(within_GG[:-1, :-1])
            noise = torch.randn(
                len(label_N), len(value_D), generator=generator, dtype=torch.float64
            )
            noise = (noise * value_D.clamp_min(0).sqrt()) @ vector_DD.T
            draws.append((mean_CD[label_N] + noise).float())
        return torch.cat(draws, 1)

    def head_numbers(self) -> int:
        """How many numbers the solved head takes."""
        return 0 if self._solved is None else self._solved[1].numel()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_solved": None}


def _label(expert: Expert) -> int:
    return int(cast(Moments, expert.body).label)
