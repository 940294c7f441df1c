"""Runs cells of a bench side by side on Ray, one thread each."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
Tell = Callable[[Any], None]
_PAUSE = 0.5  # seconds


class TooFewResources(ValueError):
    """There is less in the whole cluster than one task takes."""


def run_parallel(
    tasks: Sequence[Callable[[Tell], Result]],
    workers: int,
    hear: Callable[[int, Any], None] | None = None,
    resources: Mapping[str, float] | None = None,
) -> Iterator[tuple[int, Result | Exception]]:
    """Run tasks in `workers` processes; each result is given as soon as it is there.

    Args:
        tasks: functions that cloudpickle can carry to another process; each is given a function
            to tell how it goes.
        workers: how many run at a time. A Ray that is already running, or that `RAY_ADDRESS` names,
            is used as it is.
        hear: given the position of a task and what it told last, about twice a second; without it,
            what tasks tell is lost.
        resources: what Ray sets aside for each, as {"CPU": 1, "GPU": 0.5, "memory": 2e9}; one CPU
            unless it says otherwise.

    Yields:
        (the position of the task, what it gave or how it failed). A task whose process died is run
        once more; should that die too, it is a failure of its task alone.

    Raises:
        ImportError: Ray is not installed.
        TooFewResources: a task would wait for ever.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError(
            "several workers need ray, which is not installed: "
            "pip install 'growmoe[distributed]', or leave --workers at 1"
        ) from error
    takes = {"CPU": 1.0, **(resources or {})}
    ours = not ray.is_initialized()
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            cpus = max(workers, math.ceil(workers * takes["CPU"]))
            ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        has = ray.cluster_resources()
        for name, amount in takes.items():
            if amount > has.get(name, 0):
                there = has.get(name, 0)
                raise TooFewResources(f"a cell takes {amount:g} {name}, Ray has {there:g}")
        # a cell is deterministic: what it raised once it would raise again
        call = ray.remote(
            num_cpus=takes["CPU"],
            num_gpus=takes.get("GPU", 0),
            memory=int(takes["memory"]) if "memory" in takes else None,
            resources={k: v for k, v in takes.items() if k not in ("CPU", "GPU", "memory")},
            max_retries=0,
            runtime_env=environment,
        )(_run)
        mailbox = None
        if hear is not None:  # should it die, another takes its place: no run ends for its view
            kept = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
            mailbox = ray.remote(**kept)(_Mailbox).remote()
        waiting = list(range(len(tasks)))
        running: dict[Any, int] = {}
        died: set[int] = set()
        while waiting or running:
            while waiting and len(running) < workers:
                position = waiting.pop(0)
                running[call.remote(tasks[position], position, mailbox)] = position
            done, _ = ray.wait(
                list(running), num_returns=1, timeout=None if hear is None else _PAUSE
            )
            if hear is not None and mailbox is not None:
                for position, told in ray.get(mailbox.empty.remote()).items():
                    if position in running.values():
                        hear(position, told)
            if not done:
                continue
            position = running.pop(done[0])
            result: Any
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                # Ray wraps what the task raised
                cause = getattr(error, "cause", None)
                result = cause if isinstance(cause, Exception) else error
            except Exception as error:
                if position not in died:
                    died.add(position)
                    waiting.append(position)
                    continue
                result = error
            yield position, result
    finally:
        if ours:
            ray.shutdown()


class _Mailbox:
    """Where tasks leave what they tell, in a process of its own; only the newest of each counts."""

    def __init__(self) -> None:
        self._letters: dict[int, Any] = {}

    def put(self, position: int, told: Any) -> None:
        self._letters[position] = told

    def empty(self) -> dict[int, Any]:
        letters, self._letters = self._letters, {}
        return letters


def _run(task: Callable[[Tell], Result], position: int, mailbox: Any) -> Result:
    def tell(told: Any) -> None:
        if mailbox is not None:
            mailbox.put.remote(position, told)  # nobody waits for it

    return task(tell)
