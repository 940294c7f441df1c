"""Runs growmoe, and the closed-form heads it is compared with on the very same features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.features import (
    MultiScaleFeatures,
    RandomPatchFeatures,
    RandomUnits,
    default_features,
)
from growmoe.continual.intake import Features
from growmoe.continual.load_history import LoadHistory
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.rivals.learner import Budget, Learner, run_learner
from growmoe.continual.stream import Stream
from growmoe.experts.moments import moment_numbers
from growmoe.lineage import Event
from growmoe.rules import Rule

Progress = Callable[[float, str], None]


class Grown(Learner):
    """growmoe (`GrowingClassifier`), its mini-batches as they come.

    Args:
        stream: whose images it is for.
        early: images that wait for the features.
        seed: of the features and the layers.
        rules: on domains; growmoe's if left out.
        label_rules: on the label experts; none if left out.
        num_domains: to begin with.

    Attributes:
        load: each expert's share of the inputs.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        early: int,
        seed: int,
        rules: Sequence[Rule] | None = None,
        label_rules: Sequence[Rule] = (),
        num_domains: int = 1,
    ) -> None:
        self.classifier = GrowingClassifier(
            default_features(stream.image_shape),
            stream.num_classes,
            early=early,
            rules=rules,
            label_rules=label_rules,
            num_domains=num_domains,
            seed=seed,
        )
        self.load = LoadHistory()

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.classifier.learn(images, labels)
        self.load.note(self.classifier)

    def __call__(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores

    def memory(self, bytes_per_example: int) -> Memory:
        return self.classifier.memory()

    @property
    def num_parameters(self) -> int:
        return self.classifier.num_heads

    @property
    def ready(self) -> bool:
        return self.classifier.layer is not None

    @property
    def births(self) -> int:
        """Domains that were born after the first."""
        return sum(e.act == "spawn" and e.layer == "domains" for e in self.classifier.lineage)

    def events(self) -> Sequence[Event]:
        return self.classifier.lineage

    def extras(self) -> dict[str, Any]:
        classifier = self.classifier
        return {"experts": classifier.num_experts, "domains": len(classifier.domains)}

    def shares(self, images: Tensor) -> dict[str, Tensor]:
        """1 for the expert that decides on an image, by "layer:id"."""
        names = np.array(self.classifier.expert_names(images))
        return {name: torch.from_numpy(names == name).float() for name in np.unique(names)}


class Head(Learner):
    """One closed-form head.

    Args:
        stream: whose labels it is for.
        features: not fitted yet.
        early: images that wait for the features.
        seed: of the features.
        ridge: as `RidgeHead`'s.
    """

    def __init__(
        self, stream: Stream, features: Features, *, early: int, seed: int, ridge: float
    ) -> None:
        self.features = features
        self.learner = RidgeClassifier(
            features, stream.num_classes, ridge=ridge, early=early, seed=seed
        )

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.learner.learn(images, labels)

    def __call__(self, images: Tensor) -> Tensor:
        return self.learner(images)

    @property
    def ready(self) -> bool:
        return self.learner.ready

    def memory(self, bytes_per_example: int) -> Memory:
        head = self.learner.head
        return Memory(
            model=tensor_bytes(head.W_DK),
            buffers=self.features.memory_bytes,
            statistics=tensor_bytes(head.sums.panels, head.C_DK),
        )

    @property
    def num_parameters(self) -> int:
        return self.learner.head.W_DK.numel()


def run_growmoe(stream: Stream, seed: int, progress: Progress, batch_size: int, early: int) -> Cell:
    """The growing mixture of closed-form experts (`growmoe.continual.GrowingClassifier`)."""
    learner = Grown(stream, early=early, seed=seed)
    return run_grown(stream, progress, learner, batch_size)


def run_grown(stream: Stream, progress: Progress, learner: Grown, batch_size: int) -> Cell:
    """growmoe or one of its controls."""
    cell = run_learner(stream, progress, learner, Budget(batch_size))
    return replace(cell, load_history=learner.load.entries)


def run_ridge(
    stream: Stream,
    seed: int,
    progress: Progress,
    batch_size: int,
    early: int,
    ridge: float,
    as_large_as_growmoe: bool,
) -> Cell:
    """One closed-form head, on growmoe's features or on as many as take growmoe's memory.

    growmoe keeps a moment for each label, and one more for each further domain; the head is told
    how many there are.
    """
    features = default_features(stream.image_shape)
    if as_large_as_growmoe:
        further = stream.num_domains - 1 if stream.scenario == "domain" else 0
        features = wider(features, stream.num_classes + further)
    learner = Head(stream, features, early=early, seed=seed, ridge=ridge)
    return run_learner(stream, progress, learner, Budget(batch_size))


def wider(features: Features, moments: float) -> Features:
    """Features for one head whose moment takes what so many moments of these features take.

    Patch responses are not projected, which serves a single head better; the filters of every
    scale are multiplied alike.
    """
    width = sum(features.blocks)
    most = moments * moment_numbers(features.blocks)
    while moment_numbers((width + 1,)) <= most:
        width += 1
    while width > 1 and moment_numbers((width,)) > most:
        width -= 1
    if isinstance(features, RandomUnits):
        return RandomUnits(features.width, max(1, width - features.width))
    assert isinstance(features, MultiScaleFeatures)
    unprojected = sum(scale.grid**2 * scale.filters for scale in features.scales)
    scales = []
    for scale in features.scales:
        filters = max(1, scale.filters * width // unprojected)
        options: dict[str, Any] = {**scale.settings(), "components": None, "filters": filters}
        scales.append(RandomPatchFeatures(**options))
    return MultiScaleFeatures(tuple(scales))
