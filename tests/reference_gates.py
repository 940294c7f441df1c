"""How well each expert suits each token, by every gate, as plainly as its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growmoe import Expert, routers
from growmoe.routers import Gate

Rows = list[list[Tensor]]  # [T][E]


@dataclass
class Setting:
    """What a router is given.

    Attributes:
        tokens: T float64 vectors [D].
        admissions: how far each expert has been let in.
        entry: (name, position of the expert) -> float64, what the router keeps on it.
        own: (name within the router) -> float64, what belongs to no expert.
        dtype: in which the layer computes, and so draws.
        margins: how far each decision was from falling otherwise is written here.
    """

    tokens: list[Tensor]
    experts: list[Expert]
    admissions: list[float]
    entry: Callable[[str, int], Tensor]
    own: Callable[[str], Tensor]
    training: bool
    dtype: torch.dtype
    context: dict[str, Any]
    margins: list[float]

    def told(self, name: str) -> list[int]:
        value = torch.as_tensor(self.context[name]).reshape(-1).tolist()
        each = len(self.tokens) // max(len(value), 1)
        return [v for v in value for _ in range(each)]

    def gumbel(self) -> Rows:
        draw = torch.empty(len(self.tokens), len(self.experts), dtype=self.dtype)
        return [[-v.log() for v in row] for row in draw.exponential_().double()]


def softmax(values: list[Tensor]) -> list[Tensor]:
    top = max(v.item() for v in values)
    powers = [torch.exp(v - top) for v in values]
    total = sum(powers)
    return [p / total for p in powers]


def sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def log(admission: float) -> float:
    return math.log(admission) if admission > 0 else -math.inf


def best(values: list[Tensor], k: int, margins: list[float]) -> list[int]:
    """The positions of the k largest; earlier ones first where they are equal."""
    order = sorted(range(len(values)), key=lambda e: -values[e].item())
    if k < len(order) and values[order[k]].item() > -math.inf:
        margins.append((values[order[k - 1]] - values[order[k]]).item())
    return order[:k]


def gate_logits(gate: Gate, s: Setting, where: str = "gate.") -> Rows:
    if isinstance(gate, routers.Conditioned):
        rows = (
            [[torch.tensor(log(a), dtype=torch.float64) for a in s.admissions] for _ in s.tokens]
            if gate.alone
            else gate_logits(gate.gate, s, where + "gate.")
        )
        if gate.by not in s.context:
            return rows
        name = f"{gate.by}_bias"
        return [
            [v + s.entry(name, e)[value] for e, v in enumerate(row)]
            for row, value in zip(rows, s.told(gate.by), strict=True)
        ]
    if isinstance(gate, routers.ExpertDropout):
        rows = gate_logits(gate.gate, s, where + "gate.")
        if not s.training:
            return rows
        hidden = torch.rand(len(s.tokens), len(s.experts), dtype=s.dtype) < gate.p
        return [
            [
                v - 1e4 if h and not _all_hidden(hs, s.admissions) else v
                for v, h in zip(row, hs, strict=True)
            ]
            for row, hs in zip(rows, hidden.tolist(), strict=True)
        ]
    if isinstance(gate, routers.Tree):
        return [_tree(gate, s, where, token) for token in s.tokens]
    if isinstance(gate, routers.Cosine):
        scale = torch.exp(s.own(where + "log_scale")).clamp(max=gate.largest)
        inputs = s.tokens
        if gate.d_proj is not None:
            inputs = [s.own(where + "projection") @ token for token in inputs]
        return [
            [cosine(x, s.entry("key", e)) * scale + log(a) for e, a in enumerate(s.admissions)]
            for x in inputs
        ]
    assert type(gate) is routers.Linear
    return [
        [token.dot(s.entry("key", e)) + log(a) for e, a in enumerate(s.admissions)]
        for token in s.tokens
    ]


def _all_hidden(hidden: list[bool], admissions: list[float]) -> bool:
    """Then none is: a token needs someone."""
    return all(h or not a for h, a in zip(hidden, admissions, strict=True))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a.dot(b) / (a.norm() * b.norm())


def _tree(gate: routers.Tree, s: Setting, where: str, token: Tensor) -> list[Tensor]:
    """Walk down from the root with the probability of being here; inner nodes, then leaves."""
    probability: dict[int, Tensor] = {}
    leaf = [int(s.entry("leaf", e)) for e in range(len(s.experts))]

    def walk(level: int, node: int, so_far: Tensor | float) -> None:
        if level == len(gate.branches):
            here = [e for e in range(len(s.experts)) if leaf[e] == node]
            own = [token.dot(s.entry("key", e)) + log(s.admissions[e]) for e in here]
            if any(v.isfinite() for v in own):
                for e, p in zip(here, softmax(own), strict=True):
                    probability[e] = so_far * p
            return
        b = gate.branches[level]
        below = math.prod(gate.branches[level + 1 :])
        keys = s.own(f"{where}nodes.{level}")
        children = [node * b + i for i in range(b)]
        opened = [
            max((s.admissions[e] for e in range(len(leaf)) if leaf[e] // below == c), default=0.0)
            for c in children
        ]
        values = [token.dot(keys[c]) + log(o) for c, o in zip(children, opened, strict=True)]
        kept = best(values, gate.keep or b, s.margins)
        kept = [i for i in kept if values[i].isfinite()]
        for i, p in zip(kept, softmax([values[i] for i in kept]) if kept else [], strict=True):
            walk(level + 1, children[i], so_far * p)

    walk(0, 0, 1.0)
    nothing = torch.tensor(-math.inf, dtype=torch.float64)
    return [
        probability[e].log() if e in probability and s.admissions[e] > 0 else nothing
        for e in range(len(s.experts))
    ]
