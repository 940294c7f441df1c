"""Runs methods times seeds on one stream, resumably, and writes what came out."""

from __future__ import annotations

import json
import logging
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
from growmoe.continual.environment import hardware, versions
from growmoe.continual.methods import Method
from growmoe.continual.parallel import TooFewResources, run_parallel
from growmoe.continual.streams import Stream
from growmoe.continual.summary import summarize
from growmoe.glimpse import Glimpse, Onlooker

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
    show: Callable[[str, Glimpse | None], None] | None = None,
    listen: Callable[[Mapping[str, Any]], None] = lambda record: None,
    resources: Mapping[str, float] | None = None,
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
        show: shown each cell while it runs, by its name, and None when it has ended; a method that
            measures itself with a `Recorder` shows its curves, experts and events.
        listen: given the record of each cell that is finished, those of an earlier call first.
        resources: what Ray sets aside for each cell when there are several workers, as
            {"CPU": 2, "GPU": 0.5, "memory": 2e9}; one CPU if left out.

    Raises:
        BenchError: `output` belongs to another bench, or cannot be written, or Ray has less than
            one cell takes.
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

    for record in records:
        listen(record)

    todo = [(seed, name) for seed in seeds for name in methods if (name, seed) not in done]
    failures: list[str] = []
    shown: dict[str, float] = {}  # how far the cells are that run

    def label_of(position: int) -> str:
        seed, name = todo[position]
        return f"{name} seed {seed}"

    def look(position: int, seen: Glimpse) -> None:
        label = label_of(position)
        shown[label] = seen.fraction
        if show is not None:
            show(label, seen)

    def keep(position: int, result: dict[str, Any] | _Failure) -> None:
        """Write a finished cell, or the traceback of one that failed, at once."""
        seed, name = todo[position]
        label = label_of(position)
        shown.pop(label, None)
        if show is not None:
            show(label, None)
        trace = output / "errors" / f"{name}-seed{seed}.txt"
        if isinstance(result, _Failure):
            failures.append(f"{label} failed: {result.message}")
            say(failures[-1])
            store.write_atomically(trace, result.trace)
            return
        path = store.cell_path(output, name, seed)
        store.write_atomically(path, json.dumps(result, indent=1))
        trace.unlink(missing_ok=True)
        listen(result)
        accuracy = metrics.final_accuracy(result["accuracy_matrix"], result["test_counts"])
        say(f"{label}: final accuracy {accuracy:.1%}, {result['seconds']:.1f} s of training")

    if workers > 1 and len(todo) > 1:
        tasks = [
            partial(_run_alone, load, stream, data_dir, methods[name], name, seed, data)
            for seed, name in todo
        ]
        count = 0

        def tell_all() -> None:
            done = (count + sum(shown.values())) / len(todo)
            progress(done, f"{count} of {len(todo)} cells done, {len(shown)} running")

        def hear(position: int, seen: Glimpse) -> None:
            look(position, seen)
            tell_all()

        progress(0.0, f"{workers} workers start")
        hearing = None if show is None else hear
        try:
            for position, result in run_parallel(tasks, workers, hearing, resources):
                if isinstance(result, Exception):
                    result = _Failure.of(result)
                keep(position, result)
                count += 1
                tell_all()
        except TooFewResources as error:
            raise BenchError(str(error)) from error
    else:
        current = first
        for position, (seed, name) in enumerate(todo):
            if current.seed != seed:
                current = load(stream, seed, data_dir)

            def see(seen: Glimpse, position: int = position) -> None:
                look(position, seen)
                text = f"cell {position + 1} of {len(todo)}"
                progress((position + seen.fraction) / len(todo), text)

            see(Glimpse(text="begins"))
            keep(position, _run_cell(current, stream, methods[name], name, seed, data, see))
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
    show: Callable[[Glimpse], None],
) -> dict[str, Any] | _Failure:
    """One cell as JSON, or why it failed."""
    try:
        with _cell_conditions(seed):
            begin = time.perf_counter()
            cell = method.run(stream, seed, Onlooker(show))
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
    show: Callable[[Glimpse], None],
) -> dict[str, Any] | _Failure:
    """A cell in a process of its own, which loads the stream by itself."""
    show(Glimpse(text="begins"))
    loaded = load(stream, seed, data_dir)
    return _run_cell(loaded, stream, method, name, seed, data, show)


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


def write_results(
    output: Path, results: dict[str, Any], records: Sequence[dict[str, Any]]
) -> list[Path]:
    """Write results.json, table.md, the lineages and the plots; gives their paths."""
    from growmoe.report import accuracy, plots

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
    paths.append(plots.save(accuracy.plot_accuracy, pictures / "accuracy.png", results))
    for record in records:
        cell = f"{record['method']}-seed{record['seed']}"
        events, history = record["lineage"], record["load_history"]
        if events:
            path = output / "lineage" / f"{cell}.jsonl"
            store.write_atomically(path, "".join(json.dumps(event) + "\n" for event in events))
            picture = pictures / f"lifelines-{cell}.png"
            ends = _boundaries(record)

            def draw(events: Any, history: Any, ends: list[float] = ends) -> Any:
                return accuracy.mark_boundaries(plots.plot_lifelines(events, history), ends)

            paths += [path, plots.save(draw, picture, events, history)]
        if history:
            paths.append(plots.save(plots.plot_load, pictures / f"load-{cell}.png", history))
    return paths


def _boundaries(record: dict[str, Any]) -> list[float]:
    """The steps at which experiences ended, for a method that takes one per new mini-batch."""
    size, settings = record["settings"].get("batch_size"), record["settings"]
    if not size or settings.get("min_steps") or not record.get("flops_history"):
        return []
    return [seen / size for seen, _ in record["flops_history"][:-1]]
