"""Workers as Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from growmoe.distributed.member import Run, Settings, work
from growmoe.distributed.supervisor import ClusterError

# what Ray prints of each dead worker; `fit` survives it and counts it in the bar and the result
_DEATH = "A worker died or was killed while executing a task by an unexpected system error"


def require_ray() -> Any:
    """The module; raises ImportError naming the extra."""
    if "ray" not in sys.modules:  # which reads it once; who imported Ray before sees its words
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _DEATH)
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "growmoe.distributed.fit runs on Ray, which is not installed: "
            "pip install 'growmoe[distributed]' (or pass on='processes' for this machine alone)"
        ) from error
    return ray


class Actors:
    """A `Launcher` of Ray actors, spread over the nodes.

    Args:
        use_gpu: one GPU each, unless `resources` says otherwise.
        resources: of each worker, such as {"CPU": 4, "GPU": 1}.
        address: of a cluster; else `RAY_ADDRESS`, or a Ray of our own on this machine.
    """

    def __init__(
        self,
        train_loop: Callable[[Any, Run], Any],
        config: Any,
        settings: Settings,
        use_gpu: bool = False,
        resources: Mapping[str, float] | None = None,
        address: str | None = None,
    ) -> None:
        self.ray = ray = require_ray()
        self.resources = {"CPU": 1.0, "GPU": float(use_gpu), **(resources or {})}
        self.ours = not ray.is_initialized()
        if self.ours:
            where = address or os.environ.get("RAY_ADDRESS")
            ray.init(address=where, log_to_driver=False, include_dashboard=None)
        self.host = ray.util.get_node_ip_address()
        self.job = ray.put((train_loop, config, settings))
        self.actors: dict[int, Any] = {}
        self.running: dict[Any, int] = {}
        # imports happen once, before the worker is counted as started
        self.kind = ray.remote(
            num_cpus=self.resources["CPU"],
            num_gpus=self.resources["GPU"],
            resources={k: v for k, v in self.resources.items() if k not in ("CPU", "GPU")},
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": self._environment()},
        )(_Worker)

    def _environment(self) -> dict[str, str]:
        installed = (sys.prefix, sys.base_prefix)
        # modules of the user's own, beside the script that calls fit, must be found by workers too
        own = [path for path in sys.path if path and not path.startswith(installed)]
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        return {
            # threads of torch beside those of other workers make each many times slower
            "OMP_NUM_THREADS": str(max(1, int(self.resources["CPU"]))),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys([*own, *filter(None, before)])),
        }

    def check(self, least: int, patience: float) -> None:
        """Raise ClusterError if the cluster never had what the least number of workers need."""
        until = time.monotonic() + patience
        while True:
            has: dict[str, float] = self.ray.cluster_resources()
            lacking = {
                name: (needed * least, has.get(name, 0.0))
                for name, needed in self.resources.items()
                if needed * least > has.get(name, 0.0)
            }
            # a cluster that was joined may still grow; one of our own on this machine cannot
            if not lacking or self.ours or time.monotonic() > until:
                break
            time.sleep(0.5)
        if lacking:
            if self.ours:
                self.ray.shutdown()
            raise ClusterError(
                f"{least} workers need "
                + ", ".join(
                    f"{a:g} {name}, the cluster has {b:g}" for name, (a, b) in lacking.items()
                )
            )

    def room(self) -> int:
        """By what is free; those that are about to start are not counted twice."""
        free: dict[str, float] = self.ray.available_resources()
        fits = min(int(free.get(k, 0.0) // v) for k, v in self.resources.items() if v > 0)
        return max(0, fits)

    def start(self, worker: int, port: int) -> None:
        actor = self.kind.remote()
        self.actors[worker] = actor
        self.running[actor.run.remote(worker, (self.host, port), self.job)] = worker

    def ended(self) -> dict[int, str]:
        gone: dict[int, str] = {}
        if not self.running:
            return gone
        done, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        for reference in done:
            worker = self.running.pop(reference)
            self.actors.pop(worker, None)
            try:
                self.ray.get(reference)
                gone[worker] = "left"
            except self.ray.exceptions.RayError as error:
                gone[worker] = " ".join(str(error).split())[:500]
        return gone

    def kill(self, worker: int) -> None:
        self.ray.kill(self.actors[worker], no_restart=True)

    def close(self) -> None:
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=5)
        for actor in self.actors.values():
            self.ray.kill(actor, no_restart=True)
        if self.ours:
            self.ray.shutdown()


class _Worker:
    def run(self, worker: int, where: tuple[str, int], job: Any) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        train_loop, config, settings = job
        work(worker, where, train_loop, config, settings, _Metrics())


class _Metrics:
    """What a worker tells Ray's metrics of itself; the first tells of the whole, too."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        own, whole = ("rank",), ()
        self.gauges = {
            "load": Gauge("growmoe_load", "Share of the rows that the worker's experts get", own),
            "step": Gauge("growmoe_step", "Steps done", whole),
            "workers": Gauge("growmoe_workers", "Workers in the run", whole),
            "imbalance": Gauge("growmoe_imbalance", "Busiest worker's load over the mean", whole),
            "experts": Gauge("growmoe_experts", "Experts alive", ("layer",)),
        }
        self.counters = {
            "births": Counter("growmoe_births", "Experts born", whole),
            "deaths": Counter("growmoe_deaths", "Experts merged away or pruned", whole),
            "sent": Counter(
                "growmoe_bytes_sent", "Bytes sent to other workers", ("rank", "purpose")
            ),
        }
        self.before: dict[Any, float] = {}

    def __call__(self, status: Mapping[str, Any]) -> None:
        rank = {"rank": str(status["rank"])}
        self.gauges["load"].set(status["load"], rank)
        for purpose, value in status["sent"].items():
            self._count("sent", value, {**rank, "purpose": purpose})
        if status["rank"]:
            return
        for name in ("step", "workers", "imbalance"):
            self.gauges[name].set(status[name])
        for layer, number in status["experts"].items():
            self.gauges["experts"].set(number, {"layer": layer})
        for name in ("births", "deaths"):
            self._count(name, status[name], None)

    def _count(self, name: str, total: float, tags: Any) -> None:
        key = (name, tags and tags["purpose"])
        more = total - self.before.get(key, 0)
        if more > 0:  # less after going back to a snapshot
            self.counters[name].inc(more, tags)
        self.before[key] = max(total, self.before.get(key, 0)) if name != "sent" else total
