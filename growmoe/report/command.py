"""The commands `growmoe report` and `growmoe watch`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from growmoe.report.page import write_report
from growmoe.report.run import ReportError
from growmoe.report.watch import Watch

RUNS = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Folders of runs; several are compared."),
]


def report(
    runs: RUNS,
    output: Annotated[
        Path | None, typer.Option(help="The page.", show_default="report.html in the first RUN")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Write all there is to see of runs into one HTML page that needs no network."""
    if output is None:
        output = runs[0] / "report.html" if runs[0].is_dir() else runs[0].with_suffix(".html")
    elif output.is_dir():
        raise ReportError(f"{output} is a folder: name the page, as {output / 'report.html'}")
    path = write_report(runs, output)
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    if open_page:
        webbrowser.open(path.resolve().as_uri())


def watch(
    runs: RUNS,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine; 0 is any free one.")
    ] = 8765,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Show a run while it goes on: the page on this machine alone, anew at each change."""
    with Watch(runs, port) as server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        if open_page:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
