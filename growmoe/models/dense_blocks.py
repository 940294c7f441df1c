"""Finds the feed-forward blocks of a model.

A block is known by its shape, not by its class: two linear maps D -> F -> D with an activation
between, or three with a gate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from growmoe.moe import MoE

Where = Callable[[str, nn.Module], bool] | Sequence[str] | str | re.Pattern[str]

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
FUSED = (("gate_up_proj", "down_proj"),)


@dataclass(frozen=True)
class Block:
    """A feed-forward block and where it lies.

    Attributes:
        name: where the mixture will lie, such as "model.layers.0.mlp".
        owner: the module that a user would name: the block itself, or the layer it is part of.
        dense: what is replaced, as one module: [R, D] -> [R, O]. Its parts are the user's own.
        parent, attribute: `parent.attribute` becomes the mixture.
        blanks: (module, attribute, value) of what else becomes idle.
    """

    name: str
    owner: nn.Module
    dense: nn.Module
    parent: nn.Module
    attribute: str
    blanks: tuple[tuple[nn.Module, str, Any], ...] = ()


class Function(nn.Module):
    """An activation that its owner holds as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def find_blocks(model: nn.Module) -> list[Block]:
    """The feed-forward blocks of the families known here, outermost first, each once."""
    found: list[Block] = []
    inside: set[int] = set()  # parts of blocks found, of mixtures, and of other libraries' mixtures
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, MoE) or isinstance(getattr(module, "experts", None), nn.Module):
            inside.update(map(id, module.modules()))
            continue
        block = layer_block(name, module)
        if block is None and _square(module):
            block = Block(name, module, module, *_place(model, name))
        if block is not None:
            found.append(block)
            inside.update(map(id, block.dense.modules()))
    return found


def choose_blocks(model: nn.Module, where: Where) -> list[Block]:
    """The blocks that `where` names, as `growmoe.upcycle` takes it; each once.

    Raises:
        ValueError: not one of its forms, a name that the model has not, the model itself, or a
            module together with one that holds it.
    """
    known: dict[str, Block] = {}
    if isinstance(where, str):
        matches = lambda name, _: fnmatchcase(name, where)  # noqa: E731
    elif isinstance(where, re.Pattern):
        matches = lambda name, _: where.fullmatch(name) is not None  # noqa: E731
    elif callable(where):
        matches = where
    elif isinstance(where, Sequence) and all(isinstance(name, str) for name in where):
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if missing := [name for name in where if name not in names]:
            raise ValueError(f"upcycle: where: the model has no module {missing[0]!r}")
        matches = lambda name, _: name in where  # noqa: E731
    else:
        raise ValueError(
            "upcycle: where must be a function of (name, module), a list of names, a glob or a "
            f"compiled regular expression, got {where!r}"
        )
    found: dict[int, Block] = {}
    parts: set[int] = set()  # of layers whose block is inside
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not isinstance(module, MoE) and (block := layer_block(name, module)):
            known[block.name] = block
            if matches(name, module):
                found[id(block.parent)] = block
                parts.update(map(id, block.dense.modules()))
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in parts or id(module) in found or not matches(name, module):
            continue
        if not name:
            raise ValueError(
                "upcycle: where names the model itself, which cannot be replaced in place; "
                "build a growmoe.MoE of it"
            )
        if name in known:
            found[id(known[name].parent)] = known[name]
        else:
            found[id(module)] = whole_block(model, name, module)
    blocks = list(found.values())
    for a in blocks:
        inner = {id(m) for m in a.dense.modules()} - {id(a.dense)}
        for b in blocks:
            if b is not a and any(id(m) in inner for m in b.dense.modules()):
                raise ValueError(f"upcycle: where names {b.name!r} and {a.name!r}, which holds it")
    return blocks


def layer_block(name: str, layer: nn.Module) -> Block | None:
    """The block of a layer that holds the parts of its feed-forward half separately."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    if isinstance(layer, kinds) and any(type(layer)._ff_block is k._ff_block for k in kinds):
        act = layer.activation
        act = act if isinstance(act, nn.Module) else Function(act)
        # the outer dropout stays where it is, in the layer
        dense = nn.Sequential(layer.linear1, act, layer.dropout, layer.linear2)
        blanks: list[tuple[nn.Module, str, Any]] = [
            (layer, "activation", nn.Identity()),
            (layer, "dropout", nn.Identity()),
            (layer, "linear2", nn.Identity()),
        ]
        if isinstance(layer, nn.TransformerEncoderLayer):
            blanks.append((layer, "activation_relu_or_gelu", 0))  # else eval would not call it
        return Block(_join(name, "linear1"), layer, dense, layer, "linear1", tuple(blanks))
    parts = dict(layer.named_children())
    if {"ffn", "activation", "ffn_output"} <= set(parts) and _maps(
        (parts["ffn"], parts["ffn_output"])
    ):  # ALBERT
        dense = nn.Sequential(parts["ffn"], parts["activation"], parts["ffn_output"])
        idle = ((layer, key, nn.Identity()) for key in ("activation", "ffn_output"))
        return Block(_join(name, "ffn"), layer, dense, layer, "ffn", tuple(idle))
    if {"intermediate", "output"} <= set(parts):  # BERT: the rest of `output` is around the block
        first, second = parts["intermediate"], getattr(parts["output"], "dense", None)
        if second is not None and _maps((getattr(first, "dense", None), second)):
            blank = (parts["output"], "dense", nn.Identity())
            dense = nn.Sequential(first, second)
            at = _join(name, "intermediate")
            return Block(at, layer, dense, layer, "intermediate", (blank,))
    return None


def whole_block(model: nn.Module, name: str, module: nn.Module) -> Block:
    """A module that somebody named, as it is."""
    return Block(name, module, module, *_place(model, name))


def _square(module: nn.Module) -> bool:
    """Whether this is a feed-forward block D -> F -> D with F >= D."""
    parts = dict(module.named_children())
    for gate, up, down in GATED:
        if {gate, up, down} <= set(parts):
            return _maps((parts[gate], parts[down])) and _maps((parts[up], parts[down]))
    for first, second in FUSED:
        if {first, second} <= set(parts):
            a, b = linear_width(parts[first]), linear_width(parts[second])
            return a is not None and b is not None and a == (b[1], 2 * b[0])
    if next(module.parameters(recurse=False), None) is not None:
        return False
    linear = [part for part in parts.values() if linear_width(part) is not None]
    others = [part for part in parts.values() if linear_width(part) is None]
    return (
        len(linear) == 2
        and bool(others)
        and not any(True for part in others for _ in part.parameters())
        and _maps((linear[0], linear[1]))
    )


def _maps(pair: tuple[Any, Any]) -> bool:
    """Whether two modules are linear maps D -> F and F -> D with F >= D."""
    a, b = (linear_width(part) for part in pair)
    return a is not None and b is not None and a == (b[1], b[0]) and a[1] >= a[0]


def linear_width(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, whoever defines it; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's, transposed
        return tuple(module.weight.shape)
    return None


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
