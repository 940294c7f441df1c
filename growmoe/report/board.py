"""Scalars and histograms for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


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
