"""Runs growmoe, and the heads it is compared with on the very same features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from growmoe.continual.baselines import CellRun
from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.features import RandomPatchFeatures
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.strategy import GrowMoE, OnePass
from growmoe.continual.streams import Stream

Progress = Callable[[float, str], None]


def run_growmoe(stream: Stream, seed: int, progress: Progress, batch_size: int, early: int) -> Cell:
    """The growing mixture of closed-form experts (`growmoe.continual.GrowingClassifier`)."""
    run = CellRun(stream, progress)
    features = RandomPatchFeatures.for_images(*stream.image_shape[1:])
    classifier = GrowingClassifier(features, stream.num_classes, early=early, seed=seed)
    strategy = GrowMoE(
        classifier=classifier, train_mb_size=batch_size, plugins=[run.reporter], **run.common()
    )
    for experience in run.benchmark.train_stream:
        run.train(strategy, experience)
    layer = classifier.layer
    assert layer is not None
    heads = classifier.gate.head_numbers()
    return Cell(
        run.matrix,
        run.seconds,
        heads,
        memory=Memory(
            model=4 * heads,
            buffers=features.memory_bytes,
            statistics=tensor_bytes(*layer.buffers()),
        ),
        lineage=[event.to_json() for event in layer.lineage],
        load_history=strategy.load_history,
        extras={"experts": len(layer.experts)},
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
    features = RandomPatchFeatures.for_images(*stream.image_shape[1:])
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
        statistics=tensor_bytes(head.G_DD, head.C_DK),
    )
    return Cell(run.matrix, run.seconds, head.W_DK.numel(), memory)


def wider(features: RandomPatchFeatures, num_classes: int) -> RandomPatchFeatures:
    """Features for one head whose moments take what those of one expert per class take.

    They are not projected, which serves a single head better.
    """
    width = math.sqrt(num_classes) * (features.num_features + 1)
    options: dict[str, Any] = {**features.settings(), "components": None}
    options["filters"] = max(1, math.floor((width - 1) / features.grid**2))
    return RandomPatchFeatures(**options)
