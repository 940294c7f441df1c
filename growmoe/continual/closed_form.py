"""Runs growmoe, and the heads it is compared with on the very same features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from growmoe.continual.baselines import CellRun
from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.features import (
    MultiScaleFeatures,
    RandomPatchFeatures,
    RandomUnits,
    default_features,
)
from growmoe.continual.intake import Features
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.strategy import GrowMoE, OnePass
from growmoe.continual.streams import Stream

Progress = Callable[[float, str], None]


def run_growmoe(stream: Stream, seed: int, progress: Progress, batch_size: int, early: int) -> Cell:
    """The growing mixture of closed-form experts (`growmoe.continual.GrowingClassifier`)."""
    run = CellRun(stream, progress)
    classifier = GrowingClassifier(
        default_features(stream.image_shape), stream.num_classes, early=early, seed=seed
    )
    strategy = GrowMoE(
        classifier=classifier, train_mb_size=batch_size, plugins=[run.reporter], **run.common()
    )
    for experience in run.benchmark.train_stream:
        run.train(strategy, experience)
    return Cell(
        run.matrix,
        run.seconds,
        classifier.num_heads,
        memory=classifier.memory(),
        lineage=[event.to_json() for event in classifier.lineage],
        load_history=strategy.load_history,
        extras={"experts": classifier.num_experts, "domains": len(classifier.domains)},
    )


def run_ridge(
    stream: Stream,
    seed: int,
    progress: Progress,
    batch_size: int,
    early: int,
    ridge: float,
    as_large_as_growmoe: bool,
) -> Cell:
    """One closed-form head, on growmoe's features or on as many as take growmoe's memory."""
    run = CellRun(stream, progress)
    features = default_features(stream.image_shape)
    if as_large_as_growmoe:
        features = wider(features, stream.num_classes)
    learner = RidgeClassifier(features, stream.num_classes, ridge=ridge, early=early, seed=seed)
    strategy = OnePass(
        learner=learner, train_mb_size=batch_size, plugins=[run.reporter], **run.common()
    )
    for experience in run.benchmark.train_stream:
        run.train(strategy, experience)
    head = learner.head
    memory = Memory(
        model=tensor_bytes(head.W_DK),
        buffers=features.memory_bytes,
        statistics=tensor_bytes(head.sums.panels, head.C_DK),
    )
    return Cell(run.matrix, run.seconds, head.W_DK.numel(), memory)


def wider(features: Features, num_classes: int) -> Features:
    """Features for one head whose moments take what those of one expert per class take.

    Patch responses are not projected, which serves a single head better; the filters of every
    scale are multiplied alike.
    """
    width = math.sqrt(num_classes * sum((block + 1) ** 2 for block in features.blocks)) - 1
    if isinstance(features, RandomUnits):
        return RandomUnits(features.width, max(1, round(width) - features.width))
    assert isinstance(features, MultiScaleFeatures)
    unprojected = sum(scale.grid**2 * scale.filters for scale in features.scales)
    scales = []
    for scale in features.scales:
        filters = max(1, math.floor(scale.filters * width / unprojected))
        options: dict[str, Any] = {**scale.settings(), "components": None, "filters": filters}
        scales.append(RandomPatchFeatures(**options))
    return MultiScaleFeatures(tuple(scales))
