"""Who was born of whom, when and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

_DEPTH = 20  # generations that a drawn tree indents
Act = Literal["init", "spawn", "merge", "prune", "freeze", "thaw"]


@dataclass(frozen=True)
class Event:
    """One act on a layer, done or refused.

    Attributes:
        step: the organizer's step, or the layer's count of training forwards if nobody told.
        layer: the layer's name in the model.
        act: what was done; "init" lists the experts a layer began with.
        ids: the experts acted on.
        parents: whom a newborn came from; empty for a fresh one.
        child: the newborn's id, for spawn and merge.
        reason: why, with numbers, for a person.
        signals: the values behind it.
        change: relative change of the layer's output that consent measured, if it did.
        accepted: False for a proposal that was refused; then nothing changed.
    """

    step: int
    layer: str
    act: Act
    ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    child: int | None = None
    reason: str = ""
    signals: dict[str, float] = field(default_factory=dict)
    change: float | None = None
    accepted: bool = True

    def __str__(self) -> str:
        what = {
            "init": f"began with {_list(self.ids)}",
            "spawn": f"spawned {self.child}"
            + (f" from {_list(self.parents)}" if self.parents else ""),
            "merge": f"merged {_list(self.ids)} into {self.child}",
            "prune": f"pruned {_list(self.ids)}",
            "freeze": f"froze {_list(self.ids)}",
            "thaw": f"thawed {_list(self.ids)}",
        }[self.act]
        if not self.accepted:
            what = f"refused to {self.act} {_list(self.ids)}"
        cost = "" if self.change is None else f" (output changed by {self.change:.2%})"
        if not self.accepted:
            cost = ""  # its reason tells
        why = f": {self.reason}" if self.reason else ""
        layer = f"layer {self.layer}" if self.layer.isdecimal() else self.layer
        return f"step {self.step}: {layer} {what}{why}{cost}"

    def to_json(self) -> dict[str, Any]:
        """Its fields in JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Event:
        """Raises ValueError if `data` is not an event."""
        try:
            if data["act"] not in get_args(Act):
                raise TypeError(f"unknown act {data['act']!r}")
            data = {**data, "ids": tuple(data["ids"]), "parents": tuple(data["parents"])}
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a lineage event: {data!r}") from error


class Lineage:
    """The events of one layer, in order. It only grows.

    Iterating gives the events; `replay` gives the structure they lead to.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events = list(events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def add(self, event: Event) -> Event:
        """Append an event; gives it back."""
        self.events.append(event)
        return event

    def replay(self) -> list[int]:
        """The ids alive after all events, ascending.

        Raises:
            ValueError: the events contradict each other, naming the first that does.
        """
        return sorted(self._replay()[0])

    def frozen(self) -> list[int]:
        """The ids frozen after all events, ascending."""
        return sorted(self._replay()[1])

    def _replay(self) -> tuple[set[int], set[int]]:
        alive: set[int] = set()
        frozen: set[int] = set()
        seen: set[int] = set()
        for event in self.events:
            if not event.accepted:
                continue
            ids = set(event.ids)
            born = ids if event.act == "init" else {event.child} - {None}
            if (event.act != "init" and not (ids | set(event.parents)) <= alive) or born & seen:
                raise ValueError(f"the lineage contradicts itself at: {event}")
            if event.act in ("merge", "prune"):
                alive -= ids
                if event.act == "merge" and ids <= frozen:
                    frozen |= born  # type: ignore[arg-type]
                frozen -= ids
            elif event.act == "freeze":
                frozen |= ids
            elif event.act == "thaw":
                frozen -= ids
            alive |= born  # type: ignore[arg-type]
            seen |= born  # type: ignore[arg-type]
        return alive, frozen

    def tree(self) -> str:
        """Every expert under its first parent, with when it was born and how it ended.

        An expert with several parents stands under the first and names the others.
        """
        birth: dict[int, Event] = {}
        end: dict[int, str] = {}
        for event in self.events:
            if not event.accepted:
                continue
            for id in event.ids if event.act == "init" else ():
                birth[id] = event
            if event.child is not None:
                birth[event.child] = event
            if event.act == "merge":
                end |= {id: f"merged into {event.child} at {event.step}" for id in event.ids}
            if event.act == "prune":
                end |= {id: f"pruned at {event.step}" for id in event.ids}
        frozen = set(self.frozen())
        children: dict[int | None, list[int]] = {}
        for id, event in birth.items():
            first = event.parents[0] if event.act != "init" and event.parents else None
            children.setdefault(first, []).append(id)
        lines: list[str] = []

        def describe(id: int) -> str:
            event = birth[id]
            born = "initial" if event.act == "init" else f"born at {event.step}"
            if len(event.parents) > 1:
                born += f" of {_list(event.parents)}"
            state = end.get(id, "frozen" if id in frozen else "alive")
            return f"{id} ({born}, {state})"

        # a loop, not a recursion: a line of descent may be thousands long
        stack = [(id, "", "", 0) for id in reversed(children.get(None, []))]
        while stack:
            id, above, branch, depth = stack.pop()
            deeper = f"({depth - _DEPTH} levels deeper) " if depth > _DEPTH else ""
            lines.append(above + deeper + branch + describe(id))
            young = children.get(id, [])
            if 0 < depth < _DEPTH:
                above += "│  " if branch == "├─ " else "   "
            for i, child in reversed(list(enumerate(young))):
                stack.append((child, above, "└─ " if i == len(young) - 1 else "├─ ", depth + 1))
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON lines, one event each."""
        Path(path).write_text("".join(json.dumps(e.to_json()) + "\n" for e in self.events))

    @classmethod
    def load(cls, path: str | Path) -> Lineage:
        """Read what `save` wrote.

        Raises:
            ValueError: a line is no event; the message names file and line.
        """
        events = []
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                events.append(Event.from_json(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        return cls(events)


def _list(ids: Iterable[int]) -> str:
    return ", ".join(str(id) for id in ids)
