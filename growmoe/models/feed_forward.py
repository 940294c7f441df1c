"""The feed-forward half of a host's block: a mixture of experts, or one plain network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.experts.ffn import FFN
from growmoe.moe import MoE
from growmoe.routers import ExpertChoice, Router
from growmoe.routers.gate import Context
from growmoe.structure import Template

_OURS = {"d_model", "expert", "num_experts", "router", "shared", "causal", "seed"}


@dataclass(frozen=True, eq=False)
class ScaledFFN:
    """Builds an FFN whose output is scaled: the template of a residual block's experts.

    A residual stream that sums L blocks of two branches grows with their number; scaling each
    branch by 1/sqrt(2L) at birth keeps its variance (Radford et al. 2019, GPT-2, section 2.3).
    Newborns are built here too, so that they start as small as the first experts did.

    Args:
        template: the kind of FFN; one without widths takes `d_model`.
        d_model: D, the width of the stream.
        scale: factor of the last matrix and its bias.
    """

    template: FFN
    d_model: int
    scale: float

    def __call__(self) -> FFN:
        body = self.template.fresh(self.d_model, self.d_model)
        with torch.no_grad():
            body.w_out.mul_(self.scale)
            if body.bias:
                body.b_out.mul_(self.scale)
        return body


def feed_forward(
    d_model: int,
    expert: Template | Sequence[Template],
    num_experts: int,
    router: Router | None = None,
    *,
    shared: Template | None = None,
    causal: bool = False,
    scale: float = 1.0,
    options: Context | None = None,
) -> MoE | FFN:
    """A `MoE` of `num_experts` with a router of its own, or for 0 one network of `expert`'s kind.

    Args:
        router: copied, so that no two layers share one.
        causal: refuse what lets an output depend on later inputs.
        scale: of the output of every `FFN` at birth, newborns included.
        options: further keywords of `MoE`.

    Raises:
        ValueError: what `MoE` refuses.
    """

    def scaled(template: Template) -> Template:
        return ScaledFFN(template, d_model, scale) if type(template) is FFN else template

    if num_experts == 0:
        return scaled(expert)()  # type: ignore[operator, return-value, arg-type]
    return MoE(
        d_model,
        [scaled(e) for e in expert] if isinstance(expert, Sequence) else scaled(expert),
        num_experts,
        copy.deepcopy(router),
        shared=None if shared is None else scaled(shared),
        causal=causal,
        **(options or {}),
    )


def check_mixture(
    num_experts: int,
    router: Router | None,
    expert: Any,
    shared: Any,
    moe: Context | None,
    moe_every: int = 1,
    num_layers: int = 1,
) -> None:
    """Raise ValueError for options of a host's mixtures that cannot be meant."""
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 0:
        raise ValueError(f"num_experts must be an integer >= 0 (0: no mixture), got {num_experts}")
    given = {"router": router, "expert": expert, "shared": shared, "moe": moe}
    if num_experts == 0 and any(value is not None for value in given.values()):
        names = ", ".join(name for name, value in given.items() if value is not None)
        raise ValueError(f"num_experts=0 builds no mixture, so {names} would have no effect")
    if num_experts and moe_every > num_layers:
        raise ValueError(
            f"moe_every={moe_every} leaves no mixture in num_layers={num_layers}; for a dense "
            "model pass num_experts=0"
        )
    if router is not None and not isinstance(router, Router):
        raise ValueError(f"router must be a Router such as TopK(2), got {router!r}")
    if moe is not None and not isinstance(moe, Mapping):
        raise ValueError(f"moe must be a mapping of keywords of growmoe.MoE, got {moe!r}")
    allowed = set(inspect.signature(MoE).parameters) - _OURS
    if wrong := sorted(set(moe or {}) - allowed):
        raise ValueError(f"moe: {wrong} cannot be given here; it takes {sorted(allowed)}")


def positive(**values: int) -> None:
    """Raise ValueError unless each value is an integer of 1 or more."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless it is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")


def seed_generator(seed: int | None) -> torch.Generator:
    """What a host's weights are drawn from; without a seed, as torch's global generator says."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"seed must be an integer or None, got {seed!r}")
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def run(module: nn.Module, x: Tensor, context: Context | None) -> Tensor:
    """Through a mixture, which may use the context, or through a plain network."""
    y: Tensor = module(x, context) if isinstance(module, MoE) else module(x)
    return y


def active_experts(layer: MoE) -> float:
    """How many experts an input runs through, in the mean.

    The router's `k`; the `capacity` of expert choice; all of them for a router that has no `k`.
    """
    if isinstance(layer.router, ExpertChoice):
        return min(layer.router.capacity, len(layer.experts))
    k = getattr(layer.router, "k", None)
    return min(k, len(layer.experts)) if isinstance(k, (int, float)) else len(layer.experts)


def active_size(module: nn.Module, size: Callable[[nn.Parameter], int]) -> float:
    """The sum of `size` over the parameters that one input uses.

    Of a mixture these are its mean expert's, as often as experts are active, and whatever else it
    holds, all experts' router entries included: to choose, each is looked at.
    """
    total = 0.0
    inside: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, MoE):
            bodies = [p for e in layer.experts.values() for p in e.body.parameters()]
            inside |= {id(p) for p in bodies}
            total += sum(map(size, bodies)) * active_experts(layer) / len(layer.experts)
    return total + sum(size(p) for p in module.parameters() if id(p) not in inside)
