"""The progress of all workers in one bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Watch = Callable[[dict[str, Any]], None]


def text_of(status: dict[str, Any]) -> str:
    """What the bar says beside the steps."""
    experts = sum(status["experts"].values())
    moved = sum(status["sent"].values())
    own = "".join(f" · {k} {v:.4g}" for k, v in status.get("values", {}).items())
    deaths = status.get("recoveries", 0)
    if deaths:
        own += f" · {deaths} {'recovery' if deaths == 1 else 'recoveries'}"
    return (
        f"{status['workers']} workers · {experts} experts · "
        f"busiest {status['imbalance']:.2f} × mean · {moved / 1e6:,.0f} MB sent{own}"
    )


@contextmanager
def bar(wanted: bool | None = None) -> Iterator[Watch]:
    """Gives a function to be told each status; it draws on standard error.

    Args:
        wanted: None stands for: if that is a terminal and rich is installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        wanted = False
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda status: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("workers start", total=None)

        def show(status: dict[str, Any]) -> None:
            progress.update(
                task, completed=status["step"], total=status["total"], description=text_of(status)
            )

        yield show
