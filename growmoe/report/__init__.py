"""Pictures of what a growing mixture did."""

from __future__ import annotations

from typing import Any

__all__ = ["plot_accuracy", "plot_lifelines", "plot_load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'growmoe.report' has no attribute {name!r}")
    from growmoe.report import accuracy, plots

    return getattr(accuracy if name == "plot_accuracy" else plots, name)


def __dir__() -> list[str]:
    return __all__
