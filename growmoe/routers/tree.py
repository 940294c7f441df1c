"""Logits from a tree of gates: which branch, then which branch of it, then which expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert
from growmoe.routers.cosine import refuse_second_layer
from growmoe.routers.gate import Context, Entry, Gate, linear_logits, stacked, wide


class Tree(Gate):
    """Hierarchical gate of any depth (Jordan & Jacobs 1994; two levels as in 1701.06538, app. B).

    Inner nodes have a softmax over their branches; the experts at a leaf have one over their own
    keys. An expert's probability is the product along its path, its logit the sum of the logs, so
    any router can choose by it: `TopK(2, gate=Tree((4,)))` has two levels, `Dense(Tree((2, 2, 2)))`
    is a hierarchical mixture of experts.

    The branching is fixed; experts come and go at the leaves. An expert's leaf is id mod the
    number of leaves, a clone's its parent's. Branches without experts are never taken.

    Args:
        branches: branches of a node at each level, from the root.
        keep: at each node only the best so many branches are taken (k of the primary gate in
            1701.06538); all if left out.

    Raises:
        ValueError: branches are not integers of at least 2, or keep below 1.
    """

    nodes: nn.ParameterList

    def __init__(self, branches: Sequence[int] = (4,), keep: int | None = None) -> None:
        super().__init__()
        branches = tuple(branches)
        if not branches or not all(isinstance(b, int) and b >= 2 for b in branches):
            raise ValueError(f"Tree: branches must be integers of at least 2, got {branches!r}")
        if keep is not None and (not isinstance(keep, int) or keep < 1):
            raise ValueError(f"Tree: keep must be a positive integer, got {keep!r}")
        self.branches, self.keep = branches, keep

    @property
    def leaves(self) -> int:
        """How many leaves experts can be at."""
        leaves = 1
        for b in self.branches:
            leaves *= b
        return leaves

    def entries(self, d_model: int) -> dict[str, Entry]:
        leaf = Entry(
            lambda _: torch.zeros((), dtype=torch.int64),
            parameter=False,
            merge=lambda values_P, _: values_P[0],
            numbered=lambda id: torch.tensor(id % self.leaves),
        )
        return {**super().entries(d_model), "leaf": leaf}

    def build(
        self, d_model: int, generator: torch.Generator, device: Any = None, dtype: Any = None
    ) -> None:
        refuse_second_layer(self, "nodes")
        self.nodes = nn.ParameterList()
        width = 1
        for b in self.branches:
            width *= b
            draw = torch.randn(width, d_model, generator=generator) * d_model**-0.5
            self.nodes.append(nn.Parameter(draw.to(device=device, dtype=dtype)))

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        leaf_E = stacked(experts, "leaf")
        logits_TE = linear_logits(x_TD, experts, admission_E)
        with torch.autocast(x_TD.device.type, enabled=False):
            log_probs_TE = logits_TE - _group_logsumexp(logits_TE, leaf_E, self.leaves)[:, leaf_E]
            # how far the most admitted expert below a branch has been let in
            open_L = admission_E.new_zeros(self.leaves)
            open_L = open_L.scatter_reduce(0, leaf_E, admission_E, "amax")
            width = 1
            for b, keys in zip(self.branches, self.nodes, strict=True):
                width *= b
                open_W = open_L.view(width, -1).amax(1)
                x_wide_TD, keys_WD = wide(x_TD, keys)
                branch_TW = x_wide_TD @ keys_WD.T + open_W.to(x_wide_TD).log()
                branch_TNB = branch_TW.view(len(x_TD), width // b, b)
                if self.keep is not None and self.keep < b:
                    kept = branch_TNB.topk(self.keep, dim=-1).indices
                    inside = torch.zeros_like(branch_TNB, dtype=torch.bool).scatter(2, kept, True)
                    branch_TNB = branch_TNB.masked_fill(~inside, -torch.inf)
                # a node below which there is nobody has no finite branch, and no gradient
                nobody_TN1 = ~branch_TNB.isfinite().any(-1, keepdim=True)
                log_TNB = branch_TNB.masked_fill(nobody_TN1, 0.0).log_softmax(-1)
                log_TW = log_TNB.view(len(x_TD), width).to(log_probs_TE.dtype)
                log_probs_TE = log_probs_TE + log_TW[:, leaf_E // (self.leaves // width)]
        return torch.where(admission_E > 0, log_probs_TE, -torch.inf)

    def extra_repr(self) -> str:
        return f"branches={self.branches}, keep={self.keep}"


def _group_logsumexp(logits_TE: Tensor, group_E: Tensor, num_groups: int) -> Tensor:
    """logsumexp over the experts of each group: [T, E] -> [T, G]; 0 for a group of nobody."""
    member_GE = torch.arange(num_groups, device=group_E.device)[:, None] == group_E
    masked_TGE = torch.where(member_GE, logits_TE[:, None], -torch.inf)
    top_TG1 = masked_TGE.detach().amax(-1, keepdim=True)
    top_TG1 = torch.where(top_TG1.isfinite(), top_TG1, 0.0)
    sum_TG = torch.where(member_GE, (logits_TE[:, None] - top_TG1).exp(), 0.0).sum(-1)
    return top_TG1[..., 0] + torch.where(sum_TG > 0, sum_TG, 1.0).log()
