"""Experts that compute next to nothing (Jin et al. 2024, MoE++, arXiv 2410.07348, section 3.1).

Beside feed-forward experts they let a router spend less on easy tokens:
``MoE(d, expert=[FFN(512)] * 6 + [Zero(), Copy()], num_experts=8)``. In a block with a residual
connection `Zero` drops the token from the layer, `Copy` skips the layer, `Constant` replaces it.
`Novice` stands for an expert that was pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Zero(nn.Module):
    """x -> 0."""

    def __init__(self, d_out: int | None = None) -> None:
        super().__init__()
        self.d_out = d_out

    def forward(self, x_RD: Tensor) -> Tensor:
        return x_RD.new_zeros(len(x_RD), x_RD.shape[1] if self.d_out is None else self.d_out)

    def fresh(self, d_model: int, d_out: int, **_: Any) -> Zero:
        return Zero(d_out)

    def merged(self, others: Sequence[Zero], weights: Sequence[float]) -> Zero:
        return Zero(self.d_out)

    def config(self) -> dict[str, Any]:
        """What `Zero(**config)` needs to be built again."""
        return {"d_out": self.d_out}


class Copy(nn.Module):
    """x -> x; for layers whose output is as wide as their input."""

    def forward(self, x_RD: Tensor) -> Tensor:
        return x_RD

    def fresh(self, d_model: int, d_out: int, **_: Any) -> Copy:
        if d_model != d_out:
            raise ValueError(f"Copy: the layer maps {d_model} to {d_out} values, which is no copy")
        return Copy()

    def merged(self, others: Sequence[Copy], weights: Sequence[float]) -> Copy:
        return Copy()


class Constant(nn.Module):
    """x -> a₁ x + a₂ v with (a₁, a₂) = softmax(W x): the input, or a learned vector (eq. 5)."""

    def __init__(
        self, d_model: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.d_model = d_model
        if d_model is not None:
            self.value = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype))
            self.mix = nn.Parameter(torch.zeros(2, d_model, device=device, dtype=dtype))

    def forward(self, x_RD: Tensor) -> Tensor:
        own_R1, constant_R1 = (x_RD @ self.mix.T).softmax(-1).split(1, dim=1)
        return own_R1 * x_RD + constant_R1 * self.value

    def fresh(
        self,
        d_model: int,
        d_out: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Constant:
        if d_model != d_out:
            raise ValueError(f"Constant: the layer maps {d_model} to {d_out} values, not the same")
        body = Constant(d_model, device=device, dtype=dtype)
        with torch.no_grad():
            for p in body.parameters():
                draw = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.copy_(draw * d_model**-0.5)
        return body

    @torch.no_grad()
    def merged(self, others: Sequence[Constant], weights: Sequence[float]) -> Constant:
        child = Constant(self.d_model, device=self.value.device, dtype=self.value.dtype)
        for name, p in child.named_parameters():
            parts = [getattr(body, name).double() for body in (self, *others)]
            mean = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
            p.copy_(torch.as_tensor(mean))
        return child

    def config(self) -> dict[str, Any]:
        """What `Constant(**config)` needs to be built again."""
        return {"d_model": self.d_model}


class Novice(nn.Module):
    """x -> v, whatever x is: what is left of an expert that gave nearly the same for every token.

    MoNE (Zhang et al. 2025, arXiv 2507.00390, section 3.3) puts the mean output there.

    Args:
        value: v, float [O], or its width, for one that is still to be loaded.
    """

    def __init__(self, value: Tensor | int) -> None:
        super().__init__()
        value = torch.zeros(value) if isinstance(value, int) else value.detach().clone()
        self.value = nn.Parameter(value)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.value.to(x_RD.dtype).expand(len(x_RD), -1)

    def fresh(self, d_model: int, d_out: int, **place: Any) -> Novice:
        if len(self.value) != d_out:
            raise ValueError(f"Novice: its value has {len(self.value)} numbers, the layer {d_out}")
        place = {name: place.get(name) for name in ("device", "dtype")}
        return Novice(self.value.to(**{k: v for k, v in place.items() if v is not None}))

    @torch.no_grad()
    def merged(self, others: Sequence[Novice], weights: Sequence[float]) -> Novice:
        parts = [body.value.double() for body in (self, *others)]
        mean = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)
        return Novice((mean / sum(weights)).to(self.value.dtype))

    def config(self) -> dict[str, Any]:
        """What `Novice(**config)` needs to be built again."""
        return {"value": len(self.value)}
