"""Rules: signals in, proposals out."""

from growmoe.rules.freeze import FreezeConverged, FreezeSettled, ThawOnDrift, ThawOnNovelty
from growmoe.rules.merge import MergeOverlapping, MergeSimilar
from growmoe.rules.prune import PruneIdle, PruneUseless
from growmoe.rules.rule import Proposal, Rule
from growmoe.rules.spawn import SpawnOnLoss, SpawnOnNovelty, SpawnOnOverload, SplitOnNovelty

__all__ = [
    "FreezeConverged",
    "FreezeSettled",
    "MergeOverlapping",
    "MergeSimilar",
    "Proposal",
    "PruneIdle",
    "PruneUseless",
    "Rule",
    "SpawnOnLoss",
    "SpawnOnNovelty",
    "SpawnOnOverload",
    "SplitOnNovelty",
    "ThawOnDrift",
    "ThawOnNovelty",
]
