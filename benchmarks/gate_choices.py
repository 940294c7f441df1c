"""What the choices in growmoe's closed-form gate are worth, on train images that were held out.

    python benchmarks/gate_choices.py --output benchmarks/results/gate_choices.json

Of Fashion-MNIST's 60,000 train images 50,000 are summed up by label and 10,000 judge; no test image
is read, and seeds begin at 100. Compared are which scales of features share a block (none, the two
smaller ones as in growmoe, all), how many labels are shortlisted, and how a pair of experts
decides: by the likelihood of their head's score (`growmoe.routers.duel`) or by the score alone,
σ(4 · it).
Accuracy in percent, and the megabytes of the moments.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from growmoe import MoE
from growmoe.continual import default_features, load
from growmoe.continual.environment import hardware, versions
from growmoe.experts.expert import Expert
from growmoe.experts.moments import Moments, moment_numbers
from growmoe.routers import ClosedFormGate
from growmoe.routers.duel import Duel

LABELS, HELD_OUT, ROWS, EARLY = 10, 10_000, 1000, 1000


class ByScore(Duel):
    """Decides by the mean of the blocks' scores, as their heads were fitted to ±1."""

    def log_ratio(self, x_ND: Tensor) -> Tensor:
        parts = x_ND.split([len(head_G) - 1 for head_G in self.heads], dim=1)
        scores = [x @ h_G[:-1] + h_G[-1] for x, h_G in zip(parts, self.heads, strict=True)]
        return 4 * torch.stack(scores).mean(0)


class ScoreGate(ClosedFormGate):
    """`ClosedFormGate` whose pairs decide by the score alone."""

    def _duel(self, a: Expert, b: Expert) -> Duel:
        duel = super()._duel(a, b)
        return ByScore(duel.heads, duel.mean_2B, duel.var_2B)


def features_of(seed: int, data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Features [N, D], labels [N], which of them are held out, and the scales' widths."""
    stream = load("split-fashion-mnist", seed, data_dir)
    index = torch.cat(stream.train_index)
    held = torch.zeros(len(index), dtype=torch.bool)
    held[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]] = (
        True
    )
    features = default_features(stream.image_shape)
    early = index[~held][:EARLY]
    features.fit(stream.train_images(early), torch.Generator().manual_seed(seed))
    x_ND = torch.cat([features(stream.train_images(part)) for part in index.split(ROWS)])
    widths = [scale.num_features for scale in features.scales]
    return x_ND, stream.data.train_labels[index], held, widths


def summed_up(x_ND: Tensor, y_N: Tensor, blocks: list[int]) -> MoE:
    """An expert for each label that has seen these rows."""
    width = sum(blocks)
    kinds = [partial(Moments, LABELS, label, width, blocks) for label in range(LABELS)]
    layer = MoE(
        width, kinds, LABELS, ClosedFormGate(), d_out=LABELS, balance_loss=0.0, warmup=1,
        evidence="moments", seed=0,
    )  # fmt: skip
    for x, y in zip(x_ND.split(ROWS), y_N.split(ROWS), strict=True):
        layer(x, context=y)
    return layer.eval()


@torch.no_grad()
def accuracy(layer: MoE, x_ND: Tensor, y_N: Tensor) -> float:
    """Percent."""
    right = [
        (layer(x).argmax(1) == y).sum()
        for x, y in zip(x_ND.split(ROWS), y_N.split(ROWS), strict=True)
    ]
    return 100 * float(sum(right)) / len(y_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data-dir")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for seed in range(100, 100 + given.seeds):
        x_ND, y_N, held, (small, middle, large) = features_of(seed, given.data_dir)
        for name, blocks in (
            ("a block for each scale", [small, middle, large]),
            ("two blocks (growmoe)", [small + middle, large]),
            ("one block", [small + middle + large]),
        ):
            layer = summed_up(x_ND[~held], y_N[~held], blocks)
            for gate, shortlist in (
                (ScoreGate, 3), (ScoreGate, 4), (ClosedFormGate, 3), (ClosedFormGate, 4),
            ):  # fmt: skip
                layer.router = gate(shortlist).eval()
                rows.append({
                    "seed": seed,
                    "blocks": name,
                    "decides": "likelihood" if gate is ClosedFormGate else "score",
                    "shortlist": shortlist,
                    "accuracy": accuracy(layer, x_ND[held], y_N[held]),
                    "moments_mb": 4e-6 * LABELS * moment_numbers(blocks),
                })  # fmt: skip
                print(rows[-1], flush=True)
    result = {
        "command": f"python {' '.join(sys.argv)}", "versions": versions(), "hardware": hardware(),
        "rows": rows,
    }  # fmt: skip
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
