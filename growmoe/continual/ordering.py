"""Puts the examples of domains in the order in which they come, by scenario and drift."""

from __future__ import annotations

from collections.abc import Sequence
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
