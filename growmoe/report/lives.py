"""The lives of experts, replayed from a lineage whose events are plain dicts as in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from growmoe.lineage import Lineage


@dataclass
class Life:
    """One expert from birth to death.

    Attributes:
        expert: its id; "layer:id" where the events are of several layers.
        birth: the step at which it came.
        parents: whom it came from; none for a fresh one.
        act: how it came: "init", "spawn" or "merge".
        reason: why.
        death: the step at which it went, or None.
        child: into whom it was merged, or None.
        end: why it was pruned or merged.
        frozen: the spans in which it was frozen, as [from, to]; the last may end at infinity.
    """

    expert: Any
    birth: float
    parents: list[Any] = field(default_factory=list)
    act: str = "init"
    reason: str = ""
    death: float | None = None
    child: Any = None
    end: str = ""
    frozen: list[list[float]] = field(default_factory=list)


def plain(events: Lineage | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The events as dicts.

    Those of a `Lineage` are all of one layer, whatever it was called when each came.
    """
    if isinstance(events, Lineage):
        return [{**event.to_json(), "layer": "moe"} for event in events]
    return events


def replay(
    events: Sequence[Mapping[str, Any]],
) -> tuple[dict[Any, Life], list[tuple[str, float, Any]]]:
    """The life of each expert by id, and (act, step, expert) of what happened; refusals left out.

    What an event says of experts that no event before it made is left out too.
    """
    several = len({event.get("layer") for event in events}) > 1
    lives: dict[Any, Life] = {}
    marks: list[tuple[str, float, Any]] = []

    def key(layer: Any, expert: Any) -> Any:
        return f"{layer}:{expert}" if several else expert

    for event in events:
        if not event.get("accepted", True):
            continue
        step, act, layer = event["step"], event["act"], event.get("layer")
        reason = event.get("reason") or ""
        ids = [key(layer, i) for i in event.get("ids") or ()]
        parents = [key(layer, i) for i in event.get("parents") or ()]
        if act == "init":
            for expert in ids:
                lives[expert] = Life(expert, step, [], act, reason)
        child = None
        if act in ("spawn", "merge"):
            child = key(layer, event["child"])
            lives[child] = Life(child, step, [p for p in parents if p in lives], act, reason)
            marks.append((act, step, child))
        for expert in {"merge": parents, "prune": ids}.get(act, ()):
            if expert in lives:
                lives[expert].death, lives[expert].end = step, reason
                lives[expert].child = child
                if act == "prune":
                    marks.append((act, step, expert))
        for expert in ids if act in ("freeze", "thaw") else ():
            if expert in lives:
                spans = lives[expert].frozen
                if act == "freeze":
                    spans.append([step, math.inf])
                elif spans:
                    spans[-1][1] = step
                marks.append((act, step, expert))
    return lives, marks


def fate(life: Life) -> str:
    """How a life went: "alive", "frozen", "merged" or "pruned"."""
    if life.death is not None:
        return "pruned" if life.child is None else "merged"
    return "frozen" if life.frozen and life.frozen[-1][1] == math.inf else "alive"
