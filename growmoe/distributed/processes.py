"""Workers as processes of this machine, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from growmoe.distributed.member import Run, Settings, work


class Processes:
    """A `Launcher` of local processes.

    Args:
        most: how many there may be at a time.

    Raises:
        ValueError: the loop was typed into a notebook or a prompt, where workers cannot find it.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        train_loop: Callable[[Any, Run], Any],
        config: Any,
        settings: Settings,
        most: int,
    ) -> None:
        main = sys.modules["__main__"]
        typed = main.__spec__ is None and not os.path.isfile(getattr(main, "__file__", None) or "")
        if typed and getattr(train_loop, "__module__", None) == "__main__":
            raise ValueError(
                "on='processes': workers import the training loop, so it cannot be typed into a "
                "notebook or a prompt: put it into a module and import it, or use on='ray'"
            )
        self.job = (train_loop, config, settings)
        self.most = most
        self.living: dict[int, multiprocessing.process.BaseProcess] = {}
        # a server that has imported torch once, from which a worker is there at once
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["growmoe.distributed.processes"])

    def room(self) -> int:
        return self.most - sum(p.is_alive() for p in self.living.values())

    def start(self, worker: int, port: int) -> None:
        process = self.context.Process(
            target=_run, args=(worker, (self.host, port), os.getpid(), *self.job), daemon=True
        )
        process.start()
        self.living[worker] = process

    def ended(self) -> dict[int, str]:
        gone = {w: p for w, p in self.living.items() if not p.is_alive()}
        for worker in gone:
            del self.living[worker]
        return {
            w: f"killed by signal {-code}" if (code := p.exitcode or 0) < 0 else f"exit code {code}"
            for w, p in gone.items()
        }

    def kill(self, worker: int) -> None:
        self.living[worker].kill()

    def close(self) -> None:
        until = time.monotonic() + 5
        for process in self.living.values():
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _run(worker: int, where: tuple[str, int], parent: int, *job: Any) -> None:
    torch.set_num_threads(1)

    def watch() -> None:  # die with who started us, also while in a collective
        while True:
            time.sleep(1)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    work(worker, where, *job)
