"""A stream: labelled images in the order in which they come, and a test set for each experience."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from growmoe.continual import require

SCENARIOS = ("class", "domain", "task")
DRIFTS = ("sharp", "fuzzy", "recurring", "none")


@dataclass(frozen=True)
class Data:
    """Examples and labels before they are put in order.

    Pixels are uint8 [N, C, H, W] from 0 to `white`, or float32 with `white` 1; a row of a table
    is [1, 1, D]. Labels are int64 [N], from 0.

    Raises:
        ValueError: not so; floats that are not finite, or train and test images that differ in
            shape or kind.
    """

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    white: int

    def __post_init__(self) -> None:
        for kind in ("train", "test"):
            pixels, labels = getattr(self, f"{kind}_pixels"), getattr(self, f"{kind}_labels")
            if pixels.dim() != 4 or pixels.dtype not in (torch.uint8, torch.float32):
                raise ValueError(
                    f"{kind}_pixels must be uint8 or float32 [N, C, H, W], got {pixels.dtype} "
                    f"{tuple(pixels.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
                raise ValueError(
                    f"{kind}_labels must be int64 [{len(pixels)}], got {labels.dtype} "
                    f"{tuple(labels.shape)}"
                )
            if len(labels) and labels.min() < 0:
                raise ValueError(f"{kind}_labels must be 0 or more, got {int(labels.min())}")
            if pixels.dtype == torch.float32 and not pixels.isfinite().all():
                bad = int((~pixels.flatten(1).isfinite().all(1)).nonzero()[0])
                raise ValueError(f"{kind}_pixels, example {bad}: it holds NaN or infinity")
        a, b = self.train_pixels, self.test_pixels
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ValueError(
                f"train images are {a.dtype} {tuple(a.shape[1:])}, but test images {b.dtype} "
                f"{tuple(b.shape[1:])}"
            )

    def digest(self) -> str:
        """A fingerprint of all examples and labels."""
        digest = hashlib.sha256()
        for part in (self.train_pixels, self.train_labels, self.test_pixels, self.test_labels):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Batch(NamedTuple):
    """Examples that come together.

    Attributes:
        images: float32 [N, C, H, W].
        labels: int64 [N].
        domains: int64 [N], the true domain of each example: for metrics and oracles alone.
        ends: the experiences whose last example is among these; evaluate after learning them.
        num_new: how many of them come for the first time.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor
    ends: tuple[int, ...]
    num_new: int


@dataclass(frozen=True)
class Stream:
    """A stream, held in memory as it was stored (images as unsigned bytes).

    What comes is one sequence of examples, `torch.cat(train_index)`. Its experiences are the pieces
    after which one evaluates. In a sharp stream each is one domain (a group of classes, or a way in
    which images are changed); in a fuzzy one each goes gradually over to the next; in a recurring
    one domains return; without drift all are alike.

    Attributes:
        name: as `growmoe.continual.load` takes it.
        seed: what the order was drawn from.
        data: examples, [N, C, H, W], and labels, int64 [N]; changed images stand here as changed.
        class_order: the classes in the order in which they arrive.
        experience_classes: the classes that each experience's test set asks for.
        train_index: for each experience, the positions of its train examples in the order in which
            they come, int64.
        test_index: for each experience, the positions of its domain's test examples, int64.
        scenario: "class" (labels belong to a domain, nothing tells the domain), "domain" (all
            domains share their labels) or "task" (as "class", but tests tell the domain).
        drift: "sharp", "fuzzy", "recurring" or "none".
        train_domain: the true domain of each train position, int64: for metrics and oracles alone.
        experience_domain: the domain whose test set each experience has.
        fingerprint: of the data before any of it was changed or left out.
    """

    name: str
    seed: int
    data: Data = field(repr=False)
    class_order: tuple[int, ...]
    experience_classes: tuple[tuple[int, ...], ...]
    train_index: tuple[Tensor, ...] = field(repr=False)
    test_index: tuple[Tensor, ...] = field(repr=False)
    scenario: str
    drift: str
    train_domain: Tensor = field(repr=False)
    experience_domain: tuple[int, ...]
    fingerprint: str

    @property
    def num_experiences(self) -> int:
        return len(self.experience_classes)

    @property
    def num_domains(self) -> int:
        return max(self.experience_domain) + 1

    @property
    def num_classes(self) -> int:
        return len(self.class_order)

    @property
    def num_examples(self) -> int:
        """The train examples of the whole stream."""
        return sum(map(len, self.train_index))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.data.train_pixels.shape[1:]
        return channels, height, width

    @property
    def bytes_per_example(self) -> int:
        """What keeping one example costs: as it is stored, and a byte for the label."""
        pixels = self.data.train_pixels[0]
        return pixels.numel() * pixels.element_size() + 1

    @property
    def test_counts(self) -> list[int]:
        """The number of test examples of each experience."""
        return [len(index) for index in self.test_index]

    def train_images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Train images as float32 [N, C, H, W], those of bytes in [0, 1]."""
        return self.data.train_pixels[index].float() / self.data.white

    def test_images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Test images as float32 [N, C, H, W], those of bytes in [0, 1]."""
        return self.data.test_pixels[index].float() / self.data.white

    def batches(self, batch_size: int, epochs: int = 1) -> Iterator[Batch]:
        """The stream in batches that take no notice of where an experience begins or ends.

        Args:
            batch_size: examples in each, the last one apart.
            epochs: how often each experience is gone through, after the first time in an order
                drawn from the seed.
        """
        if batch_size < 1 or epochs < 1:
            raise ValueError(
                f"batch_size and epochs must be positive, got {batch_size} and {epochs}"
            )
        order, new = self._order(epochs)
        ends = np.cumsum([len(index) * epochs for index in self.train_index]).tolist()
        for begin in range(0, len(order), batch_size):
            index = order[begin : begin + batch_size]
            done = tuple(i for i, end in enumerate(ends) if begin < end <= begin + len(index))
            yield Batch(
                self.train_images(index),
                self.data.train_labels[index],
                self.train_domain[index],
                done,
                int(new[begin : begin + batch_size].sum()),
            )

    def _order(self, epochs: int) -> tuple[Tensor, Tensor]:
        """Train positions as they come, and whether each comes for the first time."""
        generator = torch.Generator().manual_seed(self.seed)
        parts, new = [], []
        for index in self.train_index:
            for epoch in range(epochs):
                again = torch.randperm(len(index), generator=generator) if epoch else slice(None)
                parts.append(index[again])
                new.append(torch.full((len(index),), not epoch))
        return torch.cat(parts), torch.cat(new)

    def restrict(self, scores: Tensor, experience: int) -> Tensor:
        """Scores [N, K] with those of classes out of the question at -inf.

        In scenario "task" the question is which of the experience's classes it is; in the others
        nothing is told, and the scores are given back as they are.
        """
        if self.scenario != "task":
            return scores
        allowed = list(self.experience_classes[experience])
        restricted = torch.full_like(scores, -torch.inf)
        restricted[:, allowed] = scores[:, allowed]
        return restricted

    def digest(self) -> str:
        """A fingerprint of the data, the same whatever the order and the seed."""
        return self.fingerprint

    def benchmark(self) -> Any:
        """The stream as an Avalanche benchmark.

        Task labels are the domain in scenario "task" and 0 otherwise. Examples lie in the order in
        which they come; a strategy keeps it with `strategy.train(experience, shuffle=False)`.

        Returns:
            A benchmark whose `train_stream` and `test_stream` have `num_experiences` experiences of
            (image float32 [C, H, W], label, task label).

        Raises:
            ImportError: Avalanche is not installed.
        """
        generators = require("avalanche.benchmarks.scenarios.deprecated.generators")
        utils = require("avalanche.benchmarks.utils.classification_dataset")
        make = utils._make_taskaware_classification_dataset  # 0.6 has no public way

        def experiences(pixels: Tensor, labels: Tensor, parts: tuple[Tensor, ...]) -> list[Any]:
            return [
                make(
                    _Examples(pixels, labels, index, self.data.white),
                    task_labels=domain if self.scenario == "task" else 0,
                )
                for index, domain in zip(parts, self.experience_domain, strict=True)
            ]

        return generators.dataset_benchmark(
            experiences(self.data.train_pixels, self.data.train_labels, self.train_index),
            experiences(self.data.test_pixels, self.data.test_labels, self.test_index),
        )


class _Examples(torch.utils.data.Dataset):
    """(image, label) pairs for Avalanche, which reads `targets`."""

    def __init__(self, pixels: Tensor, labels: Tensor, index: Tensor, white: int) -> None:
        self.pixels, self.index, self.white = pixels, index, white
        self.targets = labels[index].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pixels[self.index[i]] / self.white, self.targets[i]
