"""Places experts by load on reproducible workloads, beside three others, and models the step time.

    python benchmarks/placement.py --output benchmarks/results/placement

Nothing here runs a model: loads are drawn, `growmoe.distributed.place` decides as it does in
training, and the cost model below says what a step would take. Every strategy but shadowing decides
at the start of an interval from the loads of the one before; shadowing decides at each step from
the step's own loads, as FasterMoE does.

The model. W workers, E = 16 W experts of SwiGLU, T tokens a worker, k choices; n_w the rows at
worker w, c its replicated experts, r a copy's number of holders, s the bytes of an expert:

    step = max_w n_w · 18 D F / rate              compute, forward and backward
         + 4 (max_w n_w · 2 D / link + W · wait)  the all-to-alls, by the busiest worker, bfloat16
         + max_w Σ_c 2 s (r − 1)/r / link         gradients of replicas
         + max_w (received) · 7 / link / steps    moves: weights, and Adam's moments in float32

Not modelled: overlap, topology, routing that differs between workers, memory.

EPLB is DeepSeek's as their report tells it (2412.19437, 3.4): each worker has one redundant slot;
copies go to the expert with the most load per copy, then copies are packed greedily into workers of
equally many slots, anew each time. Shadowing is FasterMoE's (PPoPP 2022): the hottest experts are
broadcast to all workers in every step, as long as the model says that it pays.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from heapq import heapify, heappop, heappush, heapreplace
from pathlib import Path

import numpy as np

from growmoe.distributed.placement import evenly, place

PER_WORKER = 16
TOKENS, K, D, F = 8192, 8, 2048, 768
RATE = 300e12  # FLOP/s that a worker reaches
LINK = 50e9  # bytes/s
WAIT = 2e-6  # seconds a message
SIZE = 3 * D * F * 2  # bytes of an expert in bfloat16
STEPS = 100  # in an interval
WORKLOADS = ("uniform", "zipf", "shifting", "bursts")
STRATEGIES = ("none", "growmoe", "growmoe, no copies", "eplb", "shadowing")


def loads_of(workload: str, experts: int, interval: int, seed: int) -> np.ndarray:
    """Shares of the rows, [E], of one interval; no expert can have more than 1/k of them."""
    fixed = np.random.default_rng([seed, 1])
    order = fixed.permutation(experts)
    now = np.random.default_rng([seed, 2, interval])
    share = np.ones(experts)
    if workload in ("zipf", "shifting", "bursts"):
        exponent = {"zipf": 1.0, "shifting": 0.8, "bursts": 0.4}[workload]
        if workload == "shifting":  # hot spots wander by a sixteenth of the ranks each interval
            order = np.roll(order, interval * max(1, experts // 16))
        share[order] = np.arange(1, experts + 1) ** -exponent
    if workload == "bursts" and interval % 3 == 2:
        share[now.choice(experts, max(1, experts // 64), replace=False)] *= 20
    share *= now.lognormal(0, 0.1, experts)
    for _ in range(50):
        share = np.minimum(share / share.sum(), 1 / K)
    return share / share.sum()


def step_time(holders: dict, shares: np.ndarray, workers: int, received: np.ndarray) -> dict:
    """What the model gives for one placement."""
    load, copies = np.zeros(workers), np.zeros(workers)
    for id, ranks in holders.items():
        for rank in ranks:
            load[rank] += shares[id] / len(ranks)
            copies[rank] += 2 * SIZE * (len(ranks) - 1) / len(ranks)
    rows = load.max() * TOKENS * K * workers
    parts = {
        "compute": rows * 18 * D * F / RATE,
        "all-to-all": 4 * (rows * 2 * D / LINK + workers * WAIT),
        "copies": copies.max() / LINK,
        "moves": received.max() * 7 / LINK / STEPS,
    }
    return {"max_over_mean": load.max() * workers, "seconds": sum(parts.values()), **parts}


def eplb(loads: np.ndarray, workers: int) -> dict[int, tuple[int, ...]]:
    slots = PER_WORKER + 1
    number = np.ones(len(loads), dtype=int)
    heap = [(-load, id) for id, load in enumerate(loads)]
    heapify(heap)
    for _ in range(workers * slots - len(loads)):
        id = heap[0][1]
        number[id] += 1
        heapreplace(heap, (-loads[id] / number[id], id))
    copies = sorted(
        ((loads[i] / n, i) for i, n in enumerate(number) for _ in range(n)), reverse=True
    )
    bins = [(0.0, 0, rank) for rank in range(workers)]
    heapify(bins)
    holders: dict[int, list[int]] = {id: [] for id in range(len(loads))}
    for load, id in copies:
        total, count, rank = heappop(bins)
        if rank not in holders[id]:  # a second copy on one worker is the same as one
            holders[id].append(rank)
        if count + 1 < slots:
            heappush(bins, (total + load, count + 1, rank))
    return {id: tuple(ranks) for id, ranks in holders.items()}


def shadowing(home: dict, shares: np.ndarray, workers: int) -> tuple[dict, int]:
    """The hottest experts on all workers while the modelled step gets shorter."""
    holders, best = dict(home), None
    everyone, nothing = tuple(range(workers)), np.zeros(workers)
    shadowed = 0
    for id in np.argsort(-shares)[:64]:
        trial = {**holders, int(id): everyone}
        modelled = step_time(trial, shares, workers, nothing)["seconds"]
        modelled += (shadowed + 1) * SIZE / LINK  # the broadcast; gradients are counted as copies
        if best is None:
            best = step_time(holders, shares, workers, nothing)["seconds"]
        if modelled >= best:
            break
        holders, best, shadowed = trial, modelled, shadowed + 1
    return holders, shadowed


def run(workload: str, workers: int, intervals: int, seed: int) -> dict:
    experts = PER_WORKER * workers
    home = {id: (rank,) for id, rank in evenly(range(experts), workers).items()}
    now = dict.fromkeys(STRATEGIES, home)
    rows: dict[str, list[dict]] = {name: [] for name in STRATEGIES}
    sizes = dict.fromkeys(range(experts), SIZE)
    before = None
    for interval in range(intervals + 1):
        shares = loads_of(workload, experts, interval, seed)
        for name in STRATEGIES if before is not None else ():
            start, held, shadowed = time.perf_counter(), now[name], 0
            if name.startswith("growmoe"):
                loads = dict(enumerate(before.tolist()))
                copies = 0 if "no" in name else workers
                plan = place(
                    loads,
                    held,
                    workers,
                    sizes,
                    replicas=copies,
                    slots=PER_WORKER + 1,
                    tolerance=1.1,
                )
                now[name] = plan.holders
            elif name == "eplb":
                now[name] = eplb(before, workers)
            elif name == "shadowing":
                now[name], shadowed = shadowing(home, shares, workers)
            seconds = time.perf_counter() - start
            received = np.zeros(workers)
            if name != "shadowing":
                for id, ranks in now[name].items():
                    for rank in set(ranks) - set(held[id]):
                        received[rank] += SIZE
            row = step_time(now[name], shares, workers, received)
            row["seconds"] += shadowed * SIZE / LINK
            moved = received.sum() + shadowed * SIZE * (workers - 1) * STEPS
            rows[name].append({**row, "moved": float(moved), "planning": seconds})
        before = shares
    return {
        name: {key: statistics.fmean(r[key] for r in of) for key in of[0]}
        for name, of in rows.items()
    }


def limits(workers: int) -> dict[str, float]:
    """What the implementation itself needs at this size, per worker and layer."""
    experts = PER_WORKER * workers
    return {
        "counts gathered in a forward (MB)": workers * (experts + 4) * 8 / 1e6,
        "signals with evidence (MB)": experts * (16 + 34 * D) * 4 / 1e6,
        "signals with moments (MB)": experts * (16 + 2 * D) * 4 / 1e6,
        "routing keys (MB)": experts * D * 2 / 1e6,
        "sum of signals in a forward (MB)": (256 + experts) * D * 4 / 1e6,
        "the same with moments (MB)": 256 * D * 4 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cells, lines = [], []
    for workers in arguments.workers:
        seeds = arguments.seeds if workers <= 64 else min(arguments.seeds, 256 // workers or 1)
        lines.append(f"\n{workers} workers, {PER_WORKER * workers} experts, {seeds} seeds\n")
        lines.append(
            "| workload | strategy | max / mean | step (ms) | moved (GB) | planning (ms) |"
        )
        lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
        for workload in WORKLOADS:
            runs = [
                run(workload, workers, 12 if workers <= 64 else 6, seed) for seed in range(seeds)
            ]
            for name in STRATEGIES:
                r = {k: statistics.fmean(x[name][k] for x in runs) for k in runs[0][name]}
                cells.append({"workers": workers, "workload": workload, "strategy": name, **r})
                lines.append(
                    f"| {workload} | {name} | {r['max_over_mean']:.2f} | {1e3 * r['seconds']:.2f} "
                    f"| {r['moved'] / 1e9:.2f} | {1e3 * r['planning']:.1f} |"
                )
        lines += ["", *(f"- {what}: {value:.1f}" for what, value in limits(workers).items())]
        if arguments.output:
            _write(arguments.output, lines, cells)
    print("\n".join(lines))


def _write(folder: Path, lines: list[str], cells: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.argv])
    head = [f"`{command}`; means over intervals and seeds; GB an interval of {STEPS} steps."]
    (folder / "table.md").write_text("\n".join([*head, *lines]) + "\n")
    content = {
        "command": command,
        "hardware": f"{platform.machine()}, one thread (planning times)",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cells": cells,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
