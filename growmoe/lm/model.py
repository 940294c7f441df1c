"""The model of a run, from its options."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from growmoe.experts.ffn import FFN
from growmoe.lm.config import TrainConfig, TrainError
from growmoe.lm.growing.model import GrowingLM
from growmoe.models import TransformerLM
from growmoe.routers import Router, TopK

# name -> a function of k that builds the router
ROUTERS: dict[str, Callable[[int], Router]] = {"topk": lambda k: TopK(k)}


def build_router(name: str, k: int) -> Router:
    """A router by name.

    Raises:
        TrainError: no router of that name.
    """
    if name not in ROUTERS:
        near = get_close_matches(name, ROUTERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(ROUTERS)}"
        raise TrainError(f"no router {name!r}: {hint}")
    return ROUTERS[name](k)


def build_model(config: TrainConfig, vocab_size: int = 256) -> TransformerLM | GrowingLM:
    """The transformer that `config` describes, or the first path of one that grows paths.

    Raises:
        TrainError: its options do not fit together.
    """
    hidden = config.hidden or config.d_model
    router = build_router(config.router, config.k)  # a wrong name is wrong in a dense model too
    size = (vocab_size, config.d_model, config.layers, config.heads)
    try:
        if config.paths:
            width = config.k * hidden + config.shared
            return GrowingLM(*size, d_hidden=width, seed=config.seed)
        if config.experts == 0:
            return TransformerLM(
                *size,
                d_hidden=config.k * hidden + config.shared,
                num_experts=0,
                dropout=config.dropout,
                seed=config.seed,
            )
        return TransformerLM(
            *size,
            d_hidden=hidden,
            num_experts=config.experts,
            router=router,
            shared=FFN(config.shared, "swiglu") if config.shared else None,
            dropout=config.dropout,
            moe={"balance_loss": config.balance_loss, "z_loss": config.z_loss},
            seed=config.seed,
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
