"""The mixtures of a transformers model as growmoe layers, so that they can grow; and back.

    growmoe.hf.attach(model)                        # computes what it did
    layer = growmoe.moe_layers(model)["model.layers.0.mlp.experts.moe"]
    growmoe.surgery.spawn(layer, parent=3)          # … train, merge, prune
    growmoe.hf.export(model, "grown")               # transformers loads it

Of a block the router and the experts become a `growmoe.MoE`; shared experts and all else stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.compress.layer import CompressError
from growmoe.compress.output import writing
from growmoe.hf.block import Block, layers_of, set_sizes
from growmoe.hf.bodies import body_of, template_of, tensors_of
from growmoe.hf.folder import write
from growmoe.hf.router import TransformersRouter, entry_name
from growmoe.live import refuse_parallel_wrappers, refuse_unseen_optimizers
from growmoe.moe import MoE


class Attached(nn.Module):
    """In the place of a block's experts: a growmoe layer that also routes.

    Attributes:
        moe: the layer.
    """

    def __init__(self, moe: MoE, block: Block) -> None:
        super().__init__()
        self.moe, self.family = moe, block.family
        self.router_parameters = [
            path for path in block.family.rows if isinstance(block.row(path), nn.Parameter)
        ]
        self._was = [
            block.experts
        ]  # in a list, so that it is no submodule; its tensors are on meta

    def forward(self, x_TD: Tensor, *routed: Any) -> Tensor:
        y_TD: Tensor = self.moe(x_TD)
        return y_TD


class Routed(nn.Module):
    """In the place of a block's router: the growmoe layer chooses."""

    def forward(self, x: Tensor, *more: Any) -> tuple[None, None, None]:
        return None, None, None


def attach(
    model: nn.Module,
    *,
    balance_loss: float = 0.0,
    warmup: int = 100,
    evidence: str = "inputs",
    seed: int = 0,
) -> nn.Module:
    """Turn the mixtures of a transformers model into growmoe layers, in place.

    The model's output is the same, up to rounding. Experts keep their order as ids. SwiGLU experts
    become `growmoe.FFN` and run as one grouped matmul; others (gpt-oss) are `GatedExpert`.
    Correction biases are kept as they are; transformers' own router loss is not computed, use
    `growmoe.aux_loss`.

    Args:
        balance_loss, warmup, evidence, seed: as for `growmoe.MoE`; of each layer.

    Returns:
        The model itself. `growmoe.moe_layers` lists its layers by name.

    Raises:
        CompressError: no known family, no mixture, or quantized experts.
        ValueError: an optimizer or a parallel wrapper holds the model already; or the model is set
            to `output_router_logits`.
    """
    refuse_parallel_wrappers(model)
    blocks = layers_of(model)
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "the model computes a router loss of its own, which growmoe layers do not take part "
            "in: set config.output_router_logits = False and add growmoe.aux_loss(model)"
        )
    for block in blocks:
        refuse_unseen_optimizers(block.module, [])
    for i, block in enumerate(blocks):
        moe = _layer_of(block, balance_loss, warmup, evidence, seed + i)
        layer = Attached(moe, block)
        _uninstall(block.module, layer)
    return model


@torch.no_grad()
def _layer_of(block: Block, balance_loss: float, warmup: int, evidence: str, seed: int) -> MoE:
    family, experts = block.family, block.experts
    example = next(experts.parameters())
    body = body_of(experts, 0, copy=False)
    rows = {path: block.row(path) for path in family.rows}
    router = TransformersRouter(block.router, family, block.config, rows)
    moe = MoE(
        body.d_model,  # type: ignore[arg-type]
        [partial(body_of, experts, e, copy=True) for e in range(block.count)],
        block.count,
        router,
        balance_loss=balance_loss,
        warmup=warmup,
        evidence=evidence,
        seed=seed,
        device=example.device,
        dtype=example.dtype,
    )
    moe._template = [template_of(experts)]
    trains = {name: p.requires_grad for name, p in experts.named_parameters()}
    for e, expert in enumerate(moe.experts.values()):
        for path, dim in family.rows.items():
            value = rows[path].detach().select(dim, e).clone()
            entry = nn.Parameter(value) if rows[path].requires_grad else value
            setattr(expert.entries, entry_name(path), entry)
        if router.groups > 1:
            group = e // (block.count // router.groups)
            expert.entries.group.fill_(group)  # type: ignore[operator, union-attr]
        for p in expert.body.parameters():
            p.requires_grad_(any(trains.values()))
    moe.train(experts.training)
    return moe


def attached_layers(model: nn.Module) -> dict[str, Attached]:
    """Name of a block -> what `attach` put there."""
    return {
        name.removesuffix(".experts"): module
        for name, module in model.named_modules()
        if isinstance(module, Attached)
    }


def detach(model: nn.Module, *, uneven: bool = False) -> nn.Module:
    """Turn the growmoe layers that `attach` made into transformers' blocks again, in place.

    Raises:
        CompressError: no such layers, or what transformers cannot hold, as for `export`; nothing
            has changed then.
    """
    with _as_transformers(model, uneven=uneven, for_good=True):
        return model


def export(
    model: nn.Module,
    path: str | Path,
    *,
    uneven: bool = False,
    source: str | Path | None = None,
) -> None:
    """Write an attached model for transformers; it stays attached, and its optimizer valid.

    The experts' weights are in memory twice while that lasts.

    Args:
        path: a new folder.
        uneven: where layers hold different numbers of experts, write growmoe's own format, which
            `growmoe.hf.load` reads.
        source: a folder whose tokenizer and other small files are copied.

    Raises:
        CompressError: there is something at `path`, the disk cannot take it, or the model holds
            what transformers could not load: layers with different numbers of experts, groups of
            different sizes, an expert of another kind, or one that is not fully let in yet.
    """
    with writing(path) as folder, _as_transformers(model, uneven=uneven, for_good=False):
        write(model, folder, uneven=uneven, source=None if source is None else Path(source))


@contextmanager
def _as_transformers(model: Any, *, uneven: bool, for_good: bool) -> Iterator[None]:
    layers = attached_layers(model)
    if not layers:
        raise CompressError("the model is not attached: growmoe.hf.attach comes first")
    counts = {name: len(layer.moe.experts) for name, layer in layers.items()}
    if len(set(counts.values())) > 1 and not uneven:
        raise CompressError(
            f"layers hold {sorted(set(counts.values()))} experts: a config of transformers has one "
            "number for all. Prune or spawn until they agree, or ask for growmoe's own format "
            "(uneven=True)"
        )
    orders = {name: _order(name, layer) for name, layer in layers.items()}
    family = next(iter(layers.values())).family
    before = getattr(model.config, family.count)
    try:
        for name, layer in layers.items():
            _install(model.get_submodule(name), layer, orders[name])
        setattr(model.config, family.count, max(counts.values()))
        yield
    except BaseException:
        for_good = False
        raise
    finally:
        if not for_good:
            for name, layer in layers.items():
                _uninstall(model.get_submodule(name), layer)
            setattr(model.config, family.count, before)


def _order(name: str, layer: Attached) -> list[int]:
    """Ids in the order in which transformers will have them."""
    experts = list(layer.moe.experts.values())
    for expert in experts:
        if expert.admission < 1:
            raise CompressError(
                f"{name}: expert {expert.id} is let in to {expert.admission:.0%} only, which "
                "transformers does not know: train on, or set its admission to 1"
            )
        try:
            tensors_of(expert.body, layer._was[0])
        except ValueError as error:
            raise CompressError(f"{name}: expert {expert.id}: {error}") from error
    router: Any = layer.moe.router
    order = router.order(experts)
    if None in order:
        sizes = [router.group_of(expert) for expert in experts]
        raise CompressError(
            f"{name}: its {router.groups} groups hold "
            f"{[sizes.count(g) for g in range(router.groups)]} experts; transformers would take "
            "them for equal, and choose in the wrong groups"
        )
    return [experts[e].id for e in order]


@torch.no_grad()
def _install(block: nn.Module, layer: Attached, ids: Sequence[int]) -> None:
    experts, router = layer._was[0], layer.moe.router
    assert isinstance(router, TransformersRouter)
    held = [layer.moe.experts[id] for id in ids]
    bodies = [tensors_of(expert.body, experts) for expert in held]
    for name, old in list(experts.named_parameters()):
        stacked = torch.stack([tensors[name] for tensors in bodies])
        setattr(experts, name, nn.Parameter(stacked, requires_grad=old.requires_grad))
    for path, dim in layer.family.rows.items():
        rows = [getattr(expert.entries, entry_name(path)).detach() for expert in held]
        value = torch.stack(rows, dim)
        owner, last = router.owner(path)
        owner = block if owner is None else owner
        owner.__dict__.pop(last, None)  # the None that stood there
        if path in layer.router_parameters:
            owner.register_parameter(last, nn.Parameter(value, router.learns[path]))
        else:
            owner.register_buffer(last, value)
    block.experts = experts
    setattr(block, layer.family.router, router.module)
    set_sizes(block, layer.family, len(ids))


def _uninstall(block: nn.Module, layer: Attached) -> None:
    experts, router = layer._was[0], layer.moe.router
    assert isinstance(router, TransformersRouter)
    for name, old in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(old.data.to("meta"), old.requires_grad))
    for path in layer.family.rows:
        owner, last = router.owner(path)
        holder = block if owner is None else owner
        holder._parameters.pop(last, None)
        holder._buffers.pop(last, None)
        if owner is None:
            setattr(block, last, None)  # the block hands it to its router
    block.experts = layer
    setattr(block, layer.family.router, Routed())
