"""What can be seen of a training run, from the lines of its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from growmoe.glimpse import Glimpse
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
