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
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.continual.cell import Cell, Memory
from growmoe.continual.streams import Stream

Progress = Callable[[float, str], None]
BOUNDARIES, TASK_LABELS, EXAMPLES = "boundaries", "task labels", "examples"
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

    needs = (BOUNDARIES,)

    def learn_experience(self, experience: Experience) -> None:
        """Learn an experience."""
        raise TypeError(f"{type(self).__name__} must define learn_experience")

    def of_task(self, images: Tensor, task: int) -> Tensor:
        """Scores of images that are known to be of experience `task`; for `TASK_LABELS` alone."""
        raise TypeError(f"{type(self).__name__} must define of_task")


def run_learner(stream: Stream, progress: Progress, learner: Learner, budget: Budget) -> Cell:
    """Train on one experience after the other, and test on all after each.

    A method that is told the experience of a test image is asked about one it has not met as if it
    were of the newest.
    """
    matrix: list[list[float]] = []
    seconds = 0.0
    total = stream.num_experiences
    for i in range(total):

        def tell(fraction: float, i: int = i) -> None:
            progress((i + min(1.0, fraction)) / total, f"experience {i + 1} of {total}")

        tell(0.0)
        index = stream.train_index[i]
        experience = Experience(
            stream.train_images(index),
            stream.data.train_labels[index],
            budget.batch_size,
            budget.passes(len(index)),
            tell,
        )
        begin = time.perf_counter()
        if isinstance(learner, TaskLearner):
            learner.learn_experience(experience)
        else:
            for images, labels in experience.batches():
                learner.learn(images, labels)
        seconds += time.perf_counter() - begin
        matrix.append([_accuracy(stream, learner, j, min(i, j)) for j in range(total)])
    return Cell(
        matrix,
        seconds,
        learner.num_parameters,
        learner.memory(stream.bytes_per_example),
        lineage=learner.lineage(),
        extras=learner.extras(),
    )


def _accuracy(stream: Stream, learner: Learner, experience: int, task: int) -> float:
    correct = 0
    index = stream.test_index[experience]
    for part in index.split(_EVAL_BATCH):
        images = stream.test_images(part)
        with torch.no_grad():
            if TASK_LABELS in learner.needs and isinstance(learner, TaskLearner):
                scores = learner.of_task(images, task)
            else:
                scores = learner(images)
        correct += int((scores.argmax(1) == stream.data.test_labels[part]).sum())
    return correct / len(index)


def two_layers(inputs: int, hidden: int) -> nn.Sequential:
    """The body of the bench's MLP: two hidden layers of ReLU units on flat inputs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    )
