"""A classifier that grows on a stream: fixed features, closed-form experts, the organizer.

It sees no task labels and no boundaries, keeps no examples, and passes once over the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from growmoe import surgery
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


class Features(Protocol):
    """Fixed features, fitted once on the first images of a stream, without labels."""

    @property
    def num_features(self) -> int: ...

    def fit(self, images: Tensor, generator: torch.Generator) -> Features: ...

    def __call__(self, images: Tensor) -> Tensor: ...


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
    any size in any order; calling the model predicts, at any time.

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
        if num_classes < 1 or early < 1:
            raise ValueError(f"num_classes and early must be positive: {num_classes!r}, {early!r}")
        self.features, self.num_classes, self.early = features, num_classes, early
        self.rules = default_rules() if rules is None else list(rules)
        self.every, self.seed = every, seed
        self.gate = ClosedFormGate() if gate is None else gate
        self.layer: MoE | None = None
        self.organizer: Organizer | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def learn(self, images: Tensor, labels: Tensor) -> list[Event]:
        """Take in a labelled batch once.

        Args:
            images: float32 [N, …], as the features take them.
            labels: int64 [N], in [0, C).

        Returns:
            What the organizer did.

        Raises:
            ValueError: labels out of range, or images that are not finite.
        """
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
        if len(labels) == 0:
            return []
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must be in [0, {self.num_classes}), got "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        if not images.isfinite().all():
            raise ValueError("images hold NaN or infinite values")
        if self.layer is None:
            self._waiting.append((images, labels))
            if sum(len(y) for _, y in self._waiting) < self.early:
                return []
            return self._begin()
        return self._learn(self.features(images), labels)

    def finish(self) -> list[Event]:
        """Begin even if fewer than `early` images have come; before a first prediction."""
        return self._begin() if self.layer is None and self._waiting else []

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, C]: each label's share of the votes; 0 for one that was not shortlisted.

        Raises:
            RuntimeError: nothing was learned yet.
        """
        if self.layer is None:
            raise RuntimeError("GrowingClassifier: nothing was learned yet (call learn or finish)")
        self.layer.eval()
        with torch.no_grad():
            return self.layer(self.features(images))

    def _begin(self) -> list[Event]:
        images, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        size = len(self._waiting[0][1])
        self._waiting = []
        self.features.fit(images, torch.Generator().manual_seed(self.seed))
        first = int(labels[0])
        self.layer = MoE(
            self.features.num_features,
            lambda: Moments(self.num_classes, first, self.features.num_features),
            num_experts=1,
            router=self.gate,
            d_out=self.num_classes,
            balance_loss=0.0,
            warmup=1,
            evidence="moments",
            seed=self.seed,
        )
        self.organizer = Organizer(
            self.layer, rules=self.rules, max_experts=1024, every=self.every, budget=4
        )
        events: list[Event] = []
        for start in range(0, len(labels), size):  # in the batches in which they came
            part = slice(start, start + size)
            events += self._learn(self.features(images[part]), labels[part])
        return events

    def _learn(self, x_TD: Tensor, labels: Tensor) -> list[Event]:
        assert self.layer is not None and self.organizer is not None
        self.layer.train()
        events = []
        for label in sorted(set(labels.tolist()) - self._labels()):
            events.append(
                surgery.spawn(
                    self.layer,
                    expert=lambda label=label: Moments(self.num_classes, label, x_TD.shape[1]),  # type: ignore[misc]
                    admitted=True,
                    step=self.organizer.steps,
                    reason=f"label {label} has no expert",
                    signals={"label": float(label)},
                )
            )
        self.layer(x_TD, context=labels)
        return events + self.organizer.step()

    def _labels(self) -> set[int]:
        assert self.layer is not None
        return {int(e.body.label) for e in self.layer.experts.values()}  # type: ignore[arg-type]
