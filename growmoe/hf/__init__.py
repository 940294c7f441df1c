"""Mixtures of experts of Hugging Face transformers: prune, merge, attach, grow, export.

    model = AutoModelForCausalLM.from_pretrained(folder)
    growmoe.compress.prune(model, calibration, ratio=0.25)   # in memory
    growmoe.hf.attach(model)                                 # blocks become growmoe.MoE layers
    growmoe.hf.export(model, "grown")                        # and are transformers' again

Which families are known stands in `growmoe.hf.families`.
"""

from growmoe.hf.attached import attach, attached_layers, detach, export
from growmoe.hf.block import Block, allow_uneven, layers_of, remove_experts
from growmoe.hf.families import FAMILIES, Family, family_of
from growmoe.hf.folder import load, save

__all__ = [
    "FAMILIES",
    "Block",
    "Family",
    "allow_uneven",
    "attach",
    "attached_layers",
    "detach",
    "export",
    "family_of",
    "layers_of",
    "load",
    "remove_experts",
    "save",
]
