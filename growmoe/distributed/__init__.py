"""Experts across workers: sharing out, placement, checkpoints, and runs that survive failures.

Start reading at `growmoe.distributed.parallel`; for the latter at `growmoe.distributed.fit`.
"""

from growmoe.distributed.checkpoint import load, save
from growmoe.distributed.fit import fit
from growmoe.distributed.member import Run
from growmoe.distributed.parallel import Parallel, expert_parallel
from growmoe.distributed.placement import Placement, place
from growmoe.distributed.snapshots import ExpertsLost
from growmoe.distributed.supervisor import ClusterError, Recovery, Result, WorkerError
from growmoe.distributed.workers import Workers

__all__ = [
    "ClusterError",
    "ExpertsLost",
    "Parallel",
    "Placement",
    "Recovery",
    "Result",
    "Run",
    "WorkerError",
    "Workers",
    "expert_parallel",
    "fit",
    "load",
    "place",
    "save",
]
