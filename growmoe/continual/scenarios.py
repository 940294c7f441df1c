"""Says what changes between the domains of a stream: classes, pixels, angles or data sets.

The functions here give `Domains`, which `growmoe.continual.arrange` then puts in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from growmoe.continual.ordering import Domains, arrange
from growmoe.continual.stream import Data, Stream


def split(data: Data, seed: int, experiences: int) -> Domains:
    """Domains of equally many classes each, in an order drawn from the seed.

    Raises:
        ValueError: the classes cannot be divided evenly, or a class has no train or test image.
    """
    classes = sorted(set(data.train_labels.tolist()))
    if classes != list(range(len(classes))) or set(data.test_labels.tolist()) != set(classes):
        raise ValueError("a split needs classes 0 to K-1, each with train and test images")
    if experiences < 1 or len(classes) % experiences:
        raise ValueError(f"{len(classes)} classes cannot be cut into {experiences} experiences")
    order = np.random.default_rng(seed).permutation(len(classes))
    size = len(classes) // experiences
    place = torch.empty(len(classes), dtype=torch.int64)
    place[torch.from_numpy(order)] = torch.arange(len(classes))
    train, test = place[data.train_labels], place[data.test_labels]
    return Domains(
        replace(data, train_labels=train % size, test_labels=test % size),
        train // size,
        test // size,
        tuple(tuple(order[i : i + size].tolist()) for i in range(0, len(order), size)),
        data.digest(),
    )


def permuted(
    data: Data, seed: int, experiences: int, examples: int | None = None, tests: int | None = None
) -> Domains:
    """The same images with their pixels in another order in each domain; as they are in the first.

    Kirkpatrick et al. 2017 (arXiv:1612.00796).

    Args:
        examples: train images of each domain, drawn from the seed; all if None.
        tests: test images of each domain, likewise.
    """
    rng = np.random.default_rng(seed)
    pixels = math.prod(data.train_pixels.shape[2:])
    orders = [torch.arange(pixels)]
    orders += [torch.from_numpy(rng.permutation(pixels)) for _ in range(experiences - 1)]

    def change(images: Tensor, domain: int) -> Tensor:
        return images.flatten(2)[:, :, orders[domain]].reshape(images.shape)

    return _changed(data, rng, experiences, change, examples, tests)


def rotated(
    data: Data, seed: int, experiences: int, examples: int | None = None, tests: int | None = None
) -> Domains:
    """The same images turned by multiples of 180 / `experiences` degrees, in an order drawn.

    Angles in [0, 180): Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, section 5.1). Pixels between
    others are interpolated; what comes in from outside is black. Arguments as of `permuted`.
    """
    rng = np.random.default_rng(seed)
    angles = np.deg2rad(rng.permutation(experiences) * 180.0 / experiences)

    def change(images: Tensor, domain: int) -> Tensor:
        cos, sin = math.cos(angles[domain]), math.sin(angles[domain])
        height, width = images.shape[2:]
        # affine_grid works in coordinates from -1 to 1 on both axes
        theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
        grid = torch.nn.functional.affine_grid(
            theta.unsqueeze(0), [1, 1, height, width], align_corners=False
        )
        parts = [
            torch.nn.functional.grid_sample(
                part.float(), grid.expand(len(part), -1, -1, -1), align_corners=False
            )
            for part in images.split(4096)
        ]
        turned = torch.cat(parts) if parts else images.float()
        return turned.round().to(images.dtype) if images.dtype == torch.uint8 else turned

    return _changed(data, rng, experiences, change, examples, tests)


def _changed(
    data: Data,
    rng: np.random.Generator,
    experiences: int,
    change: Callable[[Tensor, int], Tensor],
    examples: int | None,
    tests: int | None,
) -> Domains:
    if experiences < 1:
        raise ValueError(f"experiences must be positive, got {experiences}")

    def draw(labels: Tensor, count: int | None) -> Tensor:
        if count is None:
            return torch.arange(len(labels))
        return torch.from_numpy(np.sort(rng.permutation(len(labels))[:count]))

    picked = [
        (draw(data.train_labels, examples), draw(data.test_labels, tests))
        for _ in range(experiences)
    ]
    num_classes = int(data.train_labels.max()) + 1
    return Domains(
        Data(
            torch.cat([change(data.train_pixels[i], d) for d, (i, _) in enumerate(picked)]),
            torch.cat([data.train_labels[i] for i, _ in picked]),
            torch.cat([change(data.test_pixels[i], d) for d, (_, i) in enumerate(picked)]),
            torch.cat([data.test_labels[i] for _, i in picked]),
            data.white,
        ),
        _numbered([len(i) for i, _ in picked]),
        _numbered([len(i) for _, i in picked]),
        tuple(tuple(range(d * num_classes, (d + 1) * num_classes)) for d in range(experiences)),
        data.digest(),
    )


def _numbered(counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def in_turn(parts: Sequence[Data], seed: int | None = None) -> Domains:
    """One data set after another, in an order drawn from the seed, or as given if it is None.

    Raises:
        ValueError: there are none, they differ in shape or kind, or one is empty.
    """
    if not parts:
        raise ValueError("a stream needs at least one data set")
    first = parts[0]
    for k, part in enumerate(parts):
        if not len(part.train_labels) or not len(part.test_labels):
            raise ValueError(f"data set {k} has no train or no test examples")
        for pixels in (part.train_pixels, part.test_pixels):
            if pixels.shape[1:] != first.train_pixels.shape[1:] or part.white != first.white:
                raise ValueError(
                    f"examples of the stream change from {tuple(first.train_pixels.shape[1:])} "
                    f"(0 to {first.white}) to {tuple(pixels.shape[1:])} (0 to {part.white}) in "
                    f"data set {k}: make them alike first"
                )
    order = range(len(parts))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(parts)).tolist()
    counts = [1 + int(max(p.train_labels.max(), p.test_labels.max())) for p in parts]
    offsets = np.cumsum([0, *counts])
    return Domains(
        Data(
            torch.cat([parts[k].train_pixels for k in order]),
            torch.cat([parts[k].train_labels for k in order]),
            torch.cat([parts[k].test_pixels for k in order]),
            torch.cat([parts[k].test_labels for k in order]),
            first.white,
        ),
        _numbered([len(parts[k].train_labels) for k in order]),
        _numbered([len(parts[k].test_labels) for k in order]),
        tuple(tuple(range(int(offsets[k]), int(offsets[k + 1]))) for k in order),
        "-".join(part.digest()[:8] for part in parts[:8]),
    )


def class_incremental(name: str, data: Data, seed: int, num_experiences: int = 5) -> Stream:
    """A sharp class-incremental stream: equally many new classes in each experience.

    Raises:
        ValueError: the classes cannot be divided evenly, or a class has no train or test image.
    """
    return arrange(name, split(data, seed, num_experiences), seed)
