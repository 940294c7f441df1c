"""Serves the page of a run on this machine alone, made anew whenever the run has written."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from growmoe.report.page import render_page
from growmoe.report.run import ReportError, read_run

_WATCHED = {".json", ".jsonl"}


def stamp(paths: Sequence[Path]) -> str:
    """Changes whenever a file of one of the runs that a page is made of does."""
    newest, count, size = 0, 0, 0
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix not in _WATCHED or file.name.startswith("."):
                continue
            try:
                status = file.stat()
            except FileNotFoundError:  # replaced at this very moment
                continue
            newest, count = max(newest, status.st_mtime_ns), count + 1
            size += status.st_size
    return f"{newest}-{count}-{size}"


class Watch(ThreadingHTTPServer):
    """A server on loopback; `address` tells where.

    Args:
        paths: folders of runs, which may still be empty or going on.
        port: 0 takes any that is free.

    Raises:
        ReportError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[str | Path], port: int = 0) -> None:
        self.paths = [Path(path) for path in paths]
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] | None = None
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ReportError(f"cannot serve on port {port}: {error.strerror or error}") from error
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def page(self) -> bytes:
        """The page of the runs as they stand; a run that has written nothing yet says so."""
        with self._lock:
            now = stamp(self.paths)
            if self._page is None or self._page[0] != now:
                try:
                    text = render_page([read_run(path) for path in self.paths], watched=True)
                except ReportError as error:
                    text = _waiting(str(error))
                self._page = (now, text.encode())
            return self._page[1]


class _Handler(BaseHTTPRequestHandler):
    server: Watch

    def do_GET(self) -> None:
        # a page of another site must not read a run by a name that leads to loopback
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self._answer(403, b"only for this machine", "text/plain")
        elif self.path == "/":
            self._answer(200, self.server.page(), "text/html; charset=utf-8")
        elif self.path == "/stamp":
            self._answer(200, stamp(self.server.paths).encode(), "text/plain")
        else:
            self._answer(404, b"no such page", "text/plain")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""


def _waiting(reason: str) -> str:
    import html

    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" '
        'content="2"><title>waiting – growmoe</title><main><h1>Waiting for the run</h1>'
        f"<p>{html.escape(reason)}</p></main></html>"
    )
