"""What one expert lived through, in one flat float32 record.

A record is numbers (`FIELDS`), the running mean and variance of the expert's inputs, and a sample
of those inputs (its *evidence*). It is flat so that a layer can stack the records of all its
experts, let each be a view on its row, and update them all with one set of tensor operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.experts.ffn import own_storage

FIELDS = (
    "age",  # training forwards since birth
    "idle",  # training forwards since it last received a row
    "rows",  # rows it received in all
    "hits",  # training forwards in which it received a row
    "load",  # running mean of its share of the rows
    "gate_mass",  # running mean of its combine weights, summed over the batch, per token
    "confidence",  # running mean of its combine weight over its rows
    "output_norm",  # running mean of the Euclidean norm of its output over its rows
    "score_mean",  # of its inputs' distance score (see growmoe.signals), its mean …
    "score_var",  # … and variance
    "novelty",  # running mean of its rows' distance, in standard deviations
    "novel",  # running share of its rows that are novel to every candidate
    "loss_fast",  # running mean of the loss of its rows, rate 0.1 …
    "loss_slow",  # … rate 0.01 …
    "loss_var",  # … and the variance around the latter
    "loss_count",  # losses seen
)
NOVEL_Z = 2.0  # standard deviations beyond which an input is novel to an expert
READY_HITS = 20  # forwards before an expert's moments are trusted
_INDEX = {name: i for i, name in enumerate(FIELDS)}


class Statistics(nn.Module):
    """The record of one expert.

    Args:
        d_model: D, the width of the inputs.
        evidence_rows: M, how many of its inputs are kept; 0 keeps none.
    """

    record: Tensor

    def __init__(
        self,
        d_model: int,
        evidence_rows: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.evidence_rows = d_model, evidence_rows
        length = len(FIELDS) + (2 + evidence_rows) * d_model
        self.register_buffer("record", torch.zeros(length, dtype=torch.float32, device=device))

    def __getitem__(self, field: str) -> float:
        """One number of the record; waits for the device."""
        return float(self.record[_INDEX[field]])

    def view(self, record: Tensor | None = None) -> RecordView:
        """The parts of this record, or of another of the same layout, by name."""
        return RecordView(self.record if record is None else record, self.d_model)

    def _apply(self, fn: Any, recurse: bool = True) -> Statistics:
        # moves with the model, but .bfloat16() would stop the counts at 256
        record = self.record
        super()._apply(fn, recurse)
        if self.record.dtype != record.dtype:
            self.record = record.to(self.record.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own_storage(destination, prefix, ("record",))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_buffers"] = {"record": self.record.clone()}  # not the whole layer's storage
        return state


class RecordView:
    """The parts of a record [..., L], as views on it; L = len(FIELDS) + (2 + M) · D."""

    def __init__(self, record: Tensor, d_model: int) -> None:
        self.record = record
        numbers, d = len(FIELDS), d_model
        self.mean = record[..., numbers : numbers + d]
        self.var = record[..., numbers + d : numbers + 2 * d]
        self.evidence = record[..., numbers + 2 * d :].unflatten(-1, (-1, d))

    def __getitem__(self, field: str) -> Tensor:
        return self.record[..., _INDEX[field]]

    def __setitem__(self, field: str, value: Tensor | float) -> None:
        self.record[..., _INDEX[field]] = value


def evidence_count(hits: float, evidence_rows: int) -> int:
    """How many rows of evidence an expert with so many hits holds: one comes with each hit."""
    return int(min(hits, evidence_rows))


@torch.no_grad()
def merged_statistics(parents: Sequence[Statistics], generator: torch.Generator) -> Statistics:
    """The record of an expert made of several, as if it had received all their rows.

    Moments are pooled by the number of rows; the evidence is a draw from all parents' evidence.
    """
    first = parents[0]
    result = Statistics(first.d_model, first.evidence_rows, device=first.record.device)
    views = [p.view() for p in parents]
    rows = torch.stack([v["rows"] for v in views])
    share = (rows / rows.sum()) if rows.sum() > 0 else torch.full_like(rows, 1 / len(rows))
    out = result.view()
    for field in FIELDS:
        values = torch.stack([v[field] for v in views])
        if field in ("load", "gate_mass", "rows"):
            out[field] = values.sum()
        elif field in ("age", "hits", "loss_count"):
            out[field] = values.max()
        elif field == "idle":
            out[field] = values.min()
        else:
            out[field] = (values * share).sum()
    means = torch.stack([v.mean for v in views])
    out.mean.copy_(share @ means)
    second = torch.stack([v.var for v in views]) + means.square()
    out.var.copy_((share @ second - out.mean.square()).clamp_min(0))
    if first.evidence_rows:
        held = [v.evidence[: evidence_count(float(v["hits"]), first.evidence_rows)] for v in views]
        pool = torch.cat(held)
        pick = torch.randperm(len(pool), generator=generator)[: first.evidence_rows]
        out.evidence[: len(pick)] = pool[pick.to(pool.device)]
        out["hits"] = (
            torch.minimum(out["hits"], out["hits"].new_tensor(float(len(pick))))
            if len(pick) < first.evidence_rows
            else out["hits"]
        )
    return result


def score_sd(r: RecordView) -> Tensor:
    # of a logarithm: a smaller spread would call a distance of 1.2 times the usual one novel
    return r["score_var"].sqrt().clamp_min(0.1)


def distance_z(r: RecordView, x_QD: Tensor) -> Tensor:
    """z_e(x) of `growmoe.signals`, for all pairs: [Q, D] -> [Q, E]."""
    with torch.autocast(x_QD.device.type, enabled=False):  # the terms below cancel
        return _distance_z(r, x_QD.float())


def _distance_z(r: RecordView, x_QD: Tensor) -> Tensor:
    center_D = r.mean.mean(0)
    x_QD, mean_ED = x_QD - center_D, r.mean - center_D
    precision_ED = 1 / (r.var + r.var.mean(1, keepdim=True) / 20 + 1e-8)
    score_QE = (
        x_QD.square() @ precision_ED.T
        - 2 * x_QD @ (mean_ED * precision_ED).T
        + (mean_ED.square() * precision_ED).sum(1)
    ) / x_QD.shape[1]
    return (score_QE.clamp_min(1e-6).log() - r["score_mean"]) / score_sd(r)
