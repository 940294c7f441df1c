"""A mixture of experts written as plainly as its formulas: loops over inputs and experts, float64.

Nothing here is shared with growmoe's own computation: gating, feed-forward experts and combination
are written anew. Ways of choosing are in `reference_routers` and `reference_gates`, what an expert
has room for is in `reference_capacity`.

    T tokens   E experts   D width of the input   O width of the output
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from reference_capacity import within_capacity
from reference_routers import Choice, Setting, choose
from torch import Tensor, nn

from growmoe import FFN, MoE, aux_loss


@dataclass
class Reference:
    """What the layer should have computed.

    Attributes:
        y: float64, like the layer's output.
        leaves: the float64 weights by the name of the layer's own parameters.
        weights: per token, {expert's position: combine weight}; empty for a soft choice.
        margin: how far the nearest decision (a choice of expert, a kink of relu) was from falling
            otherwise; below about 1e-5 float32 may rightly decide differently.
        aux: the layer's auxiliary loss, None in eval mode.
        choice: what the router decided, capacity included.
    """

    x: Tensor
    y: Tensor
    leaves: dict[str, Tensor]
    weights: list[dict[int, Tensor]]
    margin: float
    aux: Tensor | None
    choice: Choice

    def gradients(self, cotangent: Tensor, aux: bool = False) -> dict[str, Tensor | None]:
        """Of (y · cotangent), and of aux: by parameter name, and "x"; None for what had no part."""
        leaves = {"x": self.x, **{n: p for n, p in self.leaves.items() if p.requires_grad}}
        loss = (self.y * cotangent.double()).sum()
        if aux and self.aux is not None:
            loss = loss + self.aux
        if not loss.requires_grad:
            return dict.fromkeys(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))


def reference(layer: MoE, x: Tensor, *, context: Any = None, seed: int | None = None) -> Reference:
    """The layer's output in the dumbest way, as its next forward gives it.

    Args:
        context: as for the layer.
        seed: for a router that draws: what `torch.manual_seed` is given just before the forward.
    """
    leaf_of = {
        p: p.detach().double().clone().requires_grad_(p.requires_grad) for p in layer.parameters()
    }
    leaves = {n: leaf_of[p] for n, p in layer.named_parameters(remove_duplicate=False)}
    buffers = {n: b.double() for n, b in layer.named_buffers()}
    x64 = x.detach().double().clone().requires_grad_()
    tokens = list(x64.reshape(-1, layer.d_model).unbind(0)) if x64.numel() else []
    margins = [math.inf]
    ids, experts = list(layer.experts), list(layer.experts.values())
    told = (
        context if isinstance(context, dict) or context is None else {layer.router.wants: context}
    )

    def named(name: str) -> Tensor:
        return leaves[name] if name in leaves else buffers[name]

    setting = Setting(
        tokens,
        experts,
        [min(1.0, e.admission + layer.training / layer.recorder.warmup) for e in experts],
        entry=lambda name, e: named(f"experts.{ids[e]}.entries.{name}"),
        own=lambda name: named(f"router.{name}"),
        training=layer.training,
        dtype=x.dtype,
        context={"length": x.shape[-2] if x.dim() > 1 else 1, **(told or {})},
        margins=margins,
    )
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        choice = choose(layer.router, setting)
    if layer.capacity is not None:
        choice = within_capacity(layer, choice, margins)

    def run(e: int, token: Tensor) -> Tensor:
        body = layer.experts[ids[e]].body
        return _run(body, token, leaves, f"experts.{ids[e]}.body.", margins)

    gates = getattr(layer.router, "num_tasks", 0) if "task" not in setting.context else 0
    last = (gates, layer.d_out) if gates else (layer.d_out,)
    rows = []
    for t, token in enumerate(tokens):
        y = torch.zeros(last, dtype=torch.float64)
        for e, weight in choice.weights[t].items() if choice.weights else ():
            out = run(e, token)
            y = y + (weight[:, None] * out if weight.dim() else weight * out)
        rows.append(y)
    for e, dispatch, combine in choice.mixtures if tokens else ():
        out = run(e, sum(d * token for d, token in zip(dispatch, tokens, strict=True)))
        rows = [y + c * out for y, c in zip(rows, combine, strict=True)]
    if layer.shared is not None:
        rows = [
            y + _run(layer.shared, token, leaves, "shared.", margins)
            for y, token in zip(rows, tokens, strict=True)
        ]
    y = torch.stack(rows) if rows else torch.zeros(0, layer.d_out, dtype=torch.float64)
    y = y.reshape(*x.shape[:-1], *last)
    aux = _auxiliary(layer, choice) if layer.training else None
    return Reference(x64, y, leaves, choice.weights, min(margins), aux, choice)


def _auxiliary(layer: MoE, choice: Choice) -> Tensor | None:
    """The router's own loss, the Switch balance loss E Σ f P and the mean of logsumexp²."""
    losses = [] if choice.aux is None else [choice.aux]
    count, zero = len(layer.experts), torch.zeros((), dtype=torch.float64)
    if layer.balance_loss and not choice.weights:
        losses.append(zero)
    elif layer.balance_loss:
        rows = sum(len(w) for w in choice.weights)
        share = [sum(e in w for w in choice.weights) / max(rows, 1) for e in range(count)]
        mean = [sum(p[e] / sum(p) for p in choice.probs) / len(choice.probs) for e in range(count)]
        both = sum(f * p for f, p in zip(share, mean, strict=True))
        losses.append(layer.balance_loss * count * both)
    if layer.z_loss:
        squares = [torch.stack(row).exp().sum().log() ** 2 for row in choice.logits]
        losses.append(layer.z_loss * sum(squares, zero) / max(len(squares), 1))
    return sum(losses, zero) if losses else None


def compare(
    layer: MoE,
    x: Tensor,
    tolerance: float,
    *,
    expected: Reference | None = None,
    context: Any = None,
    seed: int | None = None,
    aux: bool = False,
) -> Reference:
    """Assert that the layer's output and every gradient are the reference's.

    The difference may be `tolerance` times the norm of what is compared; the norm of a gradient
    that nearly vanishes counts as a tenth of the largest.

    Args:
        context, seed: as for `reference`.
        aux: compare the auxiliary loss too, and take its gradient with the output's.
    """
    if expected is None:
        expected = reference(layer, x, context=context, seed=seed)
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    y = layer(x) if context is None else layer(x, context)
    assert y.shape == expected.y.shape
    assert y.dtype == x.dtype
    close(y, expected.y, tolerance)
    draw = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cotangent = draw.to(y.dtype)
    loss = (y * cotangent).sum()
    if aux:
        extra = aux_loss(layer)
        want = expected.aux if expected.aux is not None else torch.zeros(())
        close(extra, want, tolerance, float(expected.y.detach().norm()) / 10, "auxiliary loss")
        loss = loss + extra
    if loss.requires_grad:
        loss.backward()
    gradients = expected.gradients(cotangent, aux)
    compare_gradients(layer, x, gradients, tolerance)
    return expected


def compare_gradients(
    layer: MoE, x: Tensor, gradients: dict[str, Tensor | None], tolerance: float
) -> None:
    floor = max((float(g.norm()) for g in gradients.values() if g is not None), default=0.0) / 10
    for name, p in {
        "x": x,
        **dict(layer.named_parameters(remove_duplicate=False)),
    }.items():
        want = gradients.get(name)
        if want is None and not name.startswith("experts"):
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient"
        elif want is None and ".body." in name:
            assert p.grad is None, f"{name} was not used, but has a gradient"
        elif want is None:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient"
        else:
            got = torch.zeros_like(p) if p.grad is None else p.grad
            assert got.shape == p.shape and got.dtype == p.dtype
            close(got, want, tolerance, floor, name)


def close(got: Tensor, want: Tensor, tolerance: float, floor: float = 0.0, name: str = "") -> None:
    """Assert ‖got − want‖ ≤ tolerance · max(‖want‖, floor)."""
    gap, size = float((got - want).detach().norm()), float(want.detach().norm())
    assert gap <= tolerance * max(size, floor), f"{name or 'output'}: {gap:.2e} off {size:.2e}"


def pooled(layer: MoE) -> list[int]:
    """The ids of the experts that the layer's last forward ran in pools."""
    ids = list(layer.experts)
    return sorted(ids[e] for where, pool in layer.experts._layout if pool for e in where)


def _run(
    body: nn.Module, token: Tensor, leaves: dict[str, Tensor], prefix: str, margins: list[float]
) -> Tensor:
    own = {n[len(prefix) :]: p for n, p in leaves.items() if n.startswith(prefix)}
    if type(body) is not FFN:
        plain = copy.deepcopy(body).double()
        for module in plain.modules():
            module._forward_hooks.clear()
        return torch.func.functional_call(plain, own, (token[None],))[0]
    hidden = token @ own["w_in"] + own.get("b_in", 0.0)
    if body.activation == "swiglu":
        gate, up = hidden[: body.d_hidden], hidden[body.d_hidden :]
        hidden = gate / (1 + torch.exp(-gate)) * up
    elif body.activation == "relu":
        margins.append(float(hidden.detach().abs().min()))
        hidden = torch.where(hidden > 0, hidden, 0.0)
    else:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ own["w_out"] + own.get("b_out", 0.0)
