"""The files of a bench: one per finished cell, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from growmoe.continual.cell import Cell, Memory
from growmoe.continual.metrics import final_accuracy

FORMAT = 1


class BrokenCellError(Exception):
    """A cell file that cannot be trusted; the message names it and says why."""


def write_atomically(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a crash at any moment, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cell_path(output: Path, method: str, seed: int) -> Path:
    """Where the cell of a method and a seed lies."""
    return output / "cells" / f"{method}-seed{seed}.json"


def _checksum(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def cell_record(cell: Cell, **identity: Any) -> dict[str, Any]:
    """A cell as JSON, with what identifies it: stream, data, method, seed, settings, ...

    Raises:
        ValueError: the accuracy matrix is not square or holds what is no accuracy.
        TypeError: the cell holds what JSON cannot.
    """
    final_accuracy(cell.accuracy_matrix)
    record = {
        "format": FORMAT,
        **identity,
        **asdict(cell),
        "memory": asdict(cell.memory),
        "memory_bytes": cell.memory_bytes,
    }
    record = json.loads(json.dumps(record, allow_nan=False))
    record["checksum"] = _checksum(record)
    return record


def read_cell(path: Path) -> dict[str, Any]:
    """Read a cell file.

    Raises:
        BrokenCellError: it is torn, was changed, or is not a cell file of this format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenCellError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BrokenCellError(f"{path} is not a cell of format {FORMAT}")
    if record.get("checksum") != _checksum(record):
        raise BrokenCellError(f"{path} does not match its checksum")
    try:
        final_accuracy(record["accuracy_matrix"], record["test_counts"])
        Memory(**record["memory"])
        if path.name != cell_path(path, record["method"], record["seed"]).name:
            raise ValueError("its name is that of another cell")
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCellError(f"{path} is not a complete cell: {error!r}") from error
    return record


def read_cells(output: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All cells of a bench, sorted by method and seed, and a message about each broken file."""
    records, broken = [], []
    for path in sorted((output / "cells").glob("*.json")):
        if path.name.startswith("."):  # what a killed run left half written
            continue
        try:
            records.append(read_cell(path))
        except BrokenCellError as error:
            broken.append(str(error))
    return sorted(records, key=lambda r: (r["method"], r["seed"])), broken
