"""Runs every table of the README, and compares it with what was published."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growmoe.continual.data.idx import DataError

_DRIFTING = ("sharp", "fuzzy", "recurring")

SUITES: dict[str, tuple[str, ...]] = {
    "paper": (
        "split-digits",
        "split-mnist-5000",
        "split-mnist-5000:scenario=domain",
        "split-mnist-5000:scenario=task",
        "split-fashion-mnist",
        "split-fashion-mnist:drift=none",
        *(
            f"{change}-fashion-mnist:{drift}examples=6000,tests=1000"
            for change in ("permuted", "rotated")
            for drift in ("" if d == "sharp" else f"drift={d}," for d in _DRIFTING)
        ),
    ),
}


@dataclass(frozen=True)
class Target:
    """A published number.

    Attributes:
        stream: on which it was reported; the name of one of ours if that is the same.
        method: as it is called here.
        metric: a quantity of results.json, such as "final_accuracy".
        value: as published, accuracies from 0 to 1.
        tolerance: how far from it still counts as reproduced.
        source: where it was published.
        note: how our setting differs, if it does.
    """

    stream: str
    method: str
    metric: str
    value: float
    tolerance: float
    source: str
    note: str = ""


def read_targets(path: str | Path) -> list[Target]:
    """Read a file of [[target]] tables.

    Raises:
        DataError: it is missing, is no TOML, or a target lacks a field or has one unknown.
    """
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content = toml.loads(Path(path).read_text(encoding="utf-8"))
        return [Target(**entry) for entry in content["target"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of targets: {error}") from error


def judge(
    targets: Sequence[Target], tables: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Target, float | None, str]]:
    """Each target, what we measured, and "reproduced", "beaten", "missed" or "not run".

    Reproduced: within the tolerance. Beaten: above it. Missed: below it.

    Args:
        targets: with metrics of which more is better.
        tables: results.json by stream.
    """
    judged: list[tuple[Target, float | None, str]] = []
    for target in targets:
        entry = tables.get(target.stream, {}).get("methods", {}).get(target.method, {})
        value = entry.get(target.metric, {}).get("mean")
        if value is None:
            judged.append((target, None, "not run"))
            continue
        gap = value - target.value
        verdict = "reproduced" if abs(gap) <= target.tolerance else "beaten"
        judged.append((target, value, "missed" if gap < -target.tolerance else verdict))
    return judged


def targets_table(judged: Sequence[tuple[Target, float | None, str]]) -> str:
    """The verdicts as Markdown."""
    lines = [
        "| stream | method | metric | published | measured | verdict | source | differs |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for target, value, verdict in judged:
        measured = "–" if value is None else f"{100 * value:.1f}"
        lines.append(
            f"| {target.stream} | {target.method} | {target.metric.replace('_', ' ')} "
            f"| {100 * target.value:.1f} | {measured} | {verdict} | {target.source} "
            f"| {target.note or '–'} |"
        )
    return "\n".join([*lines, ""])
