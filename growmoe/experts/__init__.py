"""Experts, the bank that holds them, and the grouped matmul that runs them."""

from growmoe.experts.bank import ExpertBank
from growmoe.experts.expert import Expert
from growmoe.experts.ffn import FFN
from growmoe.experts.moments import Moments
from growmoe.experts.statistics import Statistics
from growmoe.experts.zero_computation import Constant, Copy, Zero

__all__ = ["FFN", "Constant", "Copy", "Expert", "ExpertBank", "Moments", "Statistics", "Zero"]
