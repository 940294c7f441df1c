"""Hosts: models whose feed-forward halves are mixtures of experts that can grow."""

from growmoe.models.attention import KVCache
from growmoe.models.conv import ConvNet
from growmoe.models.mixture_density import MixtureDensity
from growmoe.models.mlp import MLP
from growmoe.models.multitask import MultiTask, SharedBottom
from growmoe.models.transformer import TransformerLM
from growmoe.models.vit import ViT

__all__ = [
    "MLP",
    "ConvNet",
    "KVCache",
    "MixtureDensity",
    "MultiTask",
    "SharedBottom",
    "TransformerLM",
    "ViT",
]
