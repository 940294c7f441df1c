"""Streams of a user's own data: a list of data sets, or an Avalanche benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from growmoe.continual.ordering import Domains, arrange
from growmoe.continual.stream import Data, Stream


def from_datasets(
    name: str,
    train: Sequence[Any],
    test: Sequence[Any],
    num_classes: int,
    *,
    seed: int = 0,
    scenario: str = "class",
    drift: str = "sharp",
    **how: Any,
) -> Stream:
    """A stream whose domains are the given data sets, in the given order.

    Args:
        name: any.
        train: for each domain a pair (images [N, C, H, W], labels [N]) of tensors, or anything
            that gives (image [C, H, W], label, …), such as a `torch.utils.data.Dataset`.
        test: as many, likewise.
        num_classes: labels must be integers from 0 to one less.
        seed, scenario, drift, how: as `arrange` takes them.

    Raises:
        ValueError: labels out of range, images that are not finite or not all of one shape and
            kind, an empty data set; the message names the data set and the example.
    """
    if not train or len(train) != len(test):
        raise ValueError(f"{len(train)} train data sets need as many for tests, got {len(test)}")
    sets = [
        _read(part, f"{kind} data set {k}", num_classes)
        for kind, parts in (("train", train), ("test", test))
        for k, part in enumerate(parts)
    ]
    first = sets[0][0]
    for k, (images, _) in enumerate(sets):
        if images.shape[1:] != first.shape[1:] or images.dtype != first.dtype:
            raise ValueError(
                f"images change from {tuple(first.shape[1:])} {first.dtype} to "
                f"{tuple(images.shape[1:])} {images.dtype} in "
                f"{'train' if k < len(train) else 'test'} data set {k % len(train)}: "
                "make them alike first"
            )
    trains, tests = sets[: len(train)], sets[len(train) :]
    groups = [tuple(range(num_classes))] * len(train)
    if scenario != "domain":
        groups = [
            tuple(sorted({*a[1].tolist(), *b[1].tolist()}))
            for a, b in zip(trains, tests, strict=True)
        ]

    def within(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat(
            [
                torch.searchsorted(torch.tensor(group), labels)
                for group, (_, labels) in zip(groups, parts, strict=True)
            ]
        )

    def numbered(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([torch.full_like(labels, d) for d, (_, labels) in enumerate(parts)])

    pixels = [torch.cat([images for images, _ in parts]) for parts in (trains, tests)]
    labels = [within(trains), within(tests)]
    white = 255 if first.dtype == torch.uint8 else 1
    data = Data(pixels[0], labels[0], pixels[1], labels[1], white)
    domains = Domains(data, numbered(trains), numbered(tests), tuple(groups), data.digest())
    return arrange(name, domains, seed, scenario=scenario, drift=drift, **how)


def from_avalanche(name: str, benchmark: Any, *, seed: int = 0, **how: Any) -> Stream:
    """A stream of the experiences of an Avalanche benchmark, which has one test for each of them.

    The scenario is "task" where the experiences have task labels that differ, "domain" where all
    have the same classes, and "class" otherwise; `scenario=` says otherwise.

    Raises:
        ValueError: as `from_datasets`.
    """
    train = [experience.dataset for experience in benchmark.train_stream]
    test = [experience.dataset for experience in benchmark.test_stream]
    if len(test) == 1 < len(train):
        test = test * len(train)
    classes = [set(map(int, part.targets)) for part in train]
    tasks = {int(label) for part in train for label in set(part.targets_task_labels)}
    alike = all(group == classes[0] for group in classes) and len(classes) > 1
    guess = "task" if len(tasks) > 1 else "domain" if alike else "class"
    count = 1 + max(max(map(int, part.targets)) for part in (*train, *test))
    return from_datasets(name, train, test, count, seed=seed, **{"scenario": guess, **how})


def _read(part: Any, where: str, num_classes: int) -> tuple[Tensor, Tensor]:
    pair = isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Tensor)
    images, labels = part if pair else _stack(part, where)
    labels = torch.as_tensor(labels)
    if not len(labels) or len(labels) != len(images):
        raise ValueError(f"{where} has {len(images)} images and {len(labels)} labels")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
    labels = labels.long()
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise ValueError(
            f"{where}, example {i}: label {int(labels[i])}, expected 0 to {num_classes - 1}"
        )
    if images.dtype != torch.uint8:
        images = images.float()
        bad = (~images.flatten(1).isfinite().all(1)).nonzero()
        if len(bad):
            raise ValueError(f"{where}, example {int(bad[0])}: the image holds NaN or infinity")
    if images.ndim != 4:
        raise ValueError(f"{where}: images must be [N, C, H, W], got {tuple(images.shape)}")
    return images, labels


def _stack(part: Iterable[Any], where: str) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    for i, (image, label, *_) in enumerate(part[k] for k in range(len(part))):  # type: ignore[arg-type, index]
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{where}, example {i}: the image is {tuple(image.shape)}, those before were "
                f"{tuple(images[0].shape)}"
            )
        images.append(torch.as_tensor(image))
        labels.append(int(label))
    if not images:
        raise ValueError(f"{where} is empty")
    return torch.stack(images), torch.tensor(labels)
