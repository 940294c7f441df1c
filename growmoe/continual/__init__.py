"""The continual-learning bench: streams, metrics, methods, tables.

Everything is imported on first use, because Avalanche alone takes seconds to import::

    from growmoe import continual

    stream = continual.load("split-digits", seed=0)
    cell = continual.METHODS["replay"].run(stream, 0, lambda fraction, text: None)
    continual.final_accuracy(cell.accuracy_matrix)

What needs a package that is not installed raises an ImportError that names the extra to install.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

_HOME = {
    "STREAMS": "streams",
    "DataError": "streams",
    "Batch": "stream",
    "Data": "stream",
    "Stream": "stream",
    "Domains": "ordering",
    "arrange": "ordering",
    "class_incremental": "scenarios",
    "from_avalanche": "own_data",
    "from_datasets": "own_data",
    "in_turn": "scenarios",
    "permuted": "scenarios",
    "rotated": "scenarios",
    "split": "scenarios",
    "load": "streams",
    "METHODS": "methods",
    "Method": "methods",
    "online": "methods",
    "Cell": "cell",
    "Memory": "cell",
    "MultiScaleFeatures": "features",
    "PretrainedFeatures": "pretrained",
    "Recorder": "record",
    "Subject": "record",
    "RandomPatchFeatures": "features",
    "RandomUnits": "features",
    "default_features": "features",
    "GrowingClassifier": "classifier",
    "Domain": "domains",
    "DomainGate": "domain_gate",
    "GrowMoE": "strategy",
    "OnePass": "strategy",
    "growmoe_metrics": "avalanche_metrics",
    "OrganizerPlugin": "strategy",
    "default_rules": "classifier",
    "average_incremental_accuracy": "metrics",
    "backward_transfer": "metrics",
    "final_accuracy": "metrics",
    "forgetting": "metrics",
    "forward_transfer": "metrics",
    "learning_accuracy": "metrics",
    "curve_mean": "metrics",
    "drift_detection": "metrics",
    "mutual_information": "metrics",
    "paired_test": "metrics",
    "mean_ci95": "metrics",
    "BenchError": "bench",
    "run_bench": "bench",
    "summarize": "summary",
    "csv_table": "table",
    "latex_table": "table",
    "markdown_table": "table",
    "print_table": "table",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'growmoe.continual' has no attribute {name!r}")
    return getattr(importlib.import_module(f"growmoe.continual.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def require(module: str, extra: str = "continual") -> ModuleType:
    """Import `module`, an optional dependency of the bench that comes with `extra`.

    Avalanche warns about its own deprecations and its optional parts while it is imported; those
    warnings are of no use to a reader of our output and are silenced.

    Raises:
        ImportError: the package is not installed; the message names the extra that brings it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"growmoe's continual-learning bench needs {error.name}, which is not installed: "
            f"pip install 'growmoe[{extra}]'"
        ) from error
