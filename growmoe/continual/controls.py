"""Controls of growmoe: the same method with one thing taken away or decided by someone else.

Those of "equal final size" and of "as many events" let growmoe run over the stream first, untimed,
to learn how far it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.continual import classifier as room
from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.rivals.build import features_for
from growmoe.continual.rivals.learner import (
    Budget,
    Learner,
    OracleLearner,
    held_bytes,
    run_learner,
)
from growmoe.continual.stream import Batch, Stream

Progress = Callable[[float, str], None]
# An act is switched off with the rules that propose it; what thaws goes with what freezes.
ACTS = {
    "spawn": ("Spawn", "Split"),
    "merge": ("Merge",),
    "prune": ("Prune",),
    "freeze": ("Freeze", "Thaw"),
}


def without(rules: Sequence[Any], *acts: str) -> list[Any]:
    """The rules that propose none of these acts."""
    prefixes = tuple(prefix for act in acts for prefix in ACTS[act])
    return [rule for rule in rules if not type(rule).__name__.startswith(prefixes)]


class Grown(Learner):
    """growmoe, its mini-batches as they come.

    Args:
        stream: whose images it is for.
        early: images that wait for the features.
        seed: of the features and the layers.
        off: acts that are switched off.
        num_domains: to begin with.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        early: int,
        seed: int,
        off: Sequence[str] = (),
        num_domains: int = 1,
    ) -> None:
        make: Any = room.GrowingClassifier
        rules: Any = room
        self.classifier: Any = make(
            features_for(stream),
            stream.num_classes,
            early=early,
            rules=without(rules.default_rules(), *off),
            label_rules=without(rules.default_label_rules(), *off),
            num_domains=num_domains,
            seed=seed,
        )

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.classifier.learn(images, labels)

    def __call__(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores

    def memory(self, bytes_per_example: int) -> Memory:
        kept: Memory = self.classifier.memory()
        return kept

    @property
    def num_parameters(self) -> int:
        return int(self.classifier.memory().model // 4)

    @property
    def births(self) -> int:
        """Domains that were born after the first."""
        return sum(e.act == "spawn" and e.layer == "domains" for e in self.classifier.lineage)

    def lineage(self) -> list[dict[str, Any]]:
        return [event.to_json() for event in self.classifier.lineage]

    def extras(self) -> dict[str, Any]:
        classifier = self.classifier
        return {"experts": classifier.num_experts, "domains": len(classifier.domains)}


class AtBoundaries(Grown, OracleLearner):
    """A domain for every true domain, found again when it returns; tests are told nothing."""

    def __init__(self, stream: Stream, *, early: int, seed: int) -> None:
        super().__init__(stream, early=early, seed=seed, off=("spawn", "merge", "prune"))
        self.ids: dict[int, int] = {}

    def learn_batch(self, batch: Batch) -> None:
        for domain in batch.domains.unique().tolist():
            rows = batch.domains == domain
            self.ids[domain] = self.classifier.enter(self.ids.get(domain))
            self.learn(batch.images[rows], batch.labels[rows])


class AtRandom(Grown):
    """As many domains as growmoe, each begun at a mini-batch drawn at random.

    Args:
        births: how many after the first.
        batch_size: of the mini-batches that will come.

    Attributes:
        times: the mini-batches before which a domain begins, none before the features are fitted.
    """

    def __init__(
        self, stream: Stream, *, early: int, seed: int, births: int, batch_size: int
    ) -> None:
        super().__init__(stream, early=early, seed=seed, off=("spawn", "merge", "prune"))
        first = math.ceil(early / batch_size)
        last = max(first + births, math.ceil(stream.num_examples / batch_size))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(last - first, generator=generator)[:births] + first
        self.times = set(drawn.tolist())
        self._step = 0

    def learn(self, images: Tensor, labels: Tensor) -> None:
        if self._step in self.times:
            self.classifier.enter(None)
        self._step += 1
        super().learn(images, labels)


class Dense(Learner):
    """One closed-form head on the same features, widened to the moments of so many experts."""

    def __init__(
        self, stream: Stream, *, early: int, seed: int, experts: float, ridge: float
    ) -> None:
        from growmoe.continual import closed_form  # it imports Avalanche

        widen: Callable[[Any, Any], Any] = closed_form.wider
        self.features = widen(features_for(stream), experts)
        self.learner = RidgeClassifier(
            self.features, stream.num_classes, ridge=ridge, early=early, seed=seed
        )

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.learner.learn(images, labels)

    def __call__(self, images: Tensor) -> Tensor:
        return self.learner(images)

    def memory(self, bytes_per_example: int) -> Memory:
        weights = tensor_bytes(self.learner.head.W_DK)
        return Memory(
            model=weights,
            buffers=self.features.memory_bytes,
            statistics=held_bytes(self.learner.head) - weights,
        )

    @property
    def num_parameters(self) -> int:
        return self.learner.head.W_DK.numel()


def grow(stream: Stream, seed: int, batch_size: int, early: int) -> Grown:
    """growmoe as it stands at the end of the stream."""
    learner = Grown(stream, early=early, seed=seed)
    for batch in stream.batches(batch_size):
        learner.learn(batch.images, batch.labels)
    learner.classifier.finish()
    return learner


def run_without(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int, off: str
) -> Cell:
    """An act switched off."""
    learner = Grown(stream, early=early, seed=seed, off=(off,))
    return run_learner(stream, progress, learner, Budget(batch_size))


def run_at_boundaries(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int
) -> Cell:
    """Growth at oracle boundaries."""
    learner = AtBoundaries(stream, early=early, seed=seed)
    return run_learner(stream, progress, learner, Budget(batch_size))


def run_at_random(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int
) -> Cell:
    """Growth at random times, with as many births."""
    births = grow(stream, seed, batch_size, early).births
    learner = AtRandom(stream, early=early, seed=seed, births=births, batch_size=batch_size)
    return run_learner(stream, progress, learner, Budget(batch_size))


def run_fixed(stream: Stream, seed: int, progress: Progress, batch_size: int, early: int) -> Cell:
    """A mixture of as many domains from the beginning."""
    domains = len(grow(stream, seed, batch_size, early).classifier.domains)
    learner = Grown(
        stream, early=early, seed=seed, off=("spawn", "merge", "prune"), num_domains=domains
    )
    return run_learner(stream, progress, learner, Budget(batch_size))


def run_dense(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int, ridge: float
) -> Cell:
    """One head of equal memory."""
    options: dict[str, Any] = {"early": early, "seed": seed, "ridge": ridge}
    grown = grow(stream, seed, batch_size, early).memory(stream.bytes_per_example)
    alone = Dense(stream, experts=1.0, **options).memory(stream.bytes_per_example)
    learner = Dense(stream, experts=grown.statistics / alone.statistics, **options)
    return run_learner(stream, progress, learner, Budget(batch_size))
