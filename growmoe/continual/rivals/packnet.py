"""PackNet (Mallya & Lazebnik 2018, arXiv:1711.05769): tasks packed into one network by pruning.

After two thirds of an experience's mini-batches the smallest weights among those that no earlier
task owns are released, layer by layer; the last third retrains the rest, which then stand still.
Biases are trained on the first task alone, and every task has an output layer of its own, as in the
paper (which trains and retrains in passes of their own).

Avalanche's own wants two epochs at least and task labels in the benchmark, and shares the output
layer. The experience of a test image is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.rivals.learner import BOUNDARIES, TASK_LABELS, Experience, TaskLearner

_FREE = 255  # the owner of a weight that no task owns


class PackNet(TaskLearner):
    """PackNet on an MLP of two hidden layers.

    Args:
        image_shape: of one image.
        num_classes: of the whole stream.
        hidden: units in each hidden layer.
        learning_rate: of Adam.
        pruned: the share of a task's weights that is released for later tasks.

    Attributes:
        owner: for each layer, uint8 of its weight's shape: the task that owns it.
    """

    needs = (BOUNDARIES, TASK_LABELS)

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: int,
        learning_rate: float,
        pruned: float,
    ) -> None:
        if not 0 < pruned < 1:
            raise ValueError(f"pruned must lie between 0 and 1, got {pruned!r}")
        self.layers = [nn.Linear(math.prod(image_shape), hidden), nn.Linear(hidden, hidden)]
        self.owner = [
            torch.full(layer.weight.shape, _FREE, dtype=torch.uint8) for layer in self.layers
        ]
        self.heads: list[nn.Linear] = []
        self.hidden, self.num_classes = hidden, num_classes
        self.learning_rate, self.pruned = learning_rate, pruned

    def learn_experience(self, experience: Experience) -> None:
        task = len(self.heads)
        if task >= _FREE:
            raise ValueError(f"PackNet: at most {_FREE} experiences")
        self.heads.append(nn.Linear(self.hidden, self.num_classes))
        for owner in self.owner:  # all that is free is this task's, for now
            owner[owner == _FREE] = task
        optimizer = self._optimizer(task)
        steps = math.ceil(len(experience.labels) / experience.batch_size) * experience.passes
        prune_at = max(1, math.ceil(2 * steps / 3)) if steps > 1 else None
        for step, (x, y) in enumerate(experience.batches()):
            if step == prune_at:
                self._prune(task)
                optimizer = self._optimizer(task)  # no momentum may move what was released
            loss = F.cross_entropy(self.of_task(x, task), y)
            optimizer.zero_grad()
            loss.backward()
            for layer, owner in zip(self.layers, self.owner, strict=True):
                assert layer.weight.grad is not None
                layer.weight.grad.mul_(owner == task)
            optimizer.step()
        if prune_at is None:
            self._prune(task)

    def _optimizer(self, task: int) -> torch.optim.Optimizer:
        for layer in self.layers:
            layer.bias.requires_grad_(task == 0)
        parameters = [layer.weight for layer in self.layers] + list(self.heads[task].parameters())
        if task == 0:
            parameters += [layer.bias for layer in self.layers]
        return torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)

    @torch.no_grad()
    def _prune(self, task: int) -> None:
        for layer, owner in zip(self.layers, self.owner, strict=True):
            own = (owner == task).flatten().nonzero().flatten()
            size = layer.weight.flatten()[own].abs()
            released = own[size.argsort()[: int(self.pruned * len(own))]]
            owner.view(-1)[released] = _FREE
            # drawn anew for the next task; this one masks them
            fresh = torch.empty_like(layer.weight)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
            layer.weight.copy_(torch.where(owner == _FREE, fresh, layer.weight))

    def of_task(self, images: Tensor, task: int) -> Tensor:
        """Scores through the weights that a task and those before it own, [N, classes]."""
        h = images.flatten(1)
        for layer, owner in zip(self.layers, self.owner, strict=True):
            h = F.relu(F.linear(h, layer.weight * (owner <= task), layer.bias))
        return self.heads[task](h)

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(model=4 * self.num_parameters, buffers=tensor_bytes(*self.owner))

    @property
    def num_parameters(self) -> int:
        modules = [*self.layers, *self.heads]
        return sum(p.numel() for module in modules for p in module.parameters())
