"""Reads the folder of a run, whatever wrote it, into what a reader wants to see of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from growmoe.continual import metrics, store, table
from growmoe.continual.summary import summarize
from growmoe.report.lives import replay

_MOMENTS = 120  # of a load history that are kept; more are averaged


class ReportError(Exception):
    """There is nothing to report of, or it cannot be read; the message says why in one line."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: y over x, in a band from low to high if there are several seeds."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis. Charts of the same title are compared between runs.

    Attributes:
        drifts: where a new domain came, to be marked.
    """

    title: str
    x: str
    y: str
    lines: list[Line]
    drifts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    """What happened to the experts of one layer.

    Attributes:
        name: of the method, the seed and the layer.
        events: its lineage, as JSON.
        load: [{"step": int, "load": {expert id: share}}].
        routing: [{"by": "class", "experts": ids, "groups": names, "counts": [E, G]}, …], with the
            "step" at which it was counted, if it is known.
    """

    name: str
    events: list[dict[str, Any]]
    load: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """All that a page shows of a run.

    Attributes:
        name: of the folder.
        title: what was run.
        command: what started it, or "".
        conditions: {"versions": …, "hardware": …}.
        tables: of each, rows of text, the headings first, and a note.
        note: below them.
        charts: lines over time.
        matrices: accuracy [T, T] by name, from 0 to 1.
        growths: the layers that grew.
        settings: what the run was told.
    """

    name: str
    title: str
    command: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)
    tables: list[tuple[list[list[str]], str]] = field(default_factory=list)
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)
    growths: list[Growth] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def read_run(path: str | Path) -> Run:
    """Read the folder of a bench, of train-lm or of a `RunLog`, or a lineage file, as it stands.

    A run that is still going on gives what it has written so far.

    Raises:
        ReportError: it is none of these, or cannot be read; the message says what was found.
    """
    path = Path(path)
    if not path.exists():
        raise ReportError(f"{path} does not exist")
    try:
        if path.is_file():
            return Run(path.stem, f"lineage of {path.name}", growths=_growths("", _lines(path)))
        if (path / "cells").is_dir() or "methods" in (results := _json(path / "results.json")):
            return _of_bench(path)
        if (path / "run.json").exists():
            return _of_log(path)
        if (path / "metrics.jsonl").exists() and (path / "config.json").exists():
            return _of_language_model(path, results)
        if (path / "lineage.jsonl").exists():
            events = _lines(path / "lineage.jsonl")
            return Run(path.name, "lineage", growths=_growths("", events))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path} cannot be read as a run: {error!r}") from error
    raise ReportError(
        f"{path} is no run: it has neither cells/, results.json, metrics.jsonl nor lineage.jsonl"
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; what a running or killed run has left half written at the end is left out."""
    found: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            found.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                raise ReportError(f"{path}, line {number} is no JSON") from None
    return found


# A bench of continual learning.


def _of_bench(path: Path) -> Run:
    written = _json(path / "results.json")
    records, broken = store.read_cells(path)
    if records:
        results = summarize(records, list(written.get("methods", ())), written.get("command", ""))
        conditions = {name: records[0].get(name, {}) for name in ("versions", "hardware")}
    elif written:
        results = written
        conditions = {name: written.get(name, {}) for name in ("versions", "hardware")}
    else:
        raise ReportError(f"{path} holds no finished cell yet")
    cells = records or [
        {**cell, "method": method}
        for method, e in results["methods"].items()
        for cell in e["seeds"]
    ]
    note = ""
    if broken:
        note = "Cells that cannot be read: " + "; ".join(broken) + "."
    growths = []
    for cell in cells:
        name = f"{cell['method']}, seed {cell['seed']}"
        lineage = path / "lineage" / f"{cell['method']}-seed{cell['seed']}.jsonl"
        events = cell.get("lineage") or _lines(lineage)
        maps = {"domain": cell.get("routing"), "class": cell.get("class_routing")}
        routing = [
            {"by": by, "counts": counts}
            for by, counts in maps.items()
            if counts and not (by == "domain" and len(counts[0]) == 1)
        ]
        growths += _growths(name, events, cell.get("load_history"), routing)
    matrices = {}
    for method in results["methods"]:
        mine = [cell for cell in cells if cell["method"] == method]
        stack = np.array([cell["accuracy_matrix"] for cell in mine], dtype=float)
        if len(mine) > 1:
            matrices[f"{method}, mean of {len(mine)} seeds"] = _rounded(stack.mean(0))
        for cell, matrix in zip(mine, stack, strict=True):
            matrices[f"{method}, seed {cell['seed']}"] = _rounded(matrix)
    return Run(
        path.name,
        str(results["stream"]),
        results.get("command", ""),
        conditions,
        _markdown(table.markdown_table(results)),
        note,
        _bench_charts(results["methods"], cells),
        matrices,
        growths,
        {name: entry["settings"] for name, entry in results["methods"].items()},
    )


def _bench_charts(methods: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    lines = []
    for method in methods:
        curves = [
            metrics.accuracy_by_experience(cell["accuracy_matrix"], cell["test_counts"])
            for cell in cells
            if cell["method"] == method
        ]
        lines.append(_line(method, range(1, len(curves[0]) + 1), 100 * np.array(curves)))
    charts.append(
        Chart("Accuracy on all seen so far", "experiences learned", "accuracy (%)", lines)
    )
    for key, title, y, scale in (
        ("anytime", "Accuracy on all tests as the stream goes on", "accuracy (%)", 100),
        ("prequential", "Accuracy on each batch before it is learned", "accuracy (%)", 100),
        ("memory_history", "Memory kept", "MB", 1e-6),
        ("parameter_history", "Parameters", "parameters", 1),
        ("seconds_history", "Seconds of training", "seconds", 1),
        ("flops_history", "Compute of a prediction", "FLOPs", 1),
    ):
        lines = []
        for method in methods:
            found = [cell[key] for cell in cells if cell["method"] == method and cell.get(key)]
            if not found:
                continue
            # each seed is evaluated where it happens to be: compared where all have been
            start, end = max(c[0][0] for c in found), min(c[-1][0] for c in found)
            grid = [x for x, _ in found[0] if start <= x <= end]
            values = [np.interp(grid, *np.array(curve, dtype=float).T) for curve in found]
            lines.append(_line(method, grid, scale * np.array(values)))
        if lines:
            drifts = next((list(cell["drifts"]) for cell in cells if cell.get("drifts")), [])
            charts.append(Chart(title, "examples seen", y, lines, drifts))
    return charts


def _line(name: str, x: Any, value_SN: np.ndarray) -> Line:
    mean, half = np.array([metrics.mean_ci95(column) for column in value_SN.T]).reshape(-1, 2).T
    band = bool(np.isfinite(half).all())
    return Line(
        name,
        [float(v) for v in x],
        _rounded(mean),
        _rounded(mean - half) if band else None,
        _rounded(mean + half) if band else None,
    )


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 4).tolist()


def _markdown(text: str) -> list[tuple[list[list[str]], str]]:
    """The cells of Markdown tables, each with what stands below it."""
    found: list[tuple[list[list[str]], str]] = []
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("|"):
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            found.append((rows[:1] + rows[2:], ""))
        elif lines and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {' '.join(lines)}".strip())
    return found


# A language model.


def _of_language_model(path: Path, results: dict[str, Any]) -> Run:
    from growmoe.lm.run import HEADINGS, table_rows

    config, lines = _json(path / "config.json"), _lines(path / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluation"]
    charts = []
    if tests:
        steps = [line["step"] for line in tests]
        names = list(tests[-1]["bits_per_byte"])
        bits = [
            Line(name, steps, [round(line["bits_per_byte"][name], 5) for line in tests])
            for name in names
        ]
        charts.append(Chart("Bits per byte", "step", "bits per byte (validation)", bits))
    if train:
        steps = [line["step"] for line in train]
        loss = Line(path.name, steps, [round(line["loss"], 5) for line in train])
        charts.append(Chart("Loss", "step", "nats per token (training)", [loss]))
        for key, title in (("experts", "Experts"), ("imbalance", "Largest load over the mean")):
            layers = list(train[-1].get(key, ()))
            of_layers = [
                Line(name, steps, [line[key].get(name, 0) for line in train]) for name in layers
            ]
            if of_layers:
                charts.append(Chart(title, "step", title.lower(), of_layers))
    growths = _of_layers(path, lines)
    tables = []
    if results:
        rows = [list(HEADINGS), *map(list, table_rows(results))]
        tables = [(rows, "Bits per byte of each domain on its test part; lower is better.")]
    note = ""
    if not results.get("finished"):
        note = f"Not finished: {lines[-1]['step'] if lines else 0} steps so far. "
    if growths and not any(growth.routing for growth in growths):
        note += "Which expert takes which domain was not recorded in this run."
    return Run(
        path.name,
        "language model on " + ", ".join(config["data"]),
        config.get("command", ""),
        {name: config.get(name, {}) for name in ("versions", "hardware")},
        tables,
        note.strip(),
        charts,
        {},
        growths,
        config["config"],
    )


# A loop of the user's own.


def _of_log(path: Path) -> Run:
    about, lines = _json(path / "run.json"), _lines(path / "metrics.jsonl")
    charts = []
    for name in dict.fromkeys(name for line in lines for name in line["values"]):
        points = [(line["step"], line["values"][name]) for line in lines if name in line["values"]]
        line = Line(path.name, [x for x, _ in points], [y for _, y in points])
        charts.append(Chart(name, "step", name, [line]))
    growths = _of_layers(path, lines)
    last = [[name, f"{line['values'][name]:.5g}"] for line in lines[-1:] for name in line["values"]]
    return Run(
        path.name,
        about["title"],
        about["command"],
        {name: about[name] for name in ("versions", "hardware")},
        [([["figure", "at the end"], *last], "")] if last else [],
        "",
        charts,
        {},
        growths,
        about["settings"],
    )


# What grew.


def _of_layers(path: Path, lines: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """The growth of each layer, from the folder's lineage and routing and the log's loads."""
    events, routing = _lines(path / "lineage.jsonl"), _json(path / "routing.json")
    growths = []
    for layer in dict.fromkeys(event["layer"] for event in events):
        load = [
            {"step": line["step"], "load": line["load"][layer]}
            for line in lines
            if layer in line.get("load", {})
        ]
        mine = [event for event in events if event["layer"] == layer]
        growths += _growths("", mine, load, routing.get(layer, []))
    return growths


def _growths(
    name: str,
    events: Sequence[Mapping[str, Any]],
    load: Sequence[Mapping[str, Any]] | None = None,
    routing: Sequence[Mapping[str, Any]] = (),
) -> list[Growth]:
    """One growth for each layer that has events."""
    layers = list(dict.fromkeys(str(event.get("layer", "")) for event in events))
    growths = []
    for layer in layers:
        mine = [dict(event) for event in events if str(event.get("layer", "")) == layer]
        label = ", ".join(part for part in (name, f"layer {layer}" * bool(layer)) if part)
        growths.append(
            Growth(
                label or "experts",
                mine,
                _thinned(load or []) if len(layers) == 1 else [],
                [_named(counts, mine) for counts in routing],
            )
        )
    return growths


def _thinned(load: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most so many moments: neighbours are averaged, for each entry is of the time before it."""
    ordered = sorted(load, key=lambda entry: entry["step"])
    group = -(-len(ordered) // _MOMENTS)
    thinned = []
    for i in range(0, len(ordered), group or 1):
        part = ordered[i : i + group]
        shares: dict[str, float] = {}
        for entry in part:
            for expert, share in entry["load"].items():
                shares[str(expert)] = shares.get(str(expert), 0.0) + share / len(part)
        thinned.append(
            {"step": part[-1]["step"], "load": {e: round(s, 4) for e, s in shares.items()}}
        )
    return thinned


def _named(routing: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts with the names of their rows and columns; a bench keeps the counts alone."""
    counts = [[round(float(value), 4) for value in row] for row in routing["counts"]]
    alive = [life.expert for life in replay(events)[0].values() if life.death is None]
    names = alive if len(alive) == len(counts) else list(range(len(counts)))
    first = 0 if routing["by"] == "class" else 1
    return {
        "experts": names,
        "groups": [str(i + first) for i in range(len(counts[0]))],
        **routing,
        "counts": counts,
    }
