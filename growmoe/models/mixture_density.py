"""Several possible answers instead of their mean: a mixture density of experts that can grow.

Shape suffixes: B inputs (of any leading shape), I input width, D model width, E experts, O output
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.feed_forward import check_mixture, positive, seed_generator
from growmoe.moe import MoE
from growmoe.routers import Dense
from growmoe.routers.gate import Context
from growmoe.structure import Template


@dataclass(frozen=True, eq=False)
class SpreadFFN:
    """Builds an FFN whose means start away from each other's: the template of hypotheses.

    Hypotheses that start together, or wide enough to cover all answers, stay together: each then
    does best at the mean of all, a saddle of the likelihood. So means are spread at birth, and
    scales are a quarter of the spread.

    Args:
        template: the kind of FFN; one without widths takes these. It needs biases to be spread.
        d_model: D.
        d_out: O; the FFN gives O means and O scales.
        spread: standard deviation of the means at birth.
    """

    template: FFN
    d_model: int
    d_out: int
    spread: float

    def __call__(self) -> FFN:
        body = self.template.fresh(self.d_model, 2 * self.d_out)
        if body.bias and self.spread:
            with torch.no_grad():
                body.b_out[: self.d_out].normal_(std=self.spread)
                body.b_out[self.d_out :].fill_(math.log(math.expm1(self.spread / 4)))
        return body


class MixtureDensity(nn.Module):
    """Each expert proposes one possible answer, a Gaussian, and the gate says how likely it is.

    Mixture density networks are Bishop 1994 (NCRG/94/004), with networks of their own for the
    components as in Jacobs et al. 1991. One more possible answer is one more expert: with
    `growmoe.surgery.spawn(model.mixture, …)` its birth changes no density. A fresh one finds an
    answer of its own sooner than a clone, which starts where its parent is. Merge, prune and an
    `Organizer` ask by how much the mixture's mean (and scale) changes.

    In training each call of `forward`, `distribution`, `hypotheses` or `loss` is one forward of the
    layer. Hypotheses are in ascending order of the experts' ids.

    Args:
        d_in: I.
        d_out: O.
        num_experts: E, how many hypotheses to begin with.
        d_model: D, the width of the input's features, which gate and experts see.
        d_hidden: hidden width of an expert; 2 · D if left out.
        expert: as for `MoE`, from D to 2 · O; a GELU `FFN` of `d_hidden` with biases if left out.
        spread: standard deviation of the hypotheses' means at birth, about that of y, for experts
            that are an `FFN` with biases; 0 leaves them together.
        min_scale: the smallest standard deviation, without which a likelihood has no bound.
        winner_takes_all: None trains by the likelihood of the mixture; ε in [0, 1) by relaxed
            winner-takes-all, see `loss`.
        moe: further keywords of the `MoE`.
        seed: of all initial weights and of the layer's generator; torch's global generator is not
            drawn from. Without it, one number is.

    Attributes:
        mixture: the `MoE`, on which surgery is done.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_experts: int = 4,
        *,
        d_model: int = 64,
        d_hidden: int | None = None,
        expert: Template | Sequence[Template] | None = None,
        spread: float = 1.0,
        min_scale: float = 1e-3,
        winner_takes_all: float | None = None,
        moe: Context | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        positive(d_in=d_in, d_out=d_out, num_experts=num_experts, d_model=d_model)
        d_hidden = 2 * d_model if d_hidden is None else d_hidden
        positive(d_hidden=d_hidden)
        check_mixture(num_experts, None, expert, None, moe)
        if not 0 <= spread <= 100:  # exp would overflow; y is better standardised
            raise ValueError(f"spread must be in [0, 100], got {spread!r}")
        if not min_scale > 0:
            raise ValueError(f"min_scale must be positive, got {min_scale!r}")
        if winner_takes_all is not None and not 0 <= winner_takes_all < 1:
            raise ValueError(f"winner_takes_all must be None or in [0, 1), got {winner_takes_all}")
        self.d_in, self.d_out = d_in, d_out
        self.min_scale, self.winner_takes_all = min_scale, winner_takes_all

        def hypothesis(template: Template) -> Template:
            if type(template) is FFN:
                return SpreadFFN(template, d_model, d_out, spread)
            return template

        plain = FFN(d_hidden, "gelu", bias=True)
        kinds = expert if isinstance(expert, Sequence) else [plain if expert is None else expert]
        templates = [hypothesis(kind) for kind in kinds]
        with seeded(seed_generator(seed)):
            self.stem = nn.Sequential(nn.Linear(d_in, d_model), nn.GELU())
            self.mixture = MoE(
                d_model,
                templates if isinstance(expert, Sequence) else templates[0],
                num_experts,
                Dense(),
                d_out=2 * d_out,
                **(moe or {}),
            )

    def forward(self, x_BI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., I] -> means and standard deviations [..., E, O], and log-probabilities [..., E].

        All are in float32 at least. The log-probability of an expert not admitted yet is -inf.

        Raises:
            ValueError: an input of another width, not floating point, or (on a CPU) not finite.
        """
        if x_BI.dim() < 1 or x_BI.shape[-1] != self.d_in:
            raise ValueError(
                f"x has shape {tuple(x_BI.shape)}, its last dimension must be d_in={self.d_in}"
            )
        if not x_BI.is_floating_point():
            raise ValueError(f"x is {x_BI.dtype}, it must be floating point")
        # the layer's output is the experts' weighted mean; here each counts by itself
        routing, out_RO = self.mixture.rows(self.stem(x_BI))
        num_experts = len(self.mixture.experts)
        # a dense router gives every expert all tokens, in order
        raw_TEO = out_RO.view(num_experts, -1, 2 * self.d_out).transpose(0, 1)
        log_probs_TE = routing.logits_TE.log_softmax(-1)
        raw_TEO = raw_TEO.to(log_probs_TE.dtype)
        mean_TEO, scale_TEO = raw_TEO.chunk(2, dim=-1)
        # softplus, not exp: one outlier would blow the scale up
        scale_TEO = self.min_scale + F.softplus(scale_TEO)
        shape = (*x_BI.shape[:-1], num_experts)
        return (
            mean_TEO.reshape(*shape, self.d_out),
            scale_TEO.reshape(*shape, self.d_out),
            log_probs_TE.reshape(shape),
        )

    def distribution(self, x_BI: Tensor) -> MixtureSameFamily:
        """The density of y given x: a distribution over O numbers, of batch shape [...]."""
        mean_BEO, scale_BEO, log_probs_BE = self(x_BI)
        return MixtureSameFamily(
            Categorical(logits=log_probs_BE), Independent(Normal(mean_BEO, scale_BEO), 1)
        )

    def hypotheses(self, x_BI: Tensor) -> tuple[Tensor, Tensor]:
        """What each expert proposes, [..., E, O], and how likely it is, [..., E]."""
        mean_BEO, _, log_probs_BE = self(x_BI)
        return mean_BEO, log_probs_BE.exp()

    def loss(
        self, x_BI: Tensor, y_BO: Tensor, reduction: Literal["mean", "none"] = "mean"
    ) -> Tensor:
        """How badly the mixture foretells y.

        By default the negative log likelihood -log Σ_e p_e(x) N(y; μ_e(x), σ_e(x)²) (Bishop 1994).
        With `winner_takes_all` = ε it is the relaxed meta-loss of Rupprecht et al. 2017 (arXiv
        1612.00197): the hypothesis closest to y has 1 - ε of the weight and the others share ε,
        each paying its own -log N(y; μ_e, σ_e²). The gate, which that paper has not, pays the
        cross entropy of naming the closest. Experts not admitted yet take no part.

        Args:
            x_BI: float [..., I].
            y_BO: float [..., O].
            reduction: "mean", or "none" for one value per input, [...].

        Raises:
            ValueError: shapes that do not fit, or an unknown reduction.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        if y_BO.shape != (*x_BI.shape[:-1], self.d_out):
            raise ValueError(
                f"y has shape {tuple(y_BO.shape)}, for x {tuple(x_BI.shape)} and "
                f"d_out={self.d_out} it must be {(*x_BI.shape[:-1], self.d_out)}"
            )
        mean_BEO, scale_BEO, log_probs_BE = self(x_BI)
        y_B1O = y_BO.to(mean_BEO.dtype)[..., None, :]
        each_BE = Normal(mean_BEO, scale_BEO, validate_args=False).log_prob(y_B1O).sum(-1)
        if self.winner_takes_all is None:
            loss_B = -torch.logsumexp(each_BE + log_probs_BE, dim=-1)
        else:
            gap_BE = (mean_BEO - y_B1O).detach().norm(dim=-1)
            loss_B = _winner_takes_all(each_BE, log_probs_BE, gap_BE, self.winner_takes_all)
        return loss_B.mean() if reduction == "mean" else loss_B


def _winner_takes_all(
    each_BE: Tensor, log_probs_BE: Tensor, gap_BE: Tensor, epsilon: float
) -> Tensor:
    """See `MixtureDensity.loss`: [B, E] log-likelihoods, log-probabilities, distances -> [B]."""
    out_BE = log_probs_BE.isneginf()
    winner_B1 = gap_BE.masked_fill(out_BE, torch.inf).argmin(-1, keepdim=True)
    others_B1 = (~out_BE).sum(-1, keepdim=True) - 1
    relaxed_B1 = epsilon * (others_B1 > 0)  # a lone hypothesis has all the weight
    weight_BE = (relaxed_B1 / others_B1.clamp_min(1)).expand_as(each_BE)
    weight_BE = weight_BE.masked_fill(out_BE, 0.0).scatter(-1, winner_B1, 1.0 - relaxed_B1)
    return -(weight_BE * each_BE).sum(-1) - log_probs_BE.gather(-1, winner_B1)[..., 0]
