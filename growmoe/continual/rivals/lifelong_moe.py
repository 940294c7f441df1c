"""Lifelong-MoE (Chen et al. 2023, arXiv:2305.12281): new experts for every distribution.

Legend: theta_s the dense layers that all distributions share, theta_d the experts and gate columns
of a distribution; L_o the regularisation of outputs.

When a distribution begins, experts and gate columns are added and all earlier ones are frozen
(section 3.2); the shared layers train on, held by L = L_new + lambda L_o, where L_o is the
divergence of the outputs from those of the model before (section 3.3). Top-2 routing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.record import mixture_shares
from growmoe.continual.rivals.learner import BOUNDARIES, Experience, TaskLearner
from growmoe.experts.ffn import FFN
from growmoe.lineage import Event
from growmoe.moe import MoE, aux_loss
from growmoe.routers import TopK


class MixtureNet(nn.Module):
    """A dense layer, a mixture of experts around which it is passed on, an output layer.

    Args:
        inputs: pixels.
        width: units of the dense layer, the mixture's width.
        num_classes: scores.
        layer: the mixture, [.., width] to [.., width].
    """

    def __init__(self, inputs: int, width: int, num_classes: int, layer: MoE) -> None:
        super().__init__()
        self.dense, self.layer = nn.Linear(inputs, width), layer
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, [N, classes]."""
        h = F.relu(self.dense(images.flatten(1)))
        return self.head(F.relu(h + self.layer(h)))

    def shares(self, images: Tensor) -> dict[int, Tensor]:
        """The share of each image that each expert takes, by id."""
        return mixture_shares(self.layer, F.relu(self.dense(images.flatten(1))))


class LifelongMoE(TaskLearner):
    """Lifelong-MoE on images.

    Args:
        image_shape: of one image.
        num_classes: of the whole stream.
        width: of the dense layer and the mixture.
        hidden: units of an expert.
        added: experts that each experience brings.
        regularisation: lambda.
        learning_rate: of Adam.
        seed: of the experts.
    """

    needs = (BOUNDARIES,)

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        width: int,
        hidden: int,
        added: int,
        regularisation: float,
        learning_rate: float,
        seed: int = 0,
    ) -> None:
        # newborns take part at once: they are there for the data that now begins
        layer = MoE(
            width,
            FFN(hidden, "relu"),
            num_experts=max(2, added),
            router=TopK(2),
            evidence="moments",
            seed=seed,
        )
        self.net = MixtureNet(math.prod(image_shape), width, num_classes, layer)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)
        self.added, self.regularisation = added, regularisation
        self.before: nn.Module | None = None
        self._begun = False

    def learn_experience(self, experience: Experience) -> None:
        if self._begun:
            self.expand()
        self._begun = True
        self.net.train()
        for x, y in experience.batches():
            scores = self.net(x)
            loss = F.cross_entropy(scores, y) + aux_loss(self.net)
            if self.before is not None:
                with torch.no_grad():
                    old = self.before(x)
                loss = loss + self.regularisation * output_divergence(scores, old)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def expand(self) -> None:
        """Keep the model as it is, freeze its experts and gate columns, add new ones."""
        self.before = copy.deepcopy(self.net).requires_grad_(False).eval()
        layer = self.net.layer
        active = [id for id, expert in layer.experts.items() if not expert.frozen]
        if active:
            surgery.freeze(layer, active, reason="a new distribution begins")
        for _ in range(self.added):
            surgery.spawn(
                layer, optimizer=self.optimizer, admitted=True, reason="a new distribution begins"
            )

    def __call__(self, images: Tensor) -> Tensor:
        self.net.eval()
        return self.net(images)

    def shares(self, images: Tensor) -> dict[int, Tensor]:
        return self.net.shares(images)

    def memory(self, bytes_per_example: int) -> Memory:
        before = () if self.before is None else self.before.parameters()
        return Memory(model=4 * self.num_parameters, buffers=tensor_bytes(*before))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def events(self) -> Sequence[Event]:
        return list(self.net.layer.lineage)

    def extras(self) -> dict[str, Any]:
        return {"experts": len(self.net.layer.experts)}


def output_divergence(scores_NC: Tensor, old_NC: Tensor) -> Tensor:
    """L_o: the mean divergence KL(old || new) of the outputs, a scalar; 0 where they agree."""
    return F.kl_div(
        scores_NC.log_softmax(1), old_NC.log_softmax(1), reduction="batchmean", log_target=True
    )
