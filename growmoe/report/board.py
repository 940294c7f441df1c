"""Scalars and histograms for TensorBoard, of a log or of the cells of a bench."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from growmoe.continual import metrics

_CURVES = {
    "anytime": ("accuracy/any-time", 1.0),
    "prequential": ("accuracy/prequential", 1.0),
    "memory_history": ("memory (MB)", 1e-6),
    "parameter_history": ("parameters", 1.0),
}


class Board:
    """Writes the same figures as a log does, as TensorBoard's event files.

    The folder is made with the first figure, so that a run's own folder is still new until then.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "--tensorboard needs tensorboard, which is not installed: "
                "pip install 'growmoe[report]'"
            ) from error
        self._make = SummaryWriter
        self._path = str(path)
        self._made: Any = None

    @property
    def _writer(self) -> Any:
        if self._made is None:
            self._made = self._make(self._path)
        return self._made

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        load: Mapping[str, Mapping[Any, float]] | None = None,
    ) -> None:
        """Scalars by name; of each layer the number of experts and the histogram of their loads."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for layer, shares in (load or {}).items():
            self._writer.add_scalar(f"experts/{layer}", len(shares), step)
            if shares:
                self._writer.add_histogram(f"load/{layer}", np.array(list(shares.values())), step)
        self._writer.flush()

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of a language model's log: losses, bits per byte, expert counts and loads."""
        known = ("loss", "lr", "tokens_per_second")
        values = {name: line[name] for name in known if name in line}
        bits = line.get("bits_per_byte", {})
        values |= {f"bits_per_byte/{domain}": value for domain, value in bits.items()}
        self.write(line["step"], values, line.get("load"))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class BenchBoard:
    """A TensorBoard run for each finished cell of a bench, so that methods lie over one another.

    Args:
        path: the folder, made with the first cell; a cell that it has is written anew.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        Board(self.path)  # fails before anything has run

    def cell(self, record: Mapping[str, Any]) -> None:
        """Write a cell's curves over the examples seen, and its experts and their loads.

        Accuracy by experience is over the number of experiences, loads are over mini-batches.
        """
        place = self.path / f"{record['method']}-seed{record['seed']}"
        # whole or not at all
        unfinished = place.with_name(f".{place.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        board = Board(unfinished)
        for key, (name, scale) in _CURVES.items():
            for seen, value in record.get(key) or ():
                board.write(int(seen), {name: scale * value})
        matrix, counts = record["accuracy_matrix"], record["test_counts"]
        for i, value in enumerate(metrics.accuracy_by_experience(matrix, counts), 1):
            board.write(i, {"accuracy/by experience": value})
        for entry in record.get("load_history") or ():
            board.write(entry["step"], {}, _by_layer(entry["load"]))
        board.close()
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)


def _by_layer(load: Mapping[Any, float]) -> dict[str, dict[str, float]]:
    """The shares of "layer:id", or of ids where there is one layer, layer by layer."""
    layers: dict[str, dict[str, float]] = {}
    for key, share in load.items():
        layer, _, id = str(key).rpartition(":")
        layers.setdefault(layer or "moe", {})[id] = share
    return layers
