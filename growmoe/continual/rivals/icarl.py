"""iCaRL (Rebuffi et al. 2017, arXiv:1611.07725): herded exemplars, distillation, nearest mean.

Legend: phi the network's unit features, P_y the exemplars of class y, m = budget / classes seen,
g_y the sigmoid outputs; q the outputs of the network before this experience (algorithm 3).

Avalanche's own mirrors the exemplars to average them, which is wrong for digits and garments seen
from one side, and takes the classes of an experience from the benchmark, so that no class may
come back; here a class that comes back is herded anew from its old and new images together.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.continual.cell import Memory, parameter_count, tensor_bytes
from growmoe.continual.rivals.learner import BOUNDARIES, EXAMPLES, Experience, TaskLearner


class ICaRL(TaskLearner):
    """iCaRL on an MLP.

    Args:
        body: images to features.
        width: how many features.
        num_classes: of the whole stream.
        exemplars: the budget, over all classes.
        learning_rate: of Adam.
    """

    needs = (BOUNDARIES, EXAMPLES)

    def __init__(
        self, body: nn.Module, width: int, num_classes: int, *, exemplars: int, learning_rate: float
    ) -> None:
        self.body, self.head = body, nn.Linear(width, num_classes)
        self.net = nn.Sequential(body, self.head)
        self.old: nn.Module | None = None
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)
        self.budget = exemplars
        self.exemplars: dict[int, Tensor] = {}
        self.means_KD = torch.zeros(num_classes, width)

    def learn_experience(self, experience: Experience) -> None:
        old = [*self.exemplars]
        images, labels = self._with_exemplars(experience)
        self.net.train()
        # as many steps as without the exemplars, and one pass at least
        steps = math.ceil(len(experience.labels) / experience.batch_size) * experience.passes
        passes = max(1, round(steps / math.ceil(len(labels) / experience.batch_size)))
        everything = Experience(images, labels, experience.batch_size, passes, experience.tell)
        for x, y in everything.batches():
            logits = self.net(x)
            target = F.one_hot(y, logits.shape[1]).float()
            if self.old is not None:
                with torch.no_grad():
                    target[:, old] = self.old(x)[:, old].sigmoid()
            loss = F.binary_cross_entropy_with_logits(logits, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._manage(experience)
        self.old = copy.deepcopy(self.net).requires_grad_(False)

    def _with_exemplars(self, experience: Experience) -> tuple[Tensor, Tensor]:
        images = torch.cat([experience.images, *self.exemplars.values()])
        kept = [torch.full((len(x),), k) for k, x in self.exemplars.items()]
        return images, torch.cat([experience.labels, *kept])

    @torch.no_grad()
    def _manage(self, experience: Experience) -> None:
        """Reduce the exemplar sets, and make those of the classes of this experience."""
        self.net.eval()
        new = experience.labels.unique().tolist()
        m = self.budget // len(self.exemplars.keys() | set(new))
        self.exemplars = {k: x[:m] for k, x in self.exemplars.items()}
        for k in new:
            pool = experience.images[experience.labels == k]
            if k in self.exemplars:
                pool = torch.cat([self.exemplars[k], pool])
            self.exemplars[k] = pool[herd(self._phi(pool), m)].clone()
        for k, x in self.exemplars.items():
            if len(x):
                self.means_KD[k] = F.normalize(self._phi(x).mean(0), dim=0)

    def _phi(self, images: Tensor) -> Tensor:
        return F.normalize(torch.cat([self.body(x) for x in images.split(1000)]), dim=1)

    def __call__(self, images: Tensor) -> Tensor:
        self.net.eval()
        scores = -torch.cdist(F.normalize(self.body(images), dim=1), self.means_KD)
        known = torch.zeros(len(self.means_KD), dtype=torch.bool)
        known[[*self.exemplars]] = True
        return scores.masked_fill(~known, -torch.inf)

    def memory(self, bytes_per_example: int) -> Memory:
        weights = tensor_bytes(*self.net.parameters())
        return Memory(
            model=weights,
            buffers=weights,  # the network before
            statistics=tensor_bytes(self.means_KD),
            examples=sum(map(len, self.exemplars.values())) * bytes_per_example,
        )

    @property
    def num_parameters(self) -> int:
        return parameter_count(self.net)


def herd(phi_ND: Tensor, m: int) -> Tensor:
    """The order in which herding picks m of N rows (algorithm 4): their running mean stays nearest
    to the mean of all. int64 [min(m, N)].
    """
    mean_D = phi_ND.mean(0)
    total_D = torch.zeros_like(mean_D)
    chosen: list[int] = []
    free_N = torch.ones(len(phi_ND), dtype=torch.bool)
    for k in range(1, min(m, len(phi_ND)) + 1):
        # |mu - (total + phi) / k|^2 up to what is the same for all rows
        gain_N = 2 * k * (phi_ND @ mean_D) - 2 * (phi_ND @ total_D) - phi_ND.square().sum(1)
        best = int(gain_N.masked_fill(~free_N, -torch.inf).argmax())
        chosen.append(best)
        free_N[best] = False
        total_D = total_D + phi_ND[best]
    return torch.tensor(chosen, dtype=torch.long)
