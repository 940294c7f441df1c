"""What each expert lived through: written in every training forward, read by rules.

Nothing here waits for an accelerator until a snapshot is taken. With n_e the rows routed to expert
e in a forward of R rows and T tokens, g the combine weights, f_e the expert's output, and EMA a
running mean whose rate is max(0.02, 1/n) for its n-th value:

    load_e        EMA of n_e / R
    gate mass_e   EMA of Σ g over its rows / T
    confidence_e  EMA, over forwards that hit it, of Σ g / n_e
    output norm_e EMA, over forwards that hit it, of the mean of ‖f_e(x)‖ over its rows
    score_e(x)    log (1/D) Σ_d (x_d − μ_ed)² / (v_ed + v̄_e/20): a diagonal Mahalanobis distance to
                  the expert's running mean μ and variance v (v̄ its mean over d), about 0 on its own
                  inputs; the logarithm tames its heavy tail
    z_e(x)        (score_e(x) − mean_e) / sd_e, with the score's running moments on its own inputs
    novelty(x)    min_e z_e(x): an input is novel if no expert explains it within 2 sd
    loss_e        running means at rates 0.1 and 0.01 of the loss of its rows, and their variance

Novelty is computed on at most 256 rows of a forward. Novel inputs enter the running moments at a
tenth of the rate, so that they are noticed before they are absorbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.experts.statistics import (
    NOVEL_Z,
    READY_HITS,
    RecordView,
    distance_z,
    score_sd,
)

RATE = 0.02
SAMPLE = 256
LOSS_FAST, LOSS_SLOW = 0.1, 0.01
NOVELTY_RATE = 1 / 8


class Recorder(nn.Module):
    """Writes the records of a layer's experts, all at once.

    The records are stacked; each expert's `statistics.record` is a view on its row, checked at
    every use, like the weights in a pool.

    Buffers (float32, whatever the model's dtype):
        novel: [3 + D]: the running share of novel inputs (over about 8 forwards), and since the
            last decision its peak, the number of novel inputs and their sum.
        lost: [1], how many losses were not finite.
        dropped: [3], running share of the rows that capacity dropped; since the layer was built,
            the number of rows dropped and of inputs left without any expert.
        imbalance: [2], running mean of max load / mean load of what the router chose, and the
            same as it was when the current forward began.
    """

    novel: Tensor
    lost: Tensor
    dropped: Tensor
    imbalance: Tensor

    def __init__(self, d_model: int, warmup: int, device: Any = None) -> None:
        super().__init__()
        self.d_model, self.warmup = d_model, warmup
        self.register_buffer("novel", torch.zeros(3 + d_model, device=device))
        self.register_buffer("lost", torch.zeros(1, device=device))
        self.register_buffer("dropped", torch.zeros(3, device=device))
        self.register_buffer("imbalance", torch.ones(2, device=device))
        self._stacked: Tensor | None = None
        self._last: Assignment | None = None
        self._last_ids: list[int] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Recorder:
        # moves with the model, but .half() would round the counts and overflow
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacked": None, "_last": None}

    def records(self, experts: Sequence[Expert]) -> RecordView:
        """The records of all experts [E, L], each expert's own a view on its row."""
        stacked = self._stacked
        if stacked is not None and len(stacked) == len(experts):
            address, stride = stacked.data_ptr(), stacked.stride(0) * stacked.element_size()
            held = all(
                e.statistics.record.data_ptr() == address + i * stride
                for i, e in enumerate(experts)
            )
            if held and experts[0].statistics.record.device == stacked.device:
                return RecordView(stacked, self.d_model)
        with torch.inference_mode(False):
            stacked = torch.stack([e.statistics.record for e in experts])
            for expert, row in zip(experts, stacked, strict=True):
                expert.statistics.record = row
        self._stacked = stacked
        return RecordView(stacked, self.d_model)

    def begin_forward(self) -> None:
        """Before a recorded forward: what it reads must not change while it may be recomputed."""
        self.imbalance[1] = self.imbalance[0]

    @torch.no_grad()
    def observe_capacity(self, chosen: Assignment, kept: Assignment) -> None:
        """Write how uneven the router's choice was and how much of it capacity dropped."""
        count_E, rows = self._counts(chosen)
        if not rows:
            return
        ratio = count_E.max() * (chosen.num_experts / rows)
        self.imbalance[0] += RATE * (ratio - self.imbalance[0])
        if kept is chosen:
            return
        lost = rows - self._counts(kept)[1]
        self.dropped[0] += RATE * (lost / rows - self.dropped[0])
        self.dropped[1] += lost
        self.dropped[2] += self._total(_inputs(chosen) - _inputs(kept))

    # Where several workers share the experts, each has a part of the rows; here it is all of them.

    def _counts(self, assignment: Assignment) -> tuple[Tensor, int]:
        """Rows of each expert, int64 [E], and in all."""
        return assignment.counts_E, len(assignment.token_R)

    def _total(self, value: Tensor) -> Tensor:
        """The sum over all workers."""
        return value

    def _at(self, value_TX: Tensor, assignment: Assignment, row_N: Tensor) -> Tensor:
        """float32 [N, X]: what belongs to the tokens of these rows, counted in expert order."""
        return value_TX[assignment.token_R[row_N]].float()

    @torch.no_grad()
    def observe(
        self,
        experts: Sequence[Expert],
        x_TD: Tensor,
        assignment: Assignment,
        out_RO: Tensor,
        generator: torch.Generator,
        candidates_TE: Tensor | None = None,
        novel_T: Tensor | None = None,
    ) -> None:
        """Write one training forward into the records."""
        r = self.records(experts)
        counts_E, num_rows = self._counts(assignment)
        count_E = counts_E.float()
        rows, hit_E = max(num_rows, 1), count_E > 0
        r["age"] += 1
        r["idle"] = torch.where(hit_E, 0.0, r["idle"] + 1)
        r["rows"] += count_E
        r["hits"] += hit_E
        rate_E = (1 / r["age"]).clamp_min(RATE)
        hit_rate_E = (1 / r["hits"].clamp_min(1)).clamp_min(RATE) * hit_E
        mass_E = _sum_rows(assignment.weight_R.float(), assignment)
        norm_R = torch.linalg.vector_norm(out_RO.float(), dim=1)
        # overflow is ordinary in half precision and must not stick to a running mean
        norm_E = _sum_rows(torch.where(norm_R.isfinite(), norm_R, 0.0), assignment)
        tokens_1 = mass_E.new_tensor([float(assignment.num_tokens)])
        total = self._total(torch.cat([mass_E, norm_E, tokens_1]))
        mass_E, norm_E, tokens_1 = total.split([len(mass_E), len(norm_E), 1])
        count1_E = count_E.clamp_min(1)
        r["load"] += rate_E * (count_E / rows - r["load"])
        r["gate_mass"] += rate_E * (mass_E / tokens_1.clamp_min(1) - r["gate_mass"])
        r["confidence"] += hit_rate_E * (mass_E / count1_E - r["confidence"])
        r["output_norm"] += hit_rate_E * (norm_E / count1_E - r["output_norm"])
        self._last, self._last_ids = assignment, [e.id for e in experts]
        if num_rows:
            row_N, keep = self._evidence(r, counts_E, num_rows, generator)
            row_Q = torch.arange(0, num_rows, -(-num_rows // SAMPLE), device=x_TD.device)
            wanted = [x_TD]
            if candidates_TE is not None:
                wanted.append(candidates_TE.to(x_TD.dtype))
            if novel_T is not None:
                wanted.append(novel_T[:, None].to(x_TD.dtype))
            wanted_TX = torch.cat(wanted, 1) if len(wanted) > 1 else x_TD
            at_X = self._at(wanted_TX, assignment, torch.cat([row_Q, row_N]))
            x_QD, x_ND = at_X[:, : self.d_model].split([len(row_Q), len(row_N)])
            expert_Q = torch.searchsorted(counts_E.cumsum(0), row_Q, right=True)
            more_QX = at_X[: len(row_Q), self.d_model :] > 0
            judges_QE = None if candidates_TE is None else more_QX[:, : len(counts_E)]
            novel_Q = None if novel_T is None else more_QX[:, -1]
            # a router's own judgement of single inputs is counted by inputs, whatever the batch
            rate = NOVELTY_RATE if novel_T is None else min(1.0, num_rows / 512)
            self._observe_novelty(r, x_QD, expert_Q, hit_rate_E, judges_QE, novel_Q, rate)
            if len(row_N):
                self._keep_evidence(r, x_ND, hit_E & keep[0], keep[1])

    def _observe_novelty(
        self,
        r: RecordView,
        x_QD: Tensor,
        expert_Q: Tensor,
        hit_rate_E: Tensor,
        candidates_QE: Tensor | None,
        novel_Q: Tensor | None,
        rate: float,
    ) -> None:
        finite_Q = x_QD.isfinite().all(1)
        x_QD = torch.where(finite_Q[:, None], x_QD, 0.0)
        z_QE = distance_z(r, x_QD)
        ready_E = r["hits"] > READY_HITS
        judge_QE = ready_E if candidates_QE is None else ready_E & candidates_QE
        nearest_Q = z_QE.masked_fill(~judge_QE, torch.inf).amin(1)
        if novel_Q is None:
            novel_Q = (nearest_Q > NOVEL_Z) & nearest_Q.isfinite()
        novel_Q = novel_Q & finite_Q
        own_z_Q = z_QE.gather(1, expert_Q[:, None])[:, 0]
        own_score_Q = own_z_Q * score_sd(r)[expert_Q] + r["score_mean"][expert_Q]

        def mean_by_expert(value: Tensor, weight_Q: Tensor) -> tuple[Tensor, Tensor]:
            shape = (len(r["age"]), *value.shape[1:])
            weight = weight_Q.view(-1, *[1] * (value.dim() - 1))
            total = value.new_zeros(shape).index_add_(0, expert_Q, value * weight)
            weight_E = value.new_zeros(len(r["age"])).index_add_(0, expert_Q, weight_Q)
            return total / weight_E.clamp_min(1e-9).view(-1, *weight.shape[1:]), weight_E

        every_Q = finite_Q.float()
        absorbed_Q = torch.where(novel_Q, 0.1, every_Q)
        mean_ED, weight_E = mean_by_expert(x_QD, absorbed_Q)
        seen_E = torch.zeros_like(weight_E).index_add_(0, expert_Q, torch.ones_like(absorbed_Q))
        rate_E = hit_rate_E * weight_E / seen_E.clamp_min(1)
        old_mean_ED = r.mean.clone()
        r.mean.add_(rate_E[:, None] * (mean_ED - r.mean))
        square_ED, _ = mean_by_expert(
            (x_QD - old_mean_ED[expert_Q]) * (x_QD - r.mean[expert_Q]), absorbed_Q
        )
        r.var.add_(rate_E[:, None] * (square_ED - r.var)).clamp_min_(0)

        # clipped at 3 sd, not dropped: dropping what is novel would narrow the spread ever more
        sd_Q = score_sd(r)[expert_Q]
        clipped_Q = torch.where(
            (r["hits"] > READY_HITS)[expert_Q],
            r["score_mean"][expert_Q] + own_z_Q.clamp(-3, 3) * sd_Q,
            own_score_Q,
        )
        score_E, rows_E = mean_by_expert(clipped_Q, every_Q)
        # the first forwards score against moments that hardly exist
        settled_E = (r["hits"] > READY_HITS // 4) & (rows_E > 0)
        score_rate_E = torch.where(
            settled_E, (1 / (r["hits"] - READY_HITS // 4).clamp_min(1)).clamp_min(RATE), 0.0
        )
        old_E = r["score_mean"].clone()
        r["score_mean"] += score_rate_E * (score_E - r["score_mean"])
        spread_E, _ = mean_by_expert(
            (clipped_Q - old_E[expert_Q]) * (clipped_Q - r["score_mean"][expert_Q]), every_Q
        )
        r["score_var"] += score_rate_E * (spread_E.clamp_min(0) - r["score_var"])
        z_E, _ = mean_by_expert(own_z_Q.clamp(-3, 3), every_Q)
        r["novelty"] += hit_rate_E * ready_E * (z_E - r["novelty"])
        novel_E, _ = mean_by_expert(novel_Q.float(), every_Q)
        r["novel"] += NOVELTY_RATE * (hit_rate_E > 0) * (novel_E - r["novel"])

        novel = self.novel
        novel[0] += rate * (novel_Q.float().mean() - novel[0])
        novel[1] = torch.maximum(novel[1], novel[0])
        novel[2] += novel_Q.sum()
        novel[3:] += (x_QD * novel_Q[:, None]).sum(0)

    def _evidence(
        self, r: RecordView, counts_E: Tensor, num_rows: int, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One candidate row of each expert, whether it is kept and in which slot.

        Reservoir sampling (Vitter 1985) that never stops renewing.
        """
        held, device = r.evidence.shape[1], counts_E.device
        if not held:
            return counts_E[:0], (counts_E, counts_E)
        draw_2E = torch.rand(2, len(counts_E), generator=generator).to(device)
        start_E = counts_E.cumsum(0) - counts_E
        row_E = start_E + (draw_2E[0] * counts_E).long().clamp_max(counts_E - 1).clamp_min(0)
        seen_E = r["hits"].long() - 1
        slot_E = torch.where(
            seen_E < held, seen_E, (draw_2E[1] * seen_E.clamp(1, 50 * held)).long()
        )
        keep_E = (slot_E >= 0) & (slot_E < held)
        return row_E.clamp_max(num_rows - 1), (keep_E, slot_E.clamp(0, held - 1))

    def _keep_evidence(
        self, r: RecordView, candidate_ED: Tensor, keep_E: Tensor, slot_E: Tensor
    ) -> None:
        expert_E = torch.arange(len(keep_E), device=keep_E.device)
        keep_E = keep_E & candidate_ED.isfinite().all(1)
        old_ED = r.evidence[expert_E, slot_E]
        r.evidence[expert_E, slot_E] = torch.where(keep_E[:, None], candidate_ED, old_ED)

    def check_loss(self, loss: Tensor) -> None:
        """Raise ValueError if the number of losses does not divide that of the last inputs."""
        tokens = 0 if self._last is None else self._last.num_tokens
        if tokens and (not loss.numel() or tokens % loss.numel()):
            raise ValueError(f"loss has {loss.numel()} values, the last forward {tokens} inputs")

    @torch.no_grad()
    def observe_loss(self, experts: Sequence[Expert], loss: Tensor) -> None:
        """Write the loss of the last training forward into the records of the experts it used.

        Args:
            loss: a scalar, or one value per input of the last forward; [B] where the forward had
                B · S tokens gives each token its sequence's loss. What is not finite is counted
                and otherwise ignored.

        Raises:
            ValueError: the number of losses does not divide the number of tokens.
        """
        self.check_loss(loss)
        tokens = 0 if self._last is None else self._last.num_tokens
        if self._last is None or not tokens:
            return
        loss_N = loss.detach().float().reshape(-1).to(self.novel.device)
        loss_T = loss_N.repeat_interleave(tokens // len(loss_N))
        finite_T = loss_T.isfinite()
        self.lost += self._total((~loss_N.isfinite()).sum())
        r = self.records(experts)
        if [e.id for e in experts] != self._last_ids:
            return  # surgery since that forward: its positions are not today's
        finite_R = finite_T[self._last.token_R].float()
        loss_R = torch.where(finite_T, loss_T, 0.0)[self._last.token_R]
        sums = torch.stack([_sum_rows(finite_R, self._last), _sum_rows(loss_R, self._last)])
        count_E, loss_E = self._total(sums)
        mean_E = loss_E / count_E.clamp_min(1)
        hit_E = count_E > 0
        r["loss_count"] += hit_E
        first_E = r["loss_count"].clamp_min(1)
        fast_E = (1 / first_E).clamp_min(LOSS_FAST) * hit_E
        slow_E = (1 / first_E).clamp_min(LOSS_SLOW) * hit_E
        r["loss_fast"] += fast_E * (mean_E - r["loss_fast"])
        apart_E = mean_E - r["loss_slow"]
        r["loss_slow"] += slow_E * apart_E
        r["loss_var"] += slow_E * (apart_E * (mean_E - r["loss_slow"]) - r["loss_var"])

    def begin_window(self, forget: bool = False) -> None:
        """A decision was made: look for novel inputs anew.

        Args:
            forget: also forget the running share, after a birth that answers for it.
        """
        self.novel[1:] = 0
        if forget:
            self.novel[0] = 0


def _inputs(a: Assignment) -> Tensor:
    """How many tokens have an expert."""
    has_T = torch.zeros(a.num_tokens, dtype=torch.bool, device=a.token_R.device)
    return has_T.index_fill_(0, a.token_R, True).sum()


def _sum_rows(value_R: Tensor, assignment: Assignment) -> Tensor:
    total_E = value_R.new_zeros(assignment.num_experts)
    return total_E.index_add_(0, assignment.expert_R, value_R)


@dataclass(frozen=True)
class Signals:
    """A snapshot of one layer for the rules, on the CPU; lists are in the order of `ids`.

    Attributes:
        layer: the layer's name.
        step: the organizer's step.
        d_model: D, the width of its inputs.
        ids: the living experts, ascending.
        groups: experts of one group, that is of one kind and shape, can be merged.
        frozen: whether each is frozen.
        values: per field of the record (`growmoe.experts.statistics.FIELDS`), one float each.
        novel_share: running share of inputs that no expert explains, its peak since the last
            decision.
        novel_count: how many such inputs there were since then (of those sampled).
        novel_mean: their mean, float32 [D], or None.
        novel_nearest: the id of the expert nearest to that mean, or None.
        overlap: float32 [E, E], how novel the mean input of expert i is to expert j, as z_j.
        similarity: () -> float32 [E, E], cosine of the experts' outputs on their evidence.
        usefulness: () -> {id: relative change of the layer's output on the expert's own evidence
            if it were pruned}; an expert without enough evidence is left out.
    """

    layer: str
    step: int
    d_model: int
    ids: list[int]
    groups: list[str]
    frozen: list[bool]
    values: dict[str, list[float]]
    novel_share: float
    novel_count: float
    novel_mean: Tensor | None
    novel_nearest: int | None
    overlap: Tensor
    similarity: Callable[[], Tensor]
    usefulness: Callable[[], dict[int, float]]

    def of(self, id: int) -> dict[str, float]:
        """All fields of one expert."""
        i = self.ids.index(id)
        return {name: values[i] for name, values in self.values.items()}

    def loss_z(self, id: int) -> float:
        """How far the expert's fast loss lies above its slow one, in standard errors.

        The fast mean of rate r averages about (2 − r)/r losses: z = (fast − slow) /
        (sd · sqrt(r/(2 − r))). 0 before 20 losses.
        """
        v = self.of(id)
        if v["loss_count"] < READY_HITS:
            return 0.0
        error = (v["loss_var"] * LOSS_FAST / (2 - LOSS_FAST)) ** 0.5
        gap = v["loss_fast"] - v["loss_slow"]
        return gap / max(error, 1e-6 * abs(v["loss_slow"]), 1e-12)
