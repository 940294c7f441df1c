"""Controls of growmoe: the same method with one thing taken away or decided by someone else.

Those of "equal final size" and of "as many events" let growmoe run over the stream first, untimed,
to learn how far it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from growmoe.continual.cell import Cell
from growmoe.continual.classifier import default_rules
from growmoe.continual.closed_form import Grown, Head, run_grown, wider
from growmoe.continual.features import default_features
from growmoe.continual.rivals.learner import Budget, OracleLearner, run_learner
from growmoe.continual.stream import Batch, Stream
from growmoe.experts.moments import moment_numbers
from growmoe.rules import FreezeSettled, MergeOverlapping, PruneIdle, Rule, ThawOnNovelty

Progress = Callable[[float, str], None]

# Acts that growmoe does without, and the rules that bring them: on domains, on label experts.
FURTHER: dict[str, tuple[list[Rule], list[Rule]]] = {
    "merge": ([MergeOverlapping(z=1.0)], []),
    "prune": ([PruneIdle(steps=16)], []),
    "freeze": ([], [FreezeSettled(), ThawOnNovelty()]),
}


class AtBoundaries(Grown, OracleLearner):
    """A domain for every true domain, found again when it returns; tests are told nothing."""

    def __init__(self, stream: Stream, *, early: int, seed: int) -> None:
        super().__init__(stream, early=early, seed=seed, rules=[])
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
        super().__init__(stream, early=early, seed=seed, rules=[])
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


def grow(stream: Stream, seed: int, batch_size: int, early: int) -> Grown:
    """growmoe as it stands at the end of the stream."""
    learner = Grown(stream, early=early, seed=seed)
    for batch in stream.batches(batch_size):
        learner.learn(batch.images, batch.labels)
    learner.classifier.finish()
    return learner


def run_without_births(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int
) -> Cell:
    """One domain for all."""
    learner = Grown(stream, early=early, seed=seed, rules=[])
    return run_grown(stream, progress, learner, batch_size)


def run_with(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int, act: str
) -> Cell:
    """A further act switched on."""
    rules, label_rules = FURTHER[act]
    learner = Grown(
        stream, early=early, seed=seed, rules=[*default_rules(), *rules], label_rules=label_rules
    )
    return run_grown(stream, progress, learner, batch_size)


def run_at_boundaries(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int
) -> Cell:
    """Growth at oracle boundaries."""
    learner = AtBoundaries(stream, early=early, seed=seed)
    return run_grown(stream, progress, learner, batch_size)


def run_at_random(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int
) -> Cell:
    """Growth at random times, with as many births."""
    births = grow(stream, seed, batch_size, early).births
    learner = AtRandom(stream, early=early, seed=seed, births=births, batch_size=batch_size)
    return run_grown(stream, progress, learner, batch_size)


def run_fixed(stream: Stream, seed: int, progress: Progress, batch_size: int, early: int) -> Cell:
    """A mixture of as many domains from the beginning."""
    domains = len(grow(stream, seed, batch_size, early).classifier.domains)
    learner = Grown(stream, early=early, seed=seed, rules=[], num_domains=domains)
    return run_grown(stream, progress, learner, batch_size)


def run_dense(
    stream: Stream, seed: int, progress: Progress, batch_size: int, early: int, ridge: float
) -> Cell:
    """One head of equal memory."""
    memory = grow(stream, seed, batch_size, early).memory(stream.bytes_per_example)
    features = default_features(stream.image_shape)
    moment = 4 * moment_numbers(features.blocks)
    learner = Head(
        stream, wider(features, memory.statistics / moment), early=early, seed=seed, ridge=ridge
    )
    return run_learner(stream, progress, learner, Budget(batch_size))
