"""Progressive neural networks (Rusu et al. 2016, arXiv:1606.04671).

Legend: k the column of a task, h_i its hidden units in layer i, W, U, V and alpha as in the paper:
h_i^k = relu(W_i h_(i-1)^k + U_i relu(V_i alpha h_(i-1)^(<k))) (equation 2).

Avalanche's own takes the column from task labels that class-incremental streams do not carry. Here
an experience is a task; the experience of a test image is told, as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.rivals.learner import BOUNDARIES, TASK_LABELS, Experience, TaskLearner


class _Adapter(nn.Module):
    """The lateral connections into one layer, from the layer below in all earlier columns."""

    def __init__(self, width: int, outputs: int, columns: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(columns, 1))
        self.V = nn.Linear(width * columns, width)
        self.U = nn.Linear(width, outputs, bias=False)

    def forward(self, earlier: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(earlier), 1) * self.alpha
        return self.U(F.relu(self.V(stacked.flatten(1))))


class Column(nn.Module):
    """Two hidden layers and an output layer, with adapters from earlier columns."""

    def __init__(self, inputs: int, hidden: int, num_classes: int, earlier: int) -> None:
        super().__init__()
        self.W1 = nn.Linear(inputs, hidden)
        self.W2, self.W3 = nn.Linear(hidden, hidden), nn.Linear(hidden, num_classes)
        self.into2 = _Adapter(hidden, hidden, earlier) if earlier else None
        self.into3 = _Adapter(hidden, num_classes, earlier) if earlier else None

    def forward(
        self, x: Tensor, earlier: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The hidden layers, for later columns, and the scores."""
        h1 = F.relu(self.W1(x))
        above = self.W2(h1)
        if self.into2 is not None:
            above = above + self.into2([first for first, _ in earlier])
        h2 = F.relu(above)
        scores = self.W3(h2)
        if self.into3 is not None:
            scores = scores + self.into3([second for _, second in earlier])
        return (h1, h2), scores


class PNN(TaskLearner):
    """A column per experience; earlier columns stand still.

    Args:
        image_shape: of one image.
        num_classes: of the whole stream.
        hidden: units in each hidden layer of a column.
        learning_rate: of Adam.
    """

    needs = (BOUNDARIES, TASK_LABELS)

    def __init__(
        self, image_shape: Sequence[int], num_classes: int, *, hidden: int, learning_rate: float
    ) -> None:
        self.inputs, self.hidden = math.prod(image_shape), hidden
        self.num_classes, self.learning_rate = num_classes, learning_rate
        self.columns: list[Column] = []

    def learn_experience(self, experience: Experience) -> None:
        for column in self.columns:
            column.requires_grad_(False)
        column = Column(self.inputs, self.hidden, self.num_classes, len(self.columns))
        self.columns.append(column)
        optimizer = torch.optim.Adam(column.parameters(), lr=self.learning_rate, fused=True)
        for x, y in experience.batches():
            loss = F.cross_entropy(self.of_task(x, len(self.columns) - 1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def of_task(self, images: Tensor, task: int) -> Tensor:
        """Scores of the column of a task, [N, classes]."""
        x = images.flatten(1)
        hidden: list[tuple[Tensor, Tensor]] = []
        for column in self.columns[: task + 1]:
            layers, scores = column(x, hidden)
            hidden.append(layers)
        return scores

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(model=tensor_bytes(*(p for c in self.columns for p in c.parameters())))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for c in self.columns for p in c.parameters())
