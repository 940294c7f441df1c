"""growmoe: mixtures of experts whose experts are born, merged, frozen and removed while they train.

Start reading at `growmoe.moe`. Rooms that need further packages are imported when first named.
"""

import importlib
from typing import Any

from growmoe import losses, models, offload, routers, rules, surgery
from growmoe.assignment import Assignment
from growmoe.capacity import Capacity
from growmoe.checkpoint import load, save
from growmoe.ema import EMA
from growmoe.experts import FFN, Expert, ExpertBank
from growmoe.lineage import Event, Lineage
from growmoe.models.upcycle import upcycle
from growmoe.moe import MoE, aux_loss, moe_layers
from growmoe.optim import guard
from growmoe.organizer import Organizer
from growmoe.routers import Entry, ExpertChoice, Router, Routing, TopK

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "FFN",
    "Assignment",
    "Capacity",
    "Entry",
    "Event",
    "Expert",
    "ExpertBank",
    "ExpertChoice",
    "Lineage",
    "MoE",
    "Organizer",
    "Router",
    "Routing",
    "TopK",
    "aux_loss",
    "guard",
    "load",
    "losses",
    "models",
    "moe_layers",
    "offload",
    "routers",
    "rules",
    "save",
    "surgery",
    "upcycle",
]

_ROOMS = ("compress", "continual", "distributed", "hf", "integrations", "lm", "report", "testing")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"growmoe.{name}")
    raise AttributeError(f"module 'growmoe' has no attribute {name!r}")
