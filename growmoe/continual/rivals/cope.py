"""Continual prototype evolution (De Lange & Tuytelaars 2021, arXiv:2009.00919).

Legend: f the network's unit features, p_K the class prototypes, T the temperature, alpha the
momentum of the prototypes. The loss of a mini-batch is equations 5 to 8, the prototypes follow
equation 4, and replay is a class-balanced memory, a mini-batch of it beside every new one.

Avalanche's own needs one experience per mini-batch (13 ms each); the loss is compared with its in
the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory, parameter_count, tensor_bytes
from growmoe.continual.rivals.exemplars import BalancedReservoir
from growmoe.continual.rivals.learner import EXAMPLES, Learner


class CoPE(Learner):
    """CoPE on an MLP; sees neither boundaries nor task labels.

    Args:
        body: images to features.
        width: how many features the body gives.
        num_classes: of the whole stream.
        embedding: the width of the prototypes.
        exemplars: the memory.
        learning_rate: of Adam.
        momentum: alpha.
        temperature: T.
        seed: of the prototypes' beginnings and of the memory.
    """

    needs = (EXAMPLES,)

    def __init__(
        self,
        body: nn.Module,
        width: int,
        num_classes: int,
        *,
        embedding: int,
        exemplars: int,
        learning_rate: float,
        momentum: float = 0.99,
        temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.net = nn.Sequential(body, nn.Linear(width, embedding))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)
        self.momentum, self.temperature = momentum, temperature
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(num_classes, embedding, generator=generator) * 2 - 1
        self.p_KD = F.normalize(start, dim=1)
        self.seen = torch.zeros(num_classes, dtype=torch.bool)
        self.store = BalancedReservoir(exemplars, seed)

    def learn(self, images: Tensor, labels: Tensor) -> None:
        x, y = images, labels
        if len(self.store):
            kept, kept_y = self.store.draw(len(labels))
            x, y = torch.cat([x, kept]), torch.cat([y, kept_y])
        self.net.train()
        f = F.normalize(self.net(x), dim=1)
        loss = ppp_loss(f, y, self.p_KD, self.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for k in y.unique().tolist():
                mean = F.normalize(f[y == k].mean(0), dim=0)
                moved = self.momentum * self.p_KD[k] + (1 - self.momentum) * mean
                self.p_KD[k] = F.normalize(moved, dim=0)
        self.seen[labels] = True
        self.store.add(images, labels)

    def __call__(self, images: Tensor) -> Tensor:
        self.net.eval()
        similarity = F.normalize(self.net(images), dim=1) @ self.p_KD.T
        return similarity.masked_fill(~self.seen, -torch.inf)

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=tensor_bytes(*self.net.parameters()),
            statistics=tensor_bytes(self.p_KD),
            examples=len(self.store) * bytes_per_example,
        )

    @property
    def num_parameters(self) -> int:
        return parameter_count(self.net)


def ppp_loss(f_ND: Tensor, y_N: Tensor, p_KD: Tensor, temperature: float) -> Tensor:
    """The pseudo-prototypical proxy loss of a mini-batch, a scalar.

    An image is drawn to its class's prototype and to the other images of its class (attractor,
    equation 6), and images of other classes are driven from both (repellor, equation 7). Gradients
    go through the image that is judged, not through what it is compared with.

    Args:
        f_ND: unit features of the mini-batch.
        y_N: its labels.
        p_KD: unit prototypes.
        temperature: T.
    """
    still_ND = f_ND.detach()
    near_NN = (still_ND @ f_ND.T / temperature).exp()  # [compared with, judged]
    proto_KN = (p_KD @ f_ND.T / temperature).exp()
    total = f_ND.new_zeros(())
    for c in y_N.unique().tolist():
        own_N = y_N == c
        others_N = proto_KN.sum(0) - proto_KN[c]  # summed over the other classes' prototypes
        own = near_NN[own_N]
        # attractor: over the prototype and the other images of the class
        peers = own[:, own_N]
        peers = peers * (1 - torch.eye(len(peers)))
        towards = torch.cat([peers, proto_KN[c : c + 1, own_N]])
        share = towards / (towards + others_N[own_N])
        total = total - (share.sum(0) / len(peers)).log().sum()
        # repellor: each image as a pseudo-prototype, averaged with the prototype
        if not own_N.all():
            away = torch.cat([own[:, ~own_N], proto_KN[c : c + 1, ~own_N]])
            share = away / (away + others_N[~own_N])
            total = total - (1 - (share[:-1] + share[-1:]) / 2).log().sum()
    return total / len(y_N)
