"""What can be seen of a run while it goes on, and who looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from growmoe.lineage import Event

INTERVAL = 0.25  # seconds between looks, so that looking costs nothing
_EVENTS = 6


@dataclass(frozen=True)
class Glimpse:
    """What can be seen of one thing that runs, a cell of a bench or the training of a model.

    Attributes:
        fraction: of it that is done.
        text: what it is at.
        curves: what was measured so far, by name and in the order of time.
        experts: how many are alive, by layer.
        events: what happened to experts last, newest last.
    """

    fraction: float = 0.0
    text: str = ""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)
    events: Sequence[str] = ()


class Onlooker:
    """A progress function of a cell that also looks at it, at most four times a second.

    The bench passes one as a method's `progress`; whatever measures the method calls `watch`.

    Args:
        show: given what was seen.
    """

    def __init__(self, show: Callable[[Glimpse], None]) -> None:
        self._show = show
        self._look: Callable[[], Glimpse] = Glimpse
        self._next = 0.0

    def watch(self, look: Callable[[], Glimpse]) -> None:
        """From now on, ask `look` what there is to see beside the progress."""
        self._look, self._next = look, 0.0

    def __call__(self, fraction: float, text: str) -> None:
        if time.monotonic() < self._next:
            return
        self._show(replace(self._look(), fraction=fraction, text=text))
        self._next = time.monotonic() + INTERVAL


def let_watch(progress: Callable[[float, str], None], look: Callable[[], Glimpse]) -> None:
    """Let whoever is told of the progress look on, if it cares to."""
    if isinstance(progress, Onlooker):
        progress.watch(look)


def alive(events: Iterable[Event]) -> dict[str, int]:
    """How many experts each layer has after these events."""
    count: dict[str, int] = {}
    for event in events:
        if event.accepted:
            born = {"init": len(event.ids), "spawn": 1, "merge": 1}.get(event.act, 0)
            died = len(event.ids) if event.act in ("merge", "prune") else 0
            count[event.layer] = count.get(event.layer, 0) + born - died
    return count


def told(events: Sequence[Event]) -> list[str]:
    """The last births, merges, removals and freezes that were carried out, with their reasons."""
    done = [event for event in events if event.accepted and event.act != "init"]
    return [str(event) for event in done[-_EVENTS:]]
