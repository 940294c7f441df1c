"""What every router shares: it chooses experts for tokens, by the logits of its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, Gate, Linear


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        assignment: which token goes to which expert.
        probs_TE: float32 [T, E], the gate's probabilities (or scores) over all experts.
        logits_TE: float32 [T, E], what they came from; -inf for an expert not admitted yet.
        candidates_TE: bool [T, E], which experts might have explained the token, for novelty; all
            if left out.
        novel_T: bool [T], which tokens are novel, where the router itself can tell better than the
            distances of `growmoe.signals`.
        aux: a scalar that the router itself wants added to the loss, its coefficient included.
    """

    assignment: Assignment
    probs_TE: Tensor
    logits_TE: Tensor
    candidates_TE: Tensor | None = None
    aux: Tensor | None = None
    novel_T: Tensor | None = None


class Router(nn.Module):
    """Chooses experts for tokens.

    A router keeps nothing about an expert in itself: it declares `entries`, and the layer gives
    each expert its own. A subclass defines `forward`, and `entries` where it needs more than its
    gate does.

    Args:
        gate: how logits come about; `Linear` if left out.

    Attributes:
        sees_future: whether the choice for a token depends on later tokens in the batch, which
            makes it wrong in a causal model.
        balances: whether it keeps the experts' load even by itself, or has a loss of its own for
            it; a layer then adds no balance loss unless asked.
        capped: whether a capacity can be set on what it chooses.
        wants: what a context that is no mapping says, by name.
        min_experts: the fewest experts it can choose among.
    """

    sees_future = False
    balances = False
    capped = True
    wants: str | None = None
    min_experts = 1

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        if gate is not None and not isinstance(gate, Gate):
            raise ValueError(f"gate must be a Gate such as Linear(), got {gate!r}")
        self.gate = Linear() if gate is None else gate

    def entries(self, d_model: int) -> dict[str, Entry]:
        """The per-expert tensors, by name."""
        return self.gate.entries(d_model)

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        """Make what belongs to no expert; the layer calls it once."""
        self.gate.build(d_model, generator, device, dtype)

    def advance(self, experts: Sequence[Expert]) -> None:
        """Called before each recorded training forward: the place to change what it keeps.

        What a forward decides must not depend on whether it is the first or a recomputation
        (activation checkpointing), so nothing that it reads changes during or after it.
        """

    def observe(self, experts: Sequence[Expert], routing: Routing) -> None:
        """Called after each recorded training forward, to remember for the next `advance`.

        In buffers or entries, since a checkpoint may be written in between.
        """

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        """Choose.

        Args:
            x_TD: [T, D].
            experts: the E experts in ascending order of id.
            admission_E: float32 [E] in [0, 1], how far each has been let in; its log is added to
                the expert's logit, so that 0 is never chosen while others can be.
            context: what the caller knows of the tokens, by name: "token", "task", "label" …; the
                layer adds "length", the number of tokens in a sequence.
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def overlap(self, experts: Sequence[Expert]) -> Tensor | None:
        """How far the inputs of expert i lie from those of expert j, in standard deviations.

        Returns:
            float32 [E, E] where the router can tell better than `growmoe.signals`, else None.
        """
        return None

    def __repr__(self) -> str:
        # on one line, for messages; a linear gate goes without saying
        own = self.extra_repr()
        gate = "" if type(self.gate) is Linear else f"gate={self.gate}"
        return f"{type(self).__name__}({', '.join(filter(None, (own, gate)))})"


def check_k(router: Router, k: object) -> int:
    """A positive integer, or ValueError."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{type(router).__name__}: k must be a positive integer, got {k!r}")
    return k


def from_mask(mask_TE: Tensor, weight_TE: Tensor) -> Assignment:
    """The rows where a bool mask [T, E] is set, with these weights [T, E] or [T, E, J].

    On an accelerator this waits for the number of rows.
    """
    token_R, expert_R = mask_TE.nonzero(as_tuple=True)
    return Assignment.from_pairs(
        token_R,
        expert_R,
        weight_TE[token_R, expert_R],
        num_experts=mask_TE.shape[1],
        num_tokens=len(mask_TE),
    )


def from_all(weight_TE: Tensor) -> Assignment:
    """Every token takes every expert, with these weights [T, E]."""
    num_tokens, num_experts = weight_TE.shape
    every_TE = torch.arange(num_experts, device=weight_TE.device).expand(num_tokens, num_experts)
    return Assignment.from_choice(every_TE, weight_TE, num_experts)
