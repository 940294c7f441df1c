"""Reads from a saved state which experts a layer had, and builds one for each.

A *saved structure* maps each id to what `Expert.get_extra_state` gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from growmoe.experts.expert import Expert, kind_of
from growmoe.experts.ffn import FFN

Saved = dict[int, dict[str, Any]]
Template = nn.Module | Callable[[], nn.Module]


def saved_structure(state_dict: Mapping[str, Any], prefix: str) -> Saved:
    """The experts that a state dict holds under `prefix`."""
    states: Saved = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and key.endswith("._extra_state"):
            id, _, rest = key[len(prefix) :].partition(".")
            if id.isdecimal() and rest == "_extra_state":  # a body may have one of its own
                states[int(id)] = value
    return states


def differs(experts: Mapping[int, Expert], saved: Saved) -> bool:
    """Whether the saved experts are others than these."""
    return list(experts) != sorted(saved) or any(
        not _same_kind(expert, saved[id]) for id, expert in experts.items()
    )


def experts_for(
    saved: Saved,
    experts: Mapping[int, Expert],
    templates: Iterable[Template],
    factories: Mapping[str, Callable[[], nn.Module]] | None,
    newborn: Callable[[Template], Expert],
) -> list[Expert]:
    """An expert for each saved id, of the saved kind; weights are still to be loaded.

    Args:
        experts: the living, taken where id and kind agree.
        templates: of kinds that can be built, besides `FFN` and those of the living.
        factories: kind -> a function that builds a body; given what the body's `config()`
            returned when it was saved, if it has one.
        newborn: makes an expert of a template.

    Raises:
        ValueError: a kind that nothing here can build.
    """
    makers: dict[str, Template] = {}
    for template in [*templates, *(e.body for e in experts.values())]:
        if isinstance(template, nn.Module):
            makers.setdefault(kind_of(template), template)
    makers |= factories or {}
    result = []
    for id, state in sorted(saved.items()):
        mine = experts.get(id)
        if mine is None or not _same_kind(mine, state):
            kind = state["kind"]
            if kind == "FFN":  # a template, whose weights nobody needs
                makers[kind] = FFN(**state["config"], generator=torch.Generator())
            if kind not in makers:
                raise ValueError(
                    f"expert {id} is a {kind}, which is not known here; pass "
                    f"experts={{{kind!r}: function that builds one}} to growmoe.load"
                )
            maker = makers[kind]
            if kind in (factories or {}) and state["config"]:
                maker = partial(cast(Callable[..., nn.Module], maker), **state["config"])
            mine = newborn(maker)
            mine.id = id
        result.append(mine)
    return result


def _same_kind(expert: Expert, state: dict[str, Any]) -> bool:
    mine = expert.get_extra_state()
    return all(mine[key] == state[key] for key in ("kind", "config"))
