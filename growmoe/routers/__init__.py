"""Ways of choosing experts, one file for each."""

from growmoe.routers.closed_form import ClosedFormGate
from growmoe.routers.expert_choice import ExpertChoice
from growmoe.routers.router import Entry, Router, Routing
from growmoe.routers.topk import TopK

__all__ = ["ClosedFormGate", "Entry", "ExpertChoice", "Router", "Routing", "TopK"]
