"""Which changes of text are found, how soon, and what is taken for one: cells of `text_stream`.

What is found depends on trigrams alone, so nothing else is learned here. Beside it, ADWIN and
Page–Hinkley (river's, with its defaults) watch how well a single model, that of hashed trigrams,
knew each batch before learning it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, cast

import small_lm
import torch
from torch import Tensor

from growmoe.lm import load_domains
from growmoe.lm.growing import GrowingLM, PathRouter, StreamLearner, TextStream

PYTHON, CPP, ENGLISH = small_lm.DOMAINS
_MEASURED = 32  # batches by which detectors' inputs are standardised
# domains with thirds of `steps`, the order, batches over which the rows change
# ("easier": a path for English finds Python no harder than English)
STREAMS: dict[str, tuple[list[tuple[str, int]], str, int]] = {
    "easier-documents": ([(ENGLISH, 3), (PYTHON, 3), (CPP, 3)], "documents", 4),
    "easier-shuffled": ([(ENGLISH, 3), (PYTHON, 3), (CPP, 3)], "shuffled", 4),
    "fuzzy-16-documents": ([(PYTHON, 3), (CPP, 3), (ENGLISH, 3)], "documents", 16),
    "fuzzy-64-documents": ([(PYTHON, 3), (CPP, 3), (ENGLISH, 3)], "documents", 64),
    "returning-documents": (
        [(PYTHON, 3), (CPP, 3), (PYTHON, 2), (ENGLISH, 2), (CPP, 2)],
        "documents",
        4,
    ),
    "one-text": ([(ENGLISH, 9)], "documents", 1),
    "mixture-documents": ([("+".join(small_lm.DOMAINS), 9)], "documents", 1),
}


class Counter(StreamLearner):
    """Decides as any learner does, but its paths only count trigrams."""

    def _learn(self, token_BS1: Tensor) -> None:
        usual = self._usual(self.active)
        usual.observe(self._distance(token_BS1))
        usual.count_step()
        self.router.learn(self.layer.experts[self.active], token_BS1)


def detect(name: str, steps: int, seed: int) -> dict[str, Any]:
    """What is found in a stream of `STREAMS`."""
    thirds, order, stagger = STREAMS[name]
    phases = [(text, parts * steps // 3) for text, parts in thirds]
    domains = load_domains(small_lm.DOMAINS, small_lm.BYTES_PER_DOMAIN)
    stream = TextStream(domains, phases, order, stagger=stagger, seed=seed)  # type: ignore[arg-type]
    learner = Counter(GrowingLM(256, 8, 1, 2, seed=seed))
    batches = list(stream)
    events = [event.to_json() for batch in batches for event in learner.step(batch)]
    return {
        "events": events,
        "boundaries": stream.boundaries,
        "batches": len(batches),
        "texts": [text for text, _ in phases],
        "paths": len(learner.model.paths),
        "peers": watch(batches),
    }


def watch(batches: Sequence[Tensor]) -> dict[str, list[int]]:
    """Batches, counted from 1, at which drift detectors see drift of one model's signals."""
    from river.drift import ADWIN, PageHinkley

    model = GrowingLM(256, 8, 1, 2, seed=0)
    router, expert = cast(PathRouter, model.layer.router), model.paths[0]
    signals: dict[str, list[float]] = {"loss": [], "distance": []}
    for batch in batches:
        score = float(router.scores(batch, [expert]).sum())
        signals["loss"].append(-score / (len(batch) * (batch.shape[1] - 2)))
        signals["distance"].append(router.distance(batch, [expert], torch.ones(1)))
        router.learn(expert, batch)
    found = {}
    for signal, values in signals.items():
        usual = values[_MEASURED : 2 * _MEASURED]  # before that the model has just begun
        mean, sd = statistics.mean(usual), statistics.stdev(usual)
        for name, detector in (("ADWIN", ADWIN()), ("Page–Hinkley", PageHinkley())):
            found[f"{name} on {signal}"] = []
            for step, value in enumerate(values[2 * _MEASURED :], start=2 * _MEASURED + 1):
                detector.update((value - mean) / sd)
                if detector.drift_detected:
                    found[f"{name} on {signal}"].append(step)
    return found


def acts(cell: dict[str, Any]) -> list[tuple[int, str]]:
    """Births and returns: the batch, counted from 1, and which."""
    return [(e["step"], e["act"]) for e in cell["events"] if e["act"] in ("spawn", "thaw")]


def judge(
    found: Sequence[tuple[int, str]], boundaries: Sequence[int], end: int, wanted: Sequence[str]
) -> tuple[list[float], int]:
    """Delay after each boundary in batches, infinite where it is missed; and how many are false.

    The first act between a boundary and the next counts if it is the one wanted ("" for any).

    Example:
        >>> judge([(104, "spawn"), (150, "spawn")], [100, 200], 300, ["spawn", "thaw"])
        ([4, inf], 1)
    """
    ends, delays, right = [*boundaries, end], [], 0
    for i, act in enumerate(wanted):
        inside = [(s, a) for s, a in found if ends[i] < s <= ends[i + 1]]
        hit = bool(inside) and act in ("", inside[0][1])
        delays.append(float(inside[0][0] - ends[i]) if hit else math.inf)
        right += hit
    return delays, len(found) - right


def wanted(texts: Sequence[str]) -> list[str]:
    """What each change of text should bring: a birth where it is new, else a return."""
    return [
        "thaw" if text in texts[: i + 1] else "spawn"
        for i, text in enumerate(texts[1:])
    ]  # fmt: skip
