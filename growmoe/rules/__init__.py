"""Rules: signals in, proposals out."""

from growmoe.rules.freeze import FreezeConverged, ThawOnDrift
from growmoe.rules.merge import MergeSimilar
from growmoe.rules.prune import PruneIdle, PruneUseless
from growmoe.rules.rule import Proposal, Rule
from growmoe.rules.spawn import SpawnOnLoss, SpawnOnNovelty, SpawnOnOverload

__all__ = [
    "FreezeConverged",
    "MergeSimilar",
    "Proposal",
    "PruneIdle",
    "PruneUseless",
    "Rule",
    "SpawnOnLoss",
    "SpawnOnNovelty",
    "SpawnOnOverload",
    "ThawOnDrift",
]
