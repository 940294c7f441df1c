"""Searches thresholds of the rules with Ray Tune, on text that comes one domain after the other.

    python benchmarks/tune_rules.py --trials 8 --output benchmarks/results/tune_rules.json

An example: the search space and `trial` are what one would change. Each trial trains a tiny
language model (`growmoe.lm`) with each of several seeds from 100 up, one CPU each, and reports bits
per byte as it goes, so that a scheduler can stop what goes badly. What counts is the mean over
domains and seeds on validation text; test text and the first hundred seeds stay unseen. The first
trial is that of the rules' defaults, so that it is seen what the search gains over them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

from growmoe.continual.environment import hardware, versions
from growmoe.rules import MergeSimilar, SpawnOnNovelty

SPACE = {"novelty": tune.uniform(0.05, 0.4), "similarity": tune.uniform(0.85, 0.99)}
DEFAULTS = {"novelty": SpawnOnNovelty().share, "similarity": MergeSimilar().similarity}
EVALUATIONS = 4


def trial(config: dict[str, Any]) -> None:
    """Train with these thresholds, one seed after the other."""
    import torch

    from growmoe.lm import TrainConfig, train
    from growmoe.rules import PruneIdle

    torch.set_num_threads(1)
    done: list[tuple[float, int]] = []  # bits per byte and experts at the end, by seed

    def hear(line: Any) -> None:
        if line["kind"] != "evaluation":
            return
        bits = line["bits_per_byte"].values()
        now = (sum(bits) / len(bits), sum(line["experts"].values()))
        ends = line["step"] == config["steps"]
        # seeds that are through count with their end, the running one with where it is
        each = [*done, now]
        tune.report({
            "bits_per_byte": sum(b for b, _ in each) / len(each),
            "experts": sum(e for _, e in each) / len(each),
            "seeds": len(done) + ends,
        })  # fmt: skip
        if ends:
            done.append(now)

    for seed in config["seeds"]:
        rules = [SpawnOnNovelty(config["novelty"]), MergeSimilar(config["similarity"]), PruneIdle()]
        settings = TrainConfig(
            domains=("python", "english"), curriculum="phases", d_model=32, layers=1, heads=2,
            experts=4, grow=True, max_experts=12, organize_every=20, sequence_length=64,
            batch_size=8, bytes_per_domain=200_000, steps=config["steps"], windows=8, seed=seed,
            evaluate_every=max(1, config["steps"] // EVALUATIONS), device="cpu",
        )  # fmt: skip
        train(settings, rules=rules, listen=hear)


def search(trials: int, steps: int, seeds: list[int], folder: str) -> list[dict[str, Any]]:
    """All trials, the best first; those that failed are left out and warned of by Tune."""
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={**SPACE, "steps": steps, "seeds": tune.choice([seeds])},
        tune_config=tune.TuneConfig(
            metric="bits_per_byte", mode="min", num_samples=trials,
            search_alg=BasicVariantGenerator(points_to_evaluate=[DEFAULTS], random_state=100),
        ),
        run_config=tune.RunConfig(storage_path=folder, name="rules", verbose=1),
    )  # fmt: skip
    found = [
        {
            **{name: result.config[name] for name in SPACE},
            "defaults": all(result.config[name] == DEFAULTS[name] for name in SPACE),
            "bits_per_byte": result.metrics["bits_per_byte"],
            "experts": result.metrics["experts"],
            "seconds": result.metrics["time_total_s"],
        }
        for result in tuner.fit()
        if result.metrics and result.metrics.get("seeds") == len(seeds)
    ]
    return sorted(found, key=lambda row: row["bits_per_byte"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=None, help="of this machine; all if left out")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of a trial")
    parser.add_argument("--output", type=Path, help="a file of all trials")
    arguments = parser.parse_args()
    if not os.environ.get("RAY_ADDRESS"):
        ray.init(num_cpus=arguments.cpus, log_to_driver=False, include_dashboard=False)
    seeds = list(range(100, 100 + arguments.seeds))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # with several machines: one that all see
        rows = search(arguments.trials, arguments.steps, seeds, folder)
    for row in rows:
        print(f"novelty {row['novelty']:.3f}, similarity {row['similarity']:.3f}: "
              f"{row['bits_per_byte']:.3f} bits per byte, {row['experts']:.1f} experts"
              f"{' (defaults)' if row['defaults'] else ''}")  # fmt: skip
    if arguments.output:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {**versions(), "ray": ray.__version__},
            "hardware": hardware(),
            "seconds": time.perf_counter() - begin,
            "steps": arguments.steps,
            "seeds": seeds,
            "trials": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
