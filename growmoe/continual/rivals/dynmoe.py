"""DynMoE (Guo et al. 2024, arXiv:2405.14297): as many experts as the tokens ask for.

Legend: s_e = sigma(cos(x, key_e)), G_e the threshold of expert e; expert e accepts x where
s_e > sigma(G_e). R_E counts how often each expert was accepted, R_S sums the inputs that none
accepted.

Every `window` mini-batches (algorithm 1): if inputs came that no expert accepts, an expert is added
whose key points to their sum R_S; experts that accepted nothing go. In the paper unused slots are
masked and optimizer states stay; here experts are born and die by surgery.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growmoe import surgery
from growmoe.continual.cell import Memory
from growmoe.continual.rivals.learner import Learner
from growmoe.continual.rivals.lifelong_moe import MixtureNet
from growmoe.experts.ffn import FFN
from growmoe.lineage import Event
from growmoe.moe import MoE, aux_loss
from growmoe.routers import TopAny
from growmoe.routers.gate import stacked


class DynMoE(Learner):
    """Top-any gating with experts that come and go; sees neither boundaries nor task labels.

    Args:
        image_shape: of one image.
        num_classes: of the whole stream.
        width: of the dense layer and the mixture.
        hidden: units of an expert.
        num_experts: to begin with.
        max_experts: at most.
        window: mini-batches between two adaptations.
        learning_rate: of Adam.
        seed: of the experts.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        max_experts: int,
        window: int,
        learning_rate: float,
        seed: int = 0,
    ) -> None:
        layer = MoE(
            width,
            FFN(hidden, "relu"),
            num_experts=num_experts,
            router=TopAny(),
            evidence="moments",
            seed=seed,
        )
        self.net = MixtureNet(math.prod(image_shape), width, num_classes, layer)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)
        self.max_experts, self.window = max_experts, window
        self._forget()

    def _forget(self) -> None:
        self._batches, self._refused = 0, 0
        self._accepted = dict.fromkeys(self.net.layer.experts, 0)  # R_E
        self._sum = torch.zeros(self.net.layer.d_model)  # R_S

    def learn(self, images: Tensor, labels: Tensor) -> None:
        net = self.net.train()
        h = F.relu(net.dense(images.flatten(1)))
        loss = F.cross_entropy(net.head(F.relu(h + net.layer(h))), labels) + aux_loss(net)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.record(h.detach())
        if self._batches >= self.window:
            self.adapt()

    @torch.no_grad()
    def record(self, h_TD: Tensor) -> None:
        """Take a mini-batch into R_E and R_S."""
        experts = self.net.layer.experts
        living = list(experts.values())
        key_ED, threshold_E = stacked(living, "key"), stacked(living, "threshold")
        cosine_TE = F.normalize(h_TD, dim=1) @ F.normalize(key_ED, dim=1).T
        accepts_TE = cosine_TE > threshold_E  # sigma keeps the order
        for id, count in zip(experts, accepts_TE.sum(0).tolist(), strict=True):
            self._accepted[id] += count
        refused_T = ~accepts_TE.any(1)
        self._refused += int(refused_T.sum())
        self._sum += h_TD[refused_T].sum(0)
        self._batches += 1

    def adapt(self) -> None:
        """Add an expert for inputs that none accepted, remove experts that accepted none."""
        layer = self.net.layer
        idle = [id for id, count in self._accepted.items() if not count]
        if self._refused and len(layer.experts) < self.max_experts:
            surgery.spawn(
                layer,
                optimizer=self.optimizer,
                toward=self._sum / self._refused,
                admitted=True,
                reason=f"{self._refused} inputs of {self._batches} mini-batches had no expert",
            )
        if idle and len(idle) < len(layer.experts):
            surgery.prune(
                layer,
                idle,
                optimizer=self.optimizer,
                reason=f"accepted nothing in {self._batches} mini-batches",
            )
        self._forget()

    def __call__(self, images: Tensor) -> Tensor:
        self.net.eval()
        return self.net(images)

    @property
    def births(self) -> int:
        return sum(event.act == "spawn" for event in self.net.layer.lineage)

    def shares(self, images: Tensor) -> dict[int, Tensor]:
        return self.net.shares(images)

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(model=4 * self.num_parameters, statistics=4 * self._sum.numel())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def events(self) -> Sequence[Event]:
        return list(self.net.layer.lineage)

    def extras(self) -> dict[str, Any]:
        return {"experts": len(self.net.layer.experts)}
