"""Runs cells of a bench side by side on Ray, one thread each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_parallel(
    tasks: Sequence[Callable[[], Result]], workers: int
) -> Iterator[tuple[int, Result | Exception]]:
    """Run tasks in `workers` processes; each result is given as soon as it is there.

    Args:
        tasks: functions without arguments that cloudpickle can carry to another process.
        workers: how many run at a time. A Ray that is already running is used as it is.

    Yields:
        (the position of the task, what it gave or how it failed): a process that died counts as a
        failure of its task alone.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError(
            "several workers need ray, which is not installed: "
            "pip install 'growmoe[distributed]', or leave --workers at 1"
        ) from error
    ours = not ray.is_initialized()
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    try:
        # a cell is deterministic: what failed once would fail again
        call = ray.remote(num_cpus=1, max_retries=0, runtime_env=environment)(lambda task: task())
        waiting = list(range(len(tasks)))
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                position = waiting.pop(0)
                running[call.remote(tasks[position])] = position
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            position = running.pop(done)
            try:
                yield position, ray.get(done)
            except Exception as error:
                # Ray wraps what the task raised
                cause = getattr(error, "cause", None)
                yield position, cause if isinstance(cause, Exception) else error
    finally:
        if ours:
            ray.shutdown()
