"""The table of a bench: for the terminal, and for files as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
# the second table, of what was measured on the way: the quantity in results.json, its names for the
# file and the terminal, and by what it is multiplied
_ON_THE_WAY = {
    "anytime_accuracy": ("any-time accuracy", "any-time", 100.0),
    "prequential_accuracy": ("prequential accuracy", "prequent", 100.0),
    "prediction_flops": ("MFLOPs per prediction", "MFLOPs", 1e-6),
    "peak_memory_bytes": ("peak memory (MB)", "peak MB", 1e-6),
    "specialisation": ("specialisation by domain", "domains", 100.0),
    "class_specialisation": ("by class", "", 100.0),
    "drifts_found": ("drifts found", "found", 1.0),
    "detection_delay": ("delay (examples)", "delay", 1.0),
    "drifts_false_alarms": ("false alarms", "false", 1.0),
}


# left out on a terminal, as the column is
_NEEDS = "; needs are what a method is given beyond labelled images as they come"


@dataclass(frozen=True)
class _Table:
    """Names of columns for the file, for the terminal ("" to leave one out), rows, and a note."""

    columns: Sequence[str]
    short: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def _percent(value: Mapping[str, float | None] | None, scale: float = 100.0) -> str:
    if value is None or value["mean"] is None:
        return "–"
    text = f"{scale * value['mean']:.1f}"
    return text if value["ci95"] is None else f"{text} ± {scale * value['ci95']:.1f}"


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
        f"between experiences (1 MB = 1,000,000 bytes); seconds are of training{_NEEDS}."
    )


def _tables(results: Mapping[str, Any]) -> list[_Table]:
    """The main table, and one of what was measured on the way where anything was."""
    main = _Table(list(_COLUMNS), list(_COLUMNS.values()), _rows(results), _note(results))
    entries = results["methods"].values()
    shown = [key for key in _ON_THE_WAY if any(key in entry for entry in entries)]
    if not shown:
        return [main]
    rows = [
        [name, *(_percent(entry.get(key), _ON_THE_WAY[key][2]) for key in shown)]
        for name, entry in results["methods"].items()
        if any(key in entry for key in shown)
    ]
    note = (
        "While the stream went on: any-time accuracy is on all tests and prequential accuracy on "
        "examples before they are learned, both in percent and averaged over the stream; a method "
        "that waits has none right, and one that learns whole experiences is not asked on the way."
    )
    if {"specialisation", "class_specialisation"} & set(shown):
        note += (
            " Specialisation is what the expert says of the domain or the class, in percent of all "
            "there is to say (mutual information over entropy)."
        )
    if "drifts_found" in shown:
        drifts = max(
            (e["drifts_found"]["mean"] + e["drifts_missed"]["mean"])
            for e in entries
            if "drifts_found" in e
        )
        note += (
            f" Of {drifts:.0f} new domains, those found by the birth of an expert, after how many "
            "examples, and births without one."
        )
    names = [_ON_THE_WAY[key] for key in shown]
    return [
        main,
        _Table(["method", *(n[0] for n in names)], ["method", *(n[1] for n in names)], rows, note),
    ]


def markdown_table(results: Mapping[str, Any]) -> str:
    """The tables of `results` (the content of results.json) as Markdown."""
    blocks = [f"# {results['stream']}"]
    for table in _tables(results):
        rows = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

        def line(row: Sequence[str], widths: Sequence[int] = widths) -> str:
            cells = [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
            return "| " + " | ".join(cells) + " |"

        blocks += ["\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])]
        blocks += [table.note]
    if compared := comparison_note(results):
        blocks.insert(3, compared)
    return "\n\n".join(blocks) + "\n"


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
    """The tables of `results` as LaTeX tabulars that need booktabs; the best are not marked."""

    def line(row: Sequence[str]) -> str:
        cells = [c.translate(_LATEX).replace("±", r"$\pm$").replace("–", "--") for c in row]
        return " & ".join(cells) + r" \\"

    lines = [f"% {results['stream']}"]
    for table in _tables(results):
        columns = "l" + "r" * (len(table.columns) - 1)
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(table.columns)]
        lines += [r"\midrule", *map(line, table.rows), r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


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


def _shorter(text: str, column: str) -> str:
    """Only accuracies keep their interval in a narrow second table; long times, no fractions."""
    if column == "sec" and len(text) > 5:
        return f"{float(text):.0f}"
    bare = column in {short for _, short, scale in _ON_THE_WAY.values() if scale != 100.0}
    return text.partition(" ± ")[0] if bare or column == "domains" else text.replace(" ± ", "±")


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """Print the tables of `results` to a rich console, by default one on standard output.

    What is too wide for the console goes on in a second table below, not a figure is cut.

    Raises:
        ImportError: rich is not installed.
    """
    require("rich")
    console = console or require("rich.console").Console()
    for table in _tables(results):
        title = results["stream"]
        shown = [i for i, short in enumerate(table.short) if short]
        while shown[1:]:
            count = len(shown)
            while count > 2 and _width(_draw(table, shown[:count], title), console) > console.width:
                count -= 1
            console.print(_draw(table, shown[:count], title))
            shown, title = [shown[0], *shown[count:]], None
        console.print(table.note.replace(_NEEDS, ""), style="dim", highlight=False)
    if compared := comparison_note(results):
        console.print(compared, highlight=False)


def _draw(table: _Table, shown: Sequence[int], title: str | None) -> Any:
    """The columns that are shown, of which the first names the rows."""
    drawn = require("rich.table").Table(
        title=title,
        title_justify="left",
        box=require("rich.box").SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i in shown:
        drawn.add_column(table.short[i], justify="left" if i == shown[0] else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(_shorter(row[i], table.short[i]) for i in shown))
    return drawn


def _width(drawn: Any, console: Any) -> int:
    """How wide it would be were there room."""
    measured = console.measure(drawn, options=console.options.update(max_width=10_000))
    return int(measured.maximum)
