"""Searches thresholds of the rules with Ray Tune, on text that comes one domain after the other.

    python benchmarks/tune_rules.py --trials 8 --cpus 2

An example: the search space and `trial` are what one would change. Each trial trains a tiny
language model (`growmoe.lm`), one CPU each, on seeds from 100 up, and reports bits per byte as it
goes. What counts is the mean over domains on validation text; test text and the first hundred
seeds stay unseen.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ray import tune

SPACE = {
    "novelty": tune.uniform(0.1, 0.6),
    "similarity": tune.uniform(0.85, 0.99),
    "seed": tune.randint(100, 110),
}


def trial(config: dict[str, Any]) -> None:
    """Train with these thresholds."""
    import torch

    from growmoe.lm import TrainConfig, train
    from growmoe.rules import MergeSimilar, PruneIdle, SpawnOnNovelty

    torch.set_num_threads(1)
    rules = [SpawnOnNovelty(config["novelty"]), MergeSimilar(config["similarity"]), PruneIdle()]
    settings = TrainConfig(
        domains=("python", "english"), curriculum="phases", d_model=32, layers=1, heads=2,
        experts=4, max_experts=12, organize_every=20, sequence_length=64, batch_size=8,
        bytes_per_domain=200_000, steps=config["steps"], evaluate_every=config["steps"] // 4,
        windows=8, seed=config["seed"], device="cpu",
    )  # fmt: skip

    def say(_: str) -> None:
        pass

    run = train(settings, rules=rules, say=say)
    for line in run.history:
        if line["kind"] == "evaluation":
            bits = line["bits_per_byte"].values()
            tune.report(
                {"bits_per_byte": sum(bits) / len(bits), "experts": sum(line["experts"].values())}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=None, help="of this machine; all if left out")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if not os.environ.get("RAY_ADDRESS"):
        import ray

        ray.init(num_cpus=arguments.cpus, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={**SPACE, "steps": arguments.steps},
        tune_config=tune.TuneConfig(
            metric="bits_per_byte", mode="min", num_samples=arguments.trials
        ),
    )
    best = tuner.fit().get_best_result()
    print(f"best: {best.config}: {best.metrics['bits_per_byte']:.3f} bits per byte, "
          f"{best.metrics['experts']} experts")  # fmt: skip


if __name__ == "__main__":
    main()
