"""One pass over the calibration data that collects what all criteria need; and losses.

A batch is whatever the loss takes: `next_token_loss` takes token ids, int64 [B, S + 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.compress.layer import CompressError, Layer
from growmoe.compress.statistics import LayerStatistics

Loss = Callable[[nn.Module, Any], Tensor]
Batches = Sequence[Any]


def logits_of(model: nn.Module, token_BS: Tensor) -> Tensor:
    """[B, S] -> logits [B, S, V], of a model that returns them or an output with `.logits`."""
    out = model(token_BS)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def next_token_loss(model: nn.Module, token_BS1: Tensor) -> Tensor:
    """Nats per token of each sequence: int64 [B, S + 1] -> [B]."""
    token_BS1 = token_BS1.to(next(model.parameters()).device)
    logits_BSV = logits_of(model, token_BS1[:, :-1])
    flat = logits_BSV.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    loss = F.cross_entropy(flat, token_BS1[:, 1:].flatten(), reduction="none")
    return loss.view(len(token_BS1), -1).mean(1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def losses(model: nn.Module, batches: Batches, loss: Loss = next_token_loss) -> Tensor:
    """The loss of each sample, float64 [N], in eval mode.

    Raises:
        CompressError: there are no batches, or a loss is not finite.
    """
    with eval_mode(model):
        found = [loss(model, batch).detach().double().cpu().reshape(-1) for batch in batches]
    if not found or not sum(map(len, found)):
        raise CompressError("there is nothing to measure the loss on: no batches were given")
    result = torch.cat(found)
    if not bool(result.isfinite().all()):
        raise CompressError(f"the loss of {int((~result.isfinite()).sum())} samples is not finite")
    return result


def collect(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    loss: Loss = next_token_loss,
    *,
    gradients: bool = False,
    samples: int = 1024,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> tuple[dict[str, LayerStatistics], Tensor]:
    """One pass in eval mode: the statistics of each layer by name, and the loss of each sample.

    Args:
        gradients: also go backward, for the Taylor criterion; parameters' gradients are left as
            they were.
        samples: inputs kept per layer.

    Raises:
        CompressError: no batches.
    """
    statistics = {
        layer.name: LayerStatistics(len(layer.ids), samples, seed + i)
        for i, layer in enumerate(layers)
    }
    if not len(batches):
        raise CompressError("the calibration is empty")
    found = []
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for layer in layers:
            stack.enter_context(layer.observe(statistics[layer.name].add))
        if gradients:
            stack.enter_context(_own_gradients(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for i, batch in enumerate(batches):
            loss_N = loss(model, batch)
            if gradients:
                loss_N.sum().backward()
                model.zero_grad(set_to_none=True)
            found.append(loss_N.detach().double().cpu().reshape(-1))
            progress((i + 1) / len(batches), "calibrating")
    return statistics, torch.cat(found)


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """All parameters require gradients, and have those they had after."""
    parameters = list(model.parameters())
    before = [(p.grad, p.requires_grad) for p in parameters]
    for p in parameters:
        p.grad = None
        p.requires_grad_(p.is_floating_point())
    try:
        yield
    finally:
        for p, (grad, required) in zip(parameters, before, strict=True):
            p.requires_grad_(required)
            p.grad = grad
