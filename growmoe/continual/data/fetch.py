"""Fetches data through torchvision, with a time limit, into the user's cache."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from growmoe.continual import require
from growmoe.continual.data.idx import DataError

TIMEOUT_SECONDS = 10.0


def cache_folder() -> Path:
    """Where what was downloaded is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growmoe"


def download(dataset: str, root: Path, how: str) -> None:
    """Let torchvision download one of its datasets into `root`.

    Args:
        dataset: the name of its class in `torchvision.datasets`.
        root: where to.
        how: what a user without a network can do; the end of the error.

    Raises:
        DataError: it cannot be fetched.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        getattr(require("torchvision.datasets"), dataset)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise DataError(f"{dataset} is not here and cannot be fetched ({reason}): {how}") from error
    finally:
        socket.setdefaulttimeout(before)
