"""A memory of examples that holds equally many of every class, filled from a stream."""

from __future__ import annotations

import torch
from torch import Tensor


class BalancedReservoir:
    """At most `size` examples, an equal share for each class seen, a uniform sample of each class.

    A reservoir per class (Vitter 1985); when a class appears, the others give up their surplus.

    Args:
        size: of the whole memory.
        seed: of what is kept and drawn.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size!r}")
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[int, list[Tensor]] = {}
        self._met: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Offer a mini-batch."""
        for k in sorted(set(labels.tolist()) - self._kept.keys()):
            self._kept[k], self._met[k] = [], 0
        share = max(1, self.size // len(self._kept))
        for kept in self._kept.values():
            while len(kept) > share:
                kept.pop(self._below(len(kept)))
        for image, k in zip(images, labels.tolist(), strict=True):
            self._met[k] += 1
            if len(self._kept[k]) < share:
                self._kept[k].append(image.clone())
            elif (place := self._below(self._met[k])) < share:
                self._kept[k][place] = image.clone()

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` examples (or all, if fewer) without replacement: images and labels."""
        labels = torch.tensor([k for k, kept in self._kept.items() for _ in kept])
        images = [image for kept in self._kept.values() for image in kept]
        index = torch.randperm(len(images), generator=self._generator)[:count]
        return torch.stack([images[i] for i in index.tolist()]), labels[index]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self._generator))
