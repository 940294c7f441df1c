"""Who finds room with an expert, in plain Python: queues, drops and rounds of asking elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from reference_routers import Choice
from torch import Tensor

from growmoe import Capacity, MoE

Row = tuple[int, int]  # token, the expert it was first given to


def within_capacity(layer: MoE, choice: Choice, margins: list[float]) -> Choice:
    """The choice as the layer's next forward leaves it."""
    capacity = layer.capacity
    assert capacity is not None
    factor = capacity.factor if layer.training else capacity.eval_factor
    if factor is None:
        return choice
    if factor == "adaptive":
        # in float32, as the running mean is kept
        imbalance = layer.recorder.imbalance[0 if layer.training else 1]
        factor = float((1.1 * imbalance).clamp(1, capacity.most))
    rows = sum(len(w) for w in choice.weights)
    room = room_for(float(factor), rows, len(layer.experts))
    return replace(choice, weights=placed(choice, room, capacity, len(layer.experts), margins))


def room_for(factor: float, rows: int, num_experts: int) -> int:
    return math.ceil(factor * (rows / num_experts))


def placed(
    choice: Choice, room: int, capacity: Capacity, num_experts: int, margins: list[float]
) -> list[dict[int, Tensor]]:
    """Per token, {expert: combine weight} of the rows that found a place.

    Each expert serves its queue until its room is used up. With reroute, as long as anyone can
    still ask: each token with a row that has no place asks the best expert, by logit, that it
    does not have, has not asked and that had room when the round began; who is refused asks on in
    the next round. The weight changes in proportion to the probability.
    """
    wanted = {(t, e): w for t, ws in enumerate(choice.weights) for e, w in ws.items()}
    free = [room] * num_experts
    got: list[dict[int, Tensor]] = [{} for _ in choice.weights]
    without: list[Row] = []

    def served(queue: list[tuple[Row, Tensor]]) -> list[tuple[Row, Tensor]]:
        if capacity.drop == "position":
            return sorted(queue, key=lambda asked: asked[0])
        order = sorted(queue, key=lambda asked: (-_size(asked[1]), asked[0]))
        sizes = [_size(w) for _, w in order]
        margins.extend(a - b for a, b in pairwise(sizes) if a != b)  # the first of equals first
        return order

    for e in range(num_experts):
        queue = [(row, w) for row, w in wanted.items() if row[1] == e]
        for row, w in served(queue) if len(queue) > room else queue:
            if free[e]:
                free[e] -= 1
                got[row[0]][e] = w
            else:
                without.append(row)
    if not capacity.reroute:
        return got
    tried = [set(ws) for ws in choice.weights]
    while True:
        open_now = {e for e in range(num_experts) if free[e]}
        asking: dict[int, list[tuple[Row, Tensor]]] = {}
        asked_this_round = set()
        for t, first in sorted(without):
            options = [e for e in open_now - tried[t] if choice.logits[t][e].item() > -math.inf]
            if t in asked_this_round or not options:
                continue
            asked_this_round.add(t)
            e = max(options, key=lambda e: choice.logits[t][e].item())
            was = choice.probs[t][first]
            scale = wanted[t, first] / was if was.item() else 0.0
            asking.setdefault(e, []).append(((t, first), scale * choice.probs[t][e]))
            tried[t].add(e)
        if not asking:
            return got
        for e, queue in asking.items():
            for (t, first), w in served(queue) if len(queue) > free[e] else queue:
                if free[e]:
                    free[e] -= 1
                    got[t][e] = w
                    without.remove((t, first))


def _size(weight: Tensor) -> float:
    return round(float(torch.as_tensor(weight).detach().mean()), 12)
