"""Every way of choosing, by name, as the tests that hold for all of them build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe import FFN, MoE, Router, TopK, aux_loss, routers
from growmoe.routers import (
    BASE,
    BiasBalanced,
    Conditioned,
    Cosine,
    Dense,
    DenseToSparse,
    ExpertChoice,
    ExpertDropout,
    GShard,
    Gumbel,
    Hash,
    MultiGate,
    NoisyTopK,
    ReMoE,
    Sinkhorn,
    SoftMoE,
    Stochastic,
    Switch,
    TopAny,
    TopP,
    Tree,
)

D = 8


@dataclass
class Case:
    """One way of choosing.

    Attributes:
        make: a new router.
        context: number of tokens -> what the layer is told of them.
        draws: in training, in eval mode.
    """

    make: Callable[[], Router]
    context: Callable[[int], Any] = lambda tokens: None
    draws: tuple[bool, bool] = (False, False)


def tokens_of(tokens: int) -> Tensor:
    return torch.arange(tokens) * 7 % 23


def tasks_of(tokens: int) -> dict[str, Tensor]:
    return {"task": torch.arange(tokens) % 2}


NOISE = (True, False)

CASES = {
    "dense": Case(Dense),
    "topk softmax": Case(lambda: TopK(2)),
    "topk softmax_topk": Case(lambda: TopK(2, "softmax_topk")),
    "topk sigmoid": Case(lambda: TopK(2, "sigmoid")),
    "topk noise": Case(lambda: TopK(2, noise=0.5), draws=NOISE),
    "switch": Case(lambda: Switch(0.1), draws=NOISE),
    "noisy topk": Case(NoisyTopK, draws=NOISE),
    "gshard": Case(GShard, draws=NOISE),
    "gumbel hard": Case(lambda: Gumbel(2, 0.7), draws=NOISE),
    "gumbel soft": Case(lambda: Gumbel(hard=False), draws=NOISE),
    "expert choice": Case(lambda: ExpertChoice(1.5)),
    "sinkhorn": Case(lambda: Sinkhorn(2)),
    "base": Case(BASE),
    "hash": Case(lambda: Hash(3, seed=5), tokens_of),
    "topk cosine": Case(lambda: TopK(2, gate=Cosine())),
    "topk cosine projected": Case(lambda: TopK(2, gate=Cosine(3, scale=5.0))),
    "topk tree": Case(lambda: TopK(1, gate=Tree((2, 2), keep=1))),
    "dense tree": Case(lambda: Dense(Tree((2, 3)))),
    "topk conditioned": Case(lambda: TopK(2, gate=Conditioned(2)), tasks_of),
    "topk conditioned alone": Case(lambda: TopK(2, gate=Conditioned(2, alone=True)), tasks_of),
    "topk dropout": Case(lambda: TopK(2, gate=ExpertDropout(0.4)), draws=NOISE),
    "bias balanced": Case(lambda: BiasBalanced(2, rate=0.05)),
    "bias balanced groups": Case(lambda: BiasBalanced(2, 0.05, groups=2, chosen_groups=1)),
    "top p": Case(lambda: TopP(0.6, entropy=0.1)),
    "remoe": Case(lambda: ReMoE(2, initial=0.1)),
    "top any": Case(lambda: TopAny(0.1)),
    "dense to sparse": Case(lambda: DenseToSparse(10), draws=NOISE),
    "soft": Case(lambda: SoftMoE(2)),
    "multi gate": Case(lambda: MultiGate(3)),
    "multi gate k": Case(lambda: MultiGate(3, k=2)),
    "multi gate task": Case(lambda: MultiGate(2, k=2), tasks_of),
    "stochastic": Case(lambda: Stochastic(2), draws=NOISE),
    "stochastic uniform": Case(lambda: Stochastic(2, "uniform", "sample"), draws=(True, True)),
}
# one of each kind of state and of choice, for the quick tests; the others are run as slow ones
KINDS = (
    "topk softmax",
    "noisy topk",
    "expert choice",
    "sinkhorn",
    "hash",
    "dense tree",
    "topk conditioned",
    "bias balanced groups",
    "remoe",
    "dense to sparse",
    "soft",
    "multi gate k",
    "stochastic uniform",
)
EVERY = {
    name: getattr(routers, name)
    for name in routers.__all__
    if isinstance(getattr(routers, name), type) and issubclass(getattr(routers, name), nn.Module)
}


def build(name: str, num_experts: int = 4, seed: int = 0, **options: Any) -> MoE:
    """A layer with this way of choosing whose router keeps nothing that is 0 or 1 by chance."""
    options = {"z_loss": 0.0, "expert": FFN(6, bias=True), **options}
    router = CASES[name].make()
    layer = MoE(D, num_experts=num_experts, router=router, seed=seed, **options)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        own = [*router.parameters()]
        for expert in layer.experts.values():
            own += expert.entries.parameters()
            if hasattr(expert.entries, "bias_steps"):
                expert.entries.bias_steps += torch.randint(-3, 4, (), generator=draw)
        for p in own:
            p += 0.3 * torch.randn(p.shape, generator=draw).to(p.dtype)
        if isinstance(router, ReMoE):
            router.lambda_steps += 3
        if isinstance(router, DenseToSparse):
            router.anneal_steps += 4
    return layer


def inputs(tokens: int = 10, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(name: str, layer: MoE, x: Tensor) -> Tensor:
    return layer(x, CASES[name].context(x.numel() // D))


def adamw(layer: MoE) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)]


def train(
    name: str, layer: MoE, optimizers: list[torch.optim.Optimizer], steps: int, seed: int = 3
) -> list[Tensor]:
    """So many steps on inputs and noise that depend on `seed`; the outputs."""
    layer.train()
    outputs = []
    for step in range(steps):
        x = inputs(16, seed=1000 * seed + step)
        torch.manual_seed(1000 * seed + step)
        y = call(name, layer, x)
        loss = (y - 1).square().mean() + aux_loss(layer)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs


def layer_with(logits: list[float], router: Router, **options: Any) -> MoE:
    """A layer of experts whose keys have these inner products with the input (1, 0, 0, 0)."""
    layer = MoE(4, FFN(4), len(logits), router, seed=0, **options)
    with torch.no_grad():
        for e, logit in zip(layer.experts.values(), logits, strict=True):
            e.entries.key.zero_()[..., 0] = logit
    return layer


def one(tokens: int = 1) -> Tensor:
    """So many times (1, 0, 0, 0)."""
    return torch.eye(4)[:1].expand(tokens, 4).clone()


def within_3_sd(hits: float, draws: int, probability: float) -> bool:
    """Whether so many hits are what independent draws with this probability give."""
    return abs(hits - draws * probability) <= 3 * (draws * probability * (1 - probability)) ** 0.5
