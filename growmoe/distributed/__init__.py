"""Experts across workers: sharing out, placement, checkpoints, survival; on Ray or by hand.

Start reading at `growmoe.distributed.parallel`. Ray is needed for `fit` alone.
"""

from growmoe.distributed.checkpoint import load, save
from growmoe.distributed.parallel import Parallel, expert_parallel
from growmoe.distributed.placement import Placement, place
from growmoe.distributed.workers import Workers

__all__ = ["Parallel", "Placement", "Workers", "expert_parallel", "load", "place", "save"]
