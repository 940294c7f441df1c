"""CN-DPM (Lee et al. 2020, arXiv:2001.00689): experts grow as in a Dirichlet process mixture.

Legend: x images, y labels, k an expert, N_k the examples it has taken, alpha the concentration,
phi_0 the base expert, p(x|k) a variational autoencoder, p(y|x,k) a classifier, tau the
classifier's temperature in responsibilities ("chilling").

    rho_k   ~  N_k p(x|k) p(y|x,k)^(chilled)        1 <= k <= K
    rho_new ~  alpha p(x|0) p(y|x,0)^(chilled)                          (equation 5)

An example whose rho_new is largest goes to the short-term memory; when that is full, a new expert
is trained on it ("sleep") and the memory is emptied. Others train the experts by their rho_k.
Predictions mix p(y|x,k) by N_k p(x|k). Experts here do not share lower layers as the paper's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.cell import Memory, tensor_bytes
from growmoe.continual.rivals.learner import EXAMPLES, Learner
from growmoe.lineage import Event
from growmoe.moe import MoE
from growmoe.routers import Dense


class GenerativeExpert(nn.Module):
    """A VAE for p(x|k) and a classifier for p(y|x,k), on flat images.

    Args:
        inputs: D, pixels.
        num_classes: C.
        hidden: units in each hidden layer.
        latent: of the VAE.
    """

    def __init__(self, inputs: int, num_classes: int, hidden: int, latent: int) -> None:
        super().__init__()

        def body(width: int) -> nn.Sequential:
            layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            return nn.Sequential(*layers)

        self.encoder, self.code = body(inputs), nn.Linear(hidden, 2 * latent)
        self.decoder, self.pixels = body(latent), nn.Linear(hidden, inputs)
        self.classifier = nn.Sequential(body(inputs), nn.Linear(hidden, num_classes))

    def log_evidence(self, x_ND: Tensor) -> Tensor:
        """A lower bound of log p(x|k) with pixels of unit variance, [N].

        One sample of the code in training; its mean otherwise, so that predictions are definite.
        """
        mean, log_variance = self.code(self.encoder(x_ND)).chunk(2, 1)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        decoded_ND = self.pixels(self.decoder(code)).sigmoid()
        fit = -0.5 * ((x_ND - decoded_ND).square() + math.log(2 * math.pi)).sum(1)
        kl = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return fit - kl

    def log_classes(self, x_ND: Tensor) -> Tensor:
        """log p(y|x,k), [N, C]."""
        return self.classifier(x_ND).log_softmax(1)

    def forward(self, x_ND: Tensor) -> Tensor:
        """log p(x, y|k) for every label, [N, C]."""
        return self.log_evidence(x_ND).unsqueeze(1) + self.log_classes(x_ND)


class CNDPM(Learner):
    """CN-DPM; sees neither boundaries nor task labels.

    Args:
        image_shape: of one image.
        num_classes: C.
        hidden, latent: of every expert.
        learning_rate: of Adam.
        short_term: how many examples the short-term memory holds.
        log_alpha: log alpha.
        chill: tau.
        sleep_steps: mini-batches of 50 that a newborn is trained with.
        seed: of the experts' beginnings.

    Attributes:
        layer: the experts, once there is one.
    """

    needs = (EXAMPLES,)  # the short-term memory

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: int,
        latent: int,
        learning_rate: float,
        short_term: int,
        log_alpha: float,
        chill: float,
        sleep_steps: int,
        seed: int = 0,
    ) -> None:
        self.inputs, self.num_classes, self.seed = math.prod(image_shape), num_classes, seed
        self.template = partial(GenerativeExpert, self.inputs, num_classes, hidden, latent)
        self.base = self.template().requires_grad_(False).eval()
        self.learning_rate, self.sleep_steps = learning_rate, sleep_steps
        self.short_term, self.log_alpha, self.chill = short_term, log_alpha, chill
        self.layer: MoE | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.counts: list[float] = []
        self._waiting_x: list[Tensor] = []
        self._waiting_y: list[Tensor] = []

    @property
    def experts(self) -> list[GenerativeExpert]:
        if self.layer is None:
            return []
        return [e.body for e in self.layer.experts.values()]  # type: ignore[misc]

    def log_responsibilities(self, images: Tensor, labels: Tensor) -> Tensor:
        """log rho, the new expert last: [N, K + 1], each row's exponentials sum to 1."""
        return self._log_joint(images.flatten(1), labels)[0].log_softmax(1)

    def _log_joint(self, x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised log rho [N, K + 1], detached, and the experts' losses [N, K]."""
        joint, losses = [], []
        priors = [math.log(n) for n in self.counts] + [self.log_alpha]
        for expert, prior in zip([*self.experts, self.base], priors, strict=True):
            log_x, log_y = expert.log_evidence(x_ND), expert.log_classes(x_ND)
            losses.append(-(log_x - F.nll_loss(log_y, y_N, reduction="none")))
            chilled = (log_y.detach() / self.chill).log_softmax(1)
            joint.append(prior + log_x.detach() + chilled.gather(1, y_N[:, None])[:, 0])
        return torch.stack(joint, 1), torch.stack(losses, 1)[:, :-1]

    def learn(self, images: Tensor, labels: Tensor) -> None:
        x_ND = images.flatten(1)
        new_N = torch.ones(len(x_ND), dtype=torch.bool)
        if self.layer is not None and self.optimizer is not None:
            for expert in self.experts:
                expert.train()
            joint, losses_NK = self._log_joint(x_ND, labels)
            new_N = joint.argmax(1) == joint.shape[1] - 1
            if not new_N.all():
                rho_NK = joint[:, :-1].softmax(1) * ~new_N[:, None]
                self.optimizer.zero_grad()
                # of the mini-batch's mean, so that the learning rate does not depend on its size
                ((rho_NK * losses_NK).sum() / len(x_ND)).backward()
                nn.utils.clip_grad_value_(self.layer.parameters(), 0.5)
                self.optimizer.step()
                self.counts = [
                    n + float(r) for n, r in zip(self.counts, rho_NK.sum(0), strict=True)
                ]
        if new_N.any():
            self._waiting_x.append(x_ND[new_N])
            self._waiting_y.append(labels[new_N])
        if sum(map(len, self._waiting_y)) >= self.short_term:
            self._sleep(torch.cat(self._waiting_x), torch.cat(self._waiting_y))
            self._waiting_x, self._waiting_y = [], []

    def _sleep(self, x_ND: Tensor, y_N: Tensor) -> None:
        """A new expert is born and trained on the short-term memory."""
        if self.layer is None or self.optimizer is None:
            self.layer = MoE(
                self.inputs,
                self.template,
                num_experts=1,
                router=Dense(),
                d_out=self.num_classes,
                balance_loss=0.0,
                evidence="moments",
                seed=self.seed,
            )
            self.optimizer = torch.optim.Adam(
                self.layer.parameters(), lr=self.learning_rate, fused=True
            )
        else:
            surgery.spawn(
                self.layer,
                optimizer=self.optimizer,
                expert=self.template,
                admitted=True,
                reason=f"the short-term memory holds {len(y_N)} examples that no expert explains",
            )
        newborn = self.experts[-1].train()
        alone = torch.optim.Adam(newborn.parameters(), lr=self.learning_rate, fused=True)
        for _ in range(self.sleep_steps):
            index = torch.randint(len(y_N), (50,))
            x, y = x_ND[index], y_N[index]
            loss = F.nll_loss(newborn.log_classes(x), y) - newborn.log_evidence(x).mean()
            alone.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(newborn.parameters(), 0.5)
            alone.step()
        self.counts.append(float(len(y_N)))

    def __call__(self, images: Tensor) -> Tensor:
        """log p(y|x) up to a constant of x, [N, C]; flat before the first expert is born."""
        x_ND = images.flatten(1)
        if not self.experts:
            return torch.zeros(len(x_ND), self.num_classes)
        joint = [
            math.log(n) + e.eval()(x_ND) for n, e in zip(self.counts, self.experts, strict=True)
        ]
        return torch.stack(joint).logsumexp(0)

    @property
    def births(self) -> int:
        return max(0, len(self.experts) - 1)

    def shares(self, images: Tensor) -> dict[int, Tensor] | None:
        """p(k|x), the weights of the predictions."""
        if self.layer is None:
            return None
        x_ND = images.flatten(1)
        joint = [
            math.log(n) + e.eval().log_evidence(x_ND)
            for n, e in zip(self.counts, self.experts, strict=True)
        ]
        return dict(zip(self.layer.experts, torch.stack(joint).softmax(0), strict=True))

    def memory(self, bytes_per_example: int) -> Memory:
        return Memory(
            model=4 * self.num_parameters,
            buffers=tensor_bytes(*self.base.parameters()),
            statistics=4 * len(self.counts),
            examples=self.short_term * bytes_per_example,
        )

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for e in self.experts for p in e.parameters())

    def events(self) -> Sequence[Event]:
        return () if self.layer is None else list(self.layer.lineage)

    def extras(self) -> dict[str, Any]:
        return {"experts": len(self.experts)}
