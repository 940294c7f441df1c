"""Ways of choosing experts, one file for each.

Routers choose by the logits of a gate; any gate goes with any router that takes one.
"""

from growmoe.routers.bias_balanced import BiasBalanced
from growmoe.routers.closed_form import ClosedFormGate
from growmoe.routers.conditioned import Conditioned
from growmoe.routers.cosine import Cosine
from growmoe.routers.dense import Dense
from growmoe.routers.dense_to_sparse import DenseToSparse
from growmoe.routers.expert_choice import ExpertChoice
from growmoe.routers.gate import Context, ContextMissing, Entry, Gate, Linear
from growmoe.routers.gshard import GShard
from growmoe.routers.gumbel import Gumbel
from growmoe.routers.hash import Hash
from growmoe.routers.multi_gate import MultiGate
from growmoe.routers.noisy_topk import NoisyTopK
from growmoe.routers.remoe import ReMoE
from growmoe.routers.router import Router, Routing
from growmoe.routers.sinkhorn import BASE, Sinkhorn
from growmoe.routers.soft import SoftMoE
from growmoe.routers.stochastic import ExpertDropout, Stochastic
from growmoe.routers.switch import Switch
from growmoe.routers.top_any import TopAny
from growmoe.routers.top_p import TopP
from growmoe.routers.topk import TopK
from growmoe.routers.tree import Tree

__all__ = [
    "BASE",
    "BiasBalanced",
    "ClosedFormGate",
    "Conditioned",
    "Context",
    "ContextMissing",
    "Cosine",
    "Dense",
    "DenseToSparse",
    "Entry",
    "ExpertChoice",
    "ExpertDropout",
    "GShard",
    "Gate",
    "Gumbel",
    "Hash",
    "Linear",
    "MultiGate",
    "NoisyTopK",
    "ReMoE",
    "Router",
    "Routing",
    "Sinkhorn",
    "SoftMoE",
    "Stochastic",
    "Switch",
    "TopAny",
    "TopK",
    "TopP",
    "Tree",
]
