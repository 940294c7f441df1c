"""One cell of the bench: what one method did on one stream with one seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Memory:
    """What a method keeps from one experience to the next, in bytes.

    Attributes:
        model: parameters.
        buffers: fixed tensors that the method needs to run, such as random filters or an old model.
        statistics: what is gathered from the data, such as importances or Gram matrices.
        examples: stored images and labels, as the stream has them: a byte a pixel and a label.
    """

    model: int = 0
    buffers: int = 0
    statistics: int = 0
    examples: int = 0

    @property
    def total(self) -> int:
        return self.model + self.buffers + self.statistics + self.examples


@dataclass(frozen=True)
class Cell:
    """The result of one method on one stream with one seed.

    Attributes:
        accuracy_matrix: R[i][j], accuracy from 0 to 1 on experience j after training on i.
        seconds: wall time of training, without evaluation.
        parameters: learned numbers that a prediction uses, at the end.
        memory: what is kept, in bytes, at the end.
        untrained_accuracy: accuracy on each experience before any training, or None.
        lineage: what was born, merged, frozen and removed, for a method that grows.
        load_history: [{"step": int, "load": {expert id: share of the inputs}}], likewise.
        prediction_flops: floating-point operations of one prediction, at the end.
        anytime: [[examples seen, accuracy on all tests], …], as the stream goes on.
        prequential: [[examples seen, accuracy on the batch before it was learned], …].
        memory_history: [[examples seen, bytes kept], …].
        parameter_history: [[examples seen, parameters], …].
        seconds_history: [[examples seen, seconds of training], …].
        flops_history: [[examples seen, prediction_flops], …].
        detections: the examples seen whenever a new domain was noticed.
        drifts: the examples seen whenever a new domain came, that of the beginning left out.
        routing: counts of test examples, a row for each expert, a column for each domain.
        class_routing: likewise, a column for each class.
        extras: anything else worth keeping, as JSON.
    """

    accuracy_matrix: list[list[float]]
    seconds: float
    parameters: int
    memory: Memory
    untrained_accuracy: list[float] | None = None
    lineage: list[dict[str, Any]] | None = None
    load_history: list[dict[str, Any]] | None = None
    prediction_flops: float | None = None
    anytime: list[list[float]] | None = None
    prequential: list[list[float]] | None = None
    memory_history: list[list[float]] | None = None
    parameter_history: list[list[float]] | None = None
    seconds_history: list[list[float]] | None = None
    flops_history: list[list[float]] | None = None
    detections: list[float] | None = None
    drifts: list[float] | None = None
    routing: list[list[float]] | None = None
    class_routing: list[list[float]] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        return self.memory.total


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """The bytes that the numbers of these tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def parameter_count(model: nn.Module) -> int:
    """The numbers that the model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
