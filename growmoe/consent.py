"""Whether a layer may lose experts: what its output would lose on what its experts are for.

The evidence is each expert's own inputs (or draws from their moments), not the recent batch: on
recent inputs alone, the experts of an earlier domain look useless.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert
from growmoe.experts.statistics import evidence_count
from growmoe.moe import MoE
from growmoe.routers.gate import ContextMissing

MIN_ROWS = 16


@torch.no_grad()
def evidence_of(layer: MoE, expert: Expert) -> Tensor | None:
    """Inputs the expert is for: [M, D], or None if fewer than 16 forwards hit it.

    Where the layer keeps moments instead of inputs, 32 draws from a Gaussian with these.
    """
    hits = expert.statistics["hits"]
    if hits < MIN_ROWS:
        return None
    if not layer.evidence_rows and hasattr(expert.body, "sample"):
        return cast(Any, expert.body).sample(32, _generator(layer, expert))  # it knows them better
    view = expert.statistics.view()
    if layer.evidence_rows:
        return view.evidence[: evidence_count(hits, layer.evidence_rows)]
    draw = torch.randn(32, layer.d_model, generator=_generator(layer, expert)).to(view.mean)
    return view.mean + draw * view.var.sqrt()


@torch.no_grad()
def output_change(
    layer: MoE, after: Sequence[Expert], concerned: Sequence[Expert]
) -> tuple[float | None, str]:
    """How much the layer's output would change were `after` its experts.

    For each expert with evidence X, the relative change ‖y'(X) − y(X)‖ / ‖y(X)‖ (Frobenius); the
    largest over all experts counts, so that nobody's domain is paid for by another's.

    Args:
        after: the experts that would be left, a merged one among them.
        concerned: those that would go; each needs evidence, unless it never received an input.

    Returns:
        The change, or None and why it cannot be measured.
    """
    for expert in concerned:
        hits = expert.statistics["hits"]
        if 0 < hits < MIN_ROWS:
            return None, (
                f"expert {expert.id} has {int(hits)} inputs as evidence, {MIN_ROWS} are needed"
            )
    worst = None
    before = list(layer.experts.values())
    # those that are not in the layer yet too, or they would learn from being asked
    with evaluating(nn.ModuleList([layer, *after])):
        for expert in before:
            rows = evidence_of(layer, expert)
            if rows is None:
                continue
            rows = rows.to(weight_dtype(layer))
            left = sorted(after, key=lambda e: e.id)
            try:
                mixture, changed = layer.output_of(rows, before), layer.output_of(rows, left)
            except ContextMissing as missing:
                return None, f"the evidence keeps no context: {missing}"
            y = layer.with_shared(rows, mixture).double()
            gap = layer.with_shared(rows, changed).double() - y
            change = float(gap.norm() / y.norm().clamp_min(1e-12))
            if not math.isfinite(change):
                return None, f"the output on the inputs of expert {expert.id} is not finite"
            worst = max(worst or 0.0, change)
    return worst, "" if worst is not None else "no expert has inputs as evidence yet"


def _generator(layer: MoE, expert: Expert) -> torch.Generator:
    """Consent's own: asking changes nothing that is drawn later."""
    return torch.Generator().manual_seed(1_000_003 * layer.steps + expert.id)


def weight_dtype(layer: MoE) -> torch.dtype:
    """The dtype that the layer's inputs must have."""
    return next((p.dtype for p in layer.experts.parameters()), torch.float32)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without autocast inside, every module's own mode again after."""
    modes = [(m, m.training) for m in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device.type if tensors else "cpu"
    module.eval()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for m, mode in modes:
            m.training = mode
