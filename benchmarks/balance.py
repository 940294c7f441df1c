"""What keeps experts alive on streams that collapse an unbalanced router.

    python benchmarks/balance.py --output benchmarks/results/balance

Handwritten digits (scikit-learn) through one hidden layer and 16 experts of which each input takes
one. The layer's inputs are positive, so that all keys see one common direction and whichever
expert is ahead wins everything. Two streams: all classes at once, and two classes after two.
Writes balance.json, balance.md and balance.png there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_lm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import growmoe
from growmoe import FFN, MoE, Router, TopK, losses
from growmoe.routers import BiasBalanced, Cosine, ExpertChoice, NoisyTopK, Sinkhorn

EXPERTS, WIDTH, STEPS = 16, 32, 600
# name -> (what it is, router, options of the layer)
CASES: dict[str, tuple[str, Callable[[], Router], dict[str, Any]]] = {
    "none": ("top-1, nothing", lambda: TopK(1), {"balance_loss": 0.0}),
    "switch-0.01": ("top-1, Switch loss 0.01", lambda: TopK(1), {"balance_loss": 0.01}),
    "switch-0.1": ("top-1, Switch loss 0.1", lambda: TopK(1), {"balance_loss": 0.1}),
    "squared-load": (
        "top-1, squared relative load 0.01",
        lambda: TopK(1),
        {"balance_loss": 0.0, "losses": {losses.load_loss: 0.01}},
    ),
    "mutual": (
        "top-1, mutual information 0.1",
        lambda: TopK(1),
        {"balance_loss": 0.0, "losses": {losses.mutual_information_loss: 0.1}},
    ),
    "noisy": ("noisy top-1, importance and load 0.1", lambda: NoisyTopK(1), {}),
    "bias-0.001": ("bias balanced, rate 0.001", lambda: BiasBalanced(1), {}),
    "bias-0.01": ("bias balanced, rate 0.01", lambda: BiasBalanced(1, rate=0.01), {}),
    "cosine": (
        "top-1, cosine gate, nothing",
        lambda: TopK(1, gate=Cosine()),
        {"balance_loss": 0.0},
    ),
    "sinkhorn": ("Sinkhorn", lambda: Sinkhorn(1), {}),
    "expert-choice": ("expert choice, capacity 1", lambda: ExpertChoice(1.0), {}),
}
STREAMS = {"together": [list(range(10))], "two by two": [[2 * i, 2 * i + 1] for i in range(5)]}


def data() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def work(cell: str) -> dict[str, Any]:
    """Train once; what was routed where in the second half of each phase, in training mode."""
    name, stream, seed = cell.split("--")
    _, router, options = CASES[name]
    torch.manual_seed(int(seed))
    x_ND, y_N = data()
    order = torch.randperm(len(x_ND))
    train, test = order[:1437], order[1437:]
    layer = MoE(WIDTH, FFN(WIDTH), EXPERTS, router(), seed=int(seed), **options)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), layer, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    counts_E = torch.zeros(EXPERTS, dtype=torch.float64)

    def count(module: nn.Module, _: Any, routing: growmoe.Routing) -> None:
        if module.training and counting:
            counts_E.add_(routing.assignment.counts_E)

    layer.router.register_forward_hook(count)
    phases = STREAMS[stream.replace("-", " ")]
    for classes in phases:
        rows = train[torch.isin(y_N[train], torch.tensor(classes))]
        for step in range(STEPS // len(phases)):
            counting = step >= STEPS // len(phases) // 2
            pick = rows[torch.randint(len(rows), (64,))]
            loss = F.cross_entropy(model(x_ND[pick]), y_N[pick]) + growmoe.aux_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    load_E = counts_E / counts_E.mean()
    last = test[torch.isin(y_N[test], torch.tensor(phases[-1]))]
    with torch.no_grad():
        correct = (model(x_ND[last]).argmax(1) == y_N[last]).double().mean()
    return {
        "dead": int((load_E < 0.1).sum()),
        "imbalance": float(load_E.max()),
        "accuracy": 100 * float(correct),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/balance"))
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    names = [
        f"{name}--{stream.replace(' ', '-')}--{seed}"
        for name in CASES
        for stream in STREAMS
        for seed in seeds
    ]
    cells = small_lm.run_cells(
        names, work, arguments.output / "cells", arguments.workers, "imbalance"
    )
    rows = []
    for name, (label, _, _) in CASES.items():
        row: dict[str, Any] = {"name": name, "label": label}
        for stream in STREAMS:
            mine = [cells[f"{name}--{stream.replace(' ', '-')}--{seed}"] for seed in seeds]
            row[stream] = {
                key: small_lm.interval([cell[key] for cell in mine])
                for key in ("dead", "imbalance", "accuracy")
            }
        rows.append(row)
    table = markdown(rows)
    print(table)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": small_lm.versions(),
        "setting": {"experts": EXPERTS, "width": WIDTH, "steps": STEPS, "seeds": len(seeds)},
        "rows": rows,
    }
    (arguments.output / "balance.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "balance.md").write_text(table)
    plot(rows, arguments.output / "balance.png")


def markdown(rows: list[dict]) -> str:
    lines = [
        "| | dead of 16, all classes | load max/mean | accuracy | dead of 16, two by two |"
        " load max/mean | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [row["label"]]
        for stream in STREAMS:
            dead, imbalance, accuracy = (
                row[stream][key] for key in ("dead", "imbalance", "accuracy")
            )
            parts += [
                f"{dead[0]:.1f} ± {dead[1]:.1f}",
                f"{imbalance[0]:.1f}",
                f"{accuracy[0]:.1f} ± {accuracy[1]:.1f}",
            ]
        lines.append("| " + " | ".join(parts) + " |")
    lines += [
        "",
        "Mean and 95% CI over 5 seeds. Dead: under a tenth of the mean load in the second half of"
        " each phase. Accuracy on the test images of the last phase's classes.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for shift, (stream, color) in enumerate(zip(STREAMS, ("#0072b2", "#e69f00"), strict=True)):
        means = [row[stream]["dead"][0] for row in reversed(rows)]
        errors = [row[stream]["dead"][1] for row in reversed(rows)]
        places = [i + 0.2 - 0.4 * shift for i in range(len(rows))]
        axes.barh(places, means, 0.38, xerr=errors, color=color, label=f"classes {stream}")
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    axes.set_xlim(0, EXPERTS)
    axes.set_xlabel(f"dead experts of {EXPERTS} (mean and 95% CI)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
