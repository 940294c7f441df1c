"""Parameters of which a few stand for all in the quick tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def but_slow(names: Iterable[Any], *quick: Any) -> list[Any]:
    """All parameters, or tuples of several; those not among the quick ones are marked slow."""
    return [name if name in quick else _slow(name) for name in names]


def _slow(name: Any) -> Any:
    values = name if isinstance(name, tuple) else (name,)
    return pytest.param(*values, marks=pytest.mark.slow)
