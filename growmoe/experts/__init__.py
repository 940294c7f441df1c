"""Experts, the bank that holds them, and the grouped matmul that runs them."""

from growmoe.experts.bank import ExpertBank
from growmoe.experts.expert import Expert
from growmoe.experts.ffn import FFN
from growmoe.experts.moments import Moments
from growmoe.experts.statistics import Statistics

__all__ = ["FFN", "Expert", "ExpertBank", "Moments", "Statistics"]
