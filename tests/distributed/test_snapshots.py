"""Snapshots keep every expert twice, send what changed alone, and give back every bit."""

import pytest
import torch
from distributed_training import advance, begin, everything
from gloo_workers import on_workers
from hypothesis import given
from hypothesis import strategies as st

from growmoe import moe_layers, surgery
from growmoe.distributed.snapshots import ExpertsLost, Packet, Snapshots, settled


def test_a_packet_gives_back_every_bit():
    value = {
        "a": [torch.randn(3, 2, dtype=torch.float64), None, 1.5],
        ("b", 1): torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    packet = Packet.of(value)
    back = packet.value()
    assert list(back) == list(value)
    assert torch.equal(back["a"][0], value["a"][0]) and back["a"][1:] == [None, 1.5]
    assert torch.equal(back["half"], value["half"]) and back["half"].dtype is torch.bfloat16
    assert back["empty"].shape == (0, 4) and back["flag"].tolist() == [True, False]
    assert packet.same(Packet.of(value)) and not packet.same(None)
    value["nan"][1] = 0.0  # another bit, an equal number
    assert not packet.same(Packet.of(value))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_experts_of_the_gone_find_a_place_and_all_are_held(loads, size, data):
    before = data.draw(st.integers(1, 4))
    stay = data.draw(st.sets(st.integers(0, before - 1), max_size=min(size, before)))
    now_of = {old: now for now, old in enumerate(sorted(stay))}
    holders = {i: (data.draw(st.integers(0, before - 1)),) for i in range(len(loads))}
    result = settled(holders, dict(enumerate(loads)), now_of, size)
    assert result.keys() == holders.keys()
    assert all(ranks and all(0 <= r < size for r in ranks) for ranks in result.values())


def back_and_forth(rank, size):
    run = begin(size)
    layer = next(iter(moe_layers(run.model).values()))
    snapshots = Snapshots()
    snapshots.join(run.parallel, 1)
    advance(run, rank, size, 0, 8)
    snapshots.take(8, run.organizer)
    then = everything(run)  # while it is under way
    snapshots.wait()
    advance(run, rank, size, 8, 10)  # a spawn, a prune
    surgery.freeze(layer, [next(iter(layer.experts))])
    surgery.prune(layer, list(layer.experts)[-3:], run.optimizer)  # several to be built again
    found = snapshots.restore(run.organizer)
    now = everything(run)
    sent = snapshots.sent
    snapshots.take(found.step, run.organizer)  # nothing changed
    snapshots.wait()
    copies = len(snapshots.kept[-1].packets)
    unsent = snapshots.sent - sent
    return found.step, then, now, unsent, copies, len(layer.experts), len(layer.experts.local())


@pytest.mark.slow
def test_a_snapshot_gives_back_structure_weights_moments_and_lineage():
    for step, then, now, unsent, copies, experts, own in on_workers(2, back_and_forth):
        assert step == 8 and unsent == 0
        assert copies == experts > own  # of two workers each has all
        assert then.keys() == now.keys()
        for key, value in then.items():
            same = torch.equal(value, now[key]) if torch.is_tensor(value) else value == now[key]
            assert same, key


def lost(rank, size):
    run = begin(size)
    snapshots = Snapshots()
    snapshots.join(run.parallel, 1)
    advance(run, rank, size, 0, 2)
    snapshots.take(2, run.organizer)
    snapshots.wait()
    if rank == 0:  # as if workers 0 and 1 had been replaced
        snapshots.kept = []
    if rank == 1:
        snapshots.kept = []
    try:
        snapshots.restore(run.organizer)
    except ExpertsLost as error:
        return str(error)


def test_experts_that_nobody_has_are_named():
    for message in on_workers(3, lost):
        assert "no living worker has a copy of 1.experts." in message


def test_two_copies_are_where_one_failure_leaves_one():
    for leads, keeps in on_workers(3, kept):
        assert len(keeps) == 2 * len(leads) or len(keeps) > len(leads)


def kept(rank, size):
    run = begin(size, experts=6)
    snapshots = Snapshots()
    snapshots.join(run.parallel, 1)
    snapshots.take(0, run.organizer)
    snapshots.wait()
    everyone = run.parallel.workers.objects(list(snapshots.kept[-1].packets))
    for name in snapshots.kept[-1].names:
        assert sum(name in names for names in everyone) == 2
    return [e.id for e in run.parallel.layers["1"].experts.local()], everyone[rank]


@pytest.mark.parametrize("size", [2])
def test_what_has_not_changed_is_not_sent_again(size):
    for first, second, third in on_workers(size, incremental):
        assert first > 0 and third == 0
        assert 0 < second < first  # one expert of several learned


def incremental(rank, size):
    run = begin(size, experts=6)
    snapshots = Snapshots()
    snapshots.join(run.parallel, 1)
    sent = []
    for _ in range(3):
        before = snapshots.sent
        snapshots.take(0, run.organizer)
        snapshots.wait()
        sent.append(snapshots.sent - before)
        if len(sent) == 1:
            mine = run.parallel.layers["1"].experts.local()[0]
            with torch.no_grad():
                next(iter(mine.body.parameters())).add_(1)
    return sent
