"""Paths: experts that are whole language models, or low-rank changes of one.

An expert of `GrowingLM` receives the tokens of whole sequences, a row for each token, and gives the
logits of the token after each. A new path starts from an old one, either as a copy of all of it or
as what LoRA changes of it (Hu et al. 2021, arXiv 2106.09685).

R rows: tokens of one sequence after the other    S tokens of a sequence    V vocabulary
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from growmoe.experts.expert import merged_body
from growmoe.models import TransformerLM

_SAMPLED = 32  # tokens of a sequence that a path invents as evidence of what it is for


class Usual(nn.Module):
    """How far batches of its text usually lie from a path, each measured before it was learned.

    Buffers (float64 whatever the model's dtype):
        values: [4]: running mean and variance of the distance, at rate max(1/16, 1/n); n, how many
            batches; how many steps the path has learned.
    """

    values: Tensor
    RATE = 1 / 16

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(4, dtype=torch.float64))

    def observe(self, distance: float) -> None:
        mean, variance, n, _ = self.values.tolist()
        rate = max(self.RATE, 1 / (n + 1))
        apart = distance - mean
        mean += rate * apart
        variance += rate * (apart * (distance - mean) - variance) if n else 0.0
        self.values[:3] = torch.tensor([mean, variance, n + 1], dtype=torch.float64)

    @property
    def mean(self) -> float:
        return float(self.values[0])

    @property
    def sd(self) -> float:
        """At least 1% of the mean, as a few batches tell it badly."""
        return max(math.sqrt(float(self.values[1])), 0.01 * abs(self.mean), 1e-9)

    @property
    def batches(self) -> int:
        return int(self.values[2])

    @property
    def steps(self) -> int:
        return int(self.values[3])

    def count_step(self) -> None:
        self.values[3] += 1

    def _apply(self, fn: Any, recurse: bool = True) -> Usual:
        values = self.values
        super()._apply(fn, recurse)
        if self.values.dtype != values.dtype:
            self.values = values.to(self.values.device)
        return self


class Path(nn.Module):
    """A whole language model as the body of an expert: token ids [R, 1] -> logits [R, V].

    Args:
        lm: the model.
        rank: of the changes that are all a path born of this one has of its own; None copies
            everything.

    Attributes:
        length: S of the rows that come next; the host sets it.
        usual: its record.
    """

    def __init__(self, lm: TransformerLM, rank: int | None = None) -> None:
        super().__init__()
        self.lm, self.rank = lm, rank
        self.usual = Usual()
        self.length = 0

    def forward(self, x_R1: Tensor) -> Tensor:
        """Token ids as floats [R, 1] -> logits [R, V]."""
        return self.logits(as_sequences(x_R1, self.length)).flatten(0, 1)

    def logits(self, token_NS: Tensor) -> Tensor:
        logits_NSV: Tensor = self.lm(token_NS)
        return logits_NSV

    @torch.no_grad()
    def cloned(self, noise: float, generator: torch.Generator) -> Path | LowRankPath:
        """What a path born of this one starts as: the same function, whatever the noise."""
        if self.rank is not None:
            return LowRankPath(self, self.rank, generator)
        lm = copy.deepcopy(self.lm).requires_grad_(True)
        for p in lm.parameters():
            p.grad = None
        return Path(lm)

    def merged(self, others: Sequence[Path], weights: Sequence[float]) -> Path:
        """The weighted mean of the weights: for paths that have not gone far from one ancestor."""
        lm = merged_body([self.lm, *(o.lm for o in others)], weights)
        child = Path(lm, self.rank)  # type: ignore[arg-type]
        child.usual.values.copy_(self.usual.values)
        return child

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Text that it invents, as evidence of what it is for: float [count · 4, 1].

        No text is kept, so consent asks what the paths themselves would write.
        """
        self.length = _SAMPLED
        token_N1 = torch.randint(
            self.lm.vocab_size, (count * 4 // _SAMPLED, 1), generator=generator
        )
        token_NS = self.lm.generate(token_N1, _SAMPLED - 1, generator=generator)
        return token_NS.reshape(-1, 1).float()

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank}


class LowRankPath(nn.Module):
    """A path that shares its ancestor's matrices and has a low-rank change of each.

    W = W_base + B A with A [r, n] drawn from N(0, 1/r) and B [m, r] zero, for each matrix of a
    block that this makes smaller; embedding, output, norms and small matrices are its own. A
    matrix then moves in Adam's first step as far as one trained in full.

    Args:
        base: the ancestor, which must stand still from now on.
        rank: r.
        generator: A is drawn from it; from torch's global one if left out.
    """

    def __init__(self, base: Path, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
        self._base = (base,)  # in a tuple, so that it is no submodule
        self.rank = rank
        self.usual = Usual()
        self.length = 0
        self.own = nn.ParameterDict()
        for name, p in base.lm.named_parameters():
            key = name.replace(".", "/")
            m, n = p.shape if p.dim() == 2 else (0, 0)
            if name.startswith("blocks.") and rank * (m + n) < m * n:
                a = torch.randn(rank, n, generator=generator).to(p) * rank**-0.5
                self.own[f"{key}/a"] = nn.Parameter(a)
                self.own[f"{key}/b"] = nn.Parameter(p.new_zeros(m, rank))
            else:
                self.own[key] = nn.Parameter(p.detach().clone())

    @property
    def base(self) -> Path:
        return self._base[0]

    @property
    def lm(self) -> TransformerLM:
        """The ancestor's model, for its sizes."""
        return self.base.lm

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name, as this path has them."""
        result: dict[str, Tensor] = {}
        for name, p in self.base.lm.named_parameters():
            key = name.replace(".", "/")
            if key in self.own:
                result[name] = self.own[key]
            else:
                change = self.own[f"{key}/b"] @ self.own[f"{key}/a"]
                result[name] = p.detach() + change
        return result

    def whole(self) -> TransformerLM:
        """A model of its own with this path's weights."""
        lm = copy.deepcopy(self.base.lm)
        lm.load_state_dict(self.weights(), strict=False)
        return lm

    def forward(self, x_R1: Tensor) -> Tensor:
        """Token ids as floats [R, 1] -> logits [R, V]."""
        return self.logits(as_sequences(x_R1, self.length)).flatten(0, 1)

    def logits(self, token_NS: Tensor) -> Tensor:
        logits_NSV: Tensor = functional_call(self.base.lm, self.weights(), (token_NS,))
        return logits_NSV

    @torch.no_grad()
    def cloned(self, noise: float, generator: torch.Generator) -> LowRankPath:
        """A path with the same ancestor, which starts as this one is."""
        clone = LowRankPath(self.base, self.rank, generator)
        for key, p in self.own.items():
            clone.own[key].copy_(p)
        return clone

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank}


def as_sequences(x_R1: Tensor, length: int) -> Tensor:
    """Rows back to token ids, int64 [N, S]; one sequence where S does not divide them."""
    rows = len(x_R1)
    return x_R1[:, 0].round().long().view(-1, length if length and rows % length == 0 else rows)
