"""A watched run is served on loopback alone, and anew when it has written."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("plotly")

from bench_runs import event

from growmoe.report import ReportError
from growmoe.report.watch import Watch


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Watch]:
    with Watch([tmp_path]) as watch:
        thread = threading.Thread(target=watch.serve_forever, daemon=True)
        thread.start()
        yield watch
        watch.shutdown()
        thread.join()


def get(address: str, host: str | None = None) -> str:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        return answer.read().decode()


def test_the_page_follows_the_run(server: Watch, tmp_path: Path) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    assert "Waiting for the run" in get(server.address)
    before = get(server.address + "stamp")
    (tmp_path / "lineage.jsonl").write_text(json.dumps(event(0, "init", [0, 1])) + "\n")
    assert get(server.address + "stamp") != before
    page = get(server.address)
    assert 'data-watched="true"' in page and "packed-data" in page


@pytest.mark.parametrize(("path", "host", "code"), [("x", None, 404), ("", "evil.example", 403)])
def test_other_pages_and_other_hosts_are_refused(
    server: Watch, path: str, host: str | None, code: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server.address + path, host)
    assert caught.value.code == code


def test_a_taken_port_is_said(server: Watch, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot serve on port"):
        Watch([tmp_path], server.server_port)
