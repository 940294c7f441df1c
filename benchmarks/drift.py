"""Drift detection: growmoe's births of domains beside ADWIN and Page-Hinkley (river).

    python benchmarks/drift.py --seeds 5 --output benchmarks/results/drift

Five domains of 1,000 Fashion-MNIST images, permuted or rotated, in batches of 64: sudden drifts
inside batches, gradual ones (a change lasts half a domain), and two controls in which nothing
drifts: the same domains mixed from the beginning, and unchanged images. growmoe tells drift by its
inputs and labels; ADWIN and Page-Hinkley watch, with river's defaults, the errors that an MLP
(784-400-10, Adam at 1e-3) makes on every image before it is trained on its batch. A drift is found
by the first detection between its begin and the next one's, all others are false alarms. Writes
drift.json and drift.md there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from river.drift import ADWIN, PageHinkley
from torch import nn

from growmoe.continual import metrics
from growmoe.continual.closed_form import Grown
from growmoe.continual.stream import Stream
from growmoe.continual.streams import load

BATCH, DOMAINS, EXAMPLES, OVERLAP = 64, 5, 1000, 0.5
SHAPE = f"experiences={DOMAINS},examples={EXAMPLES},tests=10"
STREAMS = {
    "permuted, sudden": f"permuted-fashion-mnist:{SHAPE}",
    "rotated, sudden": f"rotated-fashion-mnist:{SHAPE}",
    "permuted, gradual": f"permuted-fashion-mnist:drift=fuzzy,{SHAPE}",
    "rotated, gradual": f"rotated-fashion-mnist:drift=fuzzy,{SHAPE}",
    "permuted, mixed from the beginning": f"permuted-fashion-mnist:drift=none,{SHAPE}",
    "rotated, mixed from the beginning": f"rotated-fashion-mnist:drift=none,{SHAPE}",
    "unchanged images": f"split-fashion-mnist:drift=none,{SHAPE}",
}
DETECTORS = ("growmoe", "ADWIN", "Page-Hinkley")


def true_drifts(stream: Stream) -> list[float]:
    """When a share of the next domain begins to come, in examples seen."""
    if stream.drift == "none":
        return []
    early = OVERLAP / 2 * EXAMPLES if stream.drift == "fuzzy" else 0.0
    return [d * EXAMPLES - early + 1 for d in range(1, DOMAINS)]


def detections(stream: Stream, seed: int) -> dict[str, list[float]]:
    """What each detector says, in examples seen."""
    torch.manual_seed(seed)
    grown = Grown(stream, early=1000, seed=seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    watching = {"ADWIN": ADWIN(), "Page-Hinkley": PageHinkley()}
    found: dict[str, list[float]] = {name: [] for name in DETECTORS}
    seen = 0
    for batch in stream.batches(BATCH):
        births = grown.births
        grown.learn(batch.images, batch.labels)
        logits = net(batch.images)
        for wrong in (logits.argmax(1) != batch.labels).tolist():
            seen += 1
            for name, detector in watching.items():
                detector.update(float(wrong))
                if detector.drift_detected:
                    found[name].append(float(seen))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
        found["growmoe"] += [float(seen)] * (grown.births - births)
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Found, delay in examples and false alarms per 1,000, over all seeds."""
    lines = [
        "| stream | detector | found | mean delay, examples | false alarms per 1,000 |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        for detector in DETECTORS:
            each = [seed[detector] for seed in seeds]
            found = sum(r["found"] for r in each)
            total = found + sum(r["missed"] for r in each)
            delays = [r["delay"] for r in each if r["delay"] is not None]
            lines.append(
                f"| {name} | {detector} | {f'{found} of {total}' if total else 'none to find'} | "
                f"{f'{np.mean(delays):.0f}' if delays else '–'} | "
                f"{np.mean([r['false_alarms_per_1000'] for r in each]):.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--data-dir")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "drift.json"
    runs: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    for name in given.streams:
        kept = runs.setdefault(name, [])
        for seed in range(len(kept), given.seeds):
            stream = load(STREAMS[name], seed, given.data_dir)
            drifts = true_drifts(stream)
            said = detections(stream, seed)
            kept.append(
                {
                    detector: metrics.drift_detection(times, drifts, stream.num_examples)
                    for detector, times in said.items()
                }
            )
            path.write_text(json.dumps(runs, indent=1))
            print(name, seed, said, flush=True)
        (given.output / "drift.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
