"""Which input goes to which expert, with what weight: the one currency between router and bank.

Shape suffixes, here and in the whole core:
    T tokens (inputs)   E experts, in ascending order of id   K choices per token
    R routed rows, one for each (token, expert) pair          D model width   F hidden width
    J mixtures of each token's rows, where a layer has several gates; else there is one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """A sparse token-by-expert matrix of combine weights, its rows sorted by expert.

    Experts are named by their position in ascending order of id, so the rows of an expert keep
    their order whatever the bank does with its memory.

    Attributes:
        token_R: int64 [R], the token of each row.
        expert_R: int64 [R], the expert's position, ascending.
        weight_R: float [R], the combine weight; differentiable. [R, J] where several gates mix the
            same rows, each for itself.
        counts_E: int64 [E], rows of each expert.
        num_tokens: T.
        slot_TK: int64 [T, K], where each token's rows lie, if every token has exactly K of them.
            It makes the combine a gather, which is deterministic on every device.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    counts_E: Tensor
    num_tokens: int
    slot_TK: Tensor | None = None

    @classmethod
    def from_choice(cls, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Assignment:
        """Every token chooses K experts.

        Args:
            expert_TK: int64 [T, K], positions of the chosen experts, distinct within a token.
            weight_TK: float [T, K], their combine weights, or [T, K, J].
            num_experts: E.
        """
        num_tokens, k = expert_TK.shape
        flat_R = expert_TK.reshape(-1)
        order_R = torch.argsort(flat_R, stable=True)
        slot_R = torch.empty_like(order_R)
        slot_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        return cls(
            token_R=order_R // k,
            expert_R=flat_R[order_R],
            weight_R=weight_TK.flatten(0, 1)[order_R],
            counts_E=_count(flat_R, num_experts),
            num_tokens=num_tokens,
            slot_TK=slot_R.view(num_tokens, k),
        )

    @classmethod
    def from_pairs(
        cls,
        token_R: Tensor,
        expert_R: Tensor,
        weight_R: Tensor,
        num_experts: int,
        num_tokens: int,
    ) -> Assignment:
        """Any set of (token, expert, weight) triples: a variable number of experts per token.

        Args:
            token_R: int64 [R].
            expert_R: int64 [R], in any order; no pair may occur twice.
            weight_R: float [R], or [R, J].
        """
        order_R = torch.argsort(expert_R, stable=True)
        return cls(
            token_R=token_R[order_R],
            expert_R=expert_R[order_R],
            weight_R=weight_R[order_R],
            counts_E=_count(expert_R, num_experts),
            num_tokens=num_tokens,
        )

    @property
    def num_experts(self) -> int:
        return self.counts_E.numel()

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """Copy each row's token: [T, D] -> [R, D]."""
        return _Dispatch.apply(x_TD, self)  # type: ignore[no-any-return]

    def combine(self, out_RD: Tensor) -> Tensor:
        """Sum each token's rows by their weights; a token without rows gets 0.

        [R, D] -> [T, D], or [T, J, D] where there are J weights for each row.
        """
        weight_R = self.weight_R.to(out_RD.dtype)
        if weight_R.dim() == 1:
            return _Combine.apply(out_RD * weight_R[:, None], self)  # type: ignore[no-any-return]
        row_RJD = weight_R[:, :, None] * out_RD[:, None]
        sum_TJD: Tensor = _Combine.apply(row_RJD.flatten(1), self)
        return sum_TJD.view(self.num_tokens, *row_RJD.shape[1:])

    def dense(self) -> Tensor:
        """The combine weights as a matrix: float [T, E], or [T, E, J]."""
        weight_TE = self.weight_R.new_zeros(
            self.num_tokens, self.num_experts, *self.weight_R.shape[1:]
        )
        return weight_TE.index_put((self.token_R, self.expert_R), self.weight_R, accumulate=True)

    def keep(self, keep_R: Tensor) -> Assignment:
        """Only these rows: bool [R]. On an accelerator this waits for the number kept."""
        expert_R = self.expert_R[keep_R]
        return Assignment(
            token_R=self.token_R[keep_R],
            expert_R=expert_R,
            weight_R=self.weight_R[keep_R],
            counts_E=_count(expert_R, self.num_experts),
            num_tokens=self.num_tokens,
        )

    def observed(self) -> Assignment:
        """What the signals are told: hard rows with one weight each, without a graph."""
        weight_R = self.weight_R.detach()
        return Assignment(
            self.token_R,
            self.expert_R,
            weight_R if weight_R.dim() == 1 else weight_R.mean(1),
            self.counts_E,
            self.num_tokens,
            self.slot_TK,
        )


def _count(expert_R: Tensor, num_experts: int) -> Tensor:
    # not bincount, which waits for the device
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_R.device)
    return counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R))


def _sum_rows(row_RD: Tensor, assignment: Assignment) -> Tensor:
    if assignment.slot_TK is not None:
        num_tokens, k = assignment.slot_TK.shape
        return row_RD[assignment.slot_TK.view(-1)].view(num_tokens, k, row_RD.shape[1]).sum(1)
    sum_TD = row_RD.new_zeros(assignment.num_tokens, row_RD.shape[1])
    return sum_TD.index_add(0, assignment.token_R, row_RD)


class _Dispatch(torch.autograd.Function):
    """Dispatch and combine are each other's transpose, so each is the other's backward."""

    @staticmethod
    def forward(x_TD, assignment):
        return x_TD[assignment.token_R]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.assignment = inputs[1]

    @staticmethod
    def backward(ctx, grad_RD):
        return _Combine.apply(grad_RD, ctx.assignment), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(row_RD, assignment):
        return _sum_rows(row_RD, assignment)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.assignment = inputs[1]

    @staticmethod
    def backward(ctx, grad_TD):
        return _Dispatch.apply(grad_TD, ctx.assignment), None
