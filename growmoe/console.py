"""What the commands share on a terminal: a progress bar that is plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def progress_bar(
    console: Console,
) -> Iterator[tuple[Callable[[float, str], None], Callable[[str], None]]]:
    """A bar on a terminal; where the output is piped, a line for each thing that is said."""
    if not console.is_terminal:
        yield lambda fraction, text: None, lambda text: print(text, file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        yield (
            lambda fraction, text: bar.update(task, completed=fraction, description=text),
            lambda text: bar.console.print(text, highlight=False, markup=False),
        )
