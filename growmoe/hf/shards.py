"""A checkpoint's tensors on disk, read and written one at a time, byte for byte.

A safetensors file is a length (8 bytes, little-endian), a JSON header that gives each tensor's
dtype, shape and place, and the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from growmoe.compress.layer import CompressError

INDEX = "model.safetensors.index.json"
CHUNK = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a folder with safetensors files, sharded or not.

    Attributes:
        files: in order.
        entries: name -> where it lies.

    Raises:
        CompressError: there are no such files, or they are torn, or one that the index names is
            missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.entries: dict[str, Entry] = {}
        self._opened: dict[Path, Any] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            header, base = _header(file)
            self.metadata |= header.pop("__metadata__", {})
            for name, told in header.items():
                start, stop = told["data_offsets"]
                entry = Entry(file, told["dtype"], tuple(told["shape"]), base + start, base + stop)
                self.entries[name] = entry
        missing = [name for name in _indexed(folder) if name not in self.entries]
        if missing:
            raise CompressError(
                f"{folder}: {INDEX} names {len(missing)} tensors that its files do not hold, such "
                f"as {missing[0]}"
            )

    @property
    def bytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of each file."""
        stats = [(file.name, file.stat()) for file in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def tensor(self, name: str) -> Tensor:
        """A tensor, on pages of the file that the system may drop again.

        Raises:
            CompressError: there is none.
        """
        if name not in self.entries:
            raise CompressError(f"{self.folder} holds no tensor {name}")
        file = self.entries[name].file
        if file not in self._opened:
            self._opened[file] = safe_open(file, "pt")
        found: Tensor = self._opened[file].get_tensor(name)
        return found


@dataclass(frozen=True)
class Cut:
    """What is kept of a tensor.

    Attributes:
        name: in the new file.
        positions: kept along `dim`; None: all of it.
    """

    name: str
    dim: int = 0
    positions: tuple[int, ...] | None = None


def write_cut(
    source: Checkpoint,
    names: Iterable[str],
    cuts: Mapping[str, Cut],
    target: Path,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Copy tensors of a checkpoint into one file, cut; whole or not at all.

    Args:
        names: of the source's tensors; those without a cut are left out.
        progress: told of the bytes written.

    Returns:
        The names in the new file.
    """
    kept = [(source.entries[name], cuts[name]) for name in names if name in cuts]
    header: dict[str, Any] = {"__metadata__": source.metadata or {"format": "pt"}}
    place = 0
    for entry, cut in kept:
        shape = list(entry.shape)
        size = entry.stop - entry.start
        if cut.positions is not None:
            size = size // shape[cut.dim] * len(cut.positions)
            shape[cut.dim] = len(cut.positions)
        header[cut.name] = {
            "dtype": entry.dtype,
            "shape": shape,
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = target.with_name(target.name + ".partial")
    try:
        with open(partial, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for entry, cut in kept:
                with open(entry.file, "rb") as file:
                    for start, stop in _spans(entry, cut):
                        _copy(file, start, stop, out, progress)
        settle(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return [cut.name for _, cut in kept]


def settle(path: Path) -> None:
    """See to it that what a file holds outlives a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_index(folder: Path, names: Mapping[str, Sequence[str]]) -> None:
    """The index of a sharded checkpoint: file -> names of its tensors."""
    where = {name: file for file, inside in names.items() for name in inside}
    total = sum((folder / file).stat().st_size for file in names)
    told = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _spans(entry: Entry, cut: Cut) -> Iterator[tuple[int, int]]:
    """The byte ranges of what is kept, neighbours joined."""
    if cut.positions is None:
        yield entry.start, entry.stop
        return
    outer, number = prod(entry.shape[: cut.dim]), entry.shape[cut.dim]
    size = (entry.stop - entry.start) // (outer * number)
    start = stop = entry.start
    for row in range(outer):
        for position in cut.positions:
            place = entry.start + (row * number + position) * size
            if place != stop:
                if stop > start:
                    yield start, stop
                start = place
            stop = place + size
    yield start, stop


def _copy(file: Any, start: int, stop: int, out: Any, progress: Callable[[int], None]) -> None:
    file.seek(start)
    while start < stop:
        data = file.read(min(CHUNK, stop - start))
        if not data:
            raise CompressError(f"{file.name} ends early: it was changed while it was read")
        out.write(data)
        start += len(data)
        progress(len(data))


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_indexed(folder).values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing and len(files) > 1:
        raise CompressError(
            f"{folder}: {len(missing)} of {len(files)} files of its weights are "
            f"missing, such as {missing[0]}"
        )
    if missing:
        raise CompressError(f"{folder} has no safetensors: neither {missing[0]} nor {INDEX}")
    return files


def _indexed(folder: Path) -> dict[str, str]:
    """Name of a tensor -> its file, as the index says; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(str(file)).name for name, file in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{path} is torn: it names no tensors") from error


def _header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > size:
                raise ValueError
            header = json.loads(opened.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    except OSError as error:
        raise CompressError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{file} is torn: its header cannot be read") from error
    if 8 + length + max(ends, default=0) != size:
        raise CompressError(
            f"{file} is torn: it has {size:,} bytes, its header tells of "
            f"{8 + length + max(ends, default=0):,}"
        )
    return header, 8 + length
