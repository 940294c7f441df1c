"""Sums up the cells of a bench: means with intervals, and paired tests against the rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from growmoe.continual import metrics
from growmoe.continual.environment import hardware, versions
from growmoe.continual.rivals.learner import ORACLE, TASK_LABELS


def _mean_ci95(values: Sequence[float]) -> dict[str, float | None]:
    mean, half = metrics.mean_ci95(values)
    return {
        "mean": None if math.isnan(mean) else mean,
        "ci95": None if math.isnan(half) else half,
    }


# what makes the question an easier one
_TELLING = frozenset({TASK_LABELS, ORACLE})


def _mean(curve: Sequence[Sequence[float]]) -> float:
    return sum(value for _, value in curve) / len(curve)


# a quantity of the summary: the field of a cell that it comes from, which may be missing
_OPTIONAL: dict[str, tuple[str, Callable[[Any], float]]] = {
    "anytime_accuracy": ("anytime", metrics.curve_mean),
    "prequential_accuracy": ("prequential", _mean),
    "prediction_flops": ("prediction_flops", float),
    "peak_memory_bytes": ("memory_history", lambda curve: max(size for _, size in curve)),
    "specialisation": ("routing", metrics.mutual_information),
    "class_specialisation": ("class_routing", metrics.mutual_information),
}


def _detection(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well the drifts were found, for a method that looks for new domains."""
    if any(cell.get("detections") is None or cell.get("drifts") is None for cell in cells):
        return {}
    found: list[dict[str, Any]] = [
        metrics.drift_detection(cell["detections"], cell["drifts"], cell["anytime"][-1][0])
        for cell in cells
    ]
    entry: dict[str, Any] = {
        f"drifts_{name}": _mean_ci95([each[name] for each in found])
        for name in ("found", "missed", "false_alarms", "false_alarms_per_1000")
    }
    delays = [each["delay"] for each in found if each["delay"] is not None]
    if delays:
        entry["detection_delay"] = _mean_ci95(delays)
    return entry


def summarize(
    records: Sequence[dict[str, Any]], order: Sequence[str] = (), command: str = ""
) -> dict[str, Any]:
    """The content of results.json from the cells of one stream.

    Args:
        records: cells, as `store.read_cells` gives them; at least none.
        order: the methods to name first.
        command: what was run.
    """
    names = {record["method"] for record in records}
    ordered = [name for name in order if name in names]
    ordered += sorted(names - set(ordered))
    summary: dict[str, Any] = {
        "stream": records[0]["stream"] if records else None,
        "versions": versions(),
        "command": command,
        "hardware": hardware(),
        "methods": {},
    }
    for name in ordered:
        cells = [record for record in records if record["method"] == name]
        pairs = [(cell["accuracy_matrix"], cell["test_counts"]) for cell in cells]
        entry: dict[str, Any] = {
            "settings": cells[0]["settings"],
            "needs": cells[0].get("needs", []),
            "seeds": [
                {k: v for k, v in cell.items() if k not in ("lineage", "load_history", "settings")}
                for cell in cells
            ],
        }
        for weighted in (metrics.final_accuracy, metrics.average_incremental_accuracy):
            entry[weighted.__name__] = _mean_ci95([weighted(r, n) for r, n in pairs])
        for metric in (metrics.forgetting, metrics.backward_transfer, metrics.learning_accuracy):
            entry[metric.__name__] = _mean_ci95([metric(r) for r, _ in pairs])
        if all(cell["untrained_accuracy"] for cell in cells):
            entry["forward_transfer"] = _mean_ci95(
                [
                    metrics.forward_transfer(cell["accuracy_matrix"], cell["untrained_accuracy"])
                    for cell in cells
                ]
            )
        for quantity in ("parameters", "memory_bytes", "seconds"):
            entry[quantity] = _mean_ci95([cell[quantity] for cell in cells])
        for quantity, (source, value) in _OPTIONAL.items():
            # cells of an earlier version have no such field
            if all(cell.get(source) for cell in cells):
                numbers = [value(cell[source]) for cell in cells]
                if not any(map(math.isnan, numbers)):
                    entry[quantity] = _mean_ci95(numbers)
        entry |= _detection(cells)
        summary["methods"][name] = entry
    summary["comparison"] = compare(summary["methods"])
    return summary


def compare(methods: Mapping[str, Any], own: str = "growmoe") -> dict[str, Any] | None:
    """Paired tests of our method against each other, and which of them is the best rival.

    For each rival, over the seeds that both have: the mean difference in final accuracy, the
    two-sided p of Student's paired t-test, and of Wilcoxon's signed-rank test, which assumes no
    normal distribution but cannot go below 0.06 with five seeds. None where a test says nothing
    (fewer than two seeds, no difference at all). A method that is told which task a test image is
    of, or the true domains, answers an easier question: it is tested, but never the best rival of
    one that is not told.

    Args:
        methods: as in results.json.
        own: the method that is compared; None comes back if it is not among them.
    """
    if own not in methods:
        return None

    def finals(entry: Mapping[str, Any]) -> dict[int, float]:
        return {
            cell["seed"]: metrics.final_accuracy(cell["accuracy_matrix"], cell["test_counts"])
            for cell in entry["seeds"]
        }

    ours = finals(methods[own])
    rivals: dict[str, dict[str, Any]] = {}
    for name, entry in methods.items():
        if name == own:
            continue
        theirs = finals(entry)
        shared = sorted(ours.keys() & theirs.keys())
        if shared:
            pairs = [(ours[seed], theirs[seed]) for seed in shared]
            rivals[name] = metrics.paired_test(*zip(*pairs, strict=True))
    told = set(methods[own].get("needs", ()))
    # joint training sees everything at once: a bound, no rival
    allowed = {
        name: test
        for name, test in rivals.items()
        if name != "joint"
        and told.issuperset(_TELLING.intersection(methods[name].get("needs", ())))
    }
    best = min(allowed, key=lambda name: allowed[name]["difference"], default=None)
    return {"method": own, "best_rival": best, "rivals": rivals}
