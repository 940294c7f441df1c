"""A run on the terminal while it goes on: what it measures, its experts, what happened last."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from growmoe.console import REFRESH, animated, say_plainly
from growmoe.glimpse import Glimpse

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 100  # of the panel, at most
_CURVE = 24  # characters
_EVENTS = 4


class View:
    """What is shown; where nothing may move, a line for each thing that is said.

    Args:
        console: where.
        title: what is run.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.fraction, self.text = 0.0, "loading"
        self.moving = animated(console)
        self._seen: dict[str, Glimpse] = {}
        self._events: list[tuple[str, str]] = []  # the last, with the name of what they are of
        self._begin = time.monotonic()
        self._first: tuple[float, float] | None = None

    def progress(self, fraction: float, text: str) -> None:
        """How much of the whole is done, and what is being done."""
        if fraction > 0 and self._first is None:
            self._first = time.monotonic(), fraction
        self.fraction, self.text = min(1.0, fraction), text

    def say(self, text: str) -> None:
        """A line that stays, above the panel."""
        if self.moving:
            self.console.print(text, highlight=False, markup=False)
        else:
            say_plainly(self.console, text)

    def show(self, name: str, seen: Glimpse | None) -> None:
        """What is to be seen of one thing that runs, "" for the only one; None when it ended."""
        # another thread may be drawing what was seen before: nothing of it is changed
        if seen is None:
            self._seen = {of: one for of, one in self._seen.items() if of != name}
            return
        before = self._seen[name].events if name in self._seen else ()
        new = [event for event in seen.events if event not in before]
        self._events = [*self._events, *((name, event) for event in new)][-_EVENTS:]
        self._seen = {**self._seen, name: seen}

    @property
    def left(self) -> float | None:
        """Seconds that the rest would take at the pace so far, or None before there is one."""
        if self._first is None:
            return None
        begin, first = self._first
        if not first < self.fraction < 1:
            return None
        pace = (time.monotonic() - begin) / (self.fraction - first)
        return pace * (1 - self.fraction)

    # How it is drawn.

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDTH)
        seen, plain = self._seen, options.ascii_only
        lines: list[RenderableType] = []
        room = (console.height - 6 - _EVENTS) // max(1, len(seen))  # for each
        if room > 3:
            for name, one in seen.items():
                lines += [Rule(style="dim")] * bool(lines) + [_one(name, one, plain)]
        elif seen:
            lines.append(_many(seen, plain))
        if self._events:
            names = {*seen, *(name for name, _ in self._events)}
            lines.append(_happened(self._events, len(names) > 1))
        lines += [Rule(style="dim")] * bool(lines) + [self._foot()]
        title = Text(self.title, style="bold")
        yield Panel(Group(*lines), title=title, title_align="left", width=width, padding=(0, 1))

    def _foot(self) -> RenderableType:
        gone, left = time.monotonic() - self._begin, self.left
        times = f"{_clock(gone)} gone" + ("" if left is None else f", about {_clock(left)} left")
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_row(Text(self.text, overflow="ellipsis", no_wrap=True), Text(times, style="dim"))
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(1.0, self.fraction, finished_style="bar.complete"),
            Text(f"{self.fraction:4.0%}"),
        )
        return Group(grid, bar)


@contextmanager
def live_view(console: Console, title: str) -> Iterator[View]:
    """A panel that follows a run, drawn twice a second, and gone when the run is over.

    In a pipe, on a dumb terminal and with NO_COLOR set, what is said is written as plain lines.
    """
    view = View(console, title)
    if not view.moving:
        yield view
        return
    with Live(
        console=console,
        get_renderable=lambda: view,
        refresh_per_second=REFRESH,
        transient=True,
    ):
        yield view


def _one(name: str, seen: Glimpse, plain: bool) -> RenderableType:
    """All there is to see of one."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(overflow="fold")
    for label, values in seen.curves.items():
        if values:
            bars = "" if plain else sparkline(values)
            grid.add_row(label, _number(values[-1]), Text(bars, style="cyan"))
    if seen.experts:
        grid.add_row("experts", str(sum(seen.experts.values())), _of_layers(seen.experts))
    if not name:
        return grid
    head = Text.assemble((name, "bold"), f"  {seen.text}", no_wrap=True, overflow="ellipsis")
    return Group(head, grid)


def _many(seen: Mapping[str, Glimpse], plain: bool) -> RenderableType:
    """A line for each: how far it is, the first of its curves, its experts."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "left", "right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for name, one in seen.items():
        measured = [(label, values) for label, values in one.curves.items() if values]
        label, values = measured[0] if measured else ("", [])
        experts = sum(one.experts.values())
        grid.add_row(
            Text(name, style="bold"),
            f"{one.fraction:.0%}",
            Text(label, style="dim"),
            _number(values[-1]) if values else "",
            Text("" if plain else sparkline(values, 8), style="cyan"),
            f"{experts} experts" * (experts > 0),
        )
    return grid


def _happened(events: Sequence[tuple[str, str]], several: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for name, event in events:
        line = Text(f"{name}: " * several + event)
        line.highlight_words(("spawned",), "green")
        line.highlight_words(("merged", "pruned"), "magenta")
        line.highlight_words(("froze", "thawed"), "cyan")
        grid.add_row("·", line)
    return Group(Rule("last events", style="dim", align="left", characters="─"), grid)


def _of_layers(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return ""
    names = _short(list(counts))
    return ", ".join(f"{name}: {count}" for name, count in zip(names, counts.values(), strict=True))


def _short(names: Sequence[str]) -> list[str]:
    """The names of layers without the words with which all of them end."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return [".".join(p) for p in parts]


def sparkline(values: Sequence[float], width: int = _CURVE) -> str:
    """Values as bars from the lowest to the highest, averaged to at most so many."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(len(values), width)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    top = len(_BARS) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _number(value: float) -> str:
    return f"{value:#.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
