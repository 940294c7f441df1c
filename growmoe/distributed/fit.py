"""`fit`: one training loop on many workers, which outlives any one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from growmoe.distributed.member import Run, Settings
from growmoe.distributed.progress import bar
from growmoe.distributed.supervisor import Launcher, Result, Supervisor


def fit(
    train_loop: Callable[[Any, Run], Any],
    config: Any = None,
    *,
    num_workers: int | tuple[int, int] = 1,
    use_gpu: bool = False,
    resources: Mapping[str, float] | None = None,
    repeat: int = 20,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 0,
    timeout: float = 60.0,
    start_timeout: float = 120.0,
    max_failures: int = 3,
    rebalance: bool = True,
    on: Literal["ray", "processes"] = "ray",
    address: str | None = None,
    progress: bool | None = None,
    watch: Callable[[dict[str, Any]], None] = lambda status: None,
) -> Result:
    """Train with the experts shared out among workers, some of which may die, leave or join.

    A plain loop becomes one for many workers in three lines::

        def train_loop(config, run):
            model, optimizer, organizer = build(config)
            parallel = run.share(model, optimizer, organizer)     # experts shared out
            for step in run.steps(config["steps"]):               # the steps still to be done
                x, y = map(run.part, batch(step))                 # this worker's part
                loss = (criterion(model(x), y) + growmoe.aux_loss(model)) * run.weight
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                organizer.step(loss.detach())

        growmoe.distributed.fit(train_loop, {"steps": 1000}, num_workers=(2, 8))

    Every `repeat`/2 steps each expert that changed is copied to a second worker while training
    goes on. When a worker dies, the loop of each other is called anew and goes on from the last
    whole snapshot, with the experts of the dead restored on its replacement or, if more than the
    least number of workers are left, on these; what a replacement finds when it comes is that
    experts move to it.

    Ray starts, places and watches the workers as actors. Ray Train is not used: when one worker of
    its group fails it ends all processes (its v2 controller spares some only for torchft), and
    the snapshots in the survivors' memory would be lost with them.

    Args:
        train_loop: called with `config` and a `Run` on each worker, again after each failure. It
            and `config` must be picklable.
        num_workers: how many, or the least and the most.
        use_gpu: one GPU per worker, and NCCL.
        resources: of each worker, for Ray; one CPU (and one GPU) if left out.
        repeat: the most steps that are done again after a failure.
        checkpoint: a folder that all workers see. If there is a checkpoint the run begins from it;
            one is written there at the end.
        checkpoint_every: steps; 0 writes at the end alone.
        timeout: seconds after which a collective gives up; a worker that hangs is ended within
            about twice that.
        start_timeout: seconds within which the least number of workers must be there.
        max_failures: give up after so many in a row without a new snapshot.
        rebalance: move experts when their loads stay uneven (`Parallel.step`).
        on: "processes" runs the workers on this machine without Ray.
        address: of a Ray cluster; `RAY_ADDRESS`, a running one or a new one on this machine if
            left out.
        progress: one bar for all workers; on a terminal if left out.
        watch: told of each status (a dict of step, workers, imbalance, recoveries …).

    Raises:
        ImportError: Ray is not installed.
        ValueError: numbers that cannot be.
        WorkerError: the loop raised on a worker, which is shown.
        ClusterError: the cluster has too few CPUs or GPUs, workers have other versions, or too
            many failed.
    """
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    if not 1 <= least <= most:
        raise ValueError(f"num_workers must be n or (least, most) with 1 <= n, got {num_workers!r}")
    if repeat < 1 or checkpoint_every < 0 or not timeout > 0 or not start_timeout > 0:
        raise ValueError(
            "repeat and the time-outs must be positive, checkpoint_every not negative; got "
            f"{repeat=}, {timeout=}, {start_timeout=}, {checkpoint_every=}"
        )
    if checkpoint_every and checkpoint is None:
        raise ValueError("checkpoint_every needs a folder: pass checkpoint=")
    settings = Settings(
        repeat=repeat,
        checkpoint=None if checkpoint is None else str(Path(checkpoint).absolute()),
        checkpoint_every=checkpoint_every,
        timeout=timeout,
        backend="nccl" if use_gpu else "gloo",
        rebalance=rebalance,
    )
    launcher: Launcher
    if on == "processes":
        from growmoe.distributed.processes import Processes

        launcher = Processes(train_loop, config, settings, most)
    elif on == "ray":
        from growmoe.distributed.actors import Actors

        launcher = Actors(train_loop, config, settings, use_gpu, resources, address)
        launcher.check(least, start_timeout)
    else:
        raise ValueError(f"on must be 'ray' or 'processes', got {on!r}")
    with bar(progress) as draw:

        def tell(status: dict[str, Any]) -> None:
            status = {**status, "recoveries": len(supervisor.recoveries)}
            draw(status)
            watch(status)

        supervisor = Supervisor(
            launcher,
            least,
            most,
            timeout=timeout,
            start_timeout=start_timeout,
            max_failures=max_failures,
            watch=tell,
        )
        return supervisor.run()
