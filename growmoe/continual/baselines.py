"""Runs the methods that growmoe is compared with, through Avalanche.

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
from growmoe.continual.cell import Cell, Memory, parameter_count, tensor_bytes
from growmoe.continual.record import Recorder, Subject, answers
from growmoe.continual.streams import Stream

require("avalanche.training.supervised")

from avalanche.training.plugins import (  # noqa: E402
    AGEMPlugin,
    EvaluationPlugin,
    EWCPlugin,
    GDumbPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.storage_policy import ClassBalancedBuffer  # noqa: E402
from avalanche.training.supervised import DER, ER_ACE, JointTraining, Naive  # noqa: E402

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


class _FastLoader:
    """Mixed into an Avalanche strategy, gives it `_TensorBatches`."""

    def make_train_dataloader(self: Any, **kwargs: Any) -> None:
        self.dataloader = _TensorBatches(self.adapted_dataset, self.train_mb_size)


class _Naive(_FastLoader, Naive):
    pass


class _DER(_FastLoader, DER):
    pass


class _ErAce(_FastLoader, ER_ACE):
    pass


class _Joint(_FastLoader, JointTraining):
    pass


def run_incremental(
    stream: Stream,
    progress: Progress,
    training: Training,
    plugin: SupervisedPlugin | None,
    kept: Callable[[Any], Memory],
    kind: Callable[..., Any] = _Naive,
    within: bool = True,
    **options: Any,
) -> Cell:
    """Train one network on one experience after another, with a plugin or without.

    Args:
        kept: gives the memory that the method holds at the end.
        kind: an Avalanche strategy, and `options` of its own.
        within: as of `CellRun`.
    """
    run = CellRun(stream, progress, kept, within=within)
    model = mlp(stream, training.hidden)
    strategy = kind(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=True),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=training.batch_size,
        plugins=[p for p in (plugin, run.reporter) if p is not None],
        **options,
        **run.common(),
    )
    untrained = run.untrained(strategy)
    for i, experience in enumerate(run.benchmark.train_stream):
        batches = math.ceil(len(experience.dataset) / training.batch_size)
        if isinstance(plugin, ReplayPlugin):
            # As many old images of a class in a step as new ones.
            plugin.batch_size_mem = training.batch_size * max(i, 1)
            stored = len(plugin.storage_policy.buffer)
            batches = max(batches, math.ceil(stored / plugin.batch_size_mem))
        strategy.train_epochs = training.epochs(batches)
        run.train(strategy, experience)
    # the strategy's model: some begin a new one
    parameters = parameter_count(strategy.model)
    return run.recorder.cell(parameters, kept(strategy), untrained_accuracy=untrained)


def _weights(model: nn.Module) -> int:
    return tensor_bytes(*model.parameters())


def run_naive(stream: Stream, seed: int, progress: Progress, training: Training) -> Cell:
    """Training goes on as if nothing could be forgotten: the lower bound."""
    return run_incremental(
        stream, progress, training, None, lambda strategy: Memory(model=_weights(strategy.model))
    )


def run_replay(
    stream: Stream, seed: int, progress: Progress, training: Training, exemplars: int
) -> Cell:
    """A class-balanced reservoir of exemplars, mixed into every step (arXiv:1902.10486)."""
    plugin = ReplayPlugin(
        mem_size=exemplars, storage_policy=ClassBalancedBuffer(exemplars, adaptive_size=True)
    )

    def kept(strategy: Any) -> Memory:
        stored = len(plugin.storage_policy.buffer)
        return Memory(model=_weights(strategy.model), examples=stored * stream.bytes_per_example)

    return run_incremental(stream, progress, training, plugin, kept, kind=Naive)


class _GDumb(GDumbPlugin):
    """GDumb goes through its memory, not through the experience: so many times."""

    def __init__(self, exemplars: int, passes: int) -> None:
        super().__init__(mem_size=exemplars)
        self.passes = passes

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        strategy.train_epochs = self.passes


def run_gdumb(
    stream: Stream, seed: int, progress: Progress, training: Training, exemplars: int, passes: int
) -> Cell:
    """A balanced memory, and a new network trained on it alone (Prabhu et al. 2020, ECCV)."""
    plugin = _GDumb(exemplars, passes)

    def kept(strategy: Any) -> Memory:
        # its beginning is kept too, in Avalanche, but a seed would do
        stored = len(plugin.storage_policy.buffer)
        return Memory(model=_weights(strategy.model), examples=stored * stream.bytes_per_example)

    return run_incremental(stream, progress, training, plugin, kept, within=False)


def run_ewc(
    stream: Stream, seed: int, progress: Progress, training: Training, strength: float
) -> Cell:
    """Elastic weight consolidation, a penalty per experience (arXiv:1612.00796)."""
    plugin = EWCPlugin(ewc_lambda=strength, mode="separate")

    def kept(strategy: Any) -> Memory:
        old = [*plugin.importances.values(), *plugin.saved_params.values()]
        tensors = [entry.data for entries in old for entry in entries.values()]
        return Memory(model=_weights(strategy.model), statistics=tensor_bytes(*tensors))

    return run_incremental(stream, progress, training, plugin, kept)


def run_lwf(
    stream: Stream,
    seed: int,
    progress: Progress,
    training: Training,
    alpha: float,
    temperature: float,
) -> Cell:
    """Learning without forgetting: distillation from the network before (arXiv:1606.09282)."""
    plugin = LwFPlugin(alpha=alpha, temperature=temperature)

    def kept(strategy: Any) -> Memory:
        before = plugin.lwf.prev_model
        old = 0 if before is None else _weights(before)
        return Memory(model=_weights(strategy.model), buffers=old)

    return run_incremental(stream, progress, training, plugin, kept)


def run_agem(
    stream: Stream,
    seed: int,
    progress: Progress,
    training: Training,
    exemplars: int,
    sample: int,
) -> Cell:
    """A-GEM: a gradient that would raise the loss of the memory is projected (arXiv:1812.00420)."""
    plugin = AGEMPlugin(max(1, exemplars // stream.num_experiences), sample)

    def kept(strategy: Any) -> Memory:
        stored = sum(len(buffer) for buffer in plugin.buffers)
        return Memory(model=_weights(strategy.model), examples=stored * stream.bytes_per_example)

    return run_incremental(stream, progress, training, plugin, kept)


def run_der(
    stream: Stream,
    seed: int,
    progress: Progress,
    training: Training,
    exemplars: int,
    alpha: float,
    beta: float,
) -> Cell:
    """DER++: exemplars replayed with their labels and their old scores (arXiv:2004.07211)."""

    def kept(strategy: Any) -> Memory:
        stored = len(strategy.storage_policy.buffer)
        return Memory(
            model=_weights(strategy.model),
            statistics=4 * stored * stream.num_classes,
            examples=stored * stream.bytes_per_example,
        )

    return run_incremental(
        stream,
        progress,
        training,
        None,
        kept,
        kind=_DER,
        mem_size=exemplars,
        alpha=alpha,
        beta=beta,
    )


def run_er_ace(
    stream: Stream, seed: int, progress: Progress, training: Training, exemplars: int
) -> Cell:
    """ER-ACE: new images against the classes of their mini-batch alone (arXiv:2104.05025)."""

    def kept(strategy: Any) -> Memory:
        stored = len(strategy.storage_policy.buffer)
        return Memory(model=_weights(strategy.model), examples=stored * stream.bytes_per_example)

    return run_incremental(
        stream,
        progress,
        training,
        None,
        kept,
        kind=_ErAce,
        mem_size=exemplars,
        batch_size_mem=training.batch_size,
    )


def run_joint(
    stream: Stream, seed: int, progress: Progress, training: Training, passes: int
) -> Cell:
    """After each experience a new network, trained on everything so far: the upper bound."""
    run = CellRun(stream, progress, within=False)
    untrained: list[float] | None = None
    for i in range(stream.num_experiences):
        model = mlp(stream, training.hidden)
        experiences = list(run.benchmark.train_stream)[: i + 1]
        count = sum(len(experience.dataset) for experience in experiences)
        batches = math.ceil(count / training.batch_size)
        strategy = _Joint(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=True),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=training.batch_size,
            # As many steps as the incremental methods have had by now, if that is more.
            train_epochs=max(passes, math.ceil(training.min_steps * (i + 1) / batches)),
            plugins=[run.reporter],
            **run.common(),
        )
        untrained = untrained or run.untrained(strategy)
        run.train(strategy, experiences)
    memory = Memory(model=_weights(model), examples=count * stream.bytes_per_example)
    return run.recorder.cell(parameter_count(model), memory, untrained_accuracy=untrained)
