"""How much memory of its own a process has at most, leaving out pages of files."""

from __future__ import annotations

import threading
from pathlib import Path

STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """RssAnon of this process in bytes; None where the system does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), None)


class Peak:
    """The most of it while this context lasts, looked at every few milliseconds.

    Attributes:
        bytes: so far; None where the system does not tell.
    """

    def __init__(self, every: float = 0.005) -> None:
        self.every = every
        self.bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._look()
        self._stop.set()
        self._thread.join()
