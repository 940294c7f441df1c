"""Synaptic intelligence (Zenke et al. 2017, arXiv:1703.04200).

Legend: theta the weights, theta' those at the end of the last task, g the gradient of the task's
loss, omega a weight's part in the fall of that loss along its path, Omega its importance, c the
strength, xi the damping.

    omega = sum over steps of -g dtheta                                         (equation 3)
    Omega += max(omega, 0) / ((theta - theta')^2 + xi)   at the end of a task   (equation 5)
    loss  = task + c sum Omega (theta' - theta)^2                               (equation 4)

Avalanche 0.6 keeps old weights as views of the new ones on a CPU, so that every path has length
zero and its penalty never acts; hence this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory, parameter_count, tensor_bytes
from growmoe.continual.rivals.learner import Experience, TaskLearner


class SynapticIntelligence(TaskLearner):
    """An MLP whose weights are held by their importance.

    Args:
        net: images to scores.
        strength: c.
        damping: xi.
        optimizer: of the net's parameters; makes the steps.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, *, strength: float, damping: float
    ) -> None:
        self.net, self.optimizer = net, optimizer
        self.strength, self.damping = strength, damping
        self.weights = list(net.parameters())
        self.importance = [torch.zeros_like(p) for p in self.weights]
        self.anchor = [p.detach().clone() for p in self.weights]

    def learn_experience(self, experience: Experience) -> None:
        self.net.train()
        omega = [torch.zeros_like(p) for p in self.weights]
        self.anchor = [p.detach().clone() for p in self.weights]
        for x, y in experience.batches():
            self._step(x, y, omega)
        with torch.no_grad():
            for p, old, path, importance in zip(
                self.weights, self.anchor, omega, self.importance, strict=True
            ):
                importance += path.clamp(min=0) / ((p - old).square() + self.damping)
        self.anchor = [p.detach().clone() for p in self.weights]

    def _step(self, x: Tensor, y: Tensor, omega: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        with torch.no_grad():
            before = [p.clone() for p in self.weights]
            gradients = []
            for p, old, importance in zip(self.weights, self.anchor, self.importance, strict=True):
                assert p.grad is not None
                gradients.append(p.grad.clone())
                p.grad.addcmul_(importance, p - old, value=2 * self.strength)
            self.optimizer.step()
            for path, gradient, p, was in zip(omega, gradients, self.weights, before, strict=True):
                path.addcmul_(gradient, p - was, value=-1.0)

    def __call__(self, images: Tensor) -> Tensor:
        self.net.eval()
        scores: Tensor = self.net(images)
        return scores

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=tensor_bytes(*self.weights),
            statistics=tensor_bytes(*self.importance, *self.anchor),
        )

    @property
    def num_parameters(self) -> int:
        return parameter_count(self.net)
