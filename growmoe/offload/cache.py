"""Which experts of a layer are on the device, and the order in which they come and go.

What was used longest ago makes room; of what one forward used, that which had fewer rows. An expert
that the present forward still needs never goes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert
from growmoe.offload.cold import Key, Store, Tensors


@dataclass
class Stats:
    """What a cache was asked for, and what it had.

    Attributes:
        hits: experts that a forward needed and that were on the device, or on their way there.
        misses: those that were not.
        prefetched: loads begun on a guess.
        prefetch_hits: hits owed to such a guess.
        evictions: experts that made room.
        bytes_loaded: asked for in all, wrong guesses included.
        seconds_waited: that forwards stood still for loads.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    seconds_waited: float = 0.0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); NaN before the first forward."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else float("nan")

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Loader:
    """Brings experts to a device one after another, without making the caller wait.

    It touches no module: what it has brought is put in place by the thread that needs it.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # its thread ends by itself when the executor is collected
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="growmoe-offload")

    def begin(self, key: Key) -> Future[tuple[Tensors, Any]]:
        """The expert's tensors on the device, and the event after which they are complete."""
        return self._executor.submit(_load, self.store, key, self.device, self._stream)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _load(store: Store, key: Key, device: torch.device, stream: Any) -> tuple[Tensors, Any]:
    cold = store.read(key)
    if stream is None:
        return cold, None
    # allocated on the side stream too, so that it need not wait for what computes meanwhile
    with torch.cuda.device(device), torch.cuda.stream(stream):
        hot = {name: t.to(device, non_blocking=True) for name, t in cold.items()}
        event = torch.cuda.Event()
        event.record(stream)
    return hot, event


@dataclass
class _Slot:
    """An expert that is on the device or on its way."""

    coming: Future[tuple[Tensors, Any]] | None  # None once it is in place
    tick: int  # the forward that last used it
    rows: int = 0  # that it had there
    guessed: bool = False  # brought on a guess that has not come true yet
    event: Any = None
    stream: Any = None  # the CUDA stream that may use it
    marks: dict[str, tuple[int, int]] | None = None  # how to tell that its tensors were changed


class Cache:
    """The experts of one layer that are on the device.

    A tensor that someone changes in place or replaces while it is there stays there from then on,
    since its cold copy is no longer its value.

    Args:
        name: the layer's name in the model.
        tensors: those of each expert that has any, by name within its body.
        loader: brings them.
        capacity: what may be on the device at once, in the unit of `costs`.
        costs: of each expert in `tensors`, none larger than the capacity.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[int, Tensors],
        loader: Loader,
        capacity: int,
        costs: Mapping[int, int],
    ) -> None:
        self.name, self.tensors, self.loader = name, tensors, loader
        self.capacity, self.costs = capacity, costs
        self.stats = Stats()
        self.lock = RLock()
        self._bytes = {id: sum(t.nbytes for t in own.values()) for id, own in tensors.items()}
        self._slots: dict[int, _Slot] = {}
        self._changed: set[tuple[int, str]] = set()
        self._tick = 0

    def serve(self, rows: Mapping[int, int], meanwhile: Callable[[], None]) -> Iterator[int]:
        """Yield each id when its expert is on the device; it stays at least until the next.

        Those that are there come first, the missing are loaded in the order in which they come.

        Args:
            rows: how many each expert has in this forward, at least one.
            meanwhile: called once all loads that this forward needs are begun.

        Raises:
            ValueError: an expert could not be read.
        """
        self._tick += 1
        self._drop_wrong_guesses(rows)
        for id in rows:
            self._count(id)
        order = sorted(rows, key=lambda id: (self._distance(id), rows[id]))
        to_load = deque(id for id in order if self._distance(id) == 2)
        needed = set(order)
        for id in order:
            while to_load and self._make_room(to_load[0], needed):
                self._begin(to_load.popleft())
            if not to_load:
                meanwhile()
                meanwhile = _nothing
            self._use(id, rows[id])
            yield id
            needed.remove(id)

    def fetch(self, expert: nn.Module, _: Any = None) -> None:
        """Bring one expert at once: a pre-hook, for those who call an expert themselves."""
        id = cast(Expert, expert).id
        with self.lock:
            slot = self._slots.get(id)
            if id not in self.tensors or (slot is not None and slot.coming is None):
                return
            self._tick += 1
            self._count(id)
            if slot is None:
                self._make_room(id, set())
                self._begin(id)
            self._use(id, 0)

    def prefetch(self, rows: Mapping[int, int]) -> None:
        """Begin to load what the next forward seems to need, the busiest first, as room allows."""
        if not self.lock.acquire(blocking=False):
            return  # another thread is in this layer and knows better
        try:
            keep = {id for id in rows if id in self._slots}
            for id in sorted(rows, key=lambda id: -rows[id]):
                if id not in self.tensors or id in keep:
                    continue
                if not self._make_room(id, keep):
                    return
                self._begin(id, guessed=True)
                keep.add(id)
        finally:
            self.lock.release()

    def empty(self) -> None:
        """Release all tensors, whose values are in the cold store."""
        with self.lock:
            self._slots.clear()
            for id in self.tensors:
                self._release(id)

    def read(self, id: int) -> Tensors:
        """An expert's tensors where they are now: on the device, or read from the cold store."""
        with self.lock:
            slot = self._slots.get(id)
            if slot is not None and slot.marks is not None:
                return {name: t.data for name, t in self.tensors[id].items()}
            cold = self.loader.store.read((self.name, id))
            return {
                name: t.data if (id, name) in self._changed or t.numel() else cold[name]
                for name, t in self.tensors[id].items()
            }

    def __reduce_ex__(self, _: Any) -> Any:
        raise RuntimeError(
            f"the experts of layer {self.name!r} are offloaded: restore() them before they are "
            "copied or pickled"
        )

    def _count(self, id: int) -> None:
        slot = self._slots.get(id)
        if slot is not None:
            self.stats.hits += 1
            self.stats.prefetch_hits += slot.guessed
            slot.guessed = False
        elif id in self.tensors:
            self.stats.misses += 1

    def _distance(self, id: int) -> int:
        """0 for an expert that is here, 1 for one on its way, 2 for one not asked for yet."""
        if id not in self.tensors:
            return 0
        return 2 if id not in self._slots else int(self._slots[id].coming is not None)

    def _drop_wrong_guesses(self, rows: Mapping[int, int]) -> None:
        for id in [id for id, s in self._slots.items() if s.guessed and id not in rows]:
            slot = self._slots[id]
            if slot.coming is not None and slot.coming.cancel():
                del self._slots[id]
                self.stats.bytes_loaded -= self._bytes[id]
            else:
                slot.guessed, slot.tick = False, -1  # the first to go

    def _make_room(self, id: int, needed: set[int]) -> bool:
        """Whether the expert fits, after those have gone that are not needed."""
        while sum(self.costs[i] for i in self._slots) + self.costs[id] > self.capacity:
            idle = [i for i in self._slots if i not in needed]
            if not idle:
                return False
            self._evict(min(idle, key=lambda i: (self._slots[i].tick, self._slots[i].rows)))
        return True

    def _begin(self, id: int, guessed: bool = False) -> None:
        self._slots[id] = _Slot(self.loader.begin((self.name, id)), self._tick, guessed=guessed)
        self.stats.prefetched += guessed
        self.stats.bytes_loaded += self._bytes[id]

    def _use(self, id: int, rows: int) -> None:
        if id not in self.tensors:
            return
        slot = self._slots[id]
        slot.tick, slot.rows = self._tick, rows
        if slot.coming is not None:
            start = time.perf_counter()
            try:
                values, slot.event = slot.coming.result()
            except BaseException:
                del self._slots[id]
                raise
            finally:
                self.stats.seconds_waited += time.perf_counter() - start
            slot.coming = None
            for name, t in self.tensors[id].items():
                if t.numel():  # given a value while it was not here
                    self._changed.add((id, name))
            self._put(id, values)
            slot.marks = {name: _mark(t) for name, t in self.tensors[id].items()}
        if slot.event is not None:
            stream = torch.cuda.current_stream(self.loader.device)
            if slot.stream != stream:
                stream.wait_event(slot.event)
                for t in self.tensors[id].values():
                    t.data.record_stream(stream)
                slot.stream = stream

    def _evict(self, id: int) -> None:
        slot = self._slots.pop(id)
        self.stats.evictions += 1
        if slot.coming is not None:
            slot.coming.cancel()
        if slot.marks is not None:
            for name, t in self.tensors[id].items():
                if _mark(t) != slot.marks[name]:
                    self._changed.add((id, name))
            self._release(id)

    def _release(self, id: int) -> None:
        # not to the meta device: a Parameter cannot go there and stay the same object
        with torch.inference_mode(False):
            device = self.loader.device
            nothing = {
                t.dtype: torch.empty(0, dtype=t.dtype, device=device)
                for t in self.tensors[id].values()
            }
            self._put(id, {name: nothing[t.dtype] for name, t in self.tensors[id].items()})

    def _put(self, id: int, values: Tensors) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, t in self.tensors[id].items():
                if (id, name) not in self._changed:
                    t.data = values[name]


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _nothing() -> None:
    pass
