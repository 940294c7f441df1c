"""What one calibration pass keeps of a layer: sums from which all criteria follow.

For expert j, with T_j its tokens, g the combine weight that the layer used, f_j(x) its output:
N_j = |T_j|, Σ g, Σ ‖f‖, Σ ‖f‖², Σ g‖f‖, Σ f, max |f|, and, where gradients flow,
Σ ⟨∂L/∂(g f), g f⟩.
"""

from __future__ import annotations

import torch
from torch import Tensor

from growmoe.compress.layer import Observed

_SUMS = ("count", "gate", "norm", "square", "gated_norm", "taylor")


class LayerStatistics:
    """Streaming sums over the tokens of one layer; nothing grows with their number.

    Args:
        num_experts: E.
        samples: the most inputs that are kept (a uniform sample of all that were seen), for what
            must run experts on inputs not their own.
        seed: of the sample.

    Attributes:
        tokens: T.
        count, gate, norm, square, gated_norm, taylor, peak: float64 [E].
        output_EO: float64 [E, O], Σ f.
        logits_EE: float64 [E, E], Σ_t l_i l_j of the router's logits.
        sample_ND: the inputs that were kept.
    """

    def __init__(self, num_experts: int, samples: int = 1024, seed: int = 0) -> None:
        self.num_experts, self.samples = num_experts, samples
        self.tokens = 0
        for name in _SUMS:
            setattr(self, name, torch.zeros(num_experts, dtype=torch.float64))
        self.peak = torch.zeros(num_experts, dtype=torch.float64)
        self.logits_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.output_EO = torch.zeros(num_experts, 0, dtype=torch.float64)
        self.sample_ND = torch.zeros(0, 0)
        self._generator = torch.Generator().manual_seed(seed)

    count: Tensor
    gate: Tensor
    norm: Tensor
    square: Tensor
    gated_norm: Tensor
    taylor: Tensor

    @torch.no_grad()
    def add(self, observed: Observed) -> None:
        """Take in one forward; where its rows have a graph, also the gradient when it comes."""
        a = observed.assignment
        out_RO = observed.out_RO.detach()
        wide_RO = out_RO.float() if out_RO.dtype in (torch.float16, torch.bfloat16) else out_RO
        weight_R = a.weight_R.detach().double()
        norm_R = wide_RO.norm(dim=1).double()
        self.tokens += a.num_tokens
        self._sum("count", torch.ones_like(norm_R), a.expert_R)
        self._sum("gate", weight_R, a.expert_R)
        self._sum("norm", norm_R, a.expert_R)
        self._sum("square", norm_R.square(), a.expert_R)
        self._sum("gated_norm", weight_R * norm_R, a.expert_R)
        sum_EO = torch.zeros(self.num_experts, out_RO.shape[1], dtype=torch.float64)
        sum_EO = sum_EO.to(out_RO.device).index_add_(0, a.expert_R, wide_RO.double()).cpu()
        self.output_EO = sum_EO if not self.output_EO.numel() else self.output_EO + sum_EO
        top_R = wide_RO.abs().amax(1).double().cpu()
        self.peak.scatter_reduce_(0, a.expert_R.cpu(), top_R, "amax")
        logits_TE = observed.logits_TE.detach().double()
        logits_TE = logits_TE.masked_fill(logits_TE.isinf(), 0.0)  # of one not admitted yet
        self.logits_EE += (logits_TE.T @ logits_TE).cpu()
        self._keep(observed.x_TD.detach())
        self._await_gradient(observed, wide_RO, weight_R)

    def _await_gradient(self, observed: Observed, out_RO: Tensor, weight_R: Tensor) -> None:
        a = observed.assignment
        if observed.mixture_TO is not None and observed.mixture_TO.requires_grad:

            def of_mixture(grad_TO: Tensor) -> None:
                dot_R = (out_RO * grad_TO[a.token_R]).sum(1).double()
                self._sum("taylor", weight_R * dot_R, a.expert_R)

            observed.mixture_TO.register_hook(of_mixture)
        elif observed.mixture_TO is None and observed.out_RO.requires_grad:

            def of_rows(grad_RO: Tensor) -> None:  # the weight is in the gradient
                self._sum("taylor", (out_RO * grad_RO).sum(1).double(), a.expert_R)

            observed.out_RO.register_hook(of_rows)

    def _sum(self, name: str, value_R: Tensor, expert_R: Tensor) -> None:
        total: Tensor = getattr(self, name)
        total += (
            torch.zeros_like(total, device=value_R.device).index_add_(0, expert_R, value_R).cpu()
        )

    def _keep(self, x_TD: Tensor) -> None:
        """Reservoir sampling (Vitter 1985), a batch at a time."""
        if not self.samples:
            return
        if not self.sample_ND.numel():
            self.sample_ND = x_TD.new_zeros(0, x_TD.shape[1])
        room = self.samples - len(self.sample_ND)
        fits, rest = x_TD[:room], x_TD[room:]
        if len(fits):
            self.sample_ND = torch.cat([self.sample_ND, fits])
        if len(rest):
            before = self.tokens - len(rest)
            draw = torch.rand(len(rest), generator=self._generator, dtype=torch.float64)
            place = (draw * (before + 1 + torch.arange(len(rest)))).long()
            taken = (place < self.samples).nonzero()[:, 0]
            for t, n in zip(taken.tolist(), place[taken].tolist(), strict=True):
                self.sample_ND[n] = rest[t]

    @property
    def mean_output_EO(self) -> Tensor:
        """float64 [E, O], the mean output over an expert's own tokens; 0 where it had none."""
        return self.output_EO / self.count.clamp_min(1)[:, None]

    @property
    def variance(self) -> Tensor:
        """float64 [E], E‖f − E f‖² over an expert's own tokens."""
        mean_square = self.square / self.count.clamp_min(1)
        return (mean_square - self.mean_output_EO.square().sum(1)).clamp_min(0)

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors, to be kept and given to `from_state`."""
        names = (*_SUMS, "peak", "logits_EE", "output_EO", "sample_ND")
        counts = torch.tensor([self.num_experts, self.samples, self.tokens])
        return {
            **{name: getattr(self, name) for name in names},
            "counts": counts,
            "generator": self._generator.get_state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> LayerStatistics:
        num_experts, samples, tokens = state["counts"].tolist()
        mine = cls(num_experts, samples)
        mine.tokens = tokens
        mine._generator.set_state(state["generator"])
        for name in (*_SUMS, "peak", "logits_EE", "output_EO", "sample_ND"):
            setattr(mine, name, state[name].clone())
        return mine
