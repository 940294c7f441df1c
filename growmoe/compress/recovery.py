"""Training after the cut: first the router alone, by distillation, then all parameters.

The router learns the next-token distribution of the whole model (router distillation, arXiv
2603.02217); then everything learns the text, and the whole model's distribution beside it. What it
gained is told against the whole model trained for as many further steps, not against the model as
it was.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.compress.calibrate import Batches, eval_mode, logits_of, next_token_loss
from growmoe.compress.layer import CompressError, layers_of
from growmoe.compress.measure import changes, losses_by_domain
from growmoe.moe import MoE, aux_loss

Progress = Callable[[float, str], None]


def recover(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    steps: int,
    *,
    teacher: nn.Module | None = None,
    router_steps: int = 0,
    lr: float = 1e-3,
    router_lr: float = 1e-2,
    distill: float = 0.5,
    anneal: bool = True,
    warmup: int | None = None,
    clip: float = 1.0,
    progress: Progress = lambda fraction, text: None,
) -> list[float]:
    """Train a language model that was pruned or merged, or its control; in place.

    Args:
        batch: step -> token ids, int64 [B, S + 1]; steps count from 0 over both stages.
        steps: of all parameters together.
        teacher: the whole model; needed for `router_steps`, and without it there is no
            distillation.
        router_steps: before these, of the routers alone, on KL(teacher ‖ model).
        lr, router_lr: highest learning rate of AdamW, which falls to a tenth along a cosine.
        distill: α of (1 − α) · cross-entropy + α · KL(teacher ‖ model) in the second stage, where
            it falls to 0 in a straight line: at first the whole model knows more than the text
            tells in a few steps, later it is what is to be overtaken.
        anneal: whether it falls.
        warmup: steps over which the rate rises; a twentieth if left out.
        clip: largest norm of the gradient.

    Returns:
        The training loss of each step, in nats per token.

    Raises:
        CompressError: router_steps without a teacher, or the loss is not finite; the model is then
            as far as it came.
    """
    if router_steps and teacher is None:
        raise CompressError("recovery of the router distils the whole model: a teacher is needed")
    if not 0 <= distill <= 1:
        raise CompressError(f"distill must lie in [0, 1], got {distill}")
    found: list[float] = []
    total = router_steps + steps
    with _training(model):
        for stage, count, rate in (("router", router_steps, router_lr), ("all", steps, lr)):
            if not count:
                continue
            alone = stage == "router"
            parameters = (
                [p for layer in layers_of(model) for p in layer.router_parameters()]
                if alone
                else [p for p in model.parameters() if p.requires_grad]
            )
            optimizer = torch.optim.AdamW(
                [
                    {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
                    {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
                ],
                lr=rate,
                betas=(0.9, 0.95),
            )
            first = max(1, count // 20) if warmup is None else warmup
            for step in range(count):
                for group in optimizer.param_groups:
                    group["lr"] = rate * _schedule(step, count, first)
                now = 1.0 if alone else distill * (1 - step / count if anneal else 1.0)
                loss = _loss(model, batch(len(found)), teacher, now, alone)
                if not bool(loss.isfinite()):
                    raise CompressError(f"recovery: the loss is not finite at step {len(found)}")
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                model.zero_grad(set_to_none=True)
                found.append(float(loss.detach()))
                progress(len(found) / total, f"recovering: loss {found[-1]:.3f}")
    return found


def _loss(
    model: nn.Module, token_BS1: Tensor, teacher: nn.Module | None, distill: float, alone: bool
) -> Tensor:
    token_BS1 = token_BS1.to(next(model.parameters()).device)
    x_BS, y_BS = token_BS1[:, :-1], token_BS1[:, 1:]
    log_p_NV = logits_of(model, x_BS).flatten(0, 1).float().log_softmax(-1)
    loss = log_p_NV.new_zeros(())
    if distill < 1 or teacher is None:
        share = 1.0 if teacher is None else 1 - distill
        loss = loss + share * F.nll_loss(log_p_NV, y_BS.flatten())
    if teacher is not None and distill > 0:
        with torch.no_grad(), eval_mode(teacher):
            target_NV = logits_of(teacher, x_BS).flatten(0, 1).float().log_softmax(-1)
        kl = F.kl_div(log_p_NV, target_NV, log_target=True, reduction="batchmean")
        loss = loss + distill * kl
    if not alone and any(isinstance(module, MoE) for module in model.modules()):
        loss = loss + aux_loss(model)
    return loss


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        aux = [m for m in model.modules() if isinstance(m, MoE)]
        for layer in aux:
            layer.aux_loss()  # of a last forward that nobody asked for
        for module, training in modes:
            module.training = training


def recover_beside_control(
    model: nn.Module,
    whole: nn.Module,
    batch: Callable[[int], Tensor],
    steps: int,
    *,
    router_steps: int = 0,
    control: bool = True,
    evaluation: Mapping[str, Batches] | None = None,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Recover a model that was cut, and train a copy of the whole one for as many steps beside it.

    The control learns from the same batches in the same order at the same rate, from the text
    alone; the steps of the routers count as steps of the control.

    Returns:
        For a report: steps, seconds, and under "tables" the losses after recovery by domain,
        against the whole model as it was and against the control.
    """
    evaluation = evaluation or {}
    before = losses_by_domain(whole, evaluation, next_token_loss)
    share = 0.5 if control else 1.0
    clock = time.perf_counter()
    recover(
        model,
        batch,
        steps,
        teacher=whole,
        router_steps=router_steps,
        progress=lambda fraction, text: progress(share * fraction, text),
    )
    seconds = time.perf_counter() - clock
    after = losses_by_domain(model, evaluation, next_token_loss)
    tables = {"recovered": changes(before, after)}
    if control:
        other = copy.deepcopy(whole)
        recover(
            other,
            batch,
            router_steps + steps,
            progress=lambda fraction, text: progress(0.5 + 0.5 * fraction, "control: " + text),
        )
        tables["against control"] = changes(
            losses_by_domain(other, evaluation, next_token_loss), after
        )
    return {
        "steps": steps,
        "router_steps": router_steps,
        "seconds": seconds,
        "tables": {
            label: {name: change.to_json() for name, change in found.items()}
            for label, found in tables.items()
        },
    }
