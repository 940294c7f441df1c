"""One grouped matmul for all feed-forward experts of one shape.

The Parameters are the truth and the pool is a cache: each Parameter is a view on its row of a
stacked buffer, and every forward checks that it still is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

from growmoe.experts.expert import Expert
from growmoe.experts.ffn import FFN, activate, activate_backward

_POOLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Counts:
    """How many rows each expert has, on the device and, without making it wait, on the host."""

    def __init__(self, counts_E: Tensor) -> None:
        self.counts_E = counts_E
        self.offsets_E = counts_E.cumsum(0).to(torch.int32)
        self._event = None
        if counts_E.is_cuda:
            self._host = torch.empty(counts_E.shape, dtype=counts_E.dtype, pin_memory=True)
            self._host.copy_(counts_E, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = counts_E.cpu()

    def tolist(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def poolable(expert: Expert) -> tuple[Any, ...] | None:
    """What experts must share to lie in one pool, or None for one that is run by itself.

    Only a plain `FFN` is pooled: no hooks, no forward of its own, no parametrizations or tensors
    that stand in for its Parameters, not in memory shared with other processes, and widths that
    are multiples of 8: grouped_mm asks for strides of 16 bytes, also under autocast.
    """
    body = expert.body
    if type(body) is not FFN or _hooked(expert) or _hooked(body):
        return None
    held = {name: p for name, p in body._parameters.items() if p is not None}
    parameters = list(held.values())
    first = parameters[0]
    for p in parameters:
        if (
            type(p) is not nn.Parameter
            or p.dtype is not first.dtype
            or p.device != first.device
            or not p.is_contiguous()
            or (p.device.type == "cpu" and p.is_shared())
        ):
            return None
    if first.dtype not in _POOLED_DTYPES or first.device.type == "meta":
        return None
    if any(width % 8 for width in (*body.w_in.shape, *body.w_out.shape)):
        return None
    shapes = tuple((name, p.shape, p.requires_grad) for name, p in held.items())
    return (*body.config().values(), first.dtype, first.device, shapes)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def globally_hooked() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


class Pool:
    """The weights of experts of one shape, stacked by ascending id.

    Building one moves the storage of the experts' Parameters; the Parameter objects, their values
    and their version counters stay.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts = list(experts)
        body: FFN = experts[0].body  # type: ignore[assignment]
        self.activation, self.bias = body.activation, body.bias
        self.names = tuple(name for name, p in body._parameters.items() if p is not None)
        self.parameters: list[nn.Parameter] = []
        self.trainable = tuple(getattr(body, name).requires_grad for name in self.names)
        self.stacked: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name in self.names:
                rows = [getattr(e.body, name) for e in experts]
                # stacking copies, so no row can alias another even if two storages were shared
                self.stacked[name] = torch.stack([p.data for p in rows])
                for p, row in zip(rows, self.stacked[name], strict=True):
                    p.data = row
        # flat, for the check at each forward
        for expert in experts:
            self.parameters.extend(getattr(expert.body, name) for name in self.names)
        self._addresses = [p.data_ptr() for p in self.parameters]
        self._dtype = self.parameters[0].dtype

    def holds(self) -> bool:
        """Whether every Parameter is still the one that was pooled, on its row and unhooked."""
        i = 0
        addresses, parameters, dtype = self._addresses, self.parameters, self._dtype
        for expert in self.experts:
            body = expert._modules["body"]
            if (
                type(body) is not FFN
                or body.activation != self.activation
                or _hooked(expert)
                or _hooked(body)
            ):
                return False
            held = body._parameters
            for name, trainable in zip(self.names, self.trainable, strict=True):
                p = held.get(name)
                if (
                    p is not parameters[i]
                    or p.data_ptr() != addresses[i]
                    or p.requires_grad is not trainable
                    or p.dtype is not dtype
                    or not p.is_contiguous()
                ):
                    return False
                i += 1
        return i == len(addresses)

    def __call__(self, x_RD: Tensor, counts: Counts) -> Tensor:
        """[R, D] sorted by expert -> [R, O], in autocast's dtype or the weights'.

        Raises:
            ValueError: the input has another dtype than the weights, outside autocast.
        """
        kind = x_RD.device.type
        dtype = self._dtype
        if torch.is_autocast_enabled(kind) and x_RD.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        elif x_RD.dtype is not dtype:
            raise ValueError(f"input is {x_RD.dtype}, but the experts' weights are {dtype}")
        return _PooledFFN.apply(x_RD.to(dtype), self, counts, dtype, *self.parameters)  # type: ignore[no-any-return]


class _PooledFFN(torch.autograd.Function):
    """All experts of a pool on their rows; its backward gives each Parameter its own gradient.

    An expert without rows gets None, not zeros, so that no optimizer moves it.
    """

    @staticmethod
    def forward(ctx, x_RD, pool, counts, dtype, *parameters):
        weights = {name: w.to(dtype) for name, w in pool.stacked.items()}
        offsets_E = counts.offsets_E
        h_RF = F.grouped_mm(x_RD, weights["w_in"], offs=offsets_E)
        expert_R = None
        if pool.bias:
            expert_R = torch.repeat_interleave(counts.counts_E, output_size=len(x_RD))
            h_RF = h_RF + weights["b_in"][expert_R]
        act_RF = activate(h_RF, pool.activation)
        y_RO = F.grouped_mm(act_RF, weights["w_out"], offs=offsets_E)
        if pool.bias:
            y_RO = y_RO + weights["b_out"][expert_R]
        # the activation is kept as autograd would: computing it again costs a tenth of the backward
        learns = any(p.requires_grad for p in parameters)
        ctx.save_for_backward(x_RD, h_RF, act_RF if learns else None)
        # not the weights cast for autocast: the backward casts them again
        ctx.stacked, ctx.counts, ctx.expert_R = pool.stacked, counts, expert_R
        ctx.activation = pool.activation
        ctx.ids = [expert.id for expert in pool.experts]
        ctx.experts, ctx.names = pool.experts, pool.names
        ctx.parameters, ctx.versions = parameters, [p._version for p in parameters]
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        for i, (p, version) in enumerate(zip(ctx.parameters, ctx.versions, strict=True)):
            if p._version != version:
                expert, which = divmod(i, len(ctx.names))
                raise RuntimeError(
                    f"expert {ctx.ids[expert]}: {ctx.names[which]} was changed between forward and "
                    "backward (by an optimizer step or a load), so its gradient would be wrong"
                )
        x_RD, h_RF, act_RF = ctx.saved_tensors
        offsets_E = ctx.counts.offsets_E
        weights = {name: w.to(x_RD.dtype) for name, w in ctx.stacked.items()}
        grad_RO = grad_RO.contiguous()  # grouped_mm refuses an expanded gradient
        grad_act_RF = F.grouped_mm(grad_RO, weights["w_out"].transpose(1, 2), offs=offsets_E)
        grad_h_RF = activate_backward(grad_act_RF, h_RF, ctx.activation)
        grad_x_RD = None
        if ctx.needs_input_grad[0]:
            grad_x_RD = F.grouped_mm(grad_h_RF, weights["w_in"].transpose(1, 2), offs=offsets_E)
        fixed = (grad_x_RD, None, None, None)
        if not any(ctx.needs_input_grad[4:]):
            return *fixed, *[None] * len(ctx.parameters)

        counts = ctx.counts.tolist()
        hit = [e for e, count in enumerate(counts) if count]
        if not hit:
            return *fixed, *[None] * len(ctx.parameters)
        for e in hit:
            ctx.experts[e].touches += 1
        # only the experts that were hit: no row of these buffers outlives the others unused
        index_H = torch.tensor(hit, device=offsets_E.device)
        offsets_H = offsets_E[index_H] if len(hit) < len(counts) else offsets_E
        grads = {}
        needed = dict(zip(ctx.names, ctx.needs_input_grad[4 : 4 + len(ctx.names)], strict=True))
        if needed["w_in"]:
            grads["w_in"] = F.grouped_mm(x_RD.t(), grad_h_RF, offs=offsets_H)
        if needed["w_out"]:
            grads["w_out"] = F.grouped_mm(act_RF.t(), grad_RO, offs=offsets_H)
        for name, grad in (("b_in", grad_h_RF), ("b_out", grad_RO)):
            if needed.get(name):
                grads[name] = _sum_by_expert(grad, ctx.expert_R, len(counts))[index_H]
        by_parameter: list[Tensor | None] = [None] * len(ctx.parameters)
        for j, name in enumerate(ctx.names):
            if name not in grads:
                continue
            # rows are unbound, so that autograd can take each without a copy
            dtype = ctx.parameters[j].dtype
            for e, row in zip(hit, grads[name].to(dtype).unbind(0), strict=True):
                by_parameter[e * len(ctx.names) + j] = row
        return *fixed, *by_parameter


def _sum_by_expert(grad_RF: Tensor, expert_R: Tensor, num_experts: int) -> Tensor:
    total_EF = grad_RF.new_zeros(num_experts, grad_RF.shape[1], dtype=torch.float32)
    return total_EF.index_add_(0, expert_R, grad_RF.float())
