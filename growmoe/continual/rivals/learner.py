"""What a method in plain torch has to offer, and the loop that runs it over a stream.

A `Learner` sees mini-batches and nothing else. Only a `TaskLearner` is told where an experience
begins and ends, and only one that says so in `needs` is told at test time which experience an image
is of: what a method claims not to need never reaches it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.stream import Batch, Stream

Progress = Callable[[float, str], None]
BOUNDARIES, TASK_LABELS, EXAMPLES = "boundaries", "task labels", "examples"
ORACLE = "true domains"
_EVAL_BATCH = 1000


@dataclass(frozen=True)
class Budget:
    """How often a method sees an experience.

    Attributes:
        batch_size: images of the current experience in a mini-batch.
        min_steps: an experience is gone through as often as it takes to make so many mini-batches,
            and at least once; 0 for a single pass.
    """

    batch_size: int
    min_steps: int = 0

    def passes(self, examples: int) -> int:
        """How often an experience of so many examples is gone through."""
        return max(1, math.ceil(self.min_steps / max(1, math.ceil(examples / self.batch_size))))


@dataclass(frozen=True)
class Experience:
    """All that arrives between two boundaries.

    Attributes:
        images: float32 [N, C, H, W].
        labels: int64 [N].
        batch_size: images in a mini-batch.
        passes: how often a method may go through it.
        tell: told the fraction of the passes done.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    passes: int
    tell: Callable[[float], None] = field(default=lambda fraction: None, repr=False)

    def batches(self, passes: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches in a new random order at every pass, as many passes as allowed or asked."""
        passes = self.passes if passes is None else passes
        steps = math.ceil(len(self.labels) / self.batch_size) * passes
        done = 0
        for _ in range(passes):
            for index in torch.randperm(len(self.labels)).split(self.batch_size):
                yield self.images[index], self.labels[index]
                done += 1
                if done % 10 == 0:
                    self.tell(done / steps)


class Learner:
    """A method: a subclass defines `learn`, `__call__`, `memory` and `num_parameters`."""

    needs: tuple[str, ...] = ()

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """Take in a mini-batch: float32 [N, C, H, W] and int64 [N]."""
        raise TypeError(f"{type(self).__name__} must define learn")

    def __call__(self, images: Tensor) -> Tensor:
        """Scores, float32 [N, classes]."""
        raise TypeError(f"{type(self).__name__} must define __call__")

    def memory(self, bytes_per_example: int) -> Memory:
        """What it keeps from one experience to the next."""
        raise TypeError(f"{type(self).__name__} must define memory")

    @property
    def num_parameters(self) -> int:
        """Learned numbers that a prediction uses."""
        raise TypeError(f"{type(self).__name__} must define num_parameters")

    def lineage(self) -> list[dict[str, Any]] | None:
        """What was born, merged, frozen and removed, for a method that grows."""
        return None

    def extras(self) -> dict[str, Any]:
        """Anything else worth keeping, as JSON."""
        return {}


class TaskLearner(Learner):
    """A method that is told the boundaries: a subclass defines `learn_experience`."""

    needs: tuple[str, ...] = (BOUNDARIES,)

    def learn_experience(self, experience: Experience) -> None:
        """Learn an experience."""
        raise TypeError(f"{type(self).__name__} must define learn_experience")

    def of_task(self, images: Tensor, task: int) -> Tensor:
        """Scores of images that are known to be of experience `task`; for `TASK_LABELS` alone."""
        raise TypeError(f"{type(self).__name__} must define of_task")


class OracleLearner(Learner):
    """A control that is told the true domain of every train example."""

    needs = (ORACLE,)

    def learn_batch(self, batch: Batch) -> None:
        """Take in a mini-batch with its domains."""
        raise TypeError(f"{type(self).__name__} must define learn_batch")


def run_learner(stream: Stream, progress: Progress, learner: Learner, budget: Budget) -> Cell:
    """Train on the stream, and test on all experiences at the end of each.

    A method without boundaries has the stream's own mini-batches, in which one experience may end
    and the next begin. A method that is told the experience of a test image is asked about one that
    it has not met as if it were of the newest.
    """
    run = _Run(stream, progress, learner)
    if isinstance(learner, TaskLearner):
        for i, index in enumerate(stream.train_index):
            experience = Experience(
                stream.train_images(index),
                stream.data.train_labels[index],
                budget.batch_size,
                budget.passes(len(index)),
                lambda fraction, i=i: run.tell(i + fraction),  # type: ignore[misc]
            )
            begin = time.perf_counter()
            learner.learn_experience(experience)
            run.seconds += time.perf_counter() - begin
            run.test()
    else:
        epochs = budget.passes(min(map(len, stream.train_index)))
        total = math.ceil(stream.num_examples * epochs / budget.batch_size)
        for step, batch in enumerate(stream.batches(budget.batch_size, epochs)):
            begin = time.perf_counter()
            if isinstance(learner, OracleLearner):
                learner.learn_batch(batch)
            else:
                learner.learn(batch.images, batch.labels)
            run.seconds += time.perf_counter() - begin
            if step % 10 == 0:
                run.tell(step / total * stream.num_experiences)
            for _ in batch.ends:
                run.test()
    return Cell(
        run.matrix,
        run.seconds,
        learner.num_parameters,
        learner.memory(stream.bytes_per_example),
        lineage=learner.lineage(),
        anytime=run.anytime,
        memory_history=run.memory,
        parameter_history=run.parameters,
        extras=learner.extras(),
    )


class _Run:
    """A cell under way: what was measured at the end of each experience so far."""

    def __init__(self, stream: Stream, progress: Progress, learner: Learner) -> None:
        self.stream, self.progress, self.learner = stream, progress, learner
        self.seconds = 0.0
        self.matrix: list[list[float]] = []
        self.anytime: list[list[float]] = []
        self.memory: list[list[float]] = []
        self.parameters: list[list[float]] = []

    def tell(self, done: float) -> None:
        """So many experiences are done."""
        total = self.stream.num_experiences
        where = min(int(done) + 1, total)
        self.progress(min(1.0, done / total), f"experience {where} of {total}")

    def test(self) -> None:
        """The next row of the matrix, and what is kept by now."""
        i, stream, learner = len(self.matrix), self.stream, self.learner
        counts = stream.test_counts
        row = [
            accuracy(stream, j, partial(self._scores, task=min(i, j)))
            for j in range(stream.num_experiences)
        ]
        seen = sum(len(index) for index in stream.train_index[: i + 1])
        mean = sum(r * n for r, n in zip(row, counts, strict=True)) / sum(counts)
        self.matrix.append(row)
        self.anytime.append([seen, mean])
        self.memory.append([seen, learner.memory(stream.bytes_per_example).total])
        self.parameters.append([seen, learner.num_parameters])

    def _scores(self, images: Tensor, task: int) -> Tensor:
        if TASK_LABELS in self.learner.needs and isinstance(self.learner, TaskLearner):
            return self.learner.of_task(images, task)
        return self.learner(images)


@torch.no_grad()
def accuracy(stream: Stream, experience: int, scores: Callable[[Tensor], Tensor]) -> float:
    """The share of an experience's test images whose highest score is that of their class."""
    correct, index = 0, stream.test_index[experience]
    for part in index.split(_EVAL_BATCH):
        answers = stream.restrict(scores(stream.test_images(part)), experience).argmax(1)
        correct += int((answers == stream.data.test_labels[part]).sum())
    return correct / len(index)


def held_bytes(thing: object) -> int:
    """The bytes of all tensors among the attributes of an object, and of the modules there."""
    total = 0
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            total += tensor_bytes(value)
        elif isinstance(value, nn.Module):
            total += tensor_bytes(*value.parameters(), *value.buffers())
    return total


def two_layers(inputs: int, hidden: int) -> nn.Sequential:
    """The body of the bench's MLP: two hidden layers of ReLU units on flat inputs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    )
