"""What an example costs online, in batches of 10: growmoe beside Avalanche's replay.

    python benchmarks/online_cost.py --output benchmarks/results/online_cost.json

Split Fashion-MNIST, one pass. growmoe's time is split into features (with the view that novelty is
judged by), gate (which domain an input belongs to) and experts (sums, signals, decisions). Replay
trains a small convolutional network, two layers of 3 by 3 filters (32, 64) and 128 hidden units,
which comes near growmoe only where it is trained on all classes at once (`--joint` measures
that): each step takes 10 new images and 10 of 2,000 kept ones. Both run in turns on the same
images in one process, one thread on a CPU; medians over turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.continual import default_features, load, require
from growmoe.continual.classifier import GrowingClassifier
from growmoe.continual.domain_gate import DomainGate
from growmoe.continual.stream import Stream

BATCH, TURN = 10, 500  # images


class Clock:
    """Adds up the seconds of what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class TimedGate(DomainGate):
    """A domain gate whose choice is timed."""

    clock = Clock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.wrap(super().forward)(*args, **kwargs)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def replay_strategy(net: nn.Module) -> Any:
    """Avalanche's naive strategy with its replay plugin."""
    require("avalanche.training.supervised")
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import Naive

    return Naive(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=1,
        plugins=[ReplayPlugin(mem_size=2000, batch_size=BATCH)],
        evaluator=EvaluationPlugin(loggers=[]),
    )


def turns(stream: Stream, count: int) -> dict[str, list[float]]:
    """Milliseconds per image of each turn."""
    from avalanche.benchmarks.scenarios.deprecated.generators import tensors_benchmark

    torch.manual_seed(0)
    features, learning = Clock(), Clock()
    model = GrowingClassifier(
        default_features(stream.image_shape), 10, early=1000, domain_gate=TimedGate()
    )
    order = torch.cat(stream.train_index)

    def images(begin: int, end: int) -> tuple[Tensor, Tensor]:
        index = order[begin:end]
        return stream.train_images(index), stream.data.train_labels[index]

    # two experiences have been before: replay has what to replay, growmoe four experts
    start = 2 * len(stream.train_index[0]) - 6000
    for begin in range(start, start + 12000, 250):
        model.learn(*images(begin, begin + 250))
    strategy = replay_strategy(network())
    first = tensors_benchmark([images(start, start + 2000)], [images(0, 10)], task_labels=[0])
    strategy.train(first.train_stream[0])
    model._view.features = _TimedFeatures(model.features, features)  # type: ignore[assignment]
    TimedGate.clock.read()
    found: dict[str, list[float]] = {name: [] for name in ("features", "gate", "experts", "replay")}
    for turn in range(count):
        begin = start + 12000 + turn * TURN
        x, y = images(begin, begin + TURN)
        for part in torch.arange(TURN).split(BATCH):
            learning.wrap(model.learn)(x[part], y[part])
        whole, seeing, choosing = learning.read(), features.read(), TimedGate.clock.read()
        experience = tensors_benchmark([(x, y)], [(x[:10], y[:10])], task_labels=[0])
        at = time.perf_counter()
        strategy.train(experience.train_stream[0])
        found["replay"].append(time.perf_counter() - at)
        found["features"].append(seeing)
        found["gate"].append(choosing)
        found["experts"].append(whole - seeing - choosing)
        print(turn, {name: round(1000 * v[-1] / TURN, 3) for name, v in found.items()}, flush=True)
    return {name: [1000 * v / TURN for v in values] for name, values in found.items()}


class _TimedFeatures:
    """Features whose computation is timed; in all else the features themselves."""

    def __init__(self, features: Any, clock: Clock) -> None:
        self._features, self._call = features, clock.wrap(features.__call__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._features, name)

    def __call__(self, images: Tensor) -> Tensor:
        found: Tensor = self._call(images)
        return found


def joint_accuracy(stream: Stream, epochs: int) -> float:
    """Of the network trained on all classes at once."""
    torch.manual_seed(0)
    net, labels = network(), stream.data.train_labels
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(stream.train_images(index)), labels[index])
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = [
            net(stream.test_images(part)).argmax(1) == stream.data.test_labels[part]
            for part in torch.arange(len(stream.data.test_labels)).split(1000)
        ]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--joint", type=int, default=0, help="epochs of joint training")
    parser.add_argument("--data-dir")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stream = load("split-fashion-mnist", 0, given.data_dir)
    median = {name: statistics.median(v) for name, v in turns(stream, given.turns).items()}
    growmoe = median["features"] + median["gate"] + median["experts"]
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "batch": BATCH,
        "ms_per_image": {**median, "growmoe": growmoe},
        "growmoe_over_replay": growmoe / median["replay"],
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    if given.joint:
        result["joint_accuracy"] = {
            "epochs": given.joint,
            "of": joint_accuracy(stream, given.joint),
        }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
