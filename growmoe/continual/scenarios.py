"""Makes streams of data: what changes between domains, and in which order examples come.

Two steps. First `split`, `permuted`, `rotated` or `in_turn` say which domain each example belongs
to (`Domains`). Then `arrange` puts the examples in order, by scenario and drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from growmoe.continual.stream import DRIFTS, SCENARIOS, Data, Stream


@dataclass(frozen=True)
class Domains:
    """Data in which each example belongs to a domain.

    Attributes:
        data: labels count from 0 within each domain.
        train_domain: int64 [N], the domain of each train example, from 0 in order of arrival.
        test_domain: int64 [N], likewise.
        classes: for each domain, the class in the whole stream that each of its labels means.
        fingerprint: of the data before any of it was changed or left out.
    """

    data: Data = field(repr=False)
    train_domain: Tensor = field(repr=False)
    test_domain: Tensor = field(repr=False)
    classes: tuple[tuple[int, ...], ...]
    fingerprint: str


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


def arrange(
    name: str,
    domains: Domains,
    seed: int,
    *,
    scenario: str = "class",
    drift: str = "sharp",
    overlap: float = 0.5,
    visits: int = 2,
    examples: int | None = None,
    tests: int | None = None,
) -> Stream:
    """Put examples in order.

    Args:
        name: of the stream.
        domains: what belongs together.
        seed: draws the order within each domain, and that of the returns.
        scenario: "class", "domain" or "task", as in van de Ven et al. 2022 (Nature Machine
            Intelligence 4:1185).
        drift: "sharp": one domain after another. "fuzzy": the share of the next domain rises
            linearly around each boundary. "recurring": every domain comes, then every domain again.
            "none": all are mixed from the beginning.
        overlap: how long a fuzzy boundary lasts, from 0 to 1 times the length of a domain.
        visits: how often each domain of a recurring stream comes.
        examples: train examples of each domain, drawn from the seed; all if None.
        tests: test examples of each domain, likewise.

    Raises:
        ValueError: an argument is out of range, or a domain has no examples.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {scenario!r}")
    if drift not in DRIFTS:
        raise ValueError(f"drift must be one of {', '.join(DRIFTS)}, got {drift!r}")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be from 0 to 1, got {overlap}")
    if visits < 1:
        raise ValueError(f"visits must be positive, got {visits}")
    rng = np.random.default_rng([seed, 1])
    count = len(domains.classes)
    train = [_draw(domains.train_domain, d, examples, rng) for d in range(count)]
    test = [_draw(domains.test_domain, d, tests, rng) for d in range(count)]
    for d, (some, other) in enumerate(zip(train, test, strict=True)):
        if not len(some) or not len(other):
            raise ValueError(f"domain {d} of stream {name!r} has no train or no test examples")
    order = list(range(count))
    if drift == "recurring":
        short = min(map(len, train))
        if short < visits:
            raise ValueError(f"{visits} visits need as many examples in a domain, one has {short}")
        order, pieces = _recurring(train, visits, rng)
    elif drift == "fuzzy":
        pieces = _fuzzy(train, overlap, rng)
    elif drift == "none":
        pieces = _cut(rng.permutation(np.concatenate(train)), train)
    else:
        pieces = train
    if scenario == "domain":
        data = domains.data
        num_classes = max(map(len, domains.classes))
        classes = tuple(tuple(range(len(group))) for group in domains.classes)
        class_order = tuple(range(num_classes))
    else:
        data = replace(
            domains.data,
            train_labels=_named(domains.data.train_labels, domains.train_domain, domains.classes),
            test_labels=_named(domains.data.test_labels, domains.test_domain, domains.classes),
        )
        classes = domains.classes
        # each class once, where it first comes
        class_order = tuple(dict.fromkeys(c for group in domains.classes for c in group))
    return Stream(
        name=name,
        seed=seed,
        data=data,
        class_order=class_order,
        experience_classes=tuple(classes[d] for d in order),
        train_index=tuple(torch.from_numpy(piece) for piece in pieces),
        test_index=tuple(torch.from_numpy(np.sort(test[d])) for d in order),
        scenario=scenario,
        drift=drift,
        train_domain=domains.train_domain,
        experience_domain=tuple(order),
        fingerprint=domains.fingerprint,
    )


def _draw(domain: Tensor, wanted: int, count: int | None, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation((domain == wanted).nonzero().flatten().numpy())[:count]


def _cut(order: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(order, np.cumsum([len(part) for part in like])[:-1])


def _fuzzy(
    train: Sequence[np.ndarray], overlap: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Each example gets a time; domain d's are spread over [d, d + 1] with ramps at both ends.

    A time uniform in [d, d + 1] plus one uniform in [-overlap / 2, overlap / 2] has the density of
    a trapezoid, and those of neighbours add up to 1. At the two ends of the stream it is folded
    back.
    """
    times = []
    for d, part in enumerate(train):
        base = d + (rng.permutation(len(part)) + 0.5) / len(part)
        time = base + overlap * (rng.random(len(part)) - 0.5)
        times.append(len(train) - np.abs(len(train) - np.abs(time)))
    return _cut(np.concatenate(train)[np.argsort(np.concatenate(times), kind="stable")], train)


def _recurring(
    train: Sequence[np.ndarray], visits: int, rng: np.random.Generator
) -> tuple[list[int], list[np.ndarray]]:
    """Rounds of all domains, the first in order, the others drawn; no domain twice in a row."""
    parts = [np.array_split(part, visits) for part in train]
    order: list[int] = []
    pieces: list[np.ndarray] = []
    for visit in range(visits):
        turn = list(range(len(train)))
        if visit:
            turn = rng.permutation(len(train)).tolist()
            if len(turn) > 1 and turn[0] == order[-1]:
                turn.append(turn.pop(0))
        order += turn
        pieces += [parts[d][visit] for d in turn]
    return order, pieces


def _named(labels: Tensor, domain: Tensor, classes: Sequence[Sequence[int]]) -> Tensor:
    table = torch.full((len(classes), max(map(len, classes))), -1, dtype=torch.int64)
    for d, group in enumerate(classes):
        table[d, : len(group)] = torch.tensor(group)
    return table[domain, labels]


def class_incremental(name: str, data: Data, seed: int, num_experiences: int = 5) -> Stream:
    """A sharp class-incremental stream: equally many new classes in each experience.

    Raises:
        ValueError: the classes cannot be divided evenly, or a class has no train or test image.
    """
    return arrange(name, split(data, seed, num_experiences), seed)
