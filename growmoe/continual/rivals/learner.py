"""What a method in plain torch has to offer, and the loop that runs it over a stream.

A `Learner` sees mini-batches and nothing else. Only a `TaskLearner` is told where an experience
begins and ends, and only one that says so in `needs` is told at test time which experience an image
is of: what a method claims not to need never reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.continual.cell import Cell, Memory, tensor_bytes
from growmoe.continual.intake import Intake
from growmoe.continual.record import Recorder, Subject
from growmoe.continual.stream import Batch, Stream
from growmoe.glimpse import let_watch
from growmoe.lineage import Event

Progress = Callable[[float, str], None]
BOUNDARIES, TASK_LABELS, EXAMPLES = "boundaries", "task labels", "examples"
ORACLE = "true domains"


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

    @property
    def ready(self) -> bool:
        """Whether it can answer; not while the first images wait for its features."""
        intake: Intake | None = getattr(self, "_intake", None)
        return intake is None or intake.fitted

    @property
    def births(self) -> int | None:
        """How many new domains it has noticed, for a method that looks for them."""
        return None

    def shares(self, images: Tensor) -> Mapping[Any, Tensor] | None:
        """The share of each image that each expert takes, by id, for a mixture: float32 [N]."""
        return None

    def events(self) -> Sequence[Event]:
        """What was born, merged, frozen and removed so far, for a method that grows."""
        return ()

    def lineage(self) -> list[dict[str, Any]] | None:
        """The events as JSON; None for a method that does not grow."""
        return [event.to_json() for event in self.events()] or None

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
    recorder = Recorder(stream, _subject(stream, learner))
    let_watch(progress, recorder.glimpse)
    total = stream.num_experiences

    def tell(done: float) -> None:
        """So many experiences are done."""
        text = f"experience {min(int(done) + 1, total)} of {total}"
        progress(min(1.0, done / total), text)

    if isinstance(learner, TaskLearner):
        for i, index in enumerate(stream.train_index):
            experience = Experience(
                stream.train_images(index),
                stream.data.train_labels[index],
                budget.batch_size,
                budget.passes(len(index)),
                lambda fraction, i=i: tell(i + fraction),  # type: ignore[misc]
            )
            with recorder.learning():
                learner.learn_experience(experience)
            recorder.after(len(index))
            recorder.test()
    else:
        epochs = budget.passes(min(map(len, stream.train_index)))
        steps = math.ceil(stream.num_examples * epochs / budget.batch_size)
        for step, batch in enumerate(stream.batches(budget.batch_size, epochs)):
            if batch.num_new:
                recorder.before()
            with recorder.learning():
                if isinstance(learner, OracleLearner):
                    learner.learn_batch(batch)
                else:
                    learner.learn(batch.images, batch.labels)
            recorder.after(batch.num_new)
            if step % 10 == 0:
                tell(step / steps * total)
            for _ in batch.ends:
                recorder.test()
    return recorder.cell(
        learner.num_parameters,
        learner.memory(stream.bytes_per_example),
        lineage=learner.lineage(),
        extras=learner.extras(),
    )


def _subject(stream: Stream, learner: Learner) -> Subject:
    told = TASK_LABELS in learner.needs and isinstance(learner, TaskLearner)

    def scores(images: Tensor, task: int) -> Tensor:
        if told and isinstance(learner, TaskLearner):
            return learner.of_task(images, task)
        return learner(images)

    return Subject(
        scores,
        size=lambda: (learner.num_parameters, learner.memory(stream.bytes_per_example).total),
        ready=lambda: learner.ready,
        shares=learner.shares,
        births=lambda: learner.births,
        events=learner.events,
        told=told,
    )


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
