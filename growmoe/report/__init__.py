"""Pictures of what a growing mixture did, and a page that shows all of a run.

Every `plot_*` function draws on the matplotlib axes it is given as `ax`, or on a new figure, and
gives the axes back; the backend is left alone. All is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RunLog": "log",
    "count_routing": "heat",
    "expert_load": "log",
    "plot_accuracy": "accuracy",
    "plot_accuracy_matrix": "heat",
    "plot_curves": "curves",
    "plot_lifelines": "plots",
    "plot_lineage": "family",
    "plot_load": "plots",
    "plot_routing": "heat",
    "plot_territories": "territories",
    "read_run": "run",
    "render_page": "page",
    "ReportError": "run",
    "write_report": "page",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'growmoe.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"growmoe.report.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
