"""Each token's experts are fixed by a hash: nothing to learn, nothing to collapse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, told
from growmoe.routers.router import Router, Routing, check_k


class Hash(Router):
    """Hash routing of tokens (Roller et al. 2021, Hash Layers, arXiv 2106.04426).

    The context's "token", an integer for each input (or whatever `by` names), decides, with equal
    combine weights. Each (value, expert id) pair has a pseudo-random score, and a token takes the
    k experts of highest score (rendezvous hashing, Thaler & Ravishankar 1998): when an expert
    goes, only its tokens move, and a newborn takes 1/E of each one's.

    Args:
        k: experts per token.
        by: what of the context is hashed.
        seed: of the hash.

    Raises:
        ValueError: k is not a positive integer.
    """

    balances = True  # as even as the tokens' frequencies are
    wants = "token"

    def __init__(self, k: int = 1, by: str = "token", seed: int = 0) -> None:
        super().__init__()
        self.k = check_k(self, k)
        self.by = self.wants = by
        self.seed = seed

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k

    def entries(self, d_model: int) -> dict[str, Entry]:
        """None: the id alone decides."""
        return {}

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        value_T = told(context, self.by, len(x_TD), x_TD.device)
        id_E = torch.tensor([e.id for e in experts], device=x_TD.device)
        # the weighted form of rendezvous hashing lets a newborn in by its admission:
        # log(u) / weight is largest for e with probability weight_e / Σ weights
        uniform_TE = hashed(value_T[:, None], id_E + 1 + (self.seed << 20))
        score_TE = uniform_TE.log() / admission_E.double()
        chosen_TK = score_TE.topk(self.k, dim=-1).indices
        dtype = torch.promote_types(torch.float32, x_TD.dtype)
        admitted_TK = score_TE.gather(1, chosen_TK).isfinite()
        weight_TK = admitted_TK.to(dtype)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1)
        assignment = Assignment.from_choice(chosen_TK, weight_TK, len(experts))
        # before it is hashed a token may go to anyone; a rerouted row keeps its weight by this
        probs_TE = (admission_E / admission_E.sum()).to(dtype).expand(len(x_TD), -1)
        return Routing(assignment, probs_TE, score_TE.to(dtype))

    def extra_repr(self) -> str:
        return f"k={self.k}, by={self.by!r}, seed={self.seed}"


def hashed(a: Tensor, b: Tensor) -> Tensor:
    """A pseudo-random float64 in (0, 1) for each pair of integers, the same on every machine.

    A finalizer of splitmix64 (Steele et al. 2014) on int64, which wraps around.
    """
    z = a * -7046029254386353131 + b * -4417276706812531889
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shift(z, shift)) * factor
    z = z ^ _shift(z, 31)
    return (_shift(z, 11).double() + 0.5) * 2.0**-53


def _shift(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in: torch's own keeps the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
