"""SEMA (Wang et al. 2024, arXiv:2403.18886): adapters that expand by themselves.

Legend: x fixed features, f_k a functional adapter, g_k its representation descriptor (an
autoencoder), r_k = |x - g_k(x)|^2, mu_k and sigma_k the mean and deviation of r_k on what g_k was
trained on, z_k = (r_k - mu_k) / sigma_k, w the softmax of the router.

    h = x + sum_k w_k(x) f_k(x)

When the mean z of a mini-batch exceeds the threshold for every descriptor, an adapter, its
descriptor and its router column are added and all earlier ones are frozen (section 3.3). The paper
scans each task's data for this before it trains; here mini-batches are judged as they come, and a
newborn is not judged before it has seen `settle` of them. The output layer is trained on the
classes of the mini-batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.intake import Features, Intake
from growmoe.continual.record import mixture_shares
from growmoe.continual.rivals.learner import Learner
from growmoe.lineage import Event
from growmoe.moe import MoE
from growmoe.routers import Dense


class DescribedAdapter(nn.Module):
    """A functional adapter and its representation descriptor.

    Args:
        width: D.
        bottleneck: units of both.

    Buffers: ``errors`` float32 [3]: count, mean and sum of squared deviations of r.
    """

    errors: Tensor

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)  # at first it adds nothing
        nn.init.zeros_(self.up.bias)
        self.encode, self.decode = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.register_buffer("errors", torch.zeros(3))

    def forward(self, x_ND: Tensor) -> Tensor:
        """f(x), [N, D]."""
        return self.up(F.relu(self.down(x_ND)))

    def error(self, x_ND: Tensor) -> Tensor:
        """r, [N]."""
        return (self.decode(F.leaky_relu(self.encode(x_ND))) - x_ND).square().mean(1)

    @torch.no_grad()
    def z(self, r_N: Tensor) -> Tensor:
        """z of errors, [N]."""
        count, mean, spread = self.errors
        return (r_N - mean) / (spread / count.clamp(min=1)).sqrt().clamp(min=1e-8)

    @torch.no_grad()
    def remember(self, r_N: Tensor, horizon: int) -> None:
        """Take errors into mu and sigma, over about the last `horizon` of them.

        The descriptor is still improving, so what it did long ago must fade.
        """
        count, mean, spread = self.errors
        keep = min(1.0, max(0.0, 1 - len(r_N) / horizon))
        count, spread = count * keep, spread * keep
        total = count + len(r_N)
        apart = r_N.mean() - mean
        spread = spread + (r_N - r_N.mean()).square().sum()
        spread = spread + apart.square() * count * len(r_N) / total
        self.errors.copy_(torch.stack([total, mean + apart * len(r_N) / total, spread]))


class SEMA(Learner):
    """SEMA on fixed features; sees neither boundaries nor task labels.

    Args:
        features: fitted on the first `early` images.
        num_classes: C.
        bottleneck: units of an adapter, and of a descriptor.
        threshold: of the mean z of a mini-batch.
        settle: mini-batches that a newborn sees before novelty is judged again.
        learning_rate: of Adam.
        early: how many images wait for the features.
        seed: of the features and of the adapters.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        bottleneck: int,
        threshold: float,
        settle: int,
        learning_rate: float,
        early: int = 256,
        seed: int = 0,
    ) -> None:
        self.features = features
        self._intake = Intake(features, early, seed)
        width = features.num_features
        self.layer = MoE(
            width,
            partial(DescribedAdapter, width, bottleneck),
            num_experts=1,
            router=Dense(),
            evidence="moments",
            seed=seed,
        )
        self.head = nn.Linear(width, num_classes)
        parameters = [*self.layer.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        self.threshold, self.settle = threshold, settle
        self._age = 0
        self._scale = torch.ones(())

    @property
    def adapters(self) -> list[DescribedAdapter]:
        return [cast(DescribedAdapter, e.body) for e in self.layer.experts.values()]

    def learn(self, images: Tensor, labels: Tensor) -> None:
        for x_ND, y_N in self._intake(images, labels):
            self._learn(x_ND, y_N)

    def _learn(self, x_ND: Tensor, y_N: Tensor) -> None:
        if not self._age and len(self.adapters) == 1:
            self._scale = x_ND.std().clamp(min=1e-8)  # of the first images, fixed then
        x_ND = x_ND / self._scale
        if self._age >= self.settle and self.novel(x_ND):
            self._expand(x_ND)
        self._age += 1
        self.layer.train()
        scores = self.head(x_ND + self.layer(x_ND))
        present = torch.zeros(scores.shape[1], dtype=torch.bool)
        present[y_N] = True
        loss = F.cross_entropy(scores.masked_fill(~present, -torch.inf), y_N)
        r_N = self.adapters[-1].error(x_ND)
        self.optimizer.zero_grad()
        (loss + r_N.mean()).backward()
        self.optimizer.step()
        self.adapters[-1].remember(r_N.detach(), horizon=50 * len(r_N))

    @torch.no_grad()
    def novel(self, x_ND: Tensor) -> bool:
        """Whether every descriptor finds the mini-batch novel."""
        return all(float(a.z(a.error(x_ND)).mean()) > self.threshold for a in self.adapters)

    def _expand(self, x_ND: Tensor) -> None:
        active = [id for id, expert in self.layer.experts.items() if not expert.frozen]
        why = f"the mean z of {len(x_ND)} images exceeds {self.threshold} for every descriptor"
        surgery.freeze(self.layer, active, reason=why)
        surgery.spawn(self.layer, optimizer=self.optimizer, admitted=True, reason=why)
        self._age = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        for x_ND, y_N in self._intake.flush():
            with torch.enable_grad():
                self._learn(x_ND, y_N)
        self.layer.eval()
        x_ND = self.features(images) / self._scale
        return self.head(x_ND + self.layer(x_ND))

    @property
    def births(self) -> int:
        return len(self.adapters) - 1

    def shares(self, images: Tensor) -> dict[int, Tensor]:
        return mixture_shares(self.layer, self.features(images) / self._scale)

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=4 * self.num_parameters,
            buffers=self.features.memory_bytes,
            statistics=tensor_bytes(*(a.errors for a in self.adapters)),
        )

    @property
    def num_parameters(self) -> int:
        modules = (self.layer, self.head)
        return sum(p.numel() for module in modules for p in module.parameters())

    def events(self) -> Sequence[Event]:
        return list(self.layer.lineage)

    def extras(self) -> dict[str, Any]:
        return {"experts": len(self.layer.experts)}
