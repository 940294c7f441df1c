"""Small language models with mixtures of experts, trained on text that is already on the machine.

    run = growmoe.lm.train(growmoe.lm.TrainConfig(steps=500), output="runs/lm")
    run.bits_per_byte                      # of each domain's test part

The pieces can be had apart: `load_domains`, `batch`, `build_model`, `evaluate`.
"""

from growmoe.lm.config import TrainConfig, TrainError
from growmoe.lm.data import batch
from growmoe.lm.domains import Domain, load_domains
from growmoe.lm.evaluate import evaluate, unigram_bits
from growmoe.lm.loop import Stopped
from growmoe.lm.model import ROUTERS, build_model, build_router
from growmoe.lm.optimize import learning_rate, parameter_groups
from growmoe.lm.sources import EMBEDDED
from growmoe.lm.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from growmoe.lm.train import Run, train

__all__ = [
    "EMBEDDED",
    "ROUTERS",
    "ByteTokenizer",
    "Domain",
    "FileTokenizer",
    "Run",
    "Stopped",
    "Tokenizer",
    "TrainConfig",
    "TrainError",
    "batch",
    "build_model",
    "build_router",
    "evaluate",
    "learning_rate",
    "load_domains",
    "parameter_groups",
    "train",
    "unigram_bits",
]
