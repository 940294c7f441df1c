"""Experts across workers of a torch.distributed process group: sharing out, placement, checkpoints.

Start reading at `growmoe.distributed.parallel`.
"""

from growmoe.distributed.checkpoint import load, save
from growmoe.distributed.parallel import Parallel, expert_parallel
from growmoe.distributed.placement import Placement, place
from growmoe.distributed.workers import Workers

__all__ = ["Parallel", "Placement", "Workers", "expert_parallel", "load", "place", "save"]
