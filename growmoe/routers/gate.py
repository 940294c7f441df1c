"""How well each expert suits each token: the logits that routers choose by.

Gates and routers combine freely: a gate says how logits come about, a router what is chosen by
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert

Context = Mapping[str, Any]


class ContextMissing(ValueError):
    """A gate or router was not told what it chooses by."""


@dataclass(frozen=True)
class Entry:
    """One tensor that is kept on each expert, and how newborns get theirs.

    Attributes:
        fresh: (generator) -> the value of an expert without parents.
        parameter: whether it is trained; else it is a buffer.
        clone: (parent's value, generator) -> the value of a clone; a copy if left out.
        merge: (parents' values [P, ...], weights [P]) -> the value of a merged expert; the
            weighted mean if left out.
        toward: (inputs' mean [D], living experts' values [E, ...]) -> the value of a fresh expert
            born for certain inputs; `fresh` if left out.
        numbered: (id) -> the value of a fresh expert, instead of `fresh`, where it depends on the
            id alone.
    """

    fresh: Callable[[torch.Generator], Tensor]
    parameter: bool = True
    clone: Callable[[Tensor, torch.Generator], Tensor] = lambda value, _: value.clone()
    merge: Callable[[Tensor, Tensor], Tensor] = lambda values, weights: torch.tensordot(
        weights.to(values) / weights.sum(), values, dims=1
    )
    toward: Callable[[Tensor, Tensor], Tensor] | None = None
    numbered: Callable[[int], Tensor] | None = None


class Gate(nn.Module):
    """Gives each token a logit for each expert.

    A gate keeps nothing about an expert in itself: it declares `entries`, and the layer gives each
    expert its own. What belongs to no expert it makes in `build`. A subclass defines `forward`,
    and `entries` and `build` where it needs others than a linear gate.
    """

    def entries(self, d_model: int) -> dict[str, Entry]:
        """The per-expert tensors, by name."""
        return {"key": linear_key(d_model)}

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        """Make what belongs to no expert; the layer calls it once."""

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        """Logits.

        Args:
            x_TD: [T, D].
            experts: the E experts in ascending order of id.
            admission_E: float32 [E] in [0, 1], how far each has been let in; its log is added to
                the expert's logit, so that 0 is never chosen while others can be.
            context: what the caller knows of the tokens, by name: "token", "task", "length" …

        Returns:
            float32 (or float64) [T, E].
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def __repr__(self) -> str:
        inner = getattr(self, "gate", None)
        gate = "" if inner is None or type(inner) is Linear else f"gate={inner}"
        return f"{type(self).__name__}({', '.join(filter(None, (self.extra_repr(), gate)))})"


class Linear(Gate):
    """The inner product of the token with the expert's key (Shazeer et al. 2017, 1701.06538)."""

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        return linear_logits(x_TD, experts, admission_E)


def linear_key(d_model: int) -> Entry:
    """A key per expert whose inner product with the input is its logit."""

    def fresh(generator: torch.Generator) -> Tensor:
        return torch.randn(d_model, generator=generator) * d_model**-0.5

    def toward(mean_D: Tensor, keys_ED: Tensor) -> Tensor:
        # along these inputs, at the living keys' usual length
        length = keys_ED.norm(dim=1).mean() if len(keys_ED) else mean_D.new_tensor(1.0)
        return mean_D / mean_D.norm().clamp_min(1e-12) * length

    return Entry(fresh=fresh, toward=toward)


def linear_logits(x_TD: Tensor, experts: Sequence[Expert], admission_E: Tensor) -> Tensor:
    """Inner products with the experts' keys, in float32 at least: [T, D] -> [T, E]."""
    x_TD, keys_ED = wide(x_TD, stacked(experts, "key"))
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = x_TD @ keys_ED.T
    return logits_TE + admission_E.to(logits_TE).log()


def stacked(experts: Sequence[Expert], name: str) -> Tensor:
    """The experts' entries of this name: [E, ...]."""
    return torch.stack([getattr(expert.entries, name) for expert in experts])


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in their common dtype, float32 at least: gates decide in no less."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def told(context: Context | None, name: str, num_tokens: int, device: torch.device) -> Tensor:
    """What the context says of each token under `name`, as int64 [T].

    One integer is of all tokens; [B] where T is a multiple of B is of one sequence each.

    Raises:
        ContextMissing: it says nothing.
        ValueError: not integers, or as many as do not divide T.
    """
    value = None if context is None else context.get(name)
    if value is None:
        raise ContextMissing(
            f"this router chooses by {name!r}: call the layer with context={{{name!r}: …}}, an "
            "integer for each token, for each sequence, or for all"
        )
    value_N = torch.as_tensor(value, device=device).reshape(-1)
    if value_N.is_floating_point() or value_N.is_complex():
        raise ValueError(f"context {name!r} must be integers, got {value_N.dtype}")
    if not num_tokens:
        return value_N[:0].long()
    if not len(value_N) or num_tokens % len(value_N):
        raise ValueError(f"context {name!r} has {len(value_N)} values for {num_tokens} tokens")
    return value_N.long().repeat_interleave(num_tokens // len(value_N))
