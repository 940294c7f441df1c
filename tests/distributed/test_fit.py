"""A run survives its workers."""

import pytest
import torch
from survival_loops import Once, Resize, alone, train

from growmoe.distributed import ClusterError, WorkerError, fit


def run(steps, at=None, **options):
    return fit(train, {"steps": steps, "at": at}, on="processes", **{"timeout": 20.0, **options})


def assert_as_alone(value, one, tolerance=1e-9):
    assert value["events"] == one["events"]
    assert value["losses"].keys() == one["losses"].keys()
    for step, loss in one["losses"].items():
        assert value["losses"][step] == pytest.approx(loss, rel=tolerance, abs=tolerance), step
    assert value["state"].keys() == one["state"].keys()
    for name, t in one["state"].items():
        torch.testing.assert_close(value["state"][name], t, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_run_with_deaths_in_every_phase_equals_one_without(tmp_path):
    plan = {("forward", 13): 1, ("backward", 27): 0, ("surgery", 36): 2, ("between", 49): 1}
    result = run(60, Once(tmp_path, plan), num_workers=3, repeat=10, checkpoint=tmp_path / "run")
    assert len(result.recoveries) == 4
    assert all(r.exact and r.repeated <= 10 and r.workers == 3 for r in result.recoveries)
    undisturbed = run(60, num_workers=3, repeat=10)
    assert result.value["events"] == undisturbed.value["events"]
    assert result.value["losses"] == undisturbed.value["losses"]  # bit for bit
    for name, t in undisturbed.value["state"].items():
        assert torch.equal(result.value["state"][name], t)
    assert_as_alone(result.value, alone(60))


@pytest.mark.slow
def test_survivors_go_on_alone_and_a_replacement_joins(tmp_path):
    result = run(150, Once(tmp_path, {("backward", 15): 1}), num_workers=(1, 3), repeat=8)
    sizes = result.value["sizes"]
    assert sizes[0] == 3 and 2 in sizes.values() and sizes[149] == 3
    assert_as_alone(result.value, alone(150))


@pytest.mark.slow
def test_scaling_down_and_up_is_exact():
    result = run(120, Resize({20: 2, 50: 4}), num_workers=(1, 4), repeat=10)
    sizes = result.value["sizes"]
    assert sizes[0] == 4 and sizes[40] == 2 and sizes[119] == 4
    assert not result.recoveries
    assert_as_alone(result.value, alone(120))
