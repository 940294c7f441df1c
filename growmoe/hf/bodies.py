"""One expert of a transformers block as a module of its own, and back into the stacked tensors.

The stacked tensors are `gate_up_proj` and `down_proj`, with the expert along their first dimension:
(E, 2F, D) and (E, D, F), or transposed, (E, D, 2F) and (E, F, D); gate and up lie one after the
other, or interleaved; there may be biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN


class GatedExpert(nn.Module):
    """A gated feed-forward expert whose gate is not SiLU's: ``(gate(x) * up(x)) @ w_out``.

    Args:
        d_model, d_hidden: D and F.
        activation: of the gate, by the name that transformers gives it; or "clamped", as in
            gpt-oss: g = min(x W_g, limit), u = clip(x W_u, ±limit), hidden (u + 1) g σ(alpha g).
        bias: whether the three matrices have one.
        alpha, limit: of "clamped".

    Parameters: ``w_gate``, ``w_up`` [D, F], ``w_out`` [F, D]; ``b_gate``, ``b_up`` [F], ``b_out``
    [D].
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        activation: str,
        bias: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.d_model, self.d_hidden, self.activation, self.bias = (
            d_model,
            d_hidden,
            activation,
            bias,
        )
        self.alpha, self.limit = alpha, limit
        shapes: dict[str, tuple[int, ...]] = {
            "w_gate": (d_model, d_hidden),
            "w_up": (d_model, d_hidden),
            "w_out": (d_hidden, d_model),
        }
        if bias:
            shapes |= {"b_gate": (d_hidden,), "b_up": (d_hidden,), "b_out": (d_model,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    w_gate: nn.Parameter
    w_up: nn.Parameter
    w_out: nn.Parameter
    b_gate: nn.Parameter
    b_up: nn.Parameter
    b_out: nn.Parameter

    def config(self) -> dict[str, Any]:
        """What `GatedExpert(**config)` needs to build one of the same shape."""
        names = ("d_model", "d_hidden", "activation", "bias", "alpha", "limit")
        return {name: getattr(self, name) for name in names}

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(fan in)."""
        for name, p in self.named_parameters():
            fan_in = self.d_hidden if name.endswith("out") else self.d_model
            nn.init.uniform_(p, -(fan_in**-0.5), fan_in**-0.5)

    def fresh(
        self,
        d_model: int,
        d_out: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> GatedExpert:
        """A new expert of this kind with random weights."""
        with seeded(generator):
            return GatedExpert(**self.config()).to(device=device, dtype=dtype)

    def forward(self, x_RD: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate_RF, up_RF = x_RD @ self.w_gate, x_RD @ self.w_up
        if self.bias:
            gate_RF, up_RF = gate_RF + self.b_gate, up_RF + self.b_up
        if self.activation == "clamped":
            gate_RF = gate_RF.clamp(max=self.limit)
            up_RF = up_RF.clamp(-self.limit, self.limit)
            h_RF = (up_RF + 1) * (gate_RF * (self.alpha * gate_RF).sigmoid())
        else:
            h_RF = _activation(self.activation)(gate_RF) * up_RF
        y_RD = h_RF @ self.w_out
        return y_RD + self.b_out if self.bias else y_RD

    @torch.no_grad()
    def merged(self, others: Sequence[GatedExpert], weights: Sequence[float]) -> GatedExpert:
        """The weighted mean, hidden units aligned to this one's as in `FFN.merged`."""
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        total = {name: p.double() * share[0] for name, p in self.named_parameters()}
        for other, weight in zip(others, share[1:], strict=True):
            gain_FF = (_units(self) @ _units(other).T).cpu().numpy()
            unit = torch.as_tensor(linear_sum_assignment(gain_FF, maximize=True)[1])
            for name, p in other.named_parameters():
                value = p.double()
                if name != "b_out":
                    rows = name in ("w_out", "b_gate", "b_up")
                    value = value[unit] if rows else value[:, unit]
                total[name] = total[name] + value * weight
        with torch.random.fork_rng(devices=()):  # it is overwritten at once
            result = GatedExpert(**self.config()).to(self.w_out)
        for name, p in result.named_parameters():
            p.copy_(total[name])
        return result

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def _units(body: GatedExpert) -> Tensor:
    """float64 [F, ...]: all that belongs to each hidden unit."""
    parts = [body.w_gate.T, body.w_up.T, body.w_out]
    if body.bias:
        parts += [body.b_gate[:, None], body.b_up[:, None]]
    return torch.cat([p.double() for p in parts], 1)


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


@torch.no_grad()
def body_of(experts: nn.Module, position: int, *, copy: bool) -> nn.Module:
    """The expert at a position, as an `FFN` where it is SwiGLU.

    Args:
        copy: whether its weights are its own; else they are views, to look at.
    """
    layout: Any = experts
    tensors = {name: p.detach()[position] for name, p in experts.named_parameters()}
    gate_up = tensors["gate_up_proj"] if layout.is_transposed else tensors["gate_up_proj"].T
    down = tensors["down_proj"] if layout.is_transposed else tensors["down_proj"].T
    body: nn.Module
    if _is_swiglu(experts):
        ffn = FFN(down.shape[0], "swiglu")
        ffn.d_model, ffn.d_out = gate_up.shape[0], down.shape[1]
        ffn.w_in, ffn.w_out = _own(gate_up, copy), _own(down, copy)
        body = ffn
    else:
        gated = _empty_gated(experts, gate_up.shape[0], down.shape[0])
        gated.w_gate, gated.w_up = (_own(w, copy) for w in _halves(layout, gate_up))
        gated.w_out = _own(down, copy)
        if gated.bias:
            halves = _halves(layout, tensors["gate_up_proj_bias"])
            gated.b_gate, gated.b_up = (_own(b, copy) for b in halves)
            gated.b_out = _own(tensors["down_proj_bias"], copy)
        body = gated
    body.train(experts.training)
    return body


@torch.no_grad()
def tensors_of(body: nn.Module, experts: nn.Module) -> dict[str, Tensor]:
    """The slices of the stacked tensors that make this body; the inverse of `body_of`, exactly.

    Raises:
        ValueError: the body is not of the kind or the shape that these experts are.
    """
    layout: Any = experts
    found: dict[str, Tensor] = {}
    gate_up: Tensor
    down: Tensor
    if isinstance(body, FFN) and body.activation == "swiglu" and _is_swiglu(experts):
        if body.bias:
            raise ValueError(f"{body!r} has biases, which experts of this family have not")
        gate_up, down = body.w_in, body.w_out
    elif isinstance(body, GatedExpert) and not _is_swiglu(experts):
        gate_up, down = _joined(layout, body.w_gate, body.w_up), body.w_out
        if body.bias:
            found = {
                "gate_up_proj_bias": _joined(layout, body.b_gate, body.b_up),
                "down_proj_bias": body.b_out.detach(),
            }
    else:
        raise ValueError(f"{body!r} is no expert that this family can hold")
    found["gate_up_proj"] = (gate_up if layout.is_transposed else gate_up.T).detach()
    found["down_proj"] = (down if layout.is_transposed else down.T).detach()
    for name, p in experts.named_parameters():
        if found[name].shape != p.shape[1:]:
            raise ValueError(
                f"an expert's {name} is {tuple(found[name].shape)}, this family holds "
                f"{tuple(p.shape[1:])}"
            )
    return found


def template_of(experts: nn.Module) -> nn.Module:
    """What newborn experts of this kind are made from; it holds no weights."""
    example = body_of(experts, 0, copy=False)
    if isinstance(example, FFN):
        return FFN(example.d_hidden, "swiglu")
    assert isinstance(example, GatedExpert)
    return _empty_gated(experts, example.d_model, example.d_hidden)


def _is_swiglu(experts: nn.Module) -> bool:
    layout: Any = experts
    act = getattr(experts, "act_fn", None)
    silu = isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation" or act is F.silu
    return silu and layout.is_concatenated and not layout.has_bias and layout.has_gate


def _empty_gated(experts: nn.Module, d_model: int, d_hidden: int) -> GatedExpert:
    layout: Any = experts
    with torch.device("meta"):
        if hasattr(experts, "act_fn"):
            return GatedExpert(d_model, d_hidden, layout.config.hidden_act, layout.has_bias)
        return GatedExpert(
            d_model, d_hidden, "clamped", layout.has_bias, layout.alpha, layout.limit
        )


def _halves(layout: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    if layout.is_concatenated:
        gate, up = value.chunk(2, dim=-1)
        return gate, up
    return value[..., ::2], value[..., 1::2]


def _joined(layout: Any, gate: Tensor, up: Tensor) -> Tensor:
    if layout.is_concatenated:
        return torch.cat([gate, up], -1)
    return torch.stack([gate, up], -1).flatten(-2)


def _own(value: Tensor, copy: bool) -> nn.Parameter:
    return nn.Parameter(
        value.clone(memory_format=torch.contiguous_format) if copy else value, requires_grad=copy
    )
