"""Which worker holds which experts: pure functions of measured loads.

An expert's load is its share of its layer's rows; where several workers hold it, each takes an
equal part of it. A worker's load is the sum of its experts'; the step waits for the busiest, so
what counts is max over mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

Held = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Placement:
    """Where experts go.

    Attributes:
        holders: id -> ranks, the first leads.
        before, after: load of the busiest worker over the mean.
        moved: bytes of weights that travel.
    """

    holders: dict[int, tuple[int, ...]]
    before: float
    after: float
    moved: int


def evenly(ids: Sequence[int], workers: int) -> dict[int, int]:
    """By number, in order: id -> rank; the first workers have one more where it does not divide."""
    size, more = divmod(len(ids), workers)
    ranks = [rank for rank in range(workers) for _ in range(size + (rank < more))]
    return dict(zip(ids, ranks, strict=True))


def worker_loads(holders: Held, loads: Mapping[int, float], workers: int) -> list[float]:
    """The load of each worker."""
    total = [0.0] * workers
    for id, ranks in holders.items():
        for rank in ranks:
            total[rank] += loads[id] / len(ranks)
    return total


def imbalance(holders: Held, loads: Mapping[int, float], workers: int) -> float:
    """Load of the busiest worker over the mean; 1 where nothing was loaded yet."""
    total = worker_loads(holders, loads, workers)
    mean = sum(total) / workers
    return max(total) / mean if mean > 0 else 1.0


def place(
    loads: Mapping[int, float],
    held: Held,
    workers: int,
    sizes: Mapping[int, int],
    *,
    pinned: Held | None = None,
    tolerance: float = 1.1,
    replicas: int = 0,
    slots: int | None = None,
) -> Placement:
    """Even out loads, starting from where experts are and moving as little as reaches `tolerance`.

    Again and again the busiest worker gives the lightest one an expert, or swaps one with it,
    whichever narrows the gap more for its bytes. An expert that is too hot for any worker is
    replicated instead, hottest replica first as in DeepSeek's EPLB (arXiv 2412.19437, 3.4); one
    that has cooled down loses its last copy.

    Args:
        loads: of each expert, in any unit.
        held: id -> ranks, as it is.
        sizes: bytes of each expert.
        pinned: id -> ranks, where these must be.
        tolerance: max over mean to be content with; moves are made only until then.
        replicas: how many copies beyond the first there may be in all.
        slots: how many experts a worker can hold; any number if left out.

    Raises:
        ValueError: pinned experts that do not exist, or more experts than slots.
    """
    pinned = {id: tuple(ranks) for id, ranks in (pinned or {}).items()}
    if unknown := sorted(set(pinned) - set(held)):
        raise ValueError(f"pinned: there are no experts {unknown}")
    if slots is not None and len(held) > slots * workers:
        raise ValueError(f"{len(held)} experts do not fit {workers} workers of {slots} slots")
    before = imbalance(held, loads, workers)
    state = _State(loads, {**{id: tuple(r) for id, r in held.items()}, **pinned}, workers, slots)
    state.fixed = set(pinned)
    asked, start = dict(state.holders), max(state.total)
    mean = sum(loads[id] for id in held) / workers
    if mean > 0:
        _replicate(state, mean, tolerance, replicas)
        while max(state.total) > tolerance * mean and state.improve(sizes):
            pass
    if max(state.total) > start * (1 + 1e-9):  # copies dropped that could not be made up for
        state.holders = asked
    moved = sum(sizes[id] * len(set(state.holders[id]) - set(held[id])) for id in held)
    after = imbalance(state.holders, loads, workers)
    return Placement(dict(sorted(state.holders.items())), before, after, moved)


class _State:
    """A placement in the making, with what follows from it kept in step."""

    def __init__(
        self, loads: Mapping[int, float], holders: Held, workers: int, slots: int | None
    ) -> None:
        self.loads, self.slots = loads, slots
        self.holders = {id: tuple(ranks) for id, ranks in holders.items()}
        self.fixed: set[int] = set()
        self.on: list[set[int]] = [set() for _ in range(workers)]
        for id, ranks in self.holders.items():
            for rank in ranks:
                self.on[rank].add(id)
        self.total = worker_loads(self.holders, loads, workers)

    def part(self, id: int) -> float:
        """What each holder has of it."""
        return self.loads[id] / len(self.holders[id])

    def has_room(self, rank: int) -> bool:
        return self.slots is None or len(self.on[rank]) < self.slots

    def set(self, id: int, ranks: tuple[int, ...]) -> None:
        for rank in self.holders[id]:
            self.total[rank] -= self.part(id)
            self.on[rank].discard(id)
        self.holders[id] = ranks
        for rank in ranks:
            self.total[rank] += self.part(id)
            self.on[rank].add(id)

    def lightest(self, without: Sequence[int] = ()) -> int | None:
        """The rank of least load that has room."""
        ranks = [r for r in range(len(self.total)) if r not in without and self.has_room(r)]
        return min(ranks, key=lambda r: (self.total[r], r), default=None)

    def improve(self, sizes: Mapping[int, int]) -> bool:
        """One move or swap between the busiest worker and the lightest; whether one helped."""
        high = max(range(len(self.total)), key=lambda r: (self.total[r], -r))
        low = min(range(len(self.total)), key=lambda r: (self.total[r], r))
        gap = self.total[high] - self.total[low]
        gives = [i for i in self.on[high] - self.fixed if i not in self.on[low]]
        takes = [i for i in self.on[low] - self.fixed if i not in self.on[high]]
        options: list[tuple[float, int, int | None]] = []
        for a in gives:
            for b in [*([None] if self.has_room(low) else []), *takes]:
                shift = self.part(a) - (0.0 if b is None else self.part(b))
                gain = min(shift, gap - shift)  # what the busier of the two loses
                if gain > 1e-9 * gap:
                    cost = sizes[a] + (0 if b is None else sizes[b])
                    # bytes decide between moves that are about as good
                    options.append((gain / max(cost, 1) ** 0.25, a, b))
        if not options:
            return False
        _, a, b = max(options, key=lambda o: (o[0], -o[1]))
        self.set(a, tuple(low if r == high else r for r in self.holders[a]))
        if b is not None:
            self.set(b, tuple(high if r == low else r for r in self.holders[b]))
        return True


def _replicate(state: _State, mean: float, tolerance: float, replicas: int) -> None:
    free = [id for id in state.holders if id not in state.fixed]
    # a worker of many experts is packed badly with large pieces, one of few has no others
    most = mean / 2 if len(state.holders) >= 4 * len(state.total) else tolerance * mean
    for id in free:  # first those that have cooled down
        while len(state.holders[id]) > 1 and (
            state.loads[id] / (len(state.holders[id]) - 1) <= most
        ):
            busiest = max(state.holders[id], key=state.total.__getitem__)
            state.set(id, tuple(r for r in state.holders[id] if r != busiest))
    spare = replicas - sum(len(r) - 1 for r in state.holders.values())
    heap = [(-state.part(id), id) for id in free]
    heapify(heap)
    while spare > 0 and heap and -heap[0][0] > most:
        id = heap[0][1]
        rank = state.lightest(state.holders[id])
        if rank is None:
            heappop(heap)
            continue
        state.set(id, (*state.holders[id], rank))
        heapreplace(heap, (-state.part(id), id))
        spare -= 1
