"""Folders of runs are read as they stand, finished or not; what is no run says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_runs import event, write_bench

from growmoe.continual import store
from growmoe.report import ReportError, read_run


def test_a_bench_gives_its_table_curves_matrices_and_growths(tmp_path: Path) -> None:
    run = read_run(write_bench(tmp_path / "b", experiences=4, experts=9, seeds=3))
    table, note = run.tables[0]
    assert table[0][:3] == ["method", "seeds", "final accuracy"] and "percent" in note
    assert [row[0] for row in table[1:]] == ["growmoe", "naive"]
    assert run.command == "growmoe bench 'a stream' --seeds 2"
    assert run.conditions["versions"] == {"python": "3.11", "growmoe": "0.1.0"}
    chart = run.charts[0]
    assert [line.name for line in chart.lines] == ["growmoe", "naive"]
    line = chart.lines[0]
    assert line.x == [1, 2, 3, 4] and line.low is not None and line.high is not None
    assert all(a < y < b for a, y, b in zip(line.low, line.y, line.high, strict=True))
    assert [name for name in run.matrices if "growmoe" in name] == [
        "growmoe, mean of 3 seeds", "growmoe, seed 0", "growmoe, seed 1", "growmoe, seed 2",
    ]  # fmt: skip
    assert [growth.name for growth in run.growths] == [
        f"growmoe, seed {i}, layer moe" for i in range(3)
    ]
    assert len(run.growths[0].load) == 4


def test_a_bench_that_goes_on_gives_its_finished_cells_and_names_the_broken(tmp_path: Path) -> None:
    folder = write_bench(tmp_path / "b")
    (folder / "results.json").unlink()
    path = store.cell_path(folder, "naive", 1)
    path.write_text(path.read_text()[:-20])
    run = read_run(folder)
    assert [row[1] for row in run.tables[0][0][1:]] == ["2", "1"]
    assert "naive-seed1" in run.note


def test_results_without_their_cells_are_read_with_the_lineage_beside_them(tmp_path: Path) -> None:
    folder = write_bench(tmp_path / "b", seeds=1)
    events = read_run(folder).growths[0].events
    for path in (folder / "cells").iterdir():
        path.unlink()
    (folder / "cells").rmdir()
    (folder / "lineage").mkdir()
    lines = "".join(json.dumps(e) + "\n" for e in events)
    (folder / "lineage" / "growmoe-seed0.jsonl").write_text(lines)
    run = read_run(folder)
    assert run.growths[0].events == events
    assert "growmoe, seed 0" in run.matrices


def test_a_lineage_file_alone_is_enough_and_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lineage.jsonl"
    events = [event(0, "init", [0]), event(3, "spawn", [0], 1)]
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"step": 4, "la')
    assert read_run(path).growths[0].events == events
    assert read_run(tmp_path).growths[0].events == events
    path.write_text('{"step": 4, "la\n' + json.dumps(events[0]) + "\n")
    with pytest.raises(ReportError, match=r"lineage\.jsonl, line 1 is no JSON"):
        read_run(path)


def test_long_load_histories_are_averaged_not_cut(tmp_path: Path) -> None:
    folder = write_bench(tmp_path / "b", seeds=1)
    path = store.cell_path(folder, "growmoe", 0)
    record = json.loads(path.read_text())
    record["load_history"] = [{"step": s, "load": {"0": (s % 2) * 1.0}} for s in range(1000)]
    record["checksum"] = store._checksum(record)
    path.write_text(json.dumps(record))
    load = read_run(folder).growths[0].load
    assert len(load) <= 120 and load[-1]["step"] == 999
    assert sum(entry["load"]["0"] for entry in load[:-1]) / (len(load) - 1) == pytest.approx(
        0.5, abs=0.06
    )


def test_what_is_no_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="does not exist"):
        read_run(tmp_path / "none")
    with pytest.raises(ReportError, match="is no run: it has neither cells/"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReportError, match="cannot be read as a run"):
        read_run(tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "results.json").unlink()
    with pytest.raises(ReportError, match="no finished cell yet"):
        read_run(tmp_path)
