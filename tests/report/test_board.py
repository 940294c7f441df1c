"""What TensorBoard is given of a bench is what the cells say, once and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from bench_runs import write_bench
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from growmoe.continual import store
from growmoe.report.board import BenchBoard


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), {"histograms": 0})
    events.Reload()
    return events


def test_each_cell_is_a_run_with_its_curves_experts_and_loads(tmp_path: Path) -> None:
    records, _ = store.read_cells(write_bench(tmp_path / "run", seeds=1))
    board = BenchBoard(tmp_path / "tensorboard")
    assert not (tmp_path / "tensorboard").exists()
    for record in records:
        board.cell(record)
    assert sorted(p.name for p in (tmp_path / "tensorboard").iterdir()) == [
        "growmoe-seed0", "naive-seed0",
    ]  # fmt: skip
    events = read(tmp_path / "tensorboard" / "growmoe-seed0")
    (cell,) = [record for record in records if record["method"] == "growmoe"]
    scalars = [(e.step, e.value) for e in events.Scalars("accuracy/any-time")]
    assert scalars == [(seen, pytest.approx(value)) for seen, value in cell["anytime"]]
    assert [e.value for e in events.Scalars("experts/moe")] == [
        len(entry["load"]) for entry in cell["load_history"]
    ]
    assert len(events.Histograms("load/moe")) == len(cell["load_history"])
    assert len(events.Scalars("accuracy/by experience")) == len(cell["accuracy_matrix"])


def test_a_cell_written_again_replaces_itself(tmp_path: Path) -> None:
    records, _ = store.read_cells(write_bench(tmp_path / "run", seeds=1, rival=False))
    left = tmp_path / "tensorboard" / ".growmoe-seed0.unfinished"  # of a run that was killed
    left.mkdir(parents=True)
    (left / "events").write_text("half")
    for _ in range(2):
        BenchBoard(tmp_path / "tensorboard").cell(records[0])
    assert [p.name for p in (tmp_path / "tensorboard").iterdir()] == ["growmoe-seed0"]
    assert len(list((tmp_path / "tensorboard" / "growmoe-seed0").iterdir())) == 1
