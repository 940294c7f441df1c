"""The optimizer's groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from growmoe.lm.config import TrainConfig, TrainError
from growmoe.moe import moe_layers

FINAL_SHARE = 0.1  # of the learning rate, where the cosine ends
DECAY_SHARE = 0.2  # of the steps, in which "wsd" falls


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, all else without: norms, biases, embeddings, routers.

    A newborn expert goes to its parent's group (`growmoe.optim.welcome`), so it is treated alike.
    """
    spared = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    for layer in moe_layers(model).values():
        spared |= {id(p) for p in layer.router.parameters()}
        for expert in layer.experts.values():
            spared |= {id(p) for p in expert.entries.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (matrices if p.dim() >= 2 and id(p) not in spared else others).append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), fused where the device can."""
    example = next(model.parameters())
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=example.device.type in ("cpu", "cuda") and example.is_floating_point(),
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule.

    "cosine": Loshchilov and Hutter 2016, arXiv 1608.03983, down to a tenth. "wsd": warm-up, stable,
    decay (Hu et al. 2024, arXiv 2404.06395), with a linear decay to zero.
    """
    warmup = max(1, config.steps // 20) if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, config.steps - warmup)
        return config.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))
    if config.schedule == "wsd":
        falling = max(1.0, DECAY_SHARE * config.steps)
        return config.lr * min(1.0, (config.steps - step) / falling)
    return config.lr


def pick_device(name: str) -> torch.device:
    """ "auto" is an accelerator if there is one.

    Raises:
        TrainError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines() or [""]
        raise TrainError(f"device {name!r} is not to be had: {said[0]}") from error
    return device
