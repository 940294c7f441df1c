"""A run survives its workers."""

import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from survival_loops import Chain, FullDisk, Leisurely, Once, Resize, alone, build, train

import growmoe
from growmoe.distributed import ClusterError, Run, WorkerError, actors, fit
from growmoe.distributed.dashboard import dashboard
from growmoe.distributed.member import Settings, versions
from growmoe.distributed.processes import Processes
from growmoe.distributed.progress import text_of
from growmoe.distributed.supervisor import Supervisor


def run(steps, at=None, replicas=1, **options):
    config = {"steps": steps, "at": at, "replicas": replicas}
    return fit(train, config, on="processes", **{"timeout": 20.0, **options})


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
    plan = {("forward", 4): 1, ("backward", 10): 0, ("surgery", 16): 2, ("between", 22): 1}
    result = run(30, Once(tmp_path, plan), num_workers=3, repeat=6, checkpoint=tmp_path / "run")
    assert len(result.recoveries) == 4
    assert all(r.exact and r.repeated <= 6 and r.workers == 3 for r in result.recoveries)
    assert_as_alone(result.value, alone(30))


@pytest.mark.slow
def test_who_waits_for_another_survivor_learns_of_a_death_long_before_the_time_out():
    result = run(6, Chain("surgery", 4), num_workers=3, repeat=2, timeout=60.0)
    (recovery,) = result.recoveries
    assert recovery.exact and recovery.seconds < 30


@pytest.mark.slow
def test_a_group_that_is_left_closes_its_connections():
    code = """
import gc, os, tempfile, torch
from growmoe.distributed import member
from torch import distributed
with tempfile.TemporaryDirectory() as folder:
    meet = "file://" + folder + "/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads the compiler and more
    distributed.all_reduce(torch.ones(1))
    distributed.destroy_process_group()
gc.collect()
tasks = os.listdir("/proc/self/task")
print({open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python" in done.stdout and "gloo" not in done.stdout


@pytest.mark.slow
def test_survivors_go_on_alone_and_a_replacement_joins(tmp_path, monkeypatch):
    alone_seen = []
    room = Processes.room
    # the replacement comes once the survivor has been seen to go on without it
    monkeypatch.setattr(
        Processes, "room", lambda self: room(self) if not self.living or alone_seen else 0
    )

    def watch(status):
        if status["workers"] == 1:
            alone_seen.append(True)

    at = Leisurely(Once(tmp_path, {("backward", 9): 1}))
    result = run(50, at, num_workers=(1, 2), repeat=6, watch=watch)
    sizes = result.value["sizes"]
    assert sizes[0] == 2 and 1 in sizes.values() and sizes[49] == 2
    assert_as_alone(result.value, alone(50))


@pytest.mark.slow
def test_scaling_down_and_up_is_exact():
    result = run(50, Resize({6: 2, 20: 4}), num_workers=(1, 4), repeat=4)
    sizes = result.value["sizes"]
    assert sizes[0] == 4 and sizes[18] == 2 and sizes[49] == 4
    assert not result.recoveries
    assert_as_alone(result.value, alone(50))


@pytest.mark.slow
def test_replicas_of_all_experts_outlive_a_death_and_another_number_of_workers(tmp_path):
    at = Resize({14: 3, 30: 4}, Once(tmp_path, {("backward", 8): 2}))
    result = run(44, at, replicas=2, num_workers=(3, 4), repeat=4)
    seen = [(result.value["sizes"][s], result.value["replicas"][s]) for s in (0, 26, 43)]
    assert seen == [(4, 2), (3, 1), (4, 2)]
    (recovery,) = result.recoveries
    assert recovery.exact
    assert_as_alone(result.value, alone(44))


@pytest.mark.slow
def test_replicas_that_are_not_positive_are_refused():
    with pytest.raises(WorkerError, match="replicas must be positive, got 0"):
        run(5, replicas=0, num_workers=2)


@pytest.mark.slow
def test_a_mistake_in_the_loop_ends_the_run_and_is_shown(tmp_path):
    at = Once(tmp_path, {("forward", 2): 1}, "raise")
    with pytest.raises(WorkerError, match=r"(?s)worker 1: .*a mistake in the loop"):
        run(5, at, num_workers=2, repeat=2)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_replaced(tmp_path):
    at = Once(tmp_path, {("forward", 5): 1}, "hang")
    result = run(8, at, num_workers=2, repeat=2, timeout=4.0)
    (recovery,) = result.recoveries
    assert recovery.reason == "did not answer" and recovery.exact and recovery.workers == 2
    assert_as_alone(result.value, alone(8))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays_whole(tmp_path):
    folder = tmp_path / "run"
    options = {"num_workers": 2, "repeat": 4, "checkpoint": folder, "checkpoint_every": 5}
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"OSError: worker 0: .*main.*File too large"):
        # there is room for the shards, but not for the main file
        run(12, FullDisk(("between", 7), 0, 50_000), **options)
    assert time.monotonic() - begin < 60
    assert len(list(folder.iterdir())) == 3  # nothing half written is left
    model, optimizer, organizer = build()
    assert growmoe.load(folder, model, optimizer, organizer)["step"] == 5
    assert_as_alone(run(12, **options).value, alone(12))


class Elsewhere:
    """A launcher of workers that say what they are told to and do nothing."""

    host = "127.0.0.1"

    def __init__(self, said=None, room=9, dies=False):
        self.said, self.free, self.dies, self.closed = said, room, dies, False

    def room(self):
        return self.free

    def start(self, worker, port):
        self.free -= 1
        store = torch.distributed.TCPStore(self.host, port, is_master=False)
        if self.said:
            store.set(f"ready/{worker}", json.dumps(self.said))
        self.started = worker

    def ended(self):
        self.free += self.dies
        return {self.started: "exit code 1"} if self.dies else {}

    def kill(self, worker):
        pass

    def close(self):
        self.closed = True


def failing(launcher, **options):
    with pytest.raises(ClusterError) as error:
        Supervisor(launcher, 2, 2, start_timeout=0.3, **options).run()
    assert launcher.closed
    return str(error.value)


def test_workers_with_other_versions_are_refused():
    said = failing(Elsewhere({**versions(), "torch": "1.0"}))
    assert "other versions" in said and "'torch': '1.0'" in said


def test_workers_that_do_not_come_are_not_waited_for_ever():
    said = failing(Elsewhere())
    assert "0 workers after" in said and "at least 2 are needed" in said
    assert "0 more could be started" in failing(Elsewhere(room=0))


def test_workers_that_die_when_they_start_end_the_run():
    assert "exit code 1" in failing(Elsewhere(dies=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"num_workers": (3, 2)}, "num_workers"),
        ({"repeat": 0}, "repeat"),
        ({"checkpoint_every": 5}, "needs a folder"),
        ({"on": "paper"}, "'ray' or 'processes'"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        fit(train, **{"on": "processes", **options})


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"growmoe\[distributed\]"):
        fit(train)


def test_a_loop_that_was_typed_in_is_refused_where_workers_cannot_find_it(monkeypatch):
    def typed(config, run):
        pass

    typed.__module__ = "__main__"
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # as in a notebook
    with pytest.raises(ValueError, match="put it into a module"):
        fit(typed, on="processes")


def test_the_bar_tells_of_all_workers():
    status = {"workers": 3, "experts": {"a": 4, "b": 5}, "imbalance": 1.25, "sent": {"rows": 3e6}}
    text = text_of({**status, "values": {"loss": 0.51234}})
    assert text == "3 workers · 9 experts · busiest 1.25 × mean · 3 MB sent · loss 0.5123"
    assert text_of({**status, "recoveries": 1}).endswith("3 MB sent · 1 recovery")


@pytest.mark.slow
def test_what_ray_prints_of_a_worker_that_fit_replaces_is_not_shown_and_all_else_is():
    pytest.importorskip("ray")
    script = """
from growmoe.distributed import actors
actors.require_ray()
from ray._private.ray_logging import stdout_deduplicator
said = [f"{actors._DEATH}. Worker ID: 1", "Workers killed due to memory pressure (OOM)"]
print(stdout_deduplicator.deduplicate({"lines": said, "pid": "raylet", "ip": "", "is_err": False}))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_DEDUP")}
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "memory pressure" in found.stdout and "worker died" not in found.stdout


def one_part(rows, rank, size):
    place = Run(None, 1, rank, size, Settings(), None, lambda status: None)
    return place.part(torch.arange(rows)), place.weight


def test_parts_cover_the_batch_and_weights_make_up_for_uneven_ones():
    parts = [one_part(8, rank, 3) for rank in range(3)]
    assert torch.cat([p for p, _ in parts]).tolist() == list(range(8))
    assert sum(w for _, w in parts) == pytest.approx(3)
    mean = sum(w * p.double().mean().item() for p, w in parts) / 3
    assert mean == pytest.approx(3.5)
    with pytest.raises(ValueError, match="2 rows cannot be divided among 3"):
        one_part(2, 0, 3)


def test_every_panel_asks_for_a_metric_that_workers_tell():
    told = Path(actors.__file__).read_text()
    for panel in dashboard()["panels"]:
        (name,) = re.findall(r"ray_(growmoe_[a-z_]+)", panel["targets"][0]["expr"])
        assert f'"{name.removesuffix("_total")}"' in told
