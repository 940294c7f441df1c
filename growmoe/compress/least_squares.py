"""Survivors fitted to give what the whole layer gave: a closed form in their last matrices.

min_W ‖Σ_j g_j h_j W_j − Y‖² + λ Σ_j ‖W_j − W_j⁰‖², with h_j an expert's hidden units, g_j its
combine weight after the cut, Y the mixture that the layer gave before it. Linear in all W_j
together; solved expert by expert in turn on what the others leave (block Gauss–Seidel), so that no
matrix is wider than one expert's hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from growmoe.compress.calibrate import Batches, Loss, eval_mode
from growmoe.compress.layer import CompressError, Layer, Observed, ffn_of
from growmoe.experts.ffn import FFN, activate


def hidden_units(body: FFN, x_RD: Tensor) -> Tensor:
    """What an expert's last matrix sees: [R, D] -> [R, F]."""
    h_RF = x_RD @ body.w_in
    if body.bias:
        h_RF = h_RF + body.b_in
    return activate(h_RF, body.activation)


@torch.no_grad()
def mixtures(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, loss: Loss
) -> dict[str, Tensor]:
    """What each layer's routed experts give together over the batches: name -> [T, O]."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    _watch(
        model,
        {
            layer: lambda seen, name=layer.name: found[name].append(  # type: ignore[misc]
                seen.assignment.combine(seen.out_RO)
            )
            for layer in layers
        },
        batches,
        loss,
    )
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def match_outputs(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Mapping[str, Tensor],
    batches: Batches,
    loss: Loss,
    *,
    ridge: float = 0.03,
    sweeps: int = 8,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> dict[str, tuple[float, float]]:
    """Fit the experts of a model that was cut, layer by layer, each on what now comes to it.

    Args:
        target: what `mixtures` gave for the whole model, on the same batches.
        ridge: λ, relative to the mean square of an expert's weighted hidden units.
        sweeps: over all experts of a layer.

    Returns:
        layer name -> ‖Σ g h W − Y‖ / ‖Y‖ before and after.

    Raises:
        CompressError: experts that are not feed-forward, or other batches than those of `target`.
    """
    gaps = {}
    for done, layer in enumerate(layers):
        bodies = {
            id: copy.deepcopy(ffn_of(layer, id, "least squares"))
            for id in layer.ids
            if _fits(layer, id)
        }
        inputs: list[Observed] = []
        _watch(model, {layer: inputs.append}, batches, loss)
        gaps[layer.name] = _fit(layer, bodies, inputs, target[layer.name], ridge, sweeps)
        for id, body in bodies.items():
            layer.put(id, body)
        progress((done + 1) / len(layers), "fitting outputs")
    return gaps


def check_fits(layers: Sequence[Layer]) -> None:
    """Raise CompressError if there is an expert that `match_outputs` could not fit."""
    for layer in layers:
        for id in layer.ids:
            if _fits(layer, id):
                ffn_of(layer, id, "least squares")


def _fits(layer: Layer, id: int) -> bool:
    # what computes nothing has no matrix to fit, and stays as it is
    return any(p.dim() >= 2 for p in layer.ffn(id).parameters())


def _fit(
    layer: Layer,
    bodies: Mapping[int, FFN],
    inputs: Sequence[Observed],
    target_TO: Tensor,
    ridge: float,
    sweeps: int,
) -> tuple[float, float]:
    x_TD = torch.cat([seen.x_TD for seen in inputs])
    now_TO = torch.cat([seen.assignment.combine(seen.out_RO) for seen in inputs])
    if now_TO.shape != target_TO.shape:
        raise CompressError(
            f"{layer.name}: the target has shape {tuple(target_TO.shape)}, these batches give "
            f"{tuple(now_TO.shape)}"
        )
    rest_TO = (target_TO - now_TO).double()
    size = float(target_TO.double().norm().clamp_min(1e-30))
    before = float(rest_TO.norm()) / size
    starts = torch.tensor([0, *(len(seen.x_TD) for seen in inputs)]).cumsum(0)
    blocks = []
    for e, id in enumerate(layer.ids):
        if id not in bodies:
            continue
        tokens, weights = [], []
        for start, seen in zip(starts.tolist(), inputs, strict=False):
            mine_R = seen.assignment.expert_R == e
            tokens.append(seen.assignment.token_R[mine_R] + start)
            weights.append(seen.assignment.weight_R[mine_R])
        token_R, weight_R = torch.cat(tokens), torch.cat(weights)
        if not len(token_R):
            continue
        h_RF = hidden_units(bodies[id], x_TD[token_R]).double() * weight_R.double()[:, None]
        gram_FF = h_RF.T @ h_RF
        scale = ridge * max(float(gram_FF.diagonal().mean()), 1e-12)
        gram_FF.diagonal().add_(scale)
        factor = torch.linalg.cholesky(gram_FF)
        blocks.append((bodies[id], token_R, h_RF, factor, scale))
    moved = [torch.zeros_like(body.w_out, dtype=torch.float64) for body, *_ in blocks]
    for _ in range(sweeps):
        for i, (_, token_R, h_RF, factor, scale) in enumerate(blocks):
            slope_FO = h_RF.T @ rest_TO[token_R] - scale * moved[i]
            step_FO = torch.cholesky_solve(slope_FO, factor)
            moved[i] += step_FO
            rest_TO[token_R] -= h_RF @ step_FO  # a token comes to an expert once
    for (body, *_), change in zip(blocks, moved, strict=True):
        body.w_out.add_(change.to(body.w_out.dtype))
    return before, float(rest_TO.norm()) / size


def _watch(
    model: nn.Module,
    listeners: Mapping[Layer, Callable[[Observed], None]],
    batches: Batches,
    loss: Loss,
) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for layer, listener in listeners.items():
            stack.enter_context(layer.observe(listener))
        for batch in batches:
            loss(model, batch)
