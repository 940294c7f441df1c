"""What can be seen of a training run, from the lines of its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from growmoe.glimpse import Glimpse, told
from growmoe.lineage import Event
from growmoe.lm.config import TrainConfig


class Follower:
    """Gathers the lines of a log and what happened to experts, and shows what there is to see.

    Args:
        config: of the run.
        show: given a glimpse whenever there is something new.
    """

    def __init__(self, config: TrainConfig, show: Callable[[Glimpse], None]) -> None:
        self._steps, self._show = config.steps, show
        self._loss: list[float] = []
        self._bits: dict[str, list[float]] = {}
        self._experts: dict[str, int] = {}
        self._events: list[str] = []
        self._step = 0

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._step = line["step"]
        if "loss" in line:
            self._loss.append(line["loss"])
        for domain, bits in line.get("bits_per_byte", {}).items():
            self._bits.setdefault(domain, []).append(bits)
        self._experts = line.get("experts", {})
        self._tell()

    def happened(self, event: Event) -> None:
        """An act that was carried out."""
        self._events.append(str(event))
        self._tell()

    def lived(self, events: Sequence[Event]) -> None:
        """All that has happened so far, refusals too."""
        self._events = told(events)
        self._tell()

    def _tell(self) -> None:
        curves = {"loss": self._loss}
        curves |= {f"{domain}, bits per byte": bits for domain, bits in self._bits.items()}
        self._show(
            Glimpse(
                fraction=self._step / self._steps,
                curves={name: list(values) for name, values in curves.items()},
                experts=dict(self._experts),
                events=self._events[-6:],
            )
        )


class LogReader:
    """Reads the folder of a run that other processes write.

    Args:
        folder: may still be empty.
        listen: given each new line of its log, once, also where the run goes back some steps.
        lived: given the whole lineage whenever there is a new one.
    """

    def __init__(
        self,
        folder: Path,
        listen: Callable[[Mapping[str, Any]], None],
        lived: Callable[[Sequence[Event]], None],
    ) -> None:
        self._folder, self._listen, self._lived = folder, listen, lived
        self._known: set[tuple[str, int]] = set()
        self._lineage: list[dict[str, Any]] = []

    def read(self) -> None:
        """Tell what is new."""
        for line in _lines(self._folder / "metrics.jsonl"):
            key = line["kind"], line["step"]
            if key not in self._known:
                self._known.add(key)
                self._listen(line)
        lineage = _lines(self._folder / "lineage.jsonl")
        if lineage != self._lineage:
            self._lineage = lineage
            self._lived([Event.from_json(line) for line in lineage])


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines; one that is being written has no end yet."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
