"""The page holds all of a run in one file, and nothing that a run says can break out of it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

from bench_runs import event, write_bench

from growmoe.report import ReportError, read_run, render_page, write_report
from growmoe.report.page import compare_runs
from growmoe.report.run import Growth, Run


def data_of(page: str) -> Any:
    packed = re.search(r'id="packed-data">([^<]*)<', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_it_is_one_file_with_table_command_versions_and_data(tmp_path: Path) -> None:
    page = write_report([write_bench(tmp_path / "b")], tmp_path / "r.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for text in ("growmoe bench &#x27;a stream&#x27; --seeds 2", "<dt>python</dt><dd>3.11</dd>",
                 '<th scope="row">naive</th>', "average incremental accuracy"):  # fmt: skip
        assert text in page
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page  # a setting that is HTML
    (run,) = data_of(page)["runs"]
    growth = run["growths"][0]
    assert growth["experts"][0]["id"] == "0" and growth["load"] and growth["marks"]
    assert len(page) < 5_000_000


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = read_run(write_bench(tmp_path / "b"))
    assert render_page([run]) == render_page([run])


def test_fates_parents_and_reasons_come_with_each_expert() -> None:
    events = [
        event(0, "init", [0, 1, 2]),
        event(5, "spawn", [0], 3, reason="novel"),
        event(6, "merge", [0, 3], 4, reason="alike", change=0.02),
        event(7, "prune", [1], reason="idle"),
        event(8, "freeze", [2]),
        event(9, "merge", [2, 4], reason="no", accepted=False),
    ]
    run = Run("r", "t", growths=[Growth("g", events)])
    experts = {e["id"]: e for e in data_of(render_page([run]))["runs"][0]["growths"][0]["experts"]}
    assert {id: e["fate"] for id, e in experts.items()} == {
        "0": "merged", "1": "pruned", "2": "frozen", "3": "merged", "4": "alive",
    }  # fmt: skip
    assert experts["4"]["parents"] == ["0", "3"] and experts["4"]["why"] == "alike"
    assert experts["3"]["child"] == "4" and experts["1"]["end"] == "idle"
    assert experts["2"]["frozen"] == [[8, None]]


def test_several_runs_are_compared_first(tmp_path: Path) -> None:
    a, b = read_run(write_bench(tmp_path / "a")), read_run(write_bench(tmp_path / "b", seeds=1))
    both = compare_runs([a, b])
    ((table, _),) = both.tables
    assert table[0][:2] == ["run", "method"]
    assert [row[:2] for row in table[1:]] == [
        ["a", "growmoe"], ["a", "naive"], ["b", "growmoe"], ["b", "naive"],
    ]  # fmt: skip
    assert [line.name for line in both.charts[0].lines] == [
        "a: growmoe", "a: naive", "b: growmoe", "b: naive",
    ]  # fmt: skip
    page = render_page([a, b])
    assert page.count('<section class="run"') == 3 and 'id="run-choice"' in page
    assert compare_runs([a, a]).tables[0][0][1][0] == "a (1)"


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(ReportError, match="no run"):
        render_page([])
