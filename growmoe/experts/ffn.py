"""The feed-forward expert, and how two of them are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import scipy  # its rooms are loaded at their first use: a second less to import growmoe
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "relu", "swiglu"]


class FFN(nn.Module):
    """Two matrices with an activation between: ``act(x @ w_in + b_in) @ w_out + b_out``.

    SwiGLU (Shazeer 2020, arXiv 2002.05202) keeps its gate and up projections in one parameter,
    the gate in the first half of the columns: ``(silu(x @ gate) * (x @ up)) @ w_out``.

    Without ``d_model`` it is a template that holds no weights: `MoE` fills in the width.

    Args:
        d_hidden: F, the hidden width.
        activation: "gelu" (exact), "relu" or "swiglu".
        bias: whether both matrices have a bias.
        d_model: D, the width of the input.
        d_out: O, the width of the output; ``d_model`` if left out.

    Parameters: ``w_in`` [D, F] ([D, 2F] for SwiGLU), ``w_out`` [F, O], and with ``bias``
    ``b_in`` [F] ([2F]) and ``b_out`` [O].

    Raises:
        ValueError: a width that is not a positive integer, or an unknown activation.
    """

    def __init__(
        self,
        d_hidden: int,
        activation: Activation = "gelu",
        bias: bool = False,
        d_model: int | None = None,
        d_out: int | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("d_hidden", d_hidden), ("d_model", d_model), ("d_out", d_out)):
            if width is not None and (not isinstance(width, int) or width < 1):
                raise ValueError(f"FFN: {name} must be a positive integer, got {width!r}")
        if activation not in get_args(Activation):
            raise ValueError(
                f"FFN: activation must be one of {get_args(Activation)}, got {activation!r}"
            )
        self.d_model, self.d_hidden, self.d_out = d_model, d_hidden, d_out or d_model
        self.activation: Activation = activation
        self.bias = bias
        if d_model is None:
            return
        width = 2 * d_hidden if activation == "swiglu" else d_hidden

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            # drawn on the CPU, so that a seed gives the same expert on every device
            weight = torch.empty(shape, dtype=torch.float32)
            weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            return nn.Parameter(weight.to(device=device, dtype=dtype or torch.get_default_dtype()))

        self.w_in = uniform(d_model, width, fan_in=d_model)
        self.w_out = uniform(d_hidden, self.d_out, fan_in=d_hidden)  # type: ignore[arg-type]
        if bias:
            self.b_in = uniform(width, fan_in=d_model)
            self.b_out = uniform(self.d_out, fan_in=d_hidden)  # type: ignore[arg-type]

    def config(self) -> dict[str, Any]:
        """What `FFN(**config)` needs to build one of the same shape."""
        names = ("d_hidden", "activation", "bias", "d_model", "d_out")
        return {name: getattr(self, name) for name in names}

    def fresh(
        self,
        d_model: int | None = None,
        d_out: int | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FFN:
        """A new expert of this kind with random weights, uniform in ±1/sqrt(fan in)."""
        config = self.config()
        config["d_model"] = self.d_model or d_model
        config["d_out"] = self.d_out or d_out
        return FFN(**config, generator=generator, device=device, dtype=dtype)

    def forward(self, x_RD: Tensor) -> Tensor:
        """[..., D] -> [..., O].

        Raises:
            ValueError: this is a template, or the input has another dtype than the weights,
                outside autocast.
        """
        if self.d_model is None:
            raise ValueError("this FFN is a template without weights: give it d_model")
        if x_RD.dtype is not self.w_in.dtype and not (
            torch.is_autocast_enabled(x_RD.device.type) and x_RD.dtype is not torch.float64
        ):
            raise ValueError(
                f"input is {x_RD.dtype}, but the expert's weights are {self.w_in.dtype}"
            )
        h_RF = x_RD @ self.w_in
        if self.bias:
            h_RF = h_RF + self.b_in
        y_RO = activate(h_RF, self.activation) @ self.w_out
        return y_RO + self.b_out if self.bias else y_RO

    @torch.no_grad()
    def merged(self, others: Sequence[FFN], weights: Sequence[float]) -> FFN:
        """The weighted mean of this expert and others, hidden units aligned to this one's.

        Hidden units can be permuted without changing what an expert computes, so a plain mean of
        two experts mixes unrelated units. Each other expert is first permuted to maximise the
        inner product of its weights with this one's (Ainsworth et al. 2022, arXiv 2209.04836,
        exact here since one hidden layer is one assignment problem).

        Args:
            others: experts of the same shape.
            weights: one for self, then one for each other; they are normalised.
        """
        # its weights are overwritten, so the global generator must not draw them
        result = self.fresh(
            generator=torch.Generator(), device=self.w_in.device, dtype=self.w_in.dtype
        )
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        total = {name: p.double() * share[0] for name, p in self.named_parameters()}
        for other, weight in zip(others, share[1:], strict=True):
            unit = _align(self, other)
            column = torch.cat([unit, unit + self.d_hidden]) if self._fused else unit
            aligned = {"w_in": other.w_in[:, column], "w_out": other.w_out[unit]}
            if self.bias:
                aligned |= {"b_in": other.b_in[column], "b_out": other.b_out}
            for name, p in aligned.items():
                total[name] = total[name] + p.double() * weight
        for name, p in result.named_parameters():
            p.copy_(total[name])
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own_storage(destination, prefix, self._parameters)

    def __getstate__(self) -> dict[str, Any]:
        # a pickled row would bring its whole pool; the pool gathers the rows again when it is used
        for p in self._parameters.values():
            if p is not None and p.untyped_storage().nbytes() > p.nbytes:
                p.data = p.data.clone()
        return dict(self.__dict__)

    @property
    def _fused(self) -> bool:
        return self.activation == "swiglu"

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def own_storage(state_dict: dict[str, Any], prefix: str, names: Iterable[str]) -> None:
    """Clone what is a row of a larger storage, else saving one expert would save the whole pool."""
    for name in names:
        value = state_dict.get(prefix + name)
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            continue  # with keep_vars the caller wants the Parameters themselves
        if value.untyped_storage().nbytes() > value.nbytes:
            state_dict[prefix + name] = value.clone()


def activate(h_RF: Tensor, activation: Activation) -> Tensor:
    """[R, F] -> [R, F]; for SwiGLU [R, 2F] -> [R, F]."""
    if activation == "gelu":
        return F.gelu(h_RF)
    if activation == "relu":
        return F.relu(h_RF)
    gate_RF, up_RF = h_RF.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def activate_backward(grad_RF: Tensor, h_RF: Tensor, activation: Activation) -> Tensor:
    """The gradient with respect to h, given that with respect to ``activate(h)``."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad_RF, h_RF)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad_RF, h_RF, 0)
    gate_RF, up_RF = h_RF.chunk(2, dim=-1)
    grad_gate_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
    return torch.cat([grad_gate_RF, grad_RF * F.silu(gate_RF)], dim=-1)


def _align(base: FFN, other: FFN) -> Tensor:
    """int64 [F]: which unit of `other` takes the place of each unit of `base`."""

    def units(ffn: FFN) -> Tensor:
        w_in = ffn.w_in.double().view(ffn.w_in.shape[0], -1, ffn.d_hidden)  # a half per projection
        parts = [*w_in.unbind(1), ffn.w_out.double().T]
        if ffn.bias:
            parts.append(ffn.b_in.double().view(-1, ffn.d_hidden))
        return torch.cat(parts)

    gain_FF = (units(base).T @ units(other)).cpu().numpy()
    _, unit = scipy.optimize.linear_sum_assignment(gain_FF, maximize=True)
    return torch.as_tensor(unit, device=other.w_in.device)
