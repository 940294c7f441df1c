"""Runs that a report is made of, written as the bench writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from growmoe.continual import store
from growmoe.continual.cell import Cell, Memory
from growmoe.continual.summary import summarize


def event(
    step: int, act: str, ids: Any = (), child: int | None = None, **more: Any
) -> dict[str, Any]:
    parents = list(ids) if act in ("spawn", "merge") else []
    return {"step": step, "layer": "moe", "act": act, "ids": list(ids), "parents": parents,
            "child": child, "reason": "", "signals": {}, "change": None, "accepted": True,
            **more}  # fmt: skip


def life(experts: int, experiences: int, seed: int) -> tuple[list[Any], list[Any]]:
    """A lineage of so many experts, with refusals, and the load after each experience."""
    draw = random.Random(seed)
    events, alive, load = [event(0, "init", [0, 1])], [0, 1], []
    newest, frozen = 1, set[int]()
    for t in range(experiences):
        births = (experts - newest - 1) // (experiences - t)
        for k in range(births):
            step, parent = 100 * t + k, draw.choice(alive[-40:])
            newest += 1
            events.append(event(step, "spawn", [parent], newest, reason="novel inputs 53% > 25%"))
            alive.append(newest)
        step = 100 * t + 60
        events.append(event(step, "prune", alive[:1], reason="idle", accepted=False, change=0.3))
        if len(alive) > 3 and t % 2:
            a, b = draw.sample(sorted(set(alive) - frozen), 2)
            newest += 1
            events.append(event(step + 1, "merge", [a, b], newest, reason="alike", change=0.02))
            alive = [i for i in alive if i not in (a, b)] + [newest]
        learning = [i for i in alive if i not in frozen]
        if len(learning) > 4:
            frozen.add(learning[0])
            events.append(event(step + 2, "freeze", [learning[0]], reason="settled <&> done"))
        weights = [draw.random() ** 3 for _ in alive]
        shares = {str(i): round(w / sum(weights), 4) for i, w in zip(alive, weights, strict=True)}
        load.append({"step": 100 * t + 99, "load": shares})
    return events, load


def write_bench(
    path: Path, *, experiences: int = 5, experts: int = 12, seeds: int = 2, rival: bool = True
) -> Path:
    """A finished bench folder of a growing method and, if wanted, one that does not grow."""
    records = []
    for method in ("growmoe", "naive") if rival else ("growmoe",):
        for seed in range(seeds):
            draw = random.Random(seed)
            matrix = [
                [
                    (0.9 - 0.01 * (i - j) + 0.02 * draw.random()) * (j <= i)
                    for j in range(experiences)
                ]
                for i in range(experiences)
            ]
            more: dict[str, Any] = {}
            if method == "growmoe":
                events, load = life(experts, experiences, seed)
                alive = len(load[-1]["load"])
                share = [[draw.random() for _ in range(experiences)] for _ in range(alive)]
                more = {"lineage": events, "load_history": load, "routing": share,
                        "anytime": [[100.0 * (i + 1), 0.5 + 0.01 * i] for i in range(experiences)],
                        "drifts": [100.0, 200.0]}  # fmt: skip
            cell = Cell(matrix, 1.5, 1000, Memory(4000), **more)
            record = store.cell_record(
                cell, stream="a stream", data="d", method=method, seed=seed,
                settings={"note": "</script><b>bold</b>"}, class_order=[],
                test_counts=[10] * experiences, wall_seconds=2.0,
                versions={"python": "3.11", "growmoe": "0.1.0"}, hardware={"cores": 2},
            )  # fmt: skip
            store.write_atomically(store.cell_path(path, method, seed), json.dumps(record))
            records.append(record)
    results = summarize(records, ["growmoe"], "growmoe bench 'a stream' --seeds 2")
    store.write_atomically(path / "results.json", json.dumps(results))
    return path
