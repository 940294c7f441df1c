"""A loop of one's own leaves a folder that the report reads, and TensorBoard's files if wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import growmoe
from growmoe.report import RunLog, count_routing, read_run


def trained(log: bool, path: Path, **options: bool) -> tuple[torch.nn.Module, RunLog | None]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(growmoe.MoE(2, growmoe.FFN(4), 3), torch.nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    growmoe.Organizer(model, optimizer)
    writer = RunLog(path, model, title="mine", settings={"lr": 1e-2}, **options) if log else None
    for step in range(20):
        loss = model(torch.randn(16, 2)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 10:
            growmoe.surgery.spawn(model[0], 1, optimizer)
        if writer is not None and step % 5 == 0:
            writer.write(step, loss=loss.item())
    return model, writer


def test_figures_loads_lineage_and_routing_are_read_back(tmp_path: Path) -> None:
    model, log = trained(True, tmp_path / "run")
    assert log is not None
    x = torch.randn(30, 2)
    counts = count_routing(model[0], x, torch.arange(30) % 2)
    log.write_routing("0", counts, ["even", "odd"])
    run = read_run(tmp_path / "run")
    assert (run.title, run.settings) == ("mine", {"lr": 1e-2})
    assert run.charts[0].title == "loss" and run.charts[0].lines[0].x == [0, 5, 10, 15]
    (growth,) = run.growths  # though the layer learned its name after its first event
    assert growth.name == "layer 0" and [e["act"] for e in growth.events] == ["init", "spawn"]
    assert [len(m["load"]) for m in growth.load] == [3, 3, 4, 4]
    assert growth.routing == [{
        "by": "class", "experts": [0, 1, 2, 3], "groups": ["even", "odd"],
        "counts": counts.tolist(),
    }]  # fmt: skip


def test_logging_changes_nothing_of_the_training(tmp_path: Path) -> None:
    with_log, without = trained(True, tmp_path / "a")[0], trained(False, tmp_path / "b")[0]
    for p, q in zip(with_log.parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q)


def test_tensorboard_gets_scalars_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trained(True, tmp_path / "run", tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert "loss" in events.Tags()["scalars"] and "load/0" in events.Tags()["histograms"]
    assert [e.value for e in events.Scalars("experts/0")] == [3, 3, 4, 4]


def test_folders_of_others_and_bad_counts_are_refused(tmp_path: Path) -> None:
    model = growmoe.MoE(2, growmoe.FFN(4), 3)
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no log"):
        RunLog(tmp_path, model)
    with pytest.raises(ValueError, match=r"no growmoe\.MoE layer"):
        RunLog(tmp_path / "run", torch.nn.Linear(2, 2))
    log = RunLog(tmp_path / "run", model)
    with pytest.raises(ValueError, match="no layer 'other'"):
        log.write_routing("other", torch.zeros(3, 2), ["a", "b"])
    with pytest.raises(ValueError, match=r"counts are \(3, 1\), for 3 experts and 2 groups"):
        log.write_routing("moe", torch.zeros(3, 1), ["a", "b"])
