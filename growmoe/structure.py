"""Builds the experts that a template or a saved state asks for.

A *saved structure* maps each id to what `Expert.get_extra_state` gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert, fresh_body, kind_of, seeded
from growmoe.experts.ffn import FFN
from growmoe.experts.statistics import Statistics
from growmoe.experts.zero_computation import Constant, Copy, Novice, Zero
from growmoe.routers.gate import Entry

Saved = dict[int, dict[str, Any]]
Template = nn.Module | Callable[[], nn.Module]
OWN: dict[str, type[nn.Module]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Zero, Copy, Constant, Novice)
}


def build_body(
    template: Template,
    d_model: int,
    d_out: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A new body of the template's kind, its weights drawn from `generator`.

    Raises:
        ValueError: neither a module nor a function that builds one, or an FFN of other widths.
    """
    if isinstance(template, nn.Module):
        body = template
    elif callable(template):
        with seeded(generator):
            body = template()
    else:
        raise ValueError(f"expert must be a module or a function that builds one, got {template!r}")
    if not isinstance(body, nn.Module):
        raise ValueError(f"expert: the function built {body!r}, which is no module")
    if body is template or (type(body) is FFN and body.d_model is None):
        body = fresh_body(body, d_model, d_out, generator, device, dtype)
    if type(body) is FFN and (body.d_model, body.d_out) != (d_model, d_out):
        raise ValueError(f"expert: {body} does not map d_model={d_model} to d_out={d_out}")
    return body.to(device=device, dtype=dtype)


def fresh_expert(
    id: int,
    body: nn.Module,
    entries: Mapping[str, Entry],
    living: Sequence[Expert],
    d_model: int,
    evidence_rows: int,
    generator: torch.Generator,
    *,
    toward: Tensor | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Expert:
    """An expert without parents around a body, with entries and an empty record.

    Args:
        entries: what the router keeps on each expert.
        living: where its entries and record lie, and in which dtype, if any live; else `device`
            and `dtype`, or those of the body.
        toward: [D], the mean of the inputs it is born for.
    """
    example = next(iter(body.parameters()), None)
    if living:
        device = living[0].statistics.record.device
    elif example is not None:
        device, dtype = example.device, example.dtype
    values: dict[str, Tensor] = {}
    for name, entry in entries.items():
        numbered = entry.numbered
        value = entry.fresh(generator) if numbered is None else numbered(id)
        kind = dtype if value.is_floating_point() else value.dtype
        if living:
            others = torch.stack([getattr(e.entries, name).detach() for e in living])
            kind = others.dtype
            if toward is not None and entry.toward is not None:
                value = entry.toward(toward.to(others), others)
        value = value.to(device=device, dtype=kind)
        values[name] = nn.Parameter(value) if entry.parameter else value
    return Expert(id, body, values, Statistics(d_model, evidence_rows, device))


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
            elif kind in OWN:
                makers[kind] = OWN[kind](**state["config"])
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
