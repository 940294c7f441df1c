"""What was done to a model and what it cost: as data, as JSON, as a page."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from growmoe.compress.measure import Change

FORMAT = "growmoe-compress-1"


@dataclass
class LayerReport:
    """One layer: who went and why.

    Attributes:
        removed: ids, the first to go first.
        reasons: id -> why.
        merged: groups of ids that became one.
        saliency, load: id -> value, before.
        spared: super experts, which were not to go.
        gap: relative distance of the layer's output from the whole layer's, before and after the
            least-squares fit, where there was one.
    """

    name: str
    experts_before: int
    experts_after: int
    removed: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    merged: list[list[int]] = field(default_factory=list)
    saliency: dict[int, float] = field(default_factory=dict)
    load: dict[int, float] = field(default_factory=dict)
    spared: list[int] = field(default_factory=list)
    gap: tuple[float, float] | None = None


@dataclass
class Report:
    """What `prune` or `merge` did.

    Attributes:
        act: "prune" or "merge".
        settings: what was asked for.
        layers: in the model's order.
        domains: domain -> the loss before and after; "(calibration)" is on the calibration data,
            which the choice was made on.
        recovery: what training after the cut was, and its losses, if there was any.
        seconds: of all of it. peak_memory: bytes resident at most in this process so far.
        model: where it came from, and what else there is to say.
    """

    act: str
    settings: dict[str, Any]
    layers: list[LayerReport]
    domains: dict[str, Change]
    parameters_before: int
    parameters_after: int
    seconds: float
    peak_memory: int
    recovery: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def experts_before(self) -> int:
        return sum(layer.experts_before for layer in self.layers)

    @property
    def experts_after(self) -> int:
        return sum(layer.experts_after for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "act": self.act,
            "model": self.model,
            "settings": self.settings,
            "experts_before": self.experts_before,
            "experts_after": self.experts_after,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "domains": {name: change.to_json() for name, change in self.domains.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "recovery": self.recovery,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write report.json, and report.html where jinja2 is installed."""
        folder = Path(folder)
        paths = [folder / "report.json"]
        paths[0].write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        try:
            from growmoe.compress.page import page
        except ImportError:
            return paths
        paths.append(folder / "report.html")
        paths[1].write_text(page(self.to_json()), encoding="utf-8")
        return paths


@dataclass
class Inspection:
    """What `inspect` found: a dict for each layer, and the parameters of the model."""

    layers: list[dict[str, Any]]
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "parameters": self.parameters, "layers": self.layers}

    def write(self, folder: str | Path) -> list[Path]:
        """Write inspect.json, and inspect.png where matplotlib is installed."""
        folder = Path(folder)
        paths = [folder / "inspect.json"]
        paths[0].write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        try:
            from growmoe.compress.picture import draw
        except ImportError:
            return paths
        paths.append(folder / "inspect.png")
        draw(self.layers, paths[1])
        return paths


def peak_memory() -> int:
    """The most memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
