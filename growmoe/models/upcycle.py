"""Turns the feed-forward blocks of a model somebody already has into mixtures of experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from growmoe.experts.expert import clone_body
from growmoe.experts.ffn import FFN
from growmoe.live import refuse_parallel_wrappers, refuse_unseen_optimizers
from growmoe.models.block_experts import (
    CopiedBlock,
    as_ffn,
    probe,
    random_devices,
    run_once,
)
from growmoe.models.dense_blocks import Block, Where, choose_blocks, find_blocks
from growmoe.moe import MoE
from growmoe.routers import Router, TopK

Model = TypeVar("Model", bound=nn.Module)

OPTIONS = {"capacity", "balance_loss", "z_loss", "losses", "warmup", "evidence", "seed"}
# how far the first output may be off, relative to the largest value: rounding alone
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}


def upcycle(
    model: Model,
    where: Where | None = None,
    *,
    num_experts: int = 8,
    router: Router | None = None,
    noise: float = 0.0,
    causal: bool | None = None,
    **options: Any,
) -> Model:
    """Turn feed-forward blocks into `MoE` layers whose first output is the dense model's.

    Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): each expert starts as a copy of
    the block, so that the mixture computes what the block did for as long as the experts agree.
    The parameters of the blocks are multiplied by `num_experts`, and so is the optimizer's memory
    for them; the compute by the router's k.

    A block that is exactly an `FFN` (exact GELU, ReLU or SwiGLU, no dropout inside) becomes one,
    and its experts run as one grouped matmul; any other is copied as it is, dropout included. What
    is `requires_grad`, the device, the dtype and the training mode stay. A module used in several
    places stays one, as one mixture. Build the optimizer afterwards.

    Args:
        model: any module; it is changed in place. Known families: those of Llama, Qwen, Mistral,
            Gemma, Phi-3, GPT-2, BERT, ALBERT and ViT in transformers, torchvision's ViT,
            `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`, and any module of two
            linear maps D -> F -> D, F >= D, with an activation between.
        where: which blocks. None takes all of these families. A predicate ``(name, module) ->
            bool``, a list of names, a glob such as ``"*.mlp"`` (``*`` also matches dots) or a
            compiled regular expression for the whole name chooses exactly, and may name any module
            that maps [R, D] to [R, O]. In a family whose block lies inside its layer (BERT, ALBERT,
            nn.TransformerEncoderLayer) the layer is named.
        num_experts: per layer.
        router: a template, copied for each layer; its combine weights must sum to 1. `TopK(2)` if
            left out.
        noise: standard deviation of a perturbation of each copy, relative to each weight's RMS.
            Then the first output is the dense one only up to it.
        causal: whether the model must not see later tokens, for which some routers are refused;
            found out if left out.
        options: for each `MoE`: capacity, balance_loss, z_loss, losses, warmup, evidence, seed.

    Returns:
        The model itself. `growmoe.moe_layers` lists its new layers by name.

    Raises:
        ValueError: no block is found or one is named that is none; a router whose weights do not
            sum to 1 or that sees the future of a causal model; an optimizer or a parallel wrapper
            already holds a block; a block has hooks, shares weights with something outside it, or
            is on the meta device. The model is untouched then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"upcycle: model must be a torch.nn.Module, got {type(model).__name__}")
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"upcycle: {sorted(unknown)} is no option; they are {sorted(OPTIONS)}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"upcycle: noise must not be negative, and finite, got {noise!r}")
    router = TopK(2) if router is None else router
    blocks = find_blocks(model) if where is None else choose_blocks(model, where)
    if not blocks:
        raise ValueError(
            f"upcycle: {type(model).__name__} has no feed-forward block of a family known here; "
            "name the modules in where="
            if where is None
            else f"upcycle: where={where!r} matches no module of {type(model).__name__}"
        )
    _refuse(model, blocks)
    options["causal"] = _is_causal(model) if causal is None else causal
    layers: list[MoE] = []
    checked: set[int] = set()
    for i, block in enumerate(blocks):
        settings = dict(options)
        if settings.get("seed") is not None:
            settings["seed"] += i  # else all layers would have the same keys
        layers.append(_mixture(model, block, num_experts, router, noise, settings, checked))
    for block, layer in zip(blocks, layers, strict=True):
        _replace(model, block, layer)
    return model


def _refuse(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Refuse what would be lost or left behind if these blocks were replaced."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name + ".")
    for block in blocks:
        if not block.name:
            raise ValueError("upcycle: the model itself is the block: build a growmoe.MoE of it")
        for module in block.dense.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if any(hooks) or module._backward_pre_hooks or hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"upcycle: {block.name!r} has hooks, which would see some tokens only; remove "
                    "them first"
                )
        for p in block.dense.parameters():
            if p.is_meta:
                raise ValueError(f"upcycle: {block.name!r} is on the meta device; load it first")
        owned = [id(p) for _, p in block.dense.named_parameters(remove_duplicate=False)]
        for key in set(owned):
            mine = tuple(places[id(block.owner)])
            if len(names[key]) > owned.count(key) * len(mine):
                other = next((n for n in names[key] if not n.startswith(mine)), names[key][-1])
                raise ValueError(
                    f"upcycle: a weight of {block.name!r} is also {other!r}; the experts would no "
                    "longer share it. Share the module itself, which stays one, or untie it"
                )
        refuse_parallel_wrappers(block.owner)
    try:
        refuse_unseen_optimizers(nn.ModuleList([block.dense for block in blocks]), [])
    except ValueError as error:
        raise ValueError(
            "upcycle: an optimizer already holds the weights of the blocks and would not learn of "
            "the experts; upcycle first, then build the optimizer"
        ) from error


def _is_causal(model: nn.Module) -> bool:
    """Whether any of the model's attention is known to look at earlier tokens only."""
    config = getattr(model, "config", None)
    flags = ("is_decoder", "is_encoder_decoder")
    if any(getattr(config, flag, False) is True for flag in flags):
        return True
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")) or isinstance(model, nn.TransformerDecoder):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


# What it becomes.


def _mixture(
    model: nn.Module,
    block: Block,
    num_experts: int,
    router: Router,
    noise: float,
    options: dict[str, Any],
    checked: set[int],
) -> MoE:
    dense = block.dense
    example = next((p for p in dense.parameters() if p.is_floating_point()), None)
    if example is None:
        raise ValueError(f"upcycle: {block.name!r} has no weights")
    place: dict[str, Any] = {"device": example.device, "dtype": example.dtype}
    x_RD, y_RO = probe(model, block, place)
    d_model, d_out = x_RD.shape[1], y_RO.shape[1]
    options = {**options, **place}
    if d_model not in checked:
        _check_weights(d_model, num_experts, router, options)
        checked.add(d_model)
    ffn = as_ffn(dense)
    for source in (ffn, CopiedBlock(dense)):
        if source is None:
            continue
        newborn = _copier(source, noise)
        layer = MoE(
            d_model,
            [newborn] * num_experts,
            num_experts,
            copy.deepcopy(router),
            d_out=d_out,
            **options,
        )
        _keep_dtypes(layer, source)
        # what a newborn without a parent is: of this kind, its weights drawn anew
        first = next(iter(layer.experts.values())).body
        layer._template = [FFN(ffn.d_hidden, ffn.activation, ffn.bias) if source is ffn else first]
        off = 0.0 if noise else _difference(y_RO, run_once(layer, x_RD))
        if off <= TOLERANCE.get(example.dtype, 1e-5):
            return layer.train(block.owner.training)
    raise ValueError(
        f"upcycle: the mixture made of {block.name!r} differs from it by {off:.1e} (relative to "
        "its largest output) on random inputs; does it treat each input by itself?"
    )


def _copier(source: nn.Module, noise: float) -> Callable[[], nn.Module]:
    # called by MoE with torch's generator seeded from the layer's own
    return lambda: clone_body(source, noise, torch.default_generator)


def _keep_dtypes(layer: MoE, source: nn.Module) -> None:
    """Undo MoE's cast to one dtype where the block has several."""
    if len({t.dtype for t in source.state_dict().values() if isinstance(t, Tensor)}) > 1:
        for expert in layer.experts.values():
            for t, like in zip(_tensors(expert.body), _tensors(source), strict=True):
                t.data = t.data.to(like.dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _check_weights(d_model: int, num_experts: int, router: Router, options: dict[str, Any]) -> None:
    """A mixture of identities returns its input if, and only if, the combine weights sum to 1."""
    layer = MoE(d_model, nn.Identity, num_experts, copy.deepcopy(router), **options)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, d_model, generator=generator).to(options["device"], options["dtype"])
    for mode in (True, False):
        with torch.no_grad(), torch.random.fork_rng(devices=random_devices()):
            y_TD = layer.train(mode)(x_TD)
        off = _difference(x_TD, y_TD) if y_TD.shape == x_TD.shape else float("inf")
        if not off <= TOLERANCE.get(x_TD.dtype, 1e-5):
            raise ValueError(
                f"upcycle: the combine weights of {router} do not sum to 1 for each token: a "
                f"mixture of equal experts would be off by {off:.0%}. Take one that normalises "
                "them over the chosen and drops no token, such as TopK(k=2) or TopK(k=1, "
                "renormalize=True)"
            )


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def _replace(model: nn.Module, block: Block, layer: MoE) -> None:
    """Put the mixture wherever the block is; these assignments cannot fail."""
    for module, attribute, value in block.blanks:
        setattr(module, attribute, value)
    old = getattr(block.parent, block.attribute)
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is old:
                module._modules[key] = layer
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            layer is part for part in module.modules()
        ):
            module.enable_nested_tensor = module.use_nested_tensor = False  # a mixture takes none
