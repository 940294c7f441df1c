"""Checkpoints in shards load on any number of workers, and by plain `growmoe.load`."""

import os
from pathlib import Path

import pytest
import torch
from distributed_training import advance, begin, everything
from gloo_workers import on_workers

import growmoe
from growmoe import distributed


def write(rank, size, path):
    run = begin(size)
    advance(run, rank, size, 0, 12)
    distributed.save(path, run.parallel, run.organizer, extra={"step": 12})
    return everything(run)


def read(rank, size, path, more):
    run = begin(size, seed=1)
    extra = distributed.load(path, run.parallel, run.organizer)
    state = everything(run)
    advance(run, rank, size, 12, 12 + more)
    return extra, state, everything(run)


@pytest.mark.slow
def test_a_checkpoint_of_four_workers_loads_on_any_number(tmp_path):
    path = str(tmp_path / "run")
    saved = on_workers(4, write, path)[0]
    run = begin(1, seed=1)
    assert growmoe.load(path, run.model, run.optimizer, run.organizer) == {"step": 12}
    assert_same(everything(run), saved)
    for size in (2, 3):
        for extra, state, _ in on_workers(size, read, path, 0):
            assert extra == {"step": 12}
            assert_same(state, saved)
    # on the same workers training goes on bit for bit
    four = on_workers(4, read, path, 6)[0][2]
    again = on_workers(4, straight, 18)[0]
    assert_same(four, again)


def straight(rank, size, steps):
    run = begin(size)
    advance(run, rank, size, 0, steps)
    return everything(run)


def torn(rank, size, path):
    run = begin(size)
    advance(run, rank, size, 0, 3)
    distributed.save(path, run.parallel, run.organizer, extra=1)
    before = {f.name: f.read_bytes() for f in Path(path).iterdir()}
    advance(run, rank, size, 3, 5)
    real = growmoe.checkpoint._write
    if rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        growmoe.checkpoint._write = full
    said = []
    try:
        distributed.save(path, run.parallel, run.organizer, extra=2)
    except OSError as error:
        said.append(str(error))
    growmoe.checkpoint._write = real
    run.parallel.workers.objects(None)
    whole = {f.name: f.read_bytes() for f in Path(path).iterdir()} == before
    run.parallel.workers.objects(None)
    if rank == 0:
        victim = sorted(Path(path).glob("experts-*-1.safetensors"))[0]
        data = bytearray(victim.read_bytes())
        data[-3] ^= 1
        victim.write_bytes(data)
        os.sync()
    run.parallel.workers.objects(None)
    try:
        distributed.load(path, run.parallel, run.organizer)
    except ValueError as error:
        said.append(str(error))
    return said, whole


def test_a_full_disk_or_a_damaged_shard_is_told_to_all_and_harms_nothing(tmp_path):
    for said, whole in on_workers(2, torn, str(tmp_path / "run")):
        assert "No space left" in said[0] and "damaged" in said[1]
        assert whole


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key
