"""Parameters of which a few stand for all in the quick tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def but_slow(names: Iterable[Any], *quick: Any) -> list[Any]:
    """All names as parameters; those not among the quick ones are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
