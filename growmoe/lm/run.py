"""The folder of a run: what it was told, its log, its checkpoint, its results.

config.json              the configuration, the data's digests, versions, hardware, command
metrics.jsonl            a line for each log ("kind": "train") and evaluation ("evaluation")
checkpoint.safetensors   model, optimizer, organizer and random state of the last save
lineage.jsonl            every act on every layer up to that save
routing.json             the tokens of each domain that each expert took at the last evaluation
results.json, table.md   bits per byte on the test parts, sizes, seconds
sample.txt, loss.png     generated text, and the loss of each domain over the steps
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growmoe.continual.store import write_atomically
from growmoe.lm.config import FREE, TrainError
from growmoe.moe import moe_layers

FORMAT = 1


class RunFolder:
    """The files of one run; a line of its log is written at once, all else whole or not at all.

    Args:
        path: new or empty, or the folder of the same run.
        identity: {"config": …, "data": …, …}, what makes a run the same.
        command: kept in config.json.

    Raises:
        TrainError: the folder holds another run or something else, or cannot be written.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], command: str = "") -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.safetensors"
        config = self.path / "config.json"
        now: dict[str, Any] = json.loads(json.dumps(identity))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if config.exists():
                _refuse_other(self.path, json.loads(config.read_text(encoding="utf-8")), now)
                return
            if any(self.path.iterdir()):
                raise TrainError(
                    f"{self.path} is not empty and holds no run: choose another --output"
                )
            text = {"format": FORMAT, **now, "command": command, **conditions()}
            write_atomically(config, json.dumps(text, indent=1) + "\n")
        except OSError as error:
            raise TrainError(f"cannot write to {self.path}: {error.strerror or error}") from error
        except json.JSONDecodeError as error:
            raise TrainError(f"{config} cannot be read: {error}") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forget the log after `step`, and what a killed run left half written; gives the rest."""
        path = self.path / "metrics.jsonl"
        kept = []
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    break
                if line["step"] <= step:
                    kept.append(line)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def results(self) -> dict[str, Any] | None:
        """What `write_results` wrote, if it was the end of the run."""
        try:
            found = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("finished") else None

    def write_lineage(self, model: nn.Module) -> None:
        lines = [json.dumps(e.to_json()) for e in events_of(model)]
        write_atomically(self.path / "lineage.jsonl", "".join(line + "\n" for line in lines))

    def write_routing(self, maps: Mapping[str, list[dict[str, Any]]], step: int) -> None:
        """Write `RoutingCounts.maps` of the evaluation after `step`; nothing of a dense model."""
        if maps:
            dated = {layer: [{**one, "step": step} for one in ones] for layer, ones in maps.items()}
            write_atomically(self.path / "routing.json", json.dumps(dated))

    def write_results(self, results: Mapping[str, Any], sample: str | None) -> None:
        """Write the results, and plots where matplotlib is installed."""
        write_atomically(self.path / "results.json", json.dumps(results, indent=1) + "\n")
        write_atomically(self.path / "table.md", markdown_table(results))
        if sample is not None:
            write_atomically(self.path / "sample.txt", sample)
        try:
            from growmoe.lm.plot import plot_loss
            from growmoe.report import plots
        except ImportError:
            return
        plots.save(plot_loss, self.path / "loss.png", _read_lines(self.path / "metrics.jsonl"))
        events = _read_lines(self.path / "lineage.jsonl")
        if any(event["act"] != "init" for event in events):
            plots.save(plots.plot_lifelines, self.path / "lifelines.png", events)

    def files(self) -> list[Path]:
        """What a finished run holds for a reader."""
        names = ("results.json", "table.md", "sample.txt", "loss.png", "lifelines.png")
        return [self.path / name for name in names if (self.path / name).exists()]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _refuse_other(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a folder whose run is not the one that is asked for, and say what differs."""
    if before.get("format") != FORMAT:
        raise TrainError(f"{path / 'config.json'} is not of format {FORMAT}")
    changed = []
    for room in now:
        old, new = before.get(room, {}), now[room]
        changed += [
            f"{'' if room == 'config' else room + ' '}{key} was {_short(old.get(key))}, "
            f"is {_short(new.get(key))}"
            for key in [*new, *(old.keys() - new.keys())]
            if key not in FREE and old.get(key) != new.get(key)
        ]
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise TrainError(
            f"{path} holds a run of another configuration ({'; '.join(changed[:3])}{more}): "
            "choose another --output"
        )


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def events_of(model: nn.Module) -> list[Any]:
    """The lineage of all layers, by step, each event with the name that its layer has in the model.

    A layer does not know its name when it begins, and its first event says so.
    """
    events = [
        replace(event, layer=name)
        for name, layer in moe_layers(model).items()
        for event in layer.lineage
    ]
    return sorted(events, key=lambda event: event.step)


def conditions() -> dict[str, Any]:
    """The versions and the machine that the numbers were made with."""
    versions = {"python": platform.python_version()}
    for package in ("growmoe", "torch", "numpy", "scipy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    hardware = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "hardware": hardware}


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Domain, bits per byte on test, on validation, those of a unigram model, train bytes."""
    return [
        (
            name,
            f"{entry['test']:.3f}",
            f"{entry['validation']:.3f}",
            f"{entry['unigram']:.3f}",
            f"{entry['train_bytes'] / 1e6:.2f} MB",
        )
        for name, entry in results["domains"].items()
    ]


HEADINGS = ("domain", "test", "validation", "unigram", "train")


def markdown_table(results: Mapping[str, Any]) -> str:
    """Bits per byte of each domain."""
    rows = [HEADINGS, ("---", *["---:"] * 4), *table_rows(results)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
