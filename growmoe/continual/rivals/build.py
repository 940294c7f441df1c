"""Builds each method of this room for a stream, from its settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from growmoe.continual.features import default_features
from growmoe.continual.rivals.cn_dpm import CNDPM
from growmoe.continual.rivals.cope import CoPE
from growmoe.continual.rivals.dynmoe import DynMoE
from growmoe.continual.rivals.expert_gate import ExpertGate
from growmoe.continual.rivals.icarl import ICaRL
from growmoe.continual.rivals.learner import two_layers
from growmoe.continual.rivals.lifelong_moe import LifelongMoE
from growmoe.continual.rivals.packnet import PackNet
from growmoe.continual.rivals.pnn import PNN
from growmoe.continual.rivals.ranpac import RanPAC
from growmoe.continual.rivals.sema import SEMA
from growmoe.continual.rivals.si import SynapticIntelligence
from growmoe.continual.rivals.slda import StreamingLDA
from growmoe.continual.streams import Stream


def features_for(stream: Stream) -> Any:
    """The features that growmoe has on this stream, not fitted yet."""
    return default_features(stream.image_shape)


def synaptic_intelligence(
    stream: Stream,
    seed: int,
    *,
    hidden: int,
    learning_rate: float,
    strength: float,
    damping: float,
) -> SynapticIntelligence:
    body = two_layers(math.prod(stream.image_shape), hidden)
    net = nn.Sequential(body, nn.Linear(hidden, stream.num_classes))
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, fused=True)
    return SynapticIntelligence(net, optimizer, strength=strength, damping=damping)


def icarl(stream: Stream, seed: int, *, hidden: int, learning_rate: float, exemplars: int) -> ICaRL:
    body = two_layers(math.prod(stream.image_shape), hidden)
    return ICaRL(body, hidden, stream.num_classes, exemplars=exemplars, learning_rate=learning_rate)


def cope(
    stream: Stream,
    seed: int,
    *,
    hidden: int,
    learning_rate: float,
    exemplars: int,
    embedding: int,
    momentum: float,
    temperature: float,
) -> CoPE:
    return CoPE(
        two_layers(math.prod(stream.image_shape), hidden),
        hidden,
        stream.num_classes,
        embedding=embedding,
        exemplars=exemplars,
        learning_rate=learning_rate,
        momentum=momentum,
        temperature=temperature,
        seed=seed,
    )


def streaming_lda(stream: Stream, seed: int, *, shrinkage: float, early: int) -> StreamingLDA:
    return StreamingLDA(
        features_for(stream), stream.num_classes, shrinkage=shrinkage, early=early, seed=seed
    )


def ranpac(stream: Stream, seed: int, *, projected: int, ridge: float, early: int) -> RanPAC:
    return RanPAC(
        features_for(stream),
        stream.num_classes,
        projected=projected,
        ridge=ridge,
        early=early,
        seed=seed,
    )


def pnn(stream: Stream, seed: int, *, hidden: int, learning_rate: float) -> PNN:
    return PNN(stream.image_shape, stream.num_classes, hidden=hidden, learning_rate=learning_rate)


def packnet(
    stream: Stream, seed: int, *, hidden: int, learning_rate: float, pruned: float
) -> PackNet:
    return PackNet(
        stream.image_shape,
        stream.num_classes,
        hidden=hidden,
        learning_rate=learning_rate,
        pruned=pruned,
    )


def expert_gate(
    stream: Stream,
    seed: int,
    *,
    hidden: int,
    code: int,
    learning_rate: float,
    related: float,
    temperature: float,
) -> ExpertGate:
    return ExpertGate(
        stream.image_shape,
        stream.num_classes,
        hidden=hidden,
        code=code,
        learning_rate=learning_rate,
        related=related,
        temperature=temperature,
    )


def cn_dpm(
    stream: Stream,
    seed: int,
    *,
    hidden: int,
    latent: int,
    learning_rate: float,
    short_term: int,
    log_alpha: float,
    chill: float,
    sleep_steps: int,
) -> CNDPM:
    return CNDPM(
        stream.image_shape,
        stream.num_classes,
        hidden=hidden,
        latent=latent,
        learning_rate=learning_rate,
        short_term=short_term,
        log_alpha=log_alpha,
        chill=chill,
        sleep_steps=sleep_steps,
        seed=seed,
    )


def lifelong_moe(
    stream: Stream,
    seed: int,
    *,
    width: int,
    hidden: int,
    added: int,
    regularisation: float,
    learning_rate: float,
) -> LifelongMoE:
    return LifelongMoE(
        stream.image_shape,
        stream.num_classes,
        width=width,
        hidden=hidden,
        added=added,
        regularisation=regularisation,
        learning_rate=learning_rate,
        seed=seed,
    )


def sema(
    stream: Stream,
    seed: int,
    *,
    bottleneck: int,
    threshold: float,
    settle: int,
    learning_rate: float,
    early: int,
) -> SEMA:
    return SEMA(
        features_for(stream),
        stream.num_classes,
        bottleneck=bottleneck,
        threshold=threshold,
        settle=settle,
        learning_rate=learning_rate,
        early=early,
        seed=seed,
    )


def dynmoe(
    stream: Stream,
    seed: int,
    *,
    width: int,
    hidden: int,
    num_experts: int,
    max_experts: int,
    window: int,
    learning_rate: float,
) -> DynMoE:
    return DynMoE(
        stream.image_shape,
        stream.num_classes,
        width=width,
        hidden=hidden,
        num_experts=num_experts,
        max_experts=max_experts,
        window=window,
        learning_rate=learning_rate,
        seed=seed,
    )
