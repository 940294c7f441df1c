"""MMoE against one shared-bottom network of equal size, on real multi-output tables.

    python benchmarks/multi_task.py --output benchmarks/results/multi_task

    solar-flare    (river) 1,066 regions of the sun: three counts of flares from ten properties
    breast-cancer  (scikit-learn) 569 tumours: ten worst measurements from the ten mean ones

Inputs and targets are standardised on the training part; 60% train, 20% choose the epoch, 20% test,
drawn anew by each seed. The figure is the relative RMSE of a task, its RMSE over that of always
predicting the training mean, averaged over tasks (Spyromitros-Xioufis et al. 2016, aRRMSE).
Writes multi_task.json and multi_task.md there.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small_lm
import torch
from river import datasets as river_datasets
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import growmoe
from growmoe.models import MultiTask, SharedBottom

EPOCHS, BATCH, LR, EXPERTS, HIDDEN = 60, 64, 2e-3, 8, 16


def solar_flare() -> tuple[Tensor, Tensor]:
    rows = [({**x}, {**y}) for x, y in river_datasets.SolarFlare()]
    columns = []
    for name in rows[0][0]:
        values = [x[name] for x, _ in rows]
        if isinstance(values[0], str):
            columns += [[float(v == level) for v in values] for level in sorted(set(values))]
        else:
            columns.append([float(v) for v in values])
    targets = [[float(v) for v in y.values()] for _, y in rows]
    return torch.tensor(columns).T, torch.tensor(targets)


def breast_cancer() -> tuple[Tensor, Tensor]:
    x = torch.tensor(np.log1p(load_breast_cancer().data), dtype=torch.float32)
    return x[:, :10], x[:, 20:]


TABLES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "solar-flare": solar_flare,
    "breast-cancer": breast_cancer,
}


def models(d_in: int, num_tasks: int, seed: int) -> dict[str, nn.Module]:
    tasks = {str(i): 1 for i in range(num_tasks)}
    mmoe = MultiTask(d_in, tasks, EXPERTS, HIDDEN, seed=seed)
    return {
        "MMoE": mmoe,
        "MMoE, 2 of 8 experts": MultiTask(d_in, tasks, EXPERTS, HIDDEN, k=2, seed=seed),
        "shared bottom, equal size": SharedBottom.sized_as(mmoe, seed=seed),
    }


def rrmse(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Relative RMSE of each task; targets are standardised on the training part, so its mean is 0.

    A task that is constant in this part has none and is left out.
    """
    model.eval()
    with torch.no_grad():
        out = torch.cat(list(model(x).values()), dim=1)
    model.train()
    squared, base = (out - y).square().mean(0), y.square().mean(0)
    known = y.std(0) > 1e-6
    return (squared[known] / base[known]).sqrt().tolist()


def fit(model: nn.Module, parts: list[tuple[Tensor, Tensor]], seed: int) -> float:
    """Test aRRMSE at the epoch that validates best."""
    (x, y), (x_val, y_val), (x_test, y_test) = parts
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=1e-2, fused=True)
    best = (float("inf"), copy.deepcopy(model.state_dict()))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            out = torch.cat(list(model(x[rows]).values()), dim=1)
            loss = (out - y[rows]).square().mean() + growmoe.aux_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        value = float(np.mean(rrmse(model, x_val, y_val)))
        if value < best[0]:
            best = (value, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return float(np.mean(rrmse(model, x_test, y_test)))


def split(x: Tensor, y: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    ends = (int(0.6 * len(x)), int(0.8 * len(x)))
    train = order[: ends[0]]

    def scaled(value: Tensor) -> Tensor:
        return (value - value[train].mean(0)) / value[train].std(0).clamp_min(1e-6)

    x, y = scaled(x), scaled(y)
    return [(x[rows], y[rows]) for rows in order.tensor_split(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/multi_task"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for table, load in TABLES.items():
        x, y = load()
        scores: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            parts = split(x, y, seed)
            for name, model in models(x.shape[1], y.shape[1], seed).items():
                sizes[name] = sum(p.numel() for p in model.parameters())
                scores.setdefault(name, []).append(fit(model, parts, seed))
                print(f"{table} seed {seed} {name}: {scores[name][-1]:.4f}", flush=True)
        control = scores["shared bottom, equal size"]
        for name, mine in scores.items():
            rows.append(
                {
                    "table": table,
                    "model": name,
                    "parameters": sizes[name],
                    "arrmse": small_lm.interval(mine),
                    "by_seed": mine,
                    "minus_shared_bottom": small_lm.interval(
                        [a - b for a, b in zip(mine, control, strict=True)]
                    ),
                }
            )
    lines = [
        "| table | model | parameters | aRRMSE | minus shared bottom, paired |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        mean, error = row["arrmse"]
        gap, gap_error = row["minus_shared_bottom"]
        apart = "–" if row["model"].startswith("shared") else f"{gap:+.3f} ± {gap_error:.3f}"
        lines.append(
            f"| {row['table']} | {row['model']} | {row['parameters']} | {mean:.3f} ± {error:.3f} |"
            f" {apart} |"
        )
    text = "\n".join([*lines, "", f"Mean and 95% CI over {arguments.seeds} seeds; less is better."])
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "multi_task.md").write_text(text + "\n")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": small_lm.versions(),
        "setting": {"epochs": EPOCHS, "batch": BATCH, "lr": LR, "experts": EXPERTS},
        "rows": rows,
    }
    (arguments.output / "multi_task.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
