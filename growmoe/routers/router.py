"""What every router shares: the entries it keeps on each expert, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert


@dataclass(frozen=True)
class Entry:
    """One tensor that a router keeps on each expert, and how newborns get theirs.

    Attributes:
        fresh: (generator) -> the value of an expert without parents.
        parameter: whether it is trained; else it is a buffer.
        clone: (parent's value, generator) -> the value of a clone; a copy if left out.
        merge: (parents' values [P, ...], weights [P]) -> the value of a merged expert; the
            weighted mean if left out.
        toward: (inputs' mean [D], living experts' values [E, ...]) -> the value of a fresh expert
            born for certain inputs; `fresh` if left out.
    """

    fresh: Callable[[torch.Generator], Tensor]
    parameter: bool = True
    clone: Callable[[Tensor, torch.Generator], Tensor] = lambda value, _: value.clone()
    merge: Callable[[Tensor, Tensor], Tensor] = lambda values, weights: torch.tensordot(
        weights.to(values) / weights.sum(), values, dims=1
    )
    toward: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        assignment: which token goes to which expert.
        probs_TE: float32 [T, E], the gate's probabilities (or scores) over all experts.
        logits_TE: float32 [T, E], what they came from; -inf for an expert not admitted yet.
        candidates_TE: bool [T, E], which experts might have explained the token, for novelty; all
            if left out.
    """

    assignment: Assignment
    probs_TE: Tensor
    logits_TE: Tensor
    candidates_TE: Tensor | None = None


class Router(nn.Module):
    """Chooses experts for tokens.

    A router keeps nothing about an expert in itself: it declares `entries`, and the layer gives
    each expert its own. A subclass defines `entries` and `forward`.

    Attributes:
        sees_future: whether the choice for a token depends on later tokens in the batch, which
            makes it wrong in a causal model.
        min_experts: the fewest experts it can choose among.
    """

    sees_future = False
    min_experts = 1

    def entries(self, d_model: int) -> dict[str, Entry]:
        """The per-expert tensors, by name."""
        return {"key": linear_key(d_model)}

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Any = None,
    ) -> Routing:
        """Choose.

        Args:
            x_TD: [T, D].
            experts: the E experts in ascending order of id.
            admission_E: float32 [E] in [0, 1], how far each has been let in; its log is added to
                the expert's logit, so that 0 is never chosen while others can be.
            context: task, client or modality, for routers that use one.
        """
        raise TypeError(f"{type(self).__name__} must define forward")


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
    keys_ED = torch.stack([expert.entries.key for expert in experts])  # type: ignore[misc]
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, keys_ED.dtype), torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = x_TD.to(dtype) @ keys_ED.to(dtype).T
    return logits_TE + admission_E.to(dtype).log()
