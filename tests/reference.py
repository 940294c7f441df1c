"""A mixture of experts written as plainly as its formulas: loops over inputs and experts, float64.

Nothing here is shared with growmoe's own computation: gating, feed-forward experts and combination
are written anew.

    T tokens   E experts   D width of the input   O width of the output
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growmoe import FFN, ExpertChoice, MoE, TopK


@dataclass
class Reference:
    """What the layer should have computed.

    Attributes:
        y: float64, like the layer's output.
        leaves: the float64 weights by the name of the layer's own parameters.
        weights: per token, {expert's position: combine weight}.
        margin: how far the nearest decision (a choice of expert, a kink of relu) was from falling
            otherwise; below about 1e-5 float32 may rightly decide differently.
    """

    x: Tensor
    y: Tensor
    leaves: dict[str, Tensor]
    weights: list[dict[int, Tensor]]
    margin: float

    def gradients(self, cotangent: Tensor) -> dict[str, Tensor | None]:
        """Of (y · cotangent): by parameter name, and "x"; None for what played no part."""
        leaves = {"x": self.x, **{n: p for n, p in self.leaves.items() if p.requires_grad}}
        if not self.y.requires_grad:
            return dict.fromkeys(leaves)
        loss = (self.y * cotangent.double()).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))


def reference(layer: MoE, x: Tensor) -> Reference:
    """The layer's output in the dumbest way, for routers TopK and ExpertChoice without noise."""
    leaf_of = {
        p: p.detach().double().clone().requires_grad_(p.requires_grad) for p in layer.parameters()
    }
    leaves = {n: leaf_of[p] for n, p in layer.named_parameters(remove_duplicate=False)}
    x64 = x.detach().double().clone().requires_grad_()
    tokens = list(x64.reshape(-1, layer.d_model).unbind(0)) if x64.numel() else []
    margins = [math.inf]
    logits = [
        [
            token.dot(leaves[f"experts.{id}.entries.key"]) + _log(e.admission)
            for id, e in layer.experts.items()
        ]
        for token in tokens
    ]
    router = layer.router
    if isinstance(router, TopK):
        weights = [_top_k(router, row, margins) for row in logits]
    elif isinstance(router, ExpertChoice):
        weights = _expert_choice(router, logits, len(layer.experts), margins)
    else:
        raise TypeError(f"no reference for {router}")
    rows = []
    for token, chosen in zip(tokens, weights, strict=True):
        y = torch.zeros(layer.d_out, dtype=torch.float64)
        for position, weight in chosen.items():
            id = list(layer.experts)[position]
            body = layer.experts[id].body
            y = y + weight * _run(body, token, leaves, f"experts.{id}.body.", margins)
        if layer.shared is not None:
            y = y + _run(layer.shared, token, leaves, "shared.", margins)
        rows.append(y)
    y = torch.stack(rows) if rows else torch.zeros(0, layer.d_out, dtype=torch.float64)
    y = y.reshape(*x.shape[:-1], layer.d_out)
    return Reference(x64, y, leaves, weights, min(margins))


def compare(
    layer: MoE, x: Tensor, tolerance: float, *, expected: Reference | None = None
) -> Reference:
    """Assert that the layer's output and every gradient are the reference's.

    The difference may be `tolerance` times the norm of what is compared; the norm of a gradient
    that nearly vanishes counts as a tenth of the largest.
    """
    expected = reference(layer, x) if expected is None else expected
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    assert y.shape == expected.y.shape
    assert y.dtype == x.dtype
    close(y, expected.y, tolerance)
    draw = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cotangent = draw.to(y.dtype)
    if y.requires_grad:
        y.backward(cotangent)
    gradients = expected.gradients(cotangent)
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


def _log(admission: float) -> float:
    return math.log(admission) if admission > 0 else -math.inf


def _softmax(values: list[Tensor]) -> list[Tensor]:
    top = max(v.item() for v in values)
    powers = [torch.exp(v - top) for v in values]
    total = sum(powers)
    return [p / total for p in powers]


def _top_k(router: TopK, logits: list[Tensor], margins: list[float]) -> dict[int, Tensor]:
    order = sorted(range(len(logits)), key=lambda e: -logits[e].item())
    chosen, left = order[: router.k], order[router.k :]
    if left:
        margins.append((logits[chosen[-1]] - logits[left[0]]).item())
    if router.score == "softmax_topk":
        return dict(zip(chosen, _softmax([logits[e] for e in chosen]), strict=True))
    if router.score == "sigmoid":
        scores = [1 / (1 + torch.exp(-v)) for v in logits]
    else:
        scores = _softmax(logits)
    total = sum(scores[e] for e in chosen) if router.renormalize else 1.0
    return {e: scores[e] / total for e in chosen}


def _expert_choice(
    router: ExpertChoice, logits: list[list[Tensor]], num_experts: int, margins: list[float]
) -> list[dict[int, Tensor]]:
    probs = [_softmax(row) for row in logits]
    share = min(len(probs), math.ceil(len(probs) * router.capacity / num_experts))
    weights: list[dict[int, Tensor]] = [{} for _ in probs]
    for e in range(num_experts):
        order = sorted(range(len(probs)), key=lambda t: -probs[t][e].item())
        for t in order[:share]:
            weights[t][e] = probs[t][e]
        if 0 < share < len(probs):
            margins.append((probs[order[share - 1]][e] - probs[order[share]][e]).item())
    return weights


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
