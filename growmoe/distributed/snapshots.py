"""Snapshots in memory, in which every expert is kept on two workers.

A snapshot is a checkpoint that is not written: its main part, the same everywhere, is kept by every
worker; each expert's part by the worker that leads it and by the next one. Only experts that
changed since the last snapshot travel, on a group of their own, while training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from growmoe import checkpoint
from growmoe.distributed import checkpoint as shards
from growmoe.distributed.bank import Holders
from growmoe.distributed.parallel import Parallel
from growmoe.distributed.placement import place
from growmoe.experts.statistics import FIELDS
from growmoe.organizer import Organizer

LOAD = FIELDS.index("load")
ALIGNMENT = 16  # bytes, so that each tensor in a packet can be a view on its data


class ExpertsLost(RuntimeError):
    """No worker that lives has a copy of some experts."""


@dataclass(frozen=True)
class Packet:
    """Plain values and tensors as one text and one tensor of bytes.

    Attributes:
        text: JSON, as in a checkpoint.
        layout: name, dtype, shape and first byte of each tensor.
        data: uint8, on the CPU.
    """

    text: str
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    data: Tensor

    @classmethod
    def of(cls, value: Any) -> Packet:
        """A copy of the value. Raises ValueError as `growmoe.save`."""
        tensors: dict[str, Tensor] = {}
        text = json.dumps(checkpoint._encode(value, "", tensors))
        layout, end = [], 0
        for name, t in tensors.items():
            layout.append((name, t.dtype, tuple(t.shape), end))
            end += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        data = torch.zeros(end, dtype=torch.uint8)
        for (_, _, _, first), t in zip(layout, tensors.values(), strict=True):
            if t.numel():
                data[first : first + t.nbytes] = t.reshape(-1).view(torch.uint8)
        return cls(text, tuple(layout), data)

    def value(self) -> Any:
        """What it was made of, copied."""
        tensors = {}
        for name, dtype, shape, first in self.layout:
            size = torch.Size(shape).numel() * dtype.itemsize
            # not a view: Generator.set_state reads a tensor's storage from its beginning
            tensors[name] = self.data[first : first + size].view(dtype).view(shape).clone()
        return checkpoint._decode(json.loads(self.text), tensors)

    def same(self, other: Packet | None) -> bool:
        """Whether both agree in every bit."""
        return (
            other is not None
            and (self.text, self.layout) == (other.text, other.layout)
            and torch.equal(self.data, other.data)
        )


Key = tuple[int, int]  # generation of the group, step


@dataclass
class Snapshot:
    """What one worker has of a snapshot.

    Attributes:
        key: generation and step; the newest that is whole counts.
        rank, size: this worker's, and the number of workers, when it was taken.
        holders: where experts were.
        main: all that is replicated.
        randoms: every worker's random state.
        packets: by name of the body in the model, those that have arrived among them.
        names: of all bodies, anywhere.
    """

    key: Key
    rank: int
    size: int
    holders: dict[str, Holders]
    main: Packet
    randoms: list[Any]
    packets: dict[str, Packet]
    names: list[str]
    arriving: list[tuple[Any, str, Packet]] = field(default_factory=list)
    leaving: list[tuple[Any, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Restored:
    """What came of `Snapshots.restore`.

    Attributes:
        step: of the snapshot.
        extra: as it was given.
        random: this worker's random state, if there were as many workers then.
        key: of the snapshot.
        moved: bytes of experts that went between workers.
    """

    step: int
    extra: Any
    random: Any
    key: Key
    moved: int


class Snapshots:
    """This worker's snapshots: the last that is complete everywhere, and the one under way.

    They outlive the group: after a failure, `join` another and `restore`.
    """

    def __init__(self) -> None:
        self.kept: list[Snapshot] = []
        self.sent = 0
        self._there: dict[str, Packet] = {}  # what the next worker has of ours
        self._theirs: dict[str, Packet] = {}  # what we have of the previous worker's

    def join(self, parallel: Parallel, generation: int) -> None:
        """Go on in a new group; all workers call it. They have no copies of each other yet."""
        self.parallel, self.generation = parallel, generation
        workers = parallel.workers
        whole: Any = workers.group
        # on the CPU and apart from the training's collectives, whatever these run on
        self.group: Any = distributed.new_group(
            [distributed.get_global_rank(whole, r) for r in range(workers.size)],
            backend="gloo",
        )
        self._there, self._theirs = {}, {}

    def leave(self) -> None:
        """Let go of the group, and of what was under way in it: that never arrives."""
        parallel = vars(self).pop("parallel", None)
        if parallel is not None:
            parallel.workers.leave()
        self.group = None
        for snapshot in self.kept:
            snapshot.arriving, snapshot.leaving = [], []

    # Taking one.

    @property
    def pending(self) -> Snapshot | None:
        last = self.kept[-1] if self.kept else None
        return last if last is not None and (last.arriving or last.leaving) else None

    def take(
        self,
        step: int,
        organizer: Organizer | None = None,
        scheduler: Any = None,
        extra: Any = None,
        among: Sequence[int] | None = None,
    ) -> Snapshot:
        """Begin a snapshot of the state between two steps; all workers call it.

        Gradients that wait for a step are not part of it. `wait` completes it.

        Args:
            among: the ranks that keep it; all if left out.
        """
        self.wait()
        parallel, workers = self.parallel, self.parallel.workers
        rank, size = workers.rank, workers.size
        content = shards._replicated(parallel, organizer, scheduler, extra)
        del content["random"]  # it is each worker's own
        main = Packet.of(content)
        own: dict[str, Packet] = {}
        for name, part in shards._parts(parallel).items():
            packet, there = Packet.of(part), self._there.get(name)
            own[name] = there if there is not None and packet.same(there) else packet
        changed = [n for n, p in own.items() if self._there.get(n) is not p]
        headers = [(n, own[n].text, own[n].layout, own[n].data.numel()) for n in changed]
        told = self._objects((list(own), headers, checkpoint._random_state()))
        # all have waited for the one before, so what is older is not needed any more
        self.kept = self.kept[-1:]
        ring = list(range(size)) if among is None else sorted(among)
        snapshot = Snapshot(
            (self.generation, step), rank, size, parallel.holders(), main,
            [random for *_, random in told], dict(own), [n for names, *_ in told for n in names],
        )  # fmt: skip
        if rank in ring and len(ring) > 1:
            place_of = ring.index(rank)
            follower, leader = ring[(place_of + 1) % len(ring)], ring[place_of - 1]
            names, coming, _ = told[leader]
            self._theirs = {n: p for n, p in self._theirs.items() if n in names}
            for tag, (name, text, layout, size_) in enumerate(coming):
                self._theirs.pop(name, None)
                packet = Packet(text, layout, torch.empty(size_, dtype=torch.uint8))
                if size_:
                    work = distributed.irecv(
                        packet.data, group=self.group, group_src=leader, tag=tag
                    )
                    snapshot.arriving.append((work, name, packet))
                else:
                    self._theirs[name] = packet
            for tag, name in enumerate(changed):
                data = own[name].data
                if data.numel():
                    work = distributed.isend(data, group=self.group, group_dst=follower, tag=tag)
                    snapshot.leaving.append((work, data))
                    self.sent += data.numel()
            snapshot.packets |= self._theirs
            self._there = own
        elif rank not in ring and own:
            raise AssertionError(f"worker {rank} leads {list(own)} but keeps no snapshot")
        self.kept.append(snapshot)
        workers.sent["snapshots"] = self.sent
        return snapshot

    def wait(self) -> None:
        """Until the snapshot under way has arrived here and left; raises if a worker died."""
        last = self.pending
        if last is None:
            return
        for work, name, packet in last.arriving:
            work.wait()
            last.packets[name] = self._theirs[name] = packet
        last.arriving = []
        for work, _ in last.leaving:
            work.wait()
        last.leaving = []

    # Going back to one.

    def restore(
        self,
        organizer: Organizer | None = None,
        scheduler: Any = None,
        experts: dict[str, Callable[[], nn.Module]] | None = None,
    ) -> Restored | None:
        """Bring model, optimizers and the rest to the newest whole snapshot; all workers call it.

        Experts stay where they were, if as many workers are there as then. Else those whose worker
        is gone go to the least loaded, and some move to workers that have none.

        Returns:
            None if nobody has a snapshot.

        Raises:
            ExpertsLost: there are snapshots, but none of which every expert is on a living worker.
        """
        workers = self.parallel.workers
        mine = {s.key: (s.rank, s.size, s.names, list(s.packets)) for s in self.kept}
        told: list[dict[Key, Any]] = self._objects(mine)
        lost: list[str] = []
        for key in sorted({k for has in told for k in has}, reverse=True):
            having = {rank: has[key] for rank, has in enumerate(told) if key in has}
            names = set(next(iter(having.values()))[2])
            lost = sorted(names - {n for *_, there in having.values() for n in there})
            if not lost:
                break
        else:
            if not any(told):
                return None
            raise ExpertsLost(
                f"no living worker has a copy of {', '.join(lost[:5])}"
                + (f" and {len(lost) - 5} more experts" if len(lost) > 5 else "")
            )
        own = next((s for s in self.kept if s.key == key), None)
        source = min(having)
        head = None if own is None else (own.main, own.randoms, own.holders)
        if len(having) < workers.size:
            told_head = self._told(head, source)
            head = told_head if head is None else head
        assert head is not None
        main, randoms, held = head
        found = main.value()
        shards._restructure(self.parallel, found, experts)
        packets = {} if own is None else own.packets
        then = {rank: has[0] for rank, has in having.items()}
        size_then = next(iter(having.values()))[1]
        self._settle(found, held, then, size_then)
        moved = self._carry({rank: set(has[3]) for rank, has in having.items()}, packets)
        shards._install(
            "the snapshot", self.parallel, found, [(n, p.value()) for n, p in packets.items()]
        )
        if organizer is not None:
            organizer.load_state_dict(found["organizer"])
        if scheduler is not None:
            scheduler.load_state_dict(found["scheduler"])
        random = randoms[workers.rank] if len(randoms) == workers.size else None
        # until the next is complete, this is the only one
        self.kept = [s for s in self.kept if s.key == key]
        return Restored(key[1], found["extra"], random, key, moved)

    def _settle(
        self,
        found: Mapping[str, Any],
        held: dict[str, Holders],
        then: Mapping[int, int],
        size_then: int,
    ) -> None:
        """Say where each expert is from now on."""
        parallel, size = self.parallel, self.parallel.workers.size
        now_of = {old: now for now, old in then.items()}
        for name, layer in parallel.layers.items():
            bank, holders = layer.experts, held[name]
            if size != size_then:
                where = f"{shards._prefix(parallel, name)}experts"
                loads = {
                    id: float(found["model"][f"{where}.{id}.statistics.record"][LOAD])
                    for id in holders
                }
                holders = settled(holders, loads, now_of, size)
                seats = {id: parallel.workers.seats(r) for id, r in holders.items()}
                holders = {id: parallel.workers.everywhere(s) for id, s in seats.items()}
            bank.holders = {id: tuple(r) for id, r in holders.items()}
            bank.settle(parallel.optimizers)

    def _carry(self, has: Mapping[int, set[str]], packets: dict[str, Packet]) -> int:
        """Bring each expert's packet to those who hold it now."""
        parallel, rank = self.parallel, self.parallel.workers.rank
        moved = 0
        for name, holders in sorted(shards._holders_by_name(parallel).items()):
            source = min(r for r, names in has.items() if name in names)
            for receiver in holders:
                if name in has.get(receiver, ()):
                    continue
                if rank == source:
                    moved += packets[name].data.numel()
                    distributed.send_object_list(
                        [packets[name]], group=self.group, group_dst=receiver
                    )
                elif rank == receiver:
                    box: list[Any] = [None]
                    distributed.recv_object_list(box, group=self.group, group_src=source)
                    packets[name] = box[0]
        return moved

    def _objects(self, value: Any) -> list[Any]:
        result = [None] * self.parallel.workers.size
        distributed.all_gather_object(result, value, group=self.group)
        return result

    def _told(self, value: Any, source: int) -> Any:
        box = [value]
        distributed.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]


def settled(
    holders: Mapping[int, Sequence[int]],
    loads: Mapping[int, float],
    now_of: Mapping[int, int],
    size: int,
) -> dict[int, tuple[int, ...]]:
    """Where experts go when workers went or came.

    Args:
        holders: id -> ranks as they were.
        now_of: rank then -> rank now, of those who stay.
        size: how many workers there are now.
    """
    fallback = sum(loads.values()) / max(len(loads), 1) or 1.0
    known = {id: load or fallback / 100 for id, load in loads.items()}
    result: dict[int, tuple[int, ...]] = {}
    total = [0.0] * size
    for id, ranks in holders.items():
        result[id] = tuple(now_of[r] for r in ranks if r in now_of)
        for r in result[id]:
            total[r] += known[id] / len(result[id])
    orphans = [id for id, ranks in result.items() if not ranks]
    for id in sorted(orphans, key=lambda id: (-known[id], id)):
        rank = min(range(size), key=lambda r: (total[r], r))
        result[id] = (rank,)
        total[rank] += known[id]
    plan = place(known, result, size, dict.fromkeys(known, 1), replicas=0)
    return plan.holders
