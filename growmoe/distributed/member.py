"""One worker of a run that survives the death of others: what `fit` gives to the training loop.

When a worker dies, the loop of every other ends with an error in some collective. It is then
called again in a new group, builds its model anew, and `Run.share` brings that to the last
snapshot: so nothing of the step that failed is left.
"""

from __future__ import annotations

import gc
import json
import pickle
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # not later: its defaults would hold the group of that time for ever
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from growmoe import checkpoint as plain
from growmoe.distributed import checkpoint
from growmoe.distributed.parallel import Parallel, expert_parallel
from growmoe.distributed.snapshots import ExpertsLost, Snapshots
from growmoe.organizer import Organizer

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What all workers of a run are told.

    Attributes:
        repeat: N, the most steps that a failure may repeat.
        checkpoint: a folder, or None.
        checkpoint_every: steps; 0 writes one at the end alone.
        timeout: seconds after which a collective gives up.
        backend: of torch.distributed.
        rebalance: whether experts move when loads stay uneven.
    """

    repeat: int = 20
    checkpoint: str | None = None
    checkpoint_every: int = 0
    timeout: float = 60.0
    backend: str = "gloo"
    rebalance: bool = True

    @property
    def interval(self) -> int:
        """Steps between snapshots: with the time one takes, no more than `repeat`."""
        return max(1, self.repeat // 2)


class Regroup(BaseException):
    """All workers are to go on in another group, from the snapshot just taken."""


class Run:
    """This worker's place in the run.

    Attributes:
        rank, size: in the present group.
        extra: plain values of yours that belong to the training's state, as a history of losses:
            part of each snapshot and checkpoint, taken from the first worker.
        weight: what to multiply the loss with, after `part`.
        step: steps done.
        parallel: of `share`.
    """

    parallel: Parallel

    def __init__(
        self,
        store: distributed.Store,
        generation: int,
        rank: int,
        size: int,
        settings: Settings,
        snapshots: Snapshots,
        report: Report,
    ) -> None:
        self.rank, self.size, self.generation, self.settings = rank, size, generation, settings
        self.extra: dict[str, Any] = {}
        self.weight, self.step = 1.0, 0
        self._store, self._snapshots, self._report = store, snapshots, report
        self._random: Any = None
        self._shared = False
        self._said: dict[str, Any] = {}
        self._values: dict[str, float] = {}
        self._total = 0

    def share(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        organizer: Organizer | None = None,
        *,
        scheduler: Any = None,
        experts: dict[str, Callable[[], nn.Module]] | None = None,
        replicas: int = 1,
        placement: Mapping[str, Mapping[int, Sequence[int] | int]] | None = None,
    ) -> Parallel:
        """Share the experts out and go on where the run was: at a snapshot or a checkpoint.

        Call it once, when model, optimizer and organizer are built as for a fresh run.

        Args:
            scheduler: anything with a `state_dict` of plain values and tensors.
            experts: as for `growmoe.load`.
            replicas: as for `expert_parallel`; while the workers do not divide into so many, the
                greatest divisor of both.
            placement: as for `expert_parallel`, of a fresh run.

        Raises:
            ValueError: `replicas` is not positive, and as `expert_parallel`.
            ExpertsLost: two workers died before the experts of the first had a second copy again,
                and there is no checkpoint.
        """
        if replicas < 1:
            raise ValueError(f"replicas must be positive, got {replicas!r}")
        settings = self.settings
        self.parallel = expert_parallel(
            model, None, optimizer,
            replicas=gcd(self.size, replicas), placement=placement,
        )  # fmt: skip
        self._organizer, self._scheduler = organizer, scheduler
        self._snapshots.join(self.parallel, self.generation)
        extra = None
        try:
            found = self._snapshots.restore(organizer, scheduler, experts)
        except ExpertsLost:
            if not self._has_checkpoint():
                raise
            self._snapshots.kept, found = [], None
        if found is not None:
            extra, self._random = found.extra, found.random
            self._said |= {"restored": list(found.key), "moved": found.moved}
        elif self._has_checkpoint():
            assert settings.checkpoint is not None
            extra = checkpoint.load(
                settings.checkpoint, self.parallel, organizer, scheduler=scheduler, experts=experts
            )
        if extra is not None:
            self.step, self.extra = extra["step"], extra["extra"]
        self._shared = True
        return self.parallel

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are still to be done, up to `total`.

        Between two of them snapshots and checkpoints are taken, and workers come and go; so a step
        must be whole: optimizer and organizer have done theirs.
        """
        if not self._shared:
            raise RuntimeError("steps: call run.share(model, …) first")
        self._total = total
        before = self._snapshots.kept[-1] if self._snapshots.kept else None
        first = self._take()
        self._snapshots.wait()
        exact = None if before is None else _agree(before, first)
        # all are here: from now on any one worker may die
        said = [value for value in self.parallel.workers.objects(exact) if value is not None]
        if said:
            self._said["exact"] = all(said)
        if self._random is not None:
            plain._set_random_state(self._random)
        self._tell("settled")
        while self.step < total:
            yield self.step
            self.step += 1
            if self.rank == 0:
                self._store.set("step", str(self.step))
            self._between(self.step == total)

    def part(self, batch: Tensor) -> Tensor:
        """This worker's part of a batch that all workers have, [B, ...] -> [~B/W, ...].

        If B does not divide, parts differ by one, and `weight` makes up for it: multiply the loss
        with it, auxiliary losses included.

        Raises:
            ValueError: fewer rows than workers.
        """
        rows = len(batch)
        if rows < self.size:
            raise ValueError(f"part: {rows} rows cannot be divided among {self.size} workers")
        first, last = self.rank * rows // self.size, (self.rank + 1) * rows // self.size
        self.weight = (last - first) * self.size / rows
        return batch[first:last]

    def resize(self, workers: int) -> None:
        """Go on with so many workers from the next snapshot on; all workers call it."""
        if self.rank == 0:
            self._store.set("resize", str(workers))

    def report(self, **values: float) -> None:
        """Numbers to be shown beside the progress, from the first worker."""
        self._values |= values

    # What happens between steps.

    def _between(self, last: bool) -> None:
        settings, snapshots = self.settings, self._snapshots
        every = settings.checkpoint_every
        if settings.checkpoint and (last or (every and self.step % every == 0)):
            state = {"step": self.step, "extra": self.extra}
            checkpoint.save(
                settings.checkpoint, self.parallel, self._organizer, scheduler=self._scheduler,
                extra=state,
            )  # fmt: skip
        if self.step % settings.interval == 0 and not last:
            if settings.rebalance:
                self.parallel.step()
            self._make_way()
            self._take()
            self._tell("steps")
        pending = snapshots.pending
        if pending and self.step - pending.key[1] >= settings.repeat - settings.interval:
            snapshots.wait()
        if last:
            self._tell("done")

    def _take(self, among: Sequence[int] | None = None) -> Any:
        # the JSON text of a snapshot is a copy, so the loop may go on changing `extra`
        state = {"step": self.step, "extra": self.extra}
        return self._snapshots.take(self.step, self._organizer, self._scheduler, state, among)

    def _make_way(self) -> None:
        """If other workers are wanted, hand everything to those who stay, and leave the loop."""
        key = f"wanted/{self.generation}"
        wanted = None
        if self.rank == 0 and self._store.check([key]):
            wanted = json.loads(self._store.get(key))
        stay = self._snapshots._told(wanted, 0)
        if stay is None:
            return
        parallel = self.parallel
        total = {rank: 0.0 for rank in stay}
        target: dict[str, dict[int, tuple[int, ...]]] = {}
        loads = parallel.loads()
        for name, holders in parallel.holders().items():
            target[name] = {}
            for id, ranks in holders.items():
                left = tuple(r for r in ranks if r in stay) or (min(total, key=total.__getitem__),)
                target[name][id] = left
                for rank in left:
                    total[rank] += (loads[name][id] + 1e-9) / len(left)
        for name, layer in parallel.layers.items():
            layer.experts.move(target[name], parallel.optimizers)
        self._take(stay)
        self._snapshots.wait()
        parallel.workers.objects(None)
        raise Regroup

    def _tell(self, kind: str) -> None:
        parallel = self.parallel
        loads, held = parallel.loads(), parallel.holders()
        own = sum(
            load / len(held[name][id])
            for name, of_layer in loads.items()
            for id, load in of_layer.items()
            if self.rank in held[name][id]
        )
        births, deaths = 0, 0
        for layer in parallel.layers.values():
            done = [e for e in layer.lineage if e.accepted]
            births += sum(e.child is not None for e in done)
            deaths += sum(len(e.ids) for e in done if e.act in ("merge", "prune"))
        status = {
            "kind": kind,
            "generation": self.generation,
            "step": self.step,
            "total": self._total,
            "values": self._values,
            "workers": self.size,
            "rank": self.rank,
            "load": own / max(len(loads), 1),
            "imbalance": max(parallel.imbalance().values()),
            "sent": dict(parallel.workers.sent),
            "experts": {n: len(layer.experts) for n, layer in parallel.layers.items()},
            "births": births,
            "deaths": deaths,
            **self._said,
        }
        self._report(status)
        if self.rank == 0:
            self._store.set("status", json.dumps(status))
            if kind == "settled":
                self._store.set(f"settled/{self.generation}", json.dumps(status))

    def _has_checkpoint(self) -> bool:
        folder = self.settings.checkpoint
        there = folder is not None and (Path(folder) / plain.MAIN).is_file()
        return bool(self.parallel.workers.told(there, 0))


def _agree(before: Any, after: Any) -> bool:
    """Whether what was restored is, bit for bit, what the snapshot held."""
    return bool(after.main.same(before.main)) and all(
        packet.same(before.packets[name]) for name, packet in after.packets.items()
        if name in before.packets
    )  # fmt: skip


def versions() -> dict[str, str]:
    """What must be the same on all workers."""
    return {
        "growmoe": sys.modules["growmoe"].__version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version().rpartition(".")[0],
    }


def work(
    worker: int,
    where: tuple[str, int],
    train_loop: Callable[[Any, Run], Any],
    config: Any,
    settings: Settings,
    report: Report = lambda status: None,
) -> None:
    """Be a worker until the run is done or does not want it any more.

    Args:
        worker: its number, never used again for another.
        where: host and port of the supervisor's store.
    """
    store = distributed.TCPStore(
        *where, is_master=False, timeout=timedelta(seconds=max(settings.timeout, 30))
    )
    store.set(f"ready/{worker}", json.dumps(versions()))
    job = (train_loop, config, settings, report)
    snapshots, generation = Snapshots(), 0
    while True:
        found = _next(store, worker, generation)
        if found is None:
            return
        generation, members = found
        said = _take_part(store, where, worker, generation, members, snapshots, *job)
        # gloo closes its connections, and so wakes those that wait for this worker, only when
        # nothing refers to the group any more, nor to works of it in the frames of a failed loop
        snapshots.leave()
        gc.collect()
        store.set(f"said/{generation}/{worker}", json.dumps(said))


def _take_part(
    store: distributed.Store,
    where: tuple[str, int],
    worker: int,
    generation: int,
    members: list[int],
    snapshots: Snapshots,
    train_loop: Callable[[Any, Run], Any],
    config: Any,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    """Call the loop in the group of this generation; gives what came of it."""
    # a client of its own: the other may be in use
    own = distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=settings.timeout))
    rank = members.index(worker)
    try:
        distributed.init_process_group(
            settings.backend,
            store=distributed.PrefixStore(f"group/{generation}/", own),
            rank=rank,
            world_size=len(members),
            timeout=timedelta(seconds=settings.timeout),
        )
        run = Run(store, generation, rank, len(members), settings, snapshots, report)
        value = train_loop(config, run)
        distributed.barrier()
        if rank == 0:
            store.set("value", pickle.dumps(value))  # type: ignore[arg-type]
        return {"kind": "finished"}
    except Regroup:
        return {"kind": "regroup"}
    except Exception as error:
        return {
            "kind": "failed",
            "error": "".join(traceback.format_exception_only(error)).strip(),
            "traceback": traceback.format_exc(),
            "communication": _of_communication(error),
        }
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _next(store: distributed.Store, worker: int, after: int) -> tuple[int, list[int]] | None:
    """The next generation that has this worker, or None if it is to go."""
    key, belongs = f"members/{after + 1}", after > 0
    while True:
        # not store.wait, which warns each time it gives up
        while not store.check([key]):  # raises DistNetworkError if the supervisor is gone
            time.sleep(0.02)
        members = json.loads(store.get(key))
        if not members or (belongs and worker not in members):
            return None
        after += 1
        if worker in members:
            return after, members
        key = f"members/{after + 1}"


def _of_communication(error: BaseException) -> bool:
    """Whether an error may follow from the death of another worker, not from the loop itself."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    signs = (
        "connection",
        "gloo",
        "nccl",
        "timed out",
        "timeout",
        "peer",
        "socket",
        "process group",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
