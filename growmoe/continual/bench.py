"""Runs methods times seeds on one stream, resumably, and sums up what came out."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growmoe.continual import metrics, store, streams, table
from growmoe.continual.methods import Method
from growmoe.continual.parallel import run_parallel
from growmoe.continual.streams import Stream

LoadStream = Callable[[str, int, "str | Path | None"], Stream]


class BenchError(Exception):
    """The bench cannot run as asked; the message says why, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What a bench left behind.

    Attributes:
        results: the content of results.json.
        files: what was written, results.json first.
        failures: one line for each cell that failed.
    """

    results: dict[str, Any]
    files: list[Path]
    failures: list[str] = field(default_factory=list)


def run_bench(
    stream: str,
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    output: str | Path,
    data_dir: str | Path | None = None,
    *,
    command: str = "",
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    say: Callable[[str], None] = lambda text: None,
    load: LoadStream = streams.load,
    workers: int = 1,
) -> Outcome:
    """Run every method with every seed, skipping the cells that `output` already has.

    Each finished cell is written at once to `output/cells`, so that a run that was killed goes on
    where it was. A cell that fails is reported, with its traceback in `output/errors`, and the
    others go on. At the end, results.json, table.md and the plots cover all cells in `output`.

    Args:
        stream: the name of a stream.
        methods: what to run, by name.
        seeds: each seed decides the order of the classes and all other chance.
        output: a new folder, or one of an earlier bench with the same stream and settings.
        data_dir: where the data lies.
        command: kept in results.json.
        progress: told the fraction done and what is being done.
        say: told, in one line, of each finished, failed, broken or reused cell.
        load: gives the stream of a name, a seed and a data directory.
        workers: how many cells run at a time, each in a process of its own; above 1 needs Ray.

    Raises:
        BenchError: `output` belongs to another bench, or cannot be written.
        DataError: the data is missing or damaged.
        KeyError: no stream has this name.
    """
    output = Path(output)
    if workers < 1:
        raise BenchError(f"there must be at least one worker, got {workers}")
    if not seeds or not methods:
        raise BenchError("there must be at least one method and one seed")
    first = load(stream, seeds[0], data_dir)
    data = first.digest()
    try:
        (output / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write to {output}: {error.strerror or error}") from error
    records, broken = store.read_cells(output)
    if not records and not broken and (output / "results.json").exists():
        raise BenchError(f"{output} holds results without their cells: choose another --output")
    for record in records:
        _refuse_other(output, record, stream, data, methods)
    for message in broken:
        say(f"broken cell: {message}; it counts for nothing")
    done = {(record["method"], record["seed"]) for record in records}
    if reused := sum((name, seed) in done for name in methods for seed in seeds):
        say(f"{reused} cells were finished before and are kept")

    todo = [(seed, name) for seed in seeds for name in methods if (name, seed) not in done]
    failures: list[str] = []

    def keep(position: int, result: dict[str, Any] | _Failure) -> None:
        """Write a finished cell, or the traceback of one that failed, at once."""
        seed, name = todo[position]
        label = f"{name} seed {seed}"
        trace = output / "errors" / f"{name}-seed{seed}.txt"
        if isinstance(result, _Failure):
            failures.append(f"{label} failed: {result.message}")
            say(failures[-1])
            store.write_atomically(trace, result.trace)
            return
        path = store.cell_path(output, name, seed)
        store.write_atomically(path, json.dumps(result, indent=1))
        trace.unlink(missing_ok=True)
        accuracy = metrics.final_accuracy(result["accuracy_matrix"], result["test_counts"])
        say(f"{label}: final accuracy {accuracy:.1%}, {result['seconds']:.1f} s of training")

    if workers > 1 and len(todo) > 1:
        tasks = [
            partial(_run_alone, load, stream, data_dir, methods[name], name, seed, data)
            for seed, name in todo
        ]
        for count, (position, result) in enumerate(run_parallel(tasks, workers), 1):
            if isinstance(result, Exception):
                result = _Failure.of(result)
            keep(position, result)
            progress(count / len(todo), f"{count} of {len(todo)} cells")
    else:
        current = first
        for position, (seed, name) in enumerate(todo):
            if current.seed != seed:
                current = load(stream, seed, data_dir)

            def tell(fraction: float, text: str, position: int = position) -> None:
                seed, name = todo[position]
                progress((position + fraction) / len(todo), f"{name} seed {seed}: {text}")

            progress(position / len(todo), f"{name} seed {seed}")
            keep(position, _run_cell(current, stream, methods[name], name, seed, data, tell))
    progress(1.0, "done")

    records, _ = store.read_cells(output)
    results = summarize(records, order=list(methods), command=command)
    return Outcome(results, write_results(output, results, records), failures)


@dataclass(frozen=True)
class _Failure:
    """Why a cell failed: in one line, and in full."""

    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        lines = str(error).splitlines() or [""]
        trace = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {lines[0]}", trace)


def _run_cell(
    stream: Stream,
    stream_name: str,
    method: Method,
    name: str,
    seed: int,
    data: str,
    tell: Callable[[float, str], None],
) -> dict[str, Any] | _Failure:
    """One cell as JSON, or why it failed."""
    try:
        with _cell_conditions(seed):
            begin = time.perf_counter()
            cell = method.run(stream, seed, tell)
            wall_seconds = time.perf_counter() - begin
        return store.cell_record(
            cell,
            stream=stream_name,
            data=data,
            method=name,
            seed=seed,
            settings=dict(method.settings),
            needs=list(method.needs),
            class_order=list(stream.class_order),
            test_counts=stream.test_counts,
            wall_seconds=wall_seconds,
            versions=versions(),
            hardware=hardware(),
        )
    except Exception as error:
        return _Failure.of(error)


def _run_alone(
    load: LoadStream,
    stream: str,
    data_dir: str | Path | None,
    method: Method,
    name: str,
    seed: int,
    data: str,
) -> dict[str, Any] | _Failure:
    """A cell in a process of its own, which loads the stream by itself."""
    loaded = load(stream, seed, data_dir)
    return _run_cell(loaded, stream, method, name, seed, data, lambda fraction, text: None)


def _refuse_other(
    output: Path, record: dict[str, Any], stream: str, data: str, methods: Mapping[str, Method]
) -> None:
    """Refuse a folder that holds a cell of another stream, data or settings."""
    hint = "choose another --output"
    if record["stream"] != stream:
        raise BenchError(f"{output} holds a bench of {record['stream']}, not of {stream}: {hint}")
    if record["data"] != data:
        raise BenchError(f"{output} was run on other data under the name {stream}: {hint}")
    method = methods.get(record["method"])
    if method is None:
        return
    before, now = record["settings"], json.loads(json.dumps(dict(method.settings)))
    changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if changed:
        said = [
            key
            if isinstance(now.get(key), dict) or isinstance(before.get(key), dict)
            else f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in changed[:3]
        ]
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise BenchError(
            f"{output} holds {record['method']} of other settings ({', '.join(said)}{more}): {hint}"
        )


@contextmanager
def _cell_conditions(seed: int) -> Iterator[None]:
    """One thread, seeded generators, and no deprecation warnings of Avalanche in our output."""
    threads = torch.get_num_threads()
    logger = logging.getLogger("avalanche")
    level = logger.level
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        # Avalanche resets the filters before it warns, so a filter would not hold: record instead.
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("growmoe", "torch", "numpy", "avalanche-lib", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the seconds were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {"processor": processor, "cores": os.cpu_count(), "threads_used": 1, "device": "cpu"}


def _mean_ci95(values: Sequence[float]) -> dict[str, float | None]:
    mean, half = metrics.mean_ci95(values)
    return {
        "mean": None if math.isnan(mean) else mean,
        "ci95": None if math.isnan(half) else half,
    }


# (the field of a cell that may be missing, its name in the summary): the number it comes to
_OPTIONAL: dict[tuple[str, str], Callable[[Any], float]] = {
    ("prediction_flops", "prediction_flops"): float,
    ("anytime", "anytime_accuracy"): metrics.curve_mean,
    ("prequential", "prequential_accuracy"): metrics.curve_mean,
    ("memory_history", "peak_memory_bytes"): lambda curve: max(size for _, size in curve),
    ("routing", "specialisation"): metrics.mutual_information,
}


def summarize(
    records: Sequence[dict[str, Any]], order: Sequence[str] = (), command: str = ""
) -> dict[str, Any]:
    """The content of results.json from the cells of one stream.

    Args:
        records: cells, as `store.read_cells` gives them; at least none.
        order: the methods to name first.
        command: what was run.
    """
    names = {record["method"] for record in records}
    ordered = [name for name in order if name in names]
    ordered += sorted(names - set(ordered))
    summary: dict[str, Any] = {
        "stream": records[0]["stream"] if records else None,
        "versions": versions(),
        "command": command,
        "hardware": hardware(),
        "methods": {},
    }
    for name in ordered:
        cells = [record for record in records if record["method"] == name]
        pairs = [(cell["accuracy_matrix"], cell["test_counts"]) for cell in cells]
        entry: dict[str, Any] = {
            "settings": cells[0]["settings"],
            "needs": cells[0].get("needs", []),
            "seeds": [
                {k: v for k, v in cell.items() if k not in ("lineage", "load_history", "settings")}
                for cell in cells
            ],
        }
        for weighted in (metrics.final_accuracy, metrics.average_incremental_accuracy):
            entry[weighted.__name__] = _mean_ci95([weighted(r, n) for r, n in pairs])
        for metric in (metrics.forgetting, metrics.backward_transfer, metrics.learning_accuracy):
            entry[metric.__name__] = _mean_ci95([metric(r) for r, _ in pairs])
        if all(cell["untrained_accuracy"] for cell in cells):
            entry["forward_transfer"] = _mean_ci95(
                [
                    metrics.forward_transfer(cell["accuracy_matrix"], cell["untrained_accuracy"])
                    for cell in cells
                ]
            )
        for quantity in ("parameters", "memory_bytes", "seconds"):
            entry[quantity] = _mean_ci95([cell[quantity] for cell in cells])
        for (field_name, quantity), value in _OPTIONAL.items():
            # cells of an earlier version have no such field
            if all(cell.get(field_name) is not None for cell in cells):
                entry[quantity] = _mean_ci95([value(cell[field_name]) for cell in cells])
        summary["methods"][name] = entry
    summary["comparison"] = compare(summary["methods"])
    return summary


def compare(methods: Mapping[str, Any], own: str = "growmoe") -> dict[str, Any] | None:
    """Paired tests of our method against each other, and which of them is the best rival.

    For each rival, over the seeds that both have: the mean difference in final accuracy, the
    two-sided p of Student's paired t-test, and of Wilcoxon's signed-rank test, which assumes no
    normal distribution but cannot go below 0.06 with five seeds. None where a test says nothing
    (fewer than two seeds, no difference at all).

    Args:
        methods: as in results.json.
        own: the method that is compared; None comes back if it is not among them.
    """
    if own not in methods:
        return None

    def finals(entry: Mapping[str, Any]) -> dict[int, float]:
        return {
            cell["seed"]: metrics.final_accuracy(cell["accuracy_matrix"], cell["test_counts"])
            for cell in entry["seeds"]
        }

    ours = finals(methods[own])
    rivals: dict[str, dict[str, Any]] = {}
    for name, entry in methods.items():
        if name == own:
            continue
        theirs = finals(entry)
        shared = sorted(ours.keys() & theirs.keys())
        if shared:
            pairs = [(ours[seed], theirs[seed]) for seed in shared]
            rivals[name] = metrics.paired_test(*zip(*pairs, strict=True))
    # joint training sees everything at once: a bound, no rival
    allowed = {name: test for name, test in rivals.items() if name != "joint"}
    best = min(allowed, key=lambda name: allowed[name]["difference"], default=None)
    return {"method": own, "best_rival": best, "rivals": rivals}


def write_results(
    output: Path, results: dict[str, Any], records: Sequence[dict[str, Any]]
) -> list[Path]:
    """Write results.json, table.md, the lineages and the plots; gives their paths."""
    from growmoe.report import plots

    paths = [output / name for name in ("results.json", "table.md", "table.tex", "table.csv")]
    store.write_atomically(paths[0], json.dumps(results, indent=1))
    for path, write in zip(
        paths[1:], (table.markdown_table, table.latex_table, table.csv_table), strict=True
    ):
        store.write_atomically(path, write(results))
    if not records:
        return paths
    pictures = output / "plots"
    pictures.mkdir(exist_ok=True)
    paths.append(plots.save(plots.plot_accuracy, pictures / "accuracy.png", results))
    for record in records:
        cell = f"{record['method']}-seed{record['seed']}"
        events, history = record["lineage"], record["load_history"]
        if events:
            path = output / "lineage" / f"{cell}.jsonl"
            store.write_atomically(path, "".join(json.dumps(event) + "\n" for event in events))
            picture = pictures / f"lifelines-{cell}.png"
            paths += [path, plots.save(plots.plot_lifelines, picture, events, history)]
        if history:
            paths.append(plots.save(plots.plot_load, pictures / f"load-{cell}.png", history))
    return paths
