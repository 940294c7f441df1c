"""Expert Gate (Aljundi et al. 2017, arXiv:1611.06194): an expert and an autoencoder per task.

Legend: Er_k the mean reconstruction error of the autoencoder of task k on the new task's data;
Rel(k, a) = 1 - (Er_a - Er_k) / Er_k (equation 3) the relatedness of an earlier task a.

A new expert starts from the most related one, by learning without forgetting where the relatedness
exceeds a threshold and by fine-tuning elsewhere. The autoencoder that reconstructs a test image
best chooses its expert, so that no task label is needed. The gates see pixels; the paper's, and
Avalanche's, see the features of an AlexNet trained on ImageNet.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory
from growmoe.continual.rivals.learner import Experience, TaskLearner, two_layers


class ExpertGate(TaskLearner):
    """Expert Gate on MLPs.

    Args:
        image_shape: of one image.
        num_classes: of the whole stream.
        hidden: units in each hidden layer of an expert.
        code: units of an autoencoder's hidden layer.
        learning_rate: of Adam.
        related: the threshold of relatedness.
        temperature: of the distillation.

    Attributes:
        relatedness: of each new task to the most related earlier one.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: int,
        code: int,
        learning_rate: float,
        related: float = 0.85,
        temperature: float = 2.0,
    ) -> None:
        self.inputs, self.num_classes = math.prod(image_shape), num_classes
        self.hidden, self.code, self.learning_rate = hidden, code, learning_rate
        self.related, self.temperature = related, temperature
        self.experts: list[nn.Module] = []
        self.gates: list[nn.Module] = []
        self.relatedness: list[float] = []

    def learn_experience(self, experience: Experience) -> None:
        gate = nn.Sequential(
            nn.Flatten(),
            nn.Linear(self.inputs, self.code),
            nn.ReLU(),
            nn.Linear(self.code, self.inputs),
            nn.Sigmoid(),
        )
        optimizer = torch.optim.Adam(gate.parameters(), lr=self.learning_rate, fused=True)
        for x, _ in experience.batches():
            loss = F.mse_loss(gate(x), x.flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        teacher, related = self._most_related(gate, experience.images)
        if teacher is None:
            body = two_layers(self.inputs, self.hidden)
            expert: nn.Module = nn.Sequential(body, nn.Linear(self.hidden, self.num_classes))
        else:
            expert = copy.deepcopy(teacher).requires_grad_(True)
            self.relatedness.append(related)
        distil = teacher if related > self.related else None
        self._train(expert, distil, experience)
        self.gates.append(gate.requires_grad_(False))
        self.experts.append(expert.requires_grad_(False))

    def _most_related(self, gate: nn.Module, images: Tensor) -> tuple[nn.Module | None, float]:
        if not self.gates:
            return None, 0.0
        error_k = float(_error(gate, images).mean())
        errors = [float(_error(old, images).mean()) for old in self.gates]
        best = min(range(len(errors)), key=errors.__getitem__)
        return self.experts[best], 1 - (errors[best] - error_k) / error_k

    def _train(self, expert: nn.Module, teacher: nn.Module | None, experience: Experience) -> None:
        optimizer = torch.optim.Adam(expert.parameters(), lr=self.learning_rate, fused=True)
        for x, y in experience.batches():
            scores = expert(x)
            loss = F.cross_entropy(scores, y)
            if teacher is not None:
                with torch.no_grad():
                    soft = (teacher(x) / self.temperature).softmax(1)
                loss = loss + F.cross_entropy(scores / self.temperature, soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def choose(self, images: Tensor) -> Tensor:
        """The expert of each image, int64 [N]."""
        return torch.stack([_error(gate, images) for gate in self.gates], 1).argmin(1)

    def __call__(self, images: Tensor) -> Tensor:
        chosen = self.choose(images)
        scores = torch.zeros(len(images), self.num_classes)
        for k in chosen.unique().tolist():
            scores[chosen == k] = self.experts[k](images[chosen == k])
        return scores

    def shares(self, images: Tensor) -> dict[int, Tensor]:
        chosen = self.choose(images)
        return {k: (chosen == k).float() for k in range(len(self.experts))}

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(model=4 * self.num_parameters)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for m in [*self.experts, *self.gates] for p in m.parameters())


@torch.no_grad()
def _error(gate: nn.Module, images: Tensor) -> Tensor:
    """Mean squared reconstruction error of each image, [N]."""
    parts = [(gate(x) - x.flatten(1)).square().mean(1) for x in images.split(1000)]
    return torch.cat(parts)
