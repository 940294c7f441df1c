"""What commands share on a terminal: tables, what was written, a bar that is plain in a pipe."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

REFRESH = 2  # a second: a panel takes some 6 ms to draw, for which the run has to wait


def printer() -> Console:
    """Standard output for tables; with NO_COLOR set, no control codes at all, bold ones neither."""
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


def table(*headings: str) -> Table:
    """An empty table without frames: the first column is text, the others figures."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    return drawn


def print_written(paths: Iterable[Path]) -> None:
    """Which files a command has left."""
    print("\nwritten:")
    for path in paths:
        print(f"  {path}")


def command_line() -> str:
    """The command as it was given, to be kept beside what came of it."""
    return shlex.join(["growmoe", *sys.argv[1:]])


def animated(console: Console) -> bool:
    """Whether what is drawn there may move: on a terminal that is neither dumb nor wants no colour.

    A forced colour does not make a terminal of a file.
    """
    terminal = console.is_terminal and console.file.isatty()
    return terminal and not console.is_dumb_terminal and not console.no_color


def say_plainly(console: Console, text: str) -> None:
    """Write a line, folded at the width of the console, without control codes."""
    folded = textwrap.fill(
        text,
        console.width,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    print(folded, file=console.file, flush=True)


@contextmanager
def progress_bar(
    console: Console,
) -> Iterator[tuple[Callable[[float, str], None], Callable[[str], None]]]:
    """A bar on a terminal; where the output is piped, a line for each thing that is said."""
    if not animated(console):
        yield lambda fraction, text: None, lambda text: say_plainly(console, text)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=REFRESH) as bar:
        task = bar.add_task("loading", total=1.0)
        yield (
            lambda fraction, text: bar.update(task, completed=fraction, description=text),
            lambda text: bar.console.print(text, highlight=False, markup=False),
        )
