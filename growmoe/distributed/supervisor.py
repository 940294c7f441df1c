"""Starts workers, learns of deaths, and says who goes on with whom.

Each set of workers is a generation. A new one is announced when a worker died, when all say that
they cannot talk to each other, or when workers are to join or leave; they meet through the store
that the supervisor hosts.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from torch import distributed

from growmoe.distributed.member import versions


class Launcher(Protocol):
    """Where workers run."""

    host: str
    """The address under which they reach this process."""

    def room(self) -> int:
        """How many more workers could be started now."""

    def start(self, worker: int, port: int) -> None:
        """Start one; its number is never used again."""

    def ended(self) -> Mapping[int, str]:
        """Those that are no longer there since the last call, and how it came."""

    def kill(self, worker: int) -> None:
        """End one that does not answer."""

    def close(self) -> None:
        """End all."""


class WorkerError(RuntimeError):
    """The training loop itself failed on a worker; its traceback is in the message."""


class ClusterError(RuntimeError):
    """The run cannot be done with the workers that there are."""


@dataclass
class Recovery:
    """How the run went on after a failure.

    Attributes:
        died: the workers.
        reason: what is known of how.
        seconds: from when it was noticed until training went on.
        workers: how many go on.
        step: of the snapshot gone back to; None from the beginning or from a checkpoint.
        repeated: steps done again, as far as the supervisor knew of them.
        exact: whether the restored state equals the snapshot bit for bit.
    """

    died: list[int]
    reason: str
    seconds: float = 0.0
    workers: int = 0
    step: int | None = None
    repeated: int = 0
    exact: bool | None = None


@dataclass
class Result:
    """What came of a run.

    Attributes:
        value: what the training loop returned on the first worker.
        recoveries: one for each failure.
        status: the last report of the first worker.
    """

    value: Any
    recoveries: list[Recovery] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """Keeps a run going.

    Args:
        launcher: where workers run.
        least, most: workers; with fewer than `least` the run waits, up to `start_timeout`.
        timeout: seconds that a worker may be silent when the others have given up on a collective.
        start_timeout: seconds for workers to start.
        max_failures: failures in a row without a step done in between, after which to give up.
        watch: told of every new status.
    """

    poll = 0.02

    def __init__(
        self,
        launcher: Launcher,
        least: int,
        most: int,
        *,
        timeout: float = 60.0,
        start_timeout: float = 120.0,
        max_failures: int = 3,
        watch: Callable[[dict[str, Any]], None] = lambda status: None,
    ) -> None:
        self.launcher, self.least, self.most, self.wanted = launcher, least, most, most
        self.timeout, self.start_timeout = timeout, start_timeout
        self.max_failures, self.watch = max_failures, watch
        self.store = distributed.TCPStore(
            "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self.workers: set[int] = set()  # started and not known to have ended
        self.ready: set[int] = set()
        self.members: list[int] = []
        self.generation, self.born = 0, 0
        self.recoveries: list[Recovery] = []
        self.status: dict[str, Any] = {}
        self._far = -1  # the furthest step known
        self._fruitless = 0
        self._open: tuple[Recovery, float] | None = None
        self._died: dict[int, str] = {}
        self._asked = False

    def run(self) -> Result:
        """Until the training loop returns.

        Raises:
            WorkerError: it raised.
            ClusterError: too few workers could be started or kept.
        """
        try:
            self._fill()
            self._gather([])
            while True:
                time.sleep(self.poll)
                self._look()
                said = self._said()
                if any(s["kind"] == "finished" for s in said.values()):
                    return self._finish()
                gone = [w for w in self.members if w not in self.workers]
                if gone or any(s["kind"] == "failed" for s in said.values()):
                    self._recover(gone)
                elif said and all(w in said for w in self.members):
                    self._regroup()
                elif not self._asked:
                    self._resize()
        finally:
            self._announce([])
            self.launcher.close()

    # Workers.

    def _fill(self) -> None:
        """Start workers up to what is wanted, as far as there is room."""
        missing = self.wanted - len(self.workers)
        for _ in range(min(missing, self.launcher.room()) if missing > 0 else 0):
            self.launcher.start(self.born, self.store.port)
            self.workers.add(self.born)
            self.born += 1

    def _look(self) -> None:
        for worker, reason in self.launcher.ended().items():
            if worker in self.workers:
                self.workers.discard(worker)
                self.ready.discard(worker)
                self._died[worker] = reason
        for worker in self.workers - self.ready:
            if self.store.check([f"ready/{worker}"]):
                theirs = json.loads(self.store.get(f"ready/{worker}"))
                if theirs != versions():
                    raise ClusterError(
                        f"worker {worker} has other versions: {theirs}, here {versions()}"
                    )
                self.ready.add(worker)
        if self.store.check(["status"]):
            status = json.loads(self.store.get("status"))
            if status != self.status:
                self.status = status
                self.watch(status)
        if self.store.check(["step"]) and (step := int(self.store.get("step"))) > self._far:
            self._far, self._fruitless = step, 0
        if self._open is not None and self.store.check([f"settled/{self.generation}"]):
            status = json.loads(self.store.get(f"settled/{self.generation}"))
            recovery, since = self._open
            recovery.seconds = time.monotonic() - since
            recovery.exact = status.get("exact")
            if "restored" in status:
                recovery.step = status["restored"][1]
            recovery.repeated = max(0, self._far - status["step"])
            self._open = None

    def _said(self) -> dict[int, dict[str, Any]]:
        keys = {w: f"said/{self.generation}/{w}" for w in self.members}
        return {w: json.loads(self.store.get(k)) for w, k in keys.items() if self.store.check([k])}

    # Generations.

    def _announce(self, members: list[int]) -> None:
        self.generation += 1
        self.members, self._asked = members, False
        self.store.set(f"members/{self.generation}", json.dumps(members))

    def _gather(self, stay: list[int]) -> None:
        """Announce the next generation: those who stay, in their places, and who is ready.

        With as many workers as are wanted it goes on at once; with at least `least` too, if there
        were some before: the others join later.
        """
        begun = time.monotonic()
        while True:
            self._fill()
            self._look()
            stay = [w if w in self.workers else -1 for w in stay]
            living = [w for w in stay if w >= 0]
            new = sorted(self.ready - set(living))
            enough = len(living) >= self.least and bool(living)
            if enough or len(living) + len(new) >= self.wanted:
                break
            waited = time.monotonic() - begun
            if waited > self.start_timeout or (not self.workers and not self.launcher.room()):
                if len(living) + len(new) >= self.least:
                    break
                raise ClusterError(
                    f"{len(living) + len(new)} workers after {waited:.0f} s, but at least "
                    f"{self.least} are needed; {self.launcher.room()} more could be started"
                    + self._deaths()
                )
            if len(self._died) >= 3 * self.most + 3 and not self._far >= 0:
                raise ClusterError("workers die when they start" + self._deaths())
            time.sleep(self.poll)
        if len(living) + len(new) >= len(stay):  # who is new takes the places of the dead
            places = [w if w >= 0 else new.pop(0) for w in stay]
        else:
            places = living
        self._announce((places + new)[: self.wanted])

    def _deaths(self) -> str:
        if not self._died:
            return ""
        worker, reason = list(self._died.items())[-1]
        return f"; worker {worker}: {reason}"

    def _recover(self, gone: list[int]) -> None:
        """After deaths or errors: hear the living, then go on with them."""
        noticed = time.monotonic()
        patience = noticed + self.timeout + 1  # one that is not in a collective takes as long
        self._fill()
        while True:
            self._look()
            said = self._said()
            silent = [w for w in self.members if w in self.workers and w not in said]
            if not silent or time.monotonic() > patience:
                break
            time.sleep(self.poll)
        for worker in silent:
            self.launcher.kill(worker)
            self._died[worker] = "did not answer"
            self.workers.discard(worker)
            self.ready.discard(worker)
        if any(s["kind"] == "finished" for s in said.values()):
            return  # the others died with nothing left to do
        # a worker that ended in the same moment may not be known yet
        settle = time.monotonic() + (0.0 if gone or silent else 2.0)
        while not (gone := [w for w in self.members if w not in self.workers]):
            own = [w for w, s in said.items() if s["kind"] == "failed" and not s["communication"]]
            if own and time.monotonic() > settle:
                raise WorkerError(f"worker {own[0]}: {said[own[0]]['traceback']}")
            if time.monotonic() > settle:
                break
            time.sleep(self.poll)
            self._look()
        self._fruitless += 1
        if self._fruitless > self.max_failures:
            error = next((s["error"] for s in said.values() if "error" in s), "")
            raise ClusterError(
                f"{self._fruitless} failures in a row without a new step; the last: "
                f"{error or self._deaths().lstrip('; ')}"
            )
        reasons = {self._died[w] for w in gone} or {
            s["error"] for s in said.values() if "error" in s
        }
        recovery = Recovery(gone, "; ".join(sorted(reasons)))
        self.recoveries.append(recovery)
        self._open = None  # the one before may never have been complete
        self._gather(self.members)
        recovery.workers = len(self.members)
        self._open = (recovery, noticed)

    def _regroup(self) -> None:
        stay = json.loads(self.store.get(f"wanted/{self.generation}"))
        leave = {w for rank, w in enumerate(self.members) if rank not in stay}
        self.workers -= leave  # they end when they see that the next generation is without them
        self.ready -= leave
        self._gather([w for w in self.members if w not in leave])

    def _resize(self) -> None:
        """Ask the workers to make way, if there are to be more or fewer of them."""
        if self.store.check(["resize"]):
            asked = int(self.store.get("resize"))
            self.store.delete_key("resize")
            self.wanted = min(max(asked, self.least), self.most)
        have = len(self.members)
        if have < self.wanted:
            self._fill()
        joined = len(self.ready - set(self.members))
        if have > self.wanted or (have < self.wanted and joined):
            self.store.set(
                f"wanted/{self.generation}", json.dumps(list(range(min(have, self.wanted))))
            )
            self._asked = True

    def _finish(self) -> Result:
        until = time.monotonic() + 10
        while not self.store.check(["value"]) and time.monotonic() < until:
            time.sleep(self.poll)
        if not self.store.check(["value"]):
            raise ClusterError("the first worker died before it could tell the result")
        self._look()
        return Result(pickle.loads(self.store.get("value")), self.recoveries, self.status)
