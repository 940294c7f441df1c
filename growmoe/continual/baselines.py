"""The methods that growmoe is compared with and that Avalanche brings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from growmoe.continual import require
from growmoe.continual.cell import Cell, Memory, parameter_count, tensor_bytes
from growmoe.continual.cell_run import CellRun, FastLoader, Progress, Training, mlp
from growmoe.continual.streams import Stream

require("avalanche.training.supervised")

from avalanche.training.plugins import (  # noqa: E402
    AGEMPlugin,
    EWCPlugin,
    GDumbPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.storage_policy import ClassBalancedBuffer  # noqa: E402
from avalanche.training.supervised import DER, ER_ACE, JointTraining, Naive  # noqa: E402


class _Naive(FastLoader, Naive):
    pass


class _DER(FastLoader, DER):
    pass


class _ErAce(FastLoader, ER_ACE):
    pass


class _Joint(FastLoader, JointTraining):
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
