"""Loss against training compute: dense models and mixtures of equal active size, at three sizes.

    python benchmarks/quality_compute.py --output benchmarks/results/quality_compute

The learning rate is constant after its warm-up, so that each point of a curve is a fair end of
training at that compute. The ratio is the training FLOPs of the dense model at its end over those
with which the mixture first had its loss. Writes quality_compute.json, .md and .png there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import small_lm

from growmoe import TopK

SIZES = {"small": (48, 2), "middle": (80, 2), "large": (112, 4)}  # name -> d_model, heads
EXPERTS, K = 16, 2
EVALUATIONS = 20
BUDGET_HOURS = 1.5


def options(kind: str, d_model: int) -> dict[str, Any]:
    if kind == "dense":
        return {"d_hidden": 2 * d_model, "num_experts": 0}
    return {"d_hidden": d_model, "num_experts": EXPERTS, "router": TopK(K)}


def work(cell: str, steps: int, lr: float) -> dict[str, Any]:
    size, kind, seed = cell.split("-")
    d_model, heads = SIZES[size]
    setting = small_lm.Setting(d_model, 3, heads, steps, lr=lr, constant_lr=True)
    return small_lm.as_cell(
        small_lm.train(setting, int(seed.removeprefix("seed")), options(kind, d_model), EVALUATIONS)
    )


def mean_curve(cells: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The curve of the mean over seeds: (training FLOPs, validation bits per byte)."""
    curves = [cell["curve"] for cell in cells]
    return [
        (point[0][0], statistics.mean(bits for _, bits in point))
        for point in zip(*curves, strict=True)
    ]


def compute_to_reach(curve: list[tuple[float, float]], bits: float) -> float | None:
    """The FLOPs at which a curve first has this loss, between its points; None if it never does."""
    before: tuple[float, float] | None = None
    for flops, value in curve:
        if value <= bits:
            if before is None:
                return flops
            share = (before[1] - bits) / (before[1] - value)
            return before[0] + share * (flops - before[0])
        before = (flops, value)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality_compute"))
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    names = [f"{size}-{kind}-seed{s}" for s in seeds for size in SIZES for kind in ("dense", "moe")]
    folder = arguments.output / "cells" / f"steps{arguments.steps}-lr{arguments.lr:g}"
    cells = small_lm.run_cells(
        names, partial(work, steps=arguments.steps, lr=arguments.lr), folder, arguments.workers
    )
    rows = []
    for size, (d_model, _) in SIZES.items():
        both = {kind: [cells[f"{size}-{kind}-seed{s}"] for s in seeds] for kind in ("dense", "moe")}
        curves = {kind: mean_curve(mine) for kind, mine in both.items()}
        # of each seed by itself, for the spread
        ratios = []
        for dense, moe in zip(both["dense"], both["moe"], strict=True):
            end, target = dense["curve"][-1]
            reached = compute_to_reach([tuple(p) for p in moe["curve"]], target)
            ratios.append(None if reached is None else end / reached)
        found = [ratio for ratio in ratios if ratio is not None]
        ratio = small_lm.interval(found) if len(found) == len(ratios) else (None, None)
        rows.append(
            {
                "size": size,
                "d_model": d_model,
                "curves": curves,
                "test_bits": {
                    kind: small_lm.interval([cell["mean_bits"] for cell in mine])
                    for kind, mine in both.items()
                },
                "parameters": {kind: mine[0]["parameters"] for kind, mine in both.items()},
                "flops_per_token": {
                    kind: statistics.mean(c["flops_per_token"] for c in mine)
                    for kind, mine in both.items()
                },
                "ratio": ratio,
                "ratio_by_seed": ratios,
            }
        )
    table = markdown(rows)
    print(table)
    hours = sum(cell["cpu_seconds"] for cell in cells.values()) / 3600
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": small_lm.versions(),
        "setting": {"steps": arguments.steps, "lr": arguments.lr, "experts": EXPERTS, "k": K},
        "cpu_hours": {"budget": BUDGET_HOURS, "used": hours},
        "rows": rows,
    }
    (arguments.output / "quality_compute.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "quality_compute.md").write_text(table)
    plot(rows, arguments.output / "quality_compute.png")


def markdown(rows: list[dict]) -> str:
    lines = [
        "| size | parameters dense / MoE | FLOPs per token MoE / dense | dense | MoE |"
        " compute ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        p, f, b = row["parameters"], row["flops_per_token"], row["test_bits"]
        sizes = f"{p['dense'] / 1e3:.0f}k / {p['moe'] / 1e3:.0f}k"
        mean, error = row["ratio"]
        ratio = "not reached by all" if mean is None else f"{mean:.2f} ± {error:.2f}"
        lines.append(
            f"| {row['size']}, D = {row['d_model']} | {sizes}"
            f" | {f['moe'] / f['dense']:.2f} | {b['dense'][0]:.3f} ± {b['dense'][1]:.3f}"
            f" | {b['moe'][0]:.3f} ± {b['moe'][1]:.3f} | {ratio} |"
        )
    lines += [
        "",
        "Test bits per byte after equal numbers of tokens, mean and 95% CI over seeds. The ratio is"
        " the dense model's training FLOPs over those at which the mixture had its validation"
        " loss.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for row, color in zip(rows, ("#56b4e9", "#0072b2", "#332288"), strict=True):
        for kind, style in (("dense", "--"), ("moe", "-")):
            flops, bits = zip(*row["curves"][kind], strict=True)
            label = f"{'MoE' if kind == 'moe' else 'dense'}, D = {row['d_model']}"
            axes.plot(flops, bits, style, color=color, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation bits per byte")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
