"""Measures a method while it learns a stream: the accuracy matrix, and curves between its rows.

A runner tells the recorder what it is about to learn and what it has learned; the recorder asks the
method at a few moments drawn from the seed, the same for every method. Asking changes nothing: no
random numbers are used up, and a method that still waits is not hurried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from growmoe.continual.cell import Cell, Memory
from growmoe.continual.stream import Stream
from growmoe.glimpse import Glimpse, alive, told
from growmoe.lineage import Event
from growmoe.moe import MoE

_EVAL_BATCH = 1000
_CHUNK = 64
_PROBES = 500
POINTS = 20


@dataclass(frozen=True)
class Subject:
    """How a method is asked, one function for each question; those it cannot answer are None.

    Attributes:
        scores: images [N, C, H, W] and the experience they are of (which only a method that needs
            task labels may look at) to scores [N, K].
        size: gives the learned numbers that a prediction uses, and the bytes kept.
        ready: gives False while the method waits, for its features say, and cannot answer.
        shares: images to the share of each image that each expert takes, {expert id: [N]}.
        births: how many domains it has noticed so far.
        events: what happened to its experts so far.
        told: whether its scores depend on the experience.
    """

    scores: Callable[[Tensor, int], Tensor]
    size: Callable[[], tuple[int, int]] | None = None
    ready: Callable[[], bool] = lambda: True
    shares: Callable[[Tensor], Mapping[Any, Tensor] | None] | None = None
    births: Callable[[], int | None] | None = None
    events: Callable[[], Sequence[Event]] = tuple
    told: bool = False


class Recorder:
    """Fills a `Cell` while a method learns::

        recorder = Recorder(stream, Subject(lambda images, experience: model(images)))
        for batch in stream.batches(64):
            recorder.before()
            with recorder.learning():
                model.learn(batch.images, batch.labels)
            recorder.after(batch.num_new)
            for _ in batch.ends:
                recorder.test()
        cell = recorder.cell(parameters, memory)

    At each of the moments, the accuracy on 64 examples that come next (prequential: test, then
    train, in interleaved chunks) and on 500 test examples of all domains (any-time) is noted.

    Args:
        stream: what is learned.
        subject: the method.
        points: how many moments, one at random in each of as many equal parts of the stream;
            `POINTS` if left out.

    Attributes:
        matrix: the rows so far.
        seen: the examples of the stream that were learned so far.
        seconds: spent in `learning` so far.
    """

    def __init__(self, stream: Stream, subject: Subject, points: int | None = None) -> None:
        self.stream, self.subject = stream, subject
        self.matrix: list[list[float]] = []
        self.seen, self.seconds = 0, 0.0
        points = POINTS if points is None else points
        rng = np.random.default_rng([stream.seed, 2])
        parts = (np.arange(points) + rng.random(points)) / max(points, 1)
        self._moments = list(parts * stream.num_examples)
        self._order = torch.cat(stream.train_index)
        # the first experience that has each domain's tests, and some of these
        self._first = {d: j for j, d in reversed(list(enumerate(stream.experience_domain)))}
        tests = sum(len(stream.test_index[j]) for j in self._first.values())
        self._probes: dict[int, Tensor] = {}
        for j in sorted(self._first.values()):
            index = stream.test_index[j]
            count = max(1, round(_PROBES * len(index) / tests))
            self._probes[j] = index[torch.from_numpy(rng.permutation(len(index))[:count])]
        self._births, self._steps = 0, 0
        self._begin: float | None = None
        self._learned = 0.0
        self._curves: dict[str, list[list[float]]] = {
            name: [] for name in ("anytime", "prequential", "memory", "parameter", "second", "flop")
        }
        self._load: list[dict[str, Any]] = []
        self._detections: list[float] = []

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Counts the seconds spent inside."""
        self._begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds, self._begin = self._now(), None

    def before(self, images: Tensor | None = None, labels: Tensor | None = None) -> None:
        """A mini-batch is about to be learned for the first time; ask if a moment has come.

        Args:
            images, labels: those of the mini-batch, where they do not come in the stream's order.
        """
        if not self._moments or self.seen < self._moments[0]:
            return
        while self._moments and self._moments[0] <= self.seen:
            self._moments.pop(0)
        if images is None or labels is None:
            ahead = self._order[self.seen : self.seen + _CHUNK]
            images, labels = self.stream.train_images(ahead), self.stream.data.train_labels[ahead]
            domains = self.stream.train_domain[ahead]
        else:
            domains = torch.full_like(labels, self.stream.experience_domain[len(self.matrix)])
        if not len(labels):
            return
        # two chunks never overlap
        self._moments = [t for t in self._moments if t >= self.seen + len(labels)]
        with self._asking():
            self._note("prequential", self._right(images, labels, domains), len(labels))
            if self.seen:
                self._note("anytime", self._anytime())
                self._sizes()
                self._loads(images)

    def after(self, count: int) -> None:
        """So many examples have been learned that were not learned before."""
        self.seen, self._steps = self.seen + count, self._steps + 1
        births = None if self.subject.births is None else self.subject.births()
        if births is not None:
            self._detections += [float(self.seen)] * (births - self._births)
            self._births = max(births, self._births)

    def test(self) -> None:
        """An experience has ended: the next row of the matrix."""
        i, stream = len(self.matrix), self.stream
        # a mini-batch in which an experience ends may have begun the next
        self.seen = max(self.seen, sum(len(index) for index in stream.train_index[: i + 1]))
        row = self.row(i)
        self.matrix.append(row)
        with self._asking():
            counts = stream.test_counts
            right = sum(r * n for r, n in zip(row, counts, strict=True))
            self._note("anytime", right / sum(counts))
            self._sizes()
            self._note("flop", self._prediction_flops())

    def row(self, experience: int) -> list[float]:
        """Accuracy on all test examples of each experience, while this one is the newest.

        Of one that was not met yet, a method is asked as if it were of the newest.
        """
        known: dict[tuple[int, int], float] = {}
        accuracies = []
        with self._asking():
            for j, domain in enumerate(self.stream.experience_domain):
                task = min(experience, j)
                key = domain, task if self.subject.told else 0  # a domain that returns: once
                if key not in known:
                    known[key] = self._accuracy(j, task, self.stream.test_index[j])
                accuracies.append(known[key])
        return accuracies

    def cell(self, parameters: int, memory: Memory, **rest: Any) -> Cell:
        """What was measured, with what the method says of itself: fields of `Cell`."""
        curves = {name: curve or None for name, curve in self._curves.items()}
        fields: dict[str, Any] = {
            "prediction_flops": curves["flop"][-1][1] if curves["flop"] else None,
            "anytime": curves["anytime"],
            "prequential": curves["prequential"],
            "memory_history": curves["memory"],
            "parameter_history": curves["parameter"],
            "seconds_history": curves["second"],
            "flops_history": curves["flop"],
            **self._routing(),
        }
        if self.subject.births is not None and self.subject.births() is not None:
            fields |= {"detections": self._detections, "drifts": drifts(self.stream)}
        if self._load:
            fields["load_history"] = self._load
        return Cell(self.matrix, self.seconds, parameters, memory, **{**fields, **rest})

    def glimpse(self) -> Glimpse:
        """What there is to see by now; nothing is asked for it."""
        events = self.subject.events()
        shown = {
            "accuracy on all (%)": ("anytime", 100.0),
            "on the next batch (%)": ("prequential", 100.0),
            "memory (MB)": ("memory", 1e-6),
        }
        curves = {
            label: [scale * value for _, value in self._curves[name]]
            for label, (name, scale) in shown.items()
        }
        return Glimpse(curves=curves, experts=alive(events), events=told(events))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """No gradients, random numbers as if nothing had been asked, and no seconds that count."""
        self._learned = self._now()
        begin = time.perf_counter()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
        if self._begin is not None:
            self._begin += time.perf_counter() - begin

    def _now(self) -> float:
        """Seconds of learning up to now."""
        return self.seconds + (0.0 if self._begin is None else time.perf_counter() - self._begin)

    def _note(self, curve: str, value: float, ahead: int = 0) -> None:
        points, at = self._curves[curve], float(self.seen + ahead)
        if points and points[-1][0] >= at:  # measured again, better
            points.pop()
        points.append([at, value])

    def _sizes(self) -> None:
        self._note("second", self._learned)
        if self.subject.size is not None:
            parameters, size = self.subject.size()
            self._note("parameter", parameters)
            self._note("memory", size)

    def _right(self, images: Tensor, labels: Tensor, domains: Tensor) -> float:
        """The share of examples that are named rightly; none while the method waits."""
        if not self.subject.ready():
            return 0.0
        scores = self.subject.scores(images, len(self.matrix))
        right = 0
        for domain in domains.unique().tolist():
            rows = domains == domain
            answers = self.stream.restrict(scores[rows], self._first[domain]).argmax(1)
            right += int((answers == labels[rows]).sum())
        return right / len(labels)

    def _anytime(self) -> float:
        if not self.subject.ready():
            return 0.0
        now, right, total = len(self.matrix), 0.0, 0
        for j, index in self._probes.items():
            count = len(self.stream.test_index[j])
            right += count * self._accuracy(j, min(now, j), index)
            total += count
        return right / total

    def _accuracy(self, experience: int, task: int, index: Tensor) -> float:
        correct, stream = 0, self.stream
        for part in index.split(_EVAL_BATCH):
            scores = self.subject.scores(stream.test_images(part), task)
            answers = stream.restrict(scores, experience).argmax(1)
            correct += int((answers == stream.data.test_labels[part]).sum())
        return correct / len(index)

    def _loads(self, images: Tensor) -> None:
        if self.subject.shares is None or not self.subject.ready():
            return
        if shares := self.subject.shares(images):
            load = {str(id): round(float(part.mean()), 4) for id, part in shares.items()}
            self._load.append({"step": self._steps, "load": load})

    def _routing(self) -> dict[str, Any]:
        """Counts of test examples by expert and domain, and by expert and class."""
        if self.subject.shares is None:
            return {}
        stream, index = self.stream, torch.cat(list(self._probes.values()))
        domains = [stream.experience_domain[j] for j in self._probes]
        sizes = torch.tensor([len(part) for part in self._probes.values()])
        with self._asking():
            shares = self.subject.shares(stream.test_images(index))
        if not shares:
            return {}
        share_EN = torch.stack([part.double() for part in shares.values()])
        domain_N = torch.tensor(domains).repeat_interleave(sizes)

        def counts(kind_N: Tensor, kinds: int) -> list[list[float]]:
            table = share_EN @ torch.nn.functional.one_hot(kind_N, kinds).double()
            return [[round(n, 4) for n in row] for row in table.tolist()]

        return {
            "routing": counts(domain_N, stream.num_domains),
            "class_routing": counts(stream.data.test_labels[index], stream.num_classes),
        }

    def _prediction_flops(self) -> float:
        index = next(iter(self._probes.values()))
        images = self.stream.test_images(index[:_CHUNK])
        return prediction_flops(lambda: self.subject.scores(images, 0)) / len(images)


def prediction_flops(predict: Callable[[], Any]) -> float:
    """Floating-point operations of a prediction: two for each multiplication of matrices."""
    grouped = {torch.ops.aten._grouped_mm: _grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        predict()
    return float(counter.get_total_flops())


def _grouped_flops(a_RD: Any, b_EDF: Any, *rest: Any, **how: Any) -> int:
    return 2 * a_RD[0] * a_RD[1] * b_EDF[-1]  # every row meets one matrix


def mixture_shares(layer: MoE, x_TD: Tensor) -> dict[int, Tensor]:
    """The share of each input that each expert of a layer takes, by id: float [T] each."""
    training = layer.training
    layer.eval()
    with torch.no_grad():
        weight_TE = layer.route(x_TD).assignment.dense().abs()
    layer.train(training)
    weight_TE = weight_TE / weight_TE.sum(1, keepdim=True).clamp(min=1e-12)
    return dict(zip(layer.experts, weight_TE.T, strict=True))


def drifts(stream: Stream) -> list[float]:
    """The examples seen when each domain first comes, that of the beginning left out."""
    domain_N = stream.train_domain[torch.cat(stream.train_index)].numpy()
    return sorted(float(t) for t in np.unique(domain_N, return_index=True)[1] if t)


def answers(learner: object) -> bool:
    """Whether a learner can be asked: not while its first images wait for its features."""
    intake = getattr(learner, "_intake", None)
    return bool(getattr(learner, "ready", intake is None or intake.fitted))
