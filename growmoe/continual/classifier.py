"""A classifier that grows on a stream: fixed features, closed-form experts, the organizer.

It sees no task labels and no boundaries, keeps no examples, and passes once over the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from growmoe import surgery
from growmoe.continual.intake import Features, Intake
from growmoe.experts.moments import Moments
from growmoe.lineage import Event
from growmoe.moe import MoE
from growmoe.organizer import Organizer
from growmoe.routers.closed_form import ClosedFormGate
from growmoe.rules import (
    FreezeSettled,
    MergeOverlapping,
    PruneIdle,
    Rule,
    SplitOnNovelty,
    ThawOnNovelty,
)


def default_rules() -> list[Rule]:
    """The rules of `GrowingClassifier`; leave some out to see what they are worth."""
    return [
        SplitOnNovelty(),
        MergeOverlapping(),
        PruneIdle(),
        FreezeSettled(),
        ThawOnNovelty(),
    ]


class GrowingClassifier(nn.Module):
    """A growing mixture of `Moments` experts behind a `ClosedFormGate`, on fixed features.

    An expert is born when a label appears that no expert has, or when the inputs of a label have
    become novel to all its experts; the rules see to the rest. `learn` takes labelled batches of
    any size in any order; calling the model predicts, at any time. Save it whole, by `torch.save`
    or pickle: its features are no tensors of a state dict.

    Args:
        features: fitted on the first `early` images, which wait until then.
        num_classes: C.
        early: how many images wait.
        rules: in place of `default_rules()`.
        gate: in place of `ClosedFormGate()`.
        every: learned batches between decisions.
        seed: of the features and of the layer's own generator.

    Attributes:
        layer: the `MoE`, once the features are fitted; None before.
        organizer: its organizer, likewise.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        early: int = 256,
        rules: Sequence[Rule] | None = None,
        gate: ClosedFormGate | None = None,
        every: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes!r}")
        self.features, self.num_classes = features, num_classes
        self.rules = default_rules() if rules is None else list(rules)
        self.every, self.seed = every, seed
        self.gate = ClosedFormGate() if gate is None else gate
        self.layer: MoE | None = None
        self.organizer: Organizer | None = None
        self._intake = Intake(features, early, seed)

    def learn(self, images: Tensor, labels: Tensor) -> list[Event]:
        """Take in a labelled batch once.

        Args:
            images: float32 [N, 1, H, W], as the features take them.
            labels: int64 [N], in [0, C).

        Returns:
            What was born and what the organizer did.

        Raises:
            ValueError: labels out of range, not as many as images, or images that are not finite;
                nothing is learned then.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in [0, {self.num_classes}), got "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        return [e for x, y in self._intake(images, labels) for e in self._learn(x, y)]

    def finish(self) -> list[Event]:
        """Begin even if fewer than `early` images have come, as a first prediction does."""
        return [e for x, y in self._intake.flush() for e in self._learn(x, y)]

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, C]: each label's share of the votes; 0 for one that was not shortlisted.

        Raises:
            RuntimeError: nothing was learned yet.
        """
        self.finish()
        if self.layer is None:
            raise RuntimeError("GrowingClassifier: nothing was learned yet")
        self.layer.eval()
        with torch.no_grad():
            scores = self.layer(self.features(images))
        self.layer.train(self.training)
        return scores

    def _learn(self, x_TD: Tensor, labels: Tensor) -> list[Event]:
        events = []
        if self.layer is None or self.organizer is None:
            self.layer, self.organizer = self._begin(x_TD.shape[1], int(labels[0]))
            events += list(self.layer.lineage)
        self.layer.train()
        known = {int(cast(Moments, e.body).label) for e in self.layer.experts.values()}
        for label in sorted(set(labels.tolist()) - known):
            events.append(
                surgery.spawn(
                    self.layer,
                    expert=self._kind(x_TD.shape[1], label),
                    admitted=True,
                    step=self.organizer.steps,
                    reason=f"label {label} has no expert",
                    signals={"label": float(label)},
                )
            )
        self.layer(x_TD, context=labels)
        return events + self.organizer.step()

    def _begin(self, d_model: int, label: int) -> tuple[MoE, Organizer]:
        layer = MoE(
            d_model,
            self._kind(d_model, label),
            num_experts=1,
            router=self.gate,
            d_out=self.num_classes,
            balance_loss=0.0,
            warmup=1,
            evidence="moments",
            seed=self.seed,
        )
        organizer = Organizer(layer, rules=self.rules, max_experts=1024, every=self.every, budget=4)
        return layer, organizer

    def _kind(self, d_model: int, label: int) -> Callable[[], Moments]:
        return partial(Moments, self.num_classes, label, d_model)
