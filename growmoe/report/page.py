"""Renders runs as one HTML page that needs no network: styles, script, library and data inside.

The chart library and the data lie in the page as base64 of gzip and are unpacked by the browser;
tables, commands and versions are plain HTML, which is read without scripts too.
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.metadata
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

from growmoe.continual.store import write_atomically
from growmoe.report.lives import fate, replay
from growmoe.report.run import Chart, Growth, Line, ReportError, Run, read_run


def write_report(paths: Sequence[str | Path], output: str | Path, *, watched: bool = False) -> Path:
    """Read the runs and write the page; gives its path.

    Raises:
        ReportError: there is no run, one cannot be read, or the page cannot be written.
    """
    page = render_page([read_run(path) for path in paths], watched=watched)
    output = Path(output)
    try:
        write_atomically(output, page)
    except OSError as error:
        raise ReportError(f"cannot write {output}: {error.strerror or error}") from error
    return output


def render_page(runs: Sequence[Run], *, watched: bool = False) -> str:
    """The page as text.

    Args:
        runs: one or more; several are compared first.
        watched: the page is served by `growmoe watch`, and loads itself anew when it changes.

    Raises:
        ReportError: there is no run.
        ImportError: plotly is not installed.
    """
    if not runs:
        raise ReportError("there is no run to report")
    shown = [*runs] if len(runs) == 1 else [compare_runs(runs), *runs]
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared"
    data = {"runs": [_data(run) for run in shown]}
    return _asset("page.html").substitute(
        title=html.escape(f"{title} – growmoe"),
        heading="growmoe report",
        version=html.escape(importlib.metadata.version("growmoe")),
        style=_asset("page.css").template,
        script=_asset("page.js").template,
        watched=str(watched).lower(),
        choice=_choice(shown),
        sections="\n".join(_section(i, run) for i, run in enumerate(shown)),
        plotly=_packed(_plotly()),
        data=_packed(json.dumps(data, separators=(",", ":"), allow_nan=False)),
    )


class _Template:
    """Text with places named as @@name@@, which neither CSS nor JavaScript uses."""

    def __init__(self, template: str) -> None:
        self.template = template

    def substitute(self, **values: str) -> str:
        text = self.template
        parts = text.split("@@")
        return "".join(values[part] if i % 2 else part for i, part in enumerate(parts))


def _asset(name: str) -> _Template:
    file = resources.files("growmoe.report") / "assets" / name
    return _Template(file.read_text(encoding="utf-8"))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ImportError(
            "growmoe report needs plotly, which is not installed: pip install 'growmoe[report]'"
        ) from error
    return get_plotlyjs()


def _packed(text: str) -> str:
    # no time stamp: the same run gives the same page
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


# What is plain HTML.


def _choice(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    options = "".join(
        f'<option value="{i}">{html.escape(run.name)}</option>' for i, run in enumerate(runs)
    )
    return f'<label class="choice">Run <select id="run-choice">{options}</select></label>'


def _section(number: int, run: Run) -> str:
    name = html.escape(f"{run.name}: {run.title}" if run.title != run.name else run.name)
    parts = [f'<section class="run" id="run-{number}" aria-labelledby="run-{number}-title">']
    parts.append(f'<h2 id="run-{number}-title">{name}</h2>')
    if run.tables:
        parts.append("<h3>Results</h3>")
    for i, (rows, note) in enumerate(run.tables, 1):
        parts.append(_table(rows, f"Results of {run.name}, table {i}"))
        if note:
            parts.append(f'<p class="note">{html.escape(note)}</p>')
    if run.note:
        parts.append(f'<p class="note">{html.escape(run.note)}</p>')
    parts.append(f'<div class="drawn" data-run="{number}"></div>')
    parts.append(_how(run, number))
    parts.append("</section>")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]], label: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _how(run: Run, number: int) -> str:
    """The command, what it was told, versions and hardware."""
    parts = [f'<h3 id="how-{number}">How it was made</h3>']
    if run.command:
        parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-labelledby="how-{number}">'
            f"<pre><code>{html.escape(run.command)}</code></pre></div>"
        )
    rows = [
        (name, value) for part in run.conditions.values() if part for name, value in part.items()
    ]
    if rows:
        parts.append("<dl>")
        parts += [
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in rows
        ]
        parts.append("</dl>")
    if run.settings:
        text = html.escape(json.dumps(run.settings, indent=1, ensure_ascii=False))
        parts.append(
            f'<details><summary>Settings</summary><div class="scroll" tabindex="0" role="region" '
            f'aria-label="Settings"><pre><code>{text}</code></pre></div></details>'
        )
    return "\n".join(parts) if len(parts) > 1 else ""


# What the script draws.


def _data(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "charts": [asdict(chart) for chart in run.charts],
        "matrices": [{"name": name, "values": m} for name, m in run.matrices.items()],
        "growths": [_growth(growth) for growth in run.growths],
    }


def _growth(growth: Growth) -> dict[str, Any]:
    lives, marks = replay(growth.events)
    return {
        "name": growth.name,
        "experts": [
            {
                "id": str(id),
                "birth": life.birth,
                "act": life.act,
                "why": life.reason,
                "parents": [str(parent) for parent in life.parents],
                "death": life.death,
                "child": None if life.child is None else str(life.child),
                "end": life.end,
                "fate": fate(life),
                "frozen": [[a, None if math.isinf(b) else b] for a, b in life.frozen],
            }
            for id, life in lives.items()
        ],
        "marks": [[act, step, str(id)] for act, step, id in marks],
        "load": growth.load,
        "routing": growth.routing,
        "events": [
            {
                "step": event["step"],
                "act": event["act"],
                "ids": list(event.get("ids") or event.get("parents") or ()),
                "child": event.get("child"),
                "why": event.get("reason") or "",
                "change": event.get("change"),
                "done": event.get("accepted", True),
            }
            for event in growth.events
        ],
    }


def compare_runs(runs: Sequence[Run]) -> Run:
    """The runs side by side: one table of those with the same headings, and common charts."""
    names = _distinct([run.name for run in runs])
    rows: list[list[str]] = []
    for name, run in zip(names, runs, strict=True):
        table = run.tables[0][0] if run.tables else []
        if table and (not rows or table[0] == rows[0][1:]):
            rows = rows or [["run", *table[0]]]
            rows += [[name, *row] for row in table[1:]]
    charts: list[Chart] = []
    for title in dict.fromkeys(chart.title for run in runs for chart in run.charts):
        found = [
            (name, chart)
            for name, run in zip(names, runs, strict=True)
            for chart in run.charts
            if chart.title == title
        ]
        if len(found) > 1:
            lines: list[Line] = [
                replace(line, name=name if line.name == name else f"{name}: {line.name}")
                for name, chart in found
                for line in chart.lines
            ]
            charts.append(replace(found[0][1], lines=lines))
    return Run("comparison", "comparison", tables=[(rows, "")] if rows else [], charts=charts)


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]
