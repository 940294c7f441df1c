"""Runs one cell through Avalanche: its benchmark, its recorder, its progress.

All gradient methods share one network, one optimizer and one rule for the number of steps, so that
what differs between them is what they do about forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from growmoe.continual import require
from growmoe.continual.cell import Memory, parameter_count
from growmoe.continual.record import Recorder, Subject, answers
from growmoe.continual.streams import Stream
from growmoe.glimpse import let_watch

require("avalanche.training.supervised")

from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin  # noqa: E402

Progress = Callable[[float, str], None]
_EVAL_BATCH = 1000


@dataclass(frozen=True)
class Training:
    """How every gradient method is trained.

    Attributes:
        hidden: units in each of the two hidden layers.
        learning_rate: of Adam, with its default betas.
        batch_size: images of the current experience per step.
        min_steps: an experience is gone through as often as it takes to make so many steps, and at
            least once: once on MNIST and Fashion-MNIST, about thirty times on digits.
    """

    hidden: int = 400
    learning_rate: float = 3e-4
    batch_size: int = 32
    min_steps: int = 300

    def epochs(self, batches: int) -> int:
        """How often an experience of so many mini-batches is gone through."""
        return max(1, math.ceil(self.min_steps / batches))


def mlp(stream: Stream, hidden: int) -> nn.Sequential:
    """Two hidden layers of ReLU units, and one output per class of the whole stream."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(stream.image_shape), hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, stream.num_classes),
    )


class _Report(SupervisedPlugin):
    """Tells how far the training of one experience is, and the recorder what is learned.

    Args:
        tell: told the fraction done.
        recorder: told of the mini-batches of the first epoch.
    """

    def __init__(self, tell: Callable[[float], None], recorder: Recorder) -> None:
        super().__init__()
        self.tell, self.recorder = tell, recorder
        self.steps, self.left = 0, 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.steps, self.left = 0, len(strategy.experience.dataset)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        # the examples of the experience come first, those of a replay memory after them
        count = min(self.left, strategy.train_mb_size)
        if count:
            self.recorder.before(strategy.mb_x[:count], strategy.mb_y[:count])

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        count = min(self.left, strategy.train_mb_size)
        if count:
            self.recorder.after(count)
        self.left -= count
        self.steps += 1
        if self.steps % 10 == 0:
            total = len(strategy.dataloader) * strategy.train_epochs
            self.tell(min(1.0, self.steps / total))


class CellRun:
    """One cell under way: its benchmark, its recorder, its progress.

    Args:
        stream: what is learned.
        progress: told the fraction done and what is being done.
        kept: gives the memory that the method holds, of its strategy.
        within: whether the method takes an experience in by mini-batches, each once in the first
            epoch, so that it can be asked on the way.
    """

    def __init__(
        self,
        stream: Stream,
        progress: Progress,
        kept: Callable[[Any], Memory] | None = None,
        within: bool = True,
    ) -> None:
        self.stream, self.progress = stream, progress
        self.benchmark = stream.benchmark()
        self.strategy: Any = None
        size = None
        if kept is not None:
            size = partial(self._size, kept)
        subject = Subject(
            lambda images, experience: self._scores(images),
            size=size,
            ready=lambda: answers(self._learner),
        )
        self.recorder = Recorder(stream, subject, points=None if within else 0)
        let_watch(progress, self.recorder.glimpse)
        self.reporter = _Report(self._tell, self.recorder)

    @property
    def matrix(self) -> list[list[float]]:
        """The rows of the accuracy matrix so far."""
        return self.recorder.matrix

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return self.recorder.seconds

    @property
    def _learner(self) -> Any:
        return getattr(self.strategy, "learner", self.strategy.model)

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        learner = self._learner
        if not isinstance(learner, nn.Module):
            return learner(images)  # type: ignore[no-any-return]
        training = learner.training
        scores: torch.Tensor = learner.eval()(images)
        learner.train(training)
        return scores

    def _size(self, kept: Callable[[Any], Memory]) -> tuple[int, int]:
        return parameter_count(self.strategy.model), kept(self.strategy).total

    def _tell(self, fraction: float) -> None:
        done, total = len(self.matrix), self.stream.num_experiences
        self.progress((done + fraction) / total, f"experience {done + 1} of {total}")

    def common(self) -> dict[str, Any]:
        """Arguments that every Avalanche strategy here shares."""
        return {"evaluator": EvaluationPlugin(loggers=[]), "eval_mb_size": _EVAL_BATCH}

    def untrained(self, strategy: Any) -> list[float]:
        """The accuracy on each experience before anything was learned."""
        self.strategy = strategy
        return self.recorder.row(0)

    def train(self, strategy: Any, experiences: Any) -> None:
        """Train, then fill the next row of the accuracy matrix."""
        self.strategy = strategy
        self._tell(0.0)
        with self.recorder.learning():
            strategy.train(experiences, eval_streams=[])
        self.recorder.test()


class _TensorBatches:
    """Shuffled mini-batches of data held as tensors, many times faster than example by example."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        images, labels, _ = zip(*dataset, strict=True)
        self.images, self.labels = torch.stack(images), torch.tensor(labels)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for index in torch.randperm(len(self.labels)).split(self.batch_size):
            yield [self.images[index], self.labels[index], torch.zeros_like(index)]


class FastLoader:
    """Mixed into an Avalanche strategy, gives it `_TensorBatches`."""

    def make_train_dataloader(self: Any, **kwargs: Any) -> None:
        self.dataloader = _TensorBatches(self.adapted_dataset, self.train_mb_size)
