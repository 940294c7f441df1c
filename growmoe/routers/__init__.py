"""Ways of choosing experts, one file for each."""

from growmoe.routers.expert_choice import ExpertChoice
from growmoe.routers.router import Entry, Router, Routing
from growmoe.routers.topk import TopK

__all__ = ["Entry", "ExpertChoice", "Router", "Routing", "TopK"]
