"""Writes down what happens in a training loop of your own, for `growmoe report` and TensorBoard."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from growmoe.continual.store import write_atomically
from growmoe.lm.evaluate import shares
from growmoe.lm.run import conditions, events_of
from growmoe.moe import moe_layers

FORMAT = 1


class RunLog:
    """The log of one run: figures, each expert's load and the lineage, in a folder::

        log = growmoe.report.RunLog("runs/mine", model, title="a stream that drifts")
        for step in range(1000):
            ...
            if step % 10 == 0:
                log.write(step, loss=loss.item())
        log.write_routing("moe", counts, groups=["zeros", "ones"])

        $ growmoe report runs/mine

    Args:
        path: a new or empty folder, or one of an earlier log, which is begun anew.
        model: whose mixtures are followed.
        title: what is run, for the reader.
        settings: whatever is worth keeping, as JSON.
        tensorboard: also write TensorBoard's scalars and histograms there.

    Raises:
        ValueError: the model has no MoE layer, or the folder holds something else.
        ImportError: tensorboard is wanted and not installed.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        title: str = "a run",
        settings: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path, self.model = Path(path), model
        if not moe_layers(model):
            raise ValueError("RunLog: the model has no growmoe.MoE layer")
        if self.path.exists() and any(self.path.iterdir()) and not self._file("run.json").exists():
            raise ValueError(f"RunLog: {self.path} is not empty and holds no log")
        self.path.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "title": title,
            "command": shlex.join(sys.argv),
            "settings": dict(settings or {}),
            **conditions(),
        }
        write_atomically(self._file("run.json"), json.dumps(about, indent=1) + "\n")
        for name in ("metrics.jsonl", "lineage.jsonl"):
            write_atomically(self._file(name), "")
        self._file("routing.json").unlink(missing_ok=True)
        self._routing: dict[str, list[dict[str, Any]]] = {}
        self._board = None
        if tensorboard:
            from growmoe.report.board import Board

            self._board = Board(self.path / "tensorboard")

    def _file(self, name: str) -> Path:
        return self.path / name

    def write(self, step: int, **values: float) -> None:
        """Write figures of a step, with each expert's running load and what was born and died."""
        load = expert_load(self.model)
        line = {"step": int(step), "values": {k: float(v) for k, v in values.items()}, "load": load}
        with open(self._file("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        events = [json.dumps(event.to_json()) + "\n" for event in events_of(self.model)]
        write_atomically(self._file("lineage.jsonl"), "".join(events))
        if self._board is not None:
            self._board.write(step, values, load)

    def write_routing(
        self, layer: str, counts: Tensor, groups: Sequence[Any], by: str = "class"
    ) -> None:
        """Keep which expert takes what of each group, for a heat map.

        Args:
            layer: its name in the model.
            counts: [E, G] of `growmoe.report.count_routing`.
            groups: G names.
            by: what the groups are; another map by the same replaces the one before.

        Raises:
            ValueError: no such layer, or the counts do not fit it and the groups.
        """
        layers = moe_layers(self.model)
        if layer not in layers:
            raise ValueError(f"RunLog: no layer {layer!r}: there are {', '.join(layers)}")
        ids = list(layers[layer].experts)
        if tuple(counts.shape) != (len(ids), len(groups)):
            raise ValueError(
                f"RunLog: counts are {tuple(counts.shape)}, for {len(ids)} experts and "
                f"{len(groups)} groups"
            )
        others = [found for found in self._routing.get(layer, []) if found["by"] != by]
        counted = {
            "by": by,
            "experts": ids,
            "groups": [str(group) for group in groups],
            "counts": counts.tolist(),
        }
        self._routing[layer] = [*others, counted]
        write_atomically(self._file("routing.json"), json.dumps(self._routing))


def expert_load(model: nn.Module) -> dict[str, dict[str, float]]:
    """{layer: {expert id: its running share of the rows}}, as the layers' recorders saw them."""
    return {name: shares(layer) for name, layer in moe_layers(model).items()}
