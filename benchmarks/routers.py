"""Trains the same small language model with every causal router, at equal active FLOPs.

    python benchmarks/routers.py --output benchmarks/results/routers

Beside them stand two dense models: of equal active and of equal total parameters. Hyperparameters
are the routers' defaults; the learning rate was chosen on the dense models with seed 100 and is
the same for all. A router whose number of experts per token is not fixed is run as it comes, and
the table says how many it took. Writes routers.json, routers.md and routers.png there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import small_lm
import torch

from growmoe import FFN, Capacity, Router, TopK
from growmoe.experts import Constant, Copy, Zero
from growmoe.routers import (
    BiasBalanced,
    Cosine,
    Dense,
    DenseToSparse,
    ExpertDropout,
    GShard,
    Gumbel,
    Hash,
    NoisyTopK,
    ReMoE,
    Stochastic,
    Switch,
    TopAny,
    TopP,
    Tree,
)

EXPERTS, K, HIDDEN = 8, 2, 96  # the dense model of equal active parameters has k · HIDDEN
BUDGET_HOURS = 3.0


def mixture(router: Router, hidden: int = HIDDEN, experts: int = EXPERTS, **moe: Any) -> dict:
    return {"d_hidden": hidden, "num_experts": experts, "router": router, "moe": moe}


def expert(hidden: int = HIDDEN) -> FFN:
    return FFN(hidden, activation="swiglu", bias=False)


# name -> (what it is, a function that gives the options of the model)
CASES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "dense-active": (
        "dense, equal active size",
        lambda: {"d_hidden": K * HIDDEN, "num_experts": 0},
    ),
    "dense-total": ("dense, equal total size", lambda: {"d_hidden": 8 * HIDDEN, "num_experts": 0}),
    "topk": ("top-2, softmax", lambda: mixture(TopK(K))),
    "topk-no-loss": ("top-2 without balance loss", lambda: mixture(TopK(K), balance_loss=0.0)),
    "topk-over-topk": ("top-2, softmax over the two", lambda: mixture(TopK(K, "softmax_topk"))),
    "topk-sigmoid": ("top-2, sigmoid", lambda: mixture(TopK(K, "sigmoid"))),
    "topk-capacity": (
        "top-2, capacity 1.25, dropped by position",
        lambda: mixture(TopK(K), capacity=Capacity(1.25)),
    ),
    "topk-shared": (
        "top-1 of 7 beside a shared expert",
        lambda: {**mixture(TopK(1), experts=7), "shared": expert()},
    ),
    "zero-computation": (
        "top-2 of 8 and zero, copy, constant (MoE++)",
        lambda: {
            **mixture(TopK(K), experts=11),
            "expert": [*(expert() for _ in range(8)), Zero(), Copy(), Constant()],
        },
    ),
    "switch": (
        "Switch, 4 experts twice as wide",
        lambda: mixture(Switch(), 2 * HIDDEN, 4),
    ),
    "switch-capacity": (
        "Switch, 4 experts twice as wide, capacity 1.25",
        lambda: mixture(Switch(), 2 * HIDDEN, 4, capacity=Capacity(1.25)),
    ),
    "noisy-topk": ("noisy top-2", lambda: mixture(NoisyTopK(K))),
    "gshard": ("top-2, random second", lambda: mixture(GShard())),
    "gumbel": ("Gumbel top-2, straight through", lambda: mixture(Gumbel(K))),
    "stochastic": ("two draws by probability", lambda: mixture(Stochastic(K))),
    "random": ("two at random in training (THOR)", lambda: mixture(Stochastic(K, "uniform"))),
    "hash": ("two by hash of the byte", lambda: mixture(Hash(K))),
    "cosine": ("top-2, cosine gate", lambda: mixture(TopK(K, gate=Cosine()))),
    "tree": ("top-2, tree of 4 branches", lambda: mixture(TopK(K, gate=Tree((4,))))),
    "expert-dropout": (
        "top-2, experts hidden at 10%",
        lambda: mixture(TopK(K, gate=ExpertDropout())),
    ),
    "bias-balanced": ("top-2, sigmoid, bias balanced", lambda: mixture(BiasBalanced(K))),
    "bias-balanced-groups": (
        "the same in 2 of 4 groups",
        lambda: mixture(BiasBalanced(K, groups=4, chosen_groups=2)),
    ),
    "top-p": ("top-p, p = 0.4", lambda: mixture(TopP())),
    "remoe": ("ReLU, adaptive L1 (ReMoE)", lambda: mixture(ReMoE(K))),
    "top-any": ("top-any (DynMoE)", lambda: mixture(TopAny())),
    "dense-to-sparse": ("dense to sparse (EvoMoE)", lambda: mixture(DenseToSparse(200))),
    "soft-mixture": ("soft mixture of 8 small experts", lambda: mixture(Dense(), K * HIDDEN // 8)),
}


def work(cell: str, setting: small_lm.Setting) -> dict[str, Any]:
    name, seed = cell.rsplit("-seed", 1)
    return small_lm.as_cell(small_lm.train(setting, int(seed), CASES[name][1]()))


def speeds(setting: small_lm.Setting, repeats: int) -> dict[str, float]:
    """Median training time over that of the dense model of equal active size, interleaved."""
    torch.set_num_threads(1)
    tokens = torch.randint(256, (setting.batch_size, setting.length + 1))
    times: dict[str, list[float]] = {name: [] for name in CASES}
    models = {
        name: small_lm.make_model(setting, 0, **options()) for name, (_, options) in CASES.items()
    }
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            small_lm.step_of(model, optimizers[name], tokens[:, :-1], tokens[:, 1:])
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    dense = times["dense-active"]
    return {
        name: statistics.median(d / t for d, t in zip(dense, mine, strict=True))
        for name, mine in times.items()
    }


def summarize(
    cells: dict[str, dict[str, Any]], seeds: range, speed: dict[str, float]
) -> list[dict]:
    rows = []
    for name, (label, _) in CASES.items():
        mine = [cells[f"{name}-seed{seed}"] for seed in seeds]
        bits, error = small_lm.interval([cell["mean_bits"] for cell in mine])
        mean = {
            key: statistics.mean(cell[key] for cell in mine)
            for key in ("imbalance", "dead", "dropped", "experts_per_token", "flops_per_token")
        }
        rows.append(
            {
                "name": name,
                "label": label,
                "bits": bits,
                "ci95": error,
                "by_seed": [cell["mean_bits"] for cell in mine],
                "parameters": mine[0]["parameters"],
                "speed_over_dense": speed[name],
                **mean,
            }
        )
    dense = {row["name"]: row for row in rows}["dense-active"]["flops_per_token"]
    for row in rows:
        row["flops_over_dense"] = row["flops_per_token"] / dense
    return sorted(rows, key=lambda row: row["bits"])


def markdown(rows: list[dict], seeds: range) -> str:
    lines = [
        "| router | bits per byte | experts per token | FLOPs | load max/mean | dead | dropped |"
        " speed | parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mixture = not row["name"].startswith("dense-a") and row["name"] != "dense-total"
        lines.append(
            f"| {row['label']} | {row['bits']:.3f} ± {row['ci95']:.3f} | "
            + (f"{row['experts_per_token']:.2f}" if mixture else "–")
            + f" | {row['flops_over_dense']:.2f} | "
            + (
                f"{row['imbalance']:.2f} | {row['dead']:.1f} | {row['dropped']:.1%}"
                if mixture
                else "– | – | –"
            )
            + f" | {row['speed_over_dense']:.2f} | {row['parameters'] / 1e3:.0f}k |"
        )
    lines += [
        "",
        f"Mean and 95% CI over {len(seeds)} seeds of test bits per byte, mean of three domains."
        " FLOPs and speed (tokens per second in training) are over those of the dense model of"
        " equal active size; experts per token, load, dead experts (under a tenth of the mean"
        " load, per layer) and dropped rows are of the last fifth of training.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 0.27 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        dense = row["name"] in ("dense-active", "dense-total")
        axes.errorbar(
            row["bits"],
            place,
            xerr=row["ci95"],
            fmt="s" if dense else "o",
            capsize=2,
            color="#d55e00" if dense else "#0072b2",
        )
        for bits in row["by_seed"]:
            axes.plot(bits, place, "|", color="0.5", markersize=5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("test bits per byte: mean, 95% CI and seeds (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each router")
    parser.add_argument("--only", help="comma-separated names: train these and write no table")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/routers"))
    arguments = parser.parse_args()
    setting = small_lm.Setting(steps=arguments.steps, lr=arguments.lr)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    names = arguments.only.split(",") if arguments.only else list(CASES)
    # seed by seed, so that an interrupted run has compared all routers on some
    order = [f"{name}-seed{seed}" for seed in seeds for name in names]
    folder = arguments.output / "cells" / f"steps{setting.steps}-lr{setting.lr:g}"
    cells = small_lm.run_cells(order, partial(work, setting=setting), folder, arguments.workers)
    if arguments.only:
        return
    rows = summarize(cells, seeds, speeds(setting, arguments.repeats))
    hours = sum(cell["cpu_seconds"] for cell in cells.values()) / 3600
    table = markdown(rows, seeds)
    print(table)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": small_lm.versions(),
        "setting": vars(setting) | {"experts": EXPERTS, "k": K, "hidden": HIDDEN},
        "domains": small_lm.DOMAINS,
        "cpu_hours": {"budget": BUDGET_HOURS, "used": hours},
        "rows": rows,
    }
    (arguments.output / "routers.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "routers.md").write_text(table)
    plot(rows, arguments.output / "routers.png")


if __name__ == "__main__":
    main()
