"""The table of a bench: for the terminal, and for files as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from growmoe.continual import require

# for the file, and for a terminal of 80 columns
_COLUMNS = {
    "method": "method",
    "seeds": "",
    "final accuracy": "final",
    "average incremental accuracy": "average",
    "forgetting": "forgets",
    "backward transfer": "backward",
    "parameters": "params",
    "memory (MB)": "MB",
    "seconds": "sec",
    "needs": "",
}


def _percent(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    text = f"{100 * value['mean']:.1f}"
    return text if value["ci95"] is None else f"{text} ± {100 * value['ci95']:.1f}"


def _count(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, entry in results["methods"].items():
        rows.append(
            [
                name,
                str(len(entry["seeds"])),
                _percent(entry["final_accuracy"]),
                _percent(entry["average_incremental_accuracy"]),
                _percent(entry["forgetting"]),
                _percent(entry["backward_transfer"]),
                _count(entry["parameters"]["mean"]),
                f"{entry['memory_bytes']['mean'] / 1e6:.2f}",
                f"{entry['seconds']['mean']:.1f}",
                ", ".join(entry.get("needs", [])) or "–",
            ]
        )
    return rows


def _note(results: Mapping[str, Any]) -> str:
    several = any(len(entry["seeds"]) > 1 for entry in results["methods"].values())
    return (
        "Final accuracy, average incremental accuracy, forgetting and backward transfer in percent"
        + (", mean ± 95% confidence interval over seeds" if several else "")
        + "; parameters are learned numbers that a prediction uses; memory is all that is kept "
        "between experiences (1 MB = 1,000,000 bytes); seconds are of training; needs are what a "
        "method is given beyond labelled images as they come."
    )


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table of `results` (the content of results.json) as Markdown."""
    rows = [list(_COLUMNS), *_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: list[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(cells) + " |"

    lines = [line(rows[0]), line(rule), *(line(row) for row in rows[1:])]
    title = f"# {results['stream']}"
    notes = [_note(results)]
    if compared := comparison_note(results):
        notes += ["", compared]
    return "\n".join([title, "", *lines, "", *notes, ""])


def comparison_note(results: Mapping[str, Any]) -> str:
    """How our method stands against the best rival, in a sentence; empty where there is none."""
    comparison = results.get("comparison")
    if not comparison or comparison["best_rival"] is None:
        return ""
    name = comparison["best_rival"]
    test = comparison["rivals"][name]
    p = "" if test["t_p"] is None else f", paired t-test p = {test['t_p']:.2g}"
    return (
        f"{comparison['method']} against {name}, the best rival: "
        f"{100 * test['difference']:+.1f} points over {test['seeds']} seeds{p}."
    )


_LATEX = str.maketrans({c: f"\\{c}" for c in "_%&#$"})


def latex_table(results: Mapping[str, Any]) -> str:
    """The table of `results` as a LaTeX tabular that needs booktabs; the best are not marked."""

    def line(row: list[str]) -> str:
        cells = [c.translate(_LATEX).replace("±", r"$\pm$").replace("–", "--") for c in row]
        return " & ".join(cells) + r" \\"

    head, rows = line(list(_COLUMNS)), [line(row) for row in _rows(results)]
    columns = "l" + "r" * (len(_COLUMNS) - 1)
    begin = [f"% {results['stream']}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    end = [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*begin, head, r"\midrule", *rows, *end])


def csv_table(results: Mapping[str, Any]) -> str:
    """All numbers of `results`: a line for each method and quantity, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["stream", "method", "seeds", "quantity", "mean", "ci95"])
    for name, entry in results["methods"].items():
        for quantity, value in entry.items():
            if isinstance(value, dict) and value.keys() == {"mean", "ci95"}:
                numbers = ["" if value[key] is None else value[key] for key in ("mean", "ci95")]
                writer.writerow([results["stream"], name, len(entry["seeds"]), quantity, *numbers])
    return file.getvalue()


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """Print the table of `results` to a rich console, by default one on standard output.

    Raises:
        ImportError: rich is not installed.
    """
    box, rich_table = require("rich.box"), require("rich.table")
    console = console or require("rich.console").Console()
    drawn = rich_table.Table(
        title=results["stream"],
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown = [i for i, short in enumerate(_COLUMNS.values()) if short]
    for i in shown:
        short = list(_COLUMNS.values())[i]
        drawn.add_column(short, justify="left" if i == 0 else "right", no_wrap=True)
    for row in _rows(results):
        drawn.add_row(*(row[i].replace(" ± ", "±") for i in shown))
    console.print(drawn)
    console.print(_note(results), style="dim", highlight=False)
    if compared := comparison_note(results):
        console.print(compared, highlight=False)
