"""What training after pruning brings back, beside the whole model trained as long.

Of the models of pruning.py, 30% of the experts go by REAP with least squares; then the model learns
from new text and from the whole model's distribution. The control is the whole model, trained on
the same batches for as many steps. Beside them: models that had 30% fewer experts from the start,
and models that were pretrained without a balance loss, whose load is uneven.

    python benchmarks/pruning_recovery.py recover400 runs/seed0 runs/seed1 runs/seed2
    python benchmarks/pruning_recovery.py recover1500 runs/seed0 runs/seed1 runs/seed2
    for s in 0 1 2; do growmoe train-lm … --experts 22 --seed $s --output runs/small$s
        growmoe train-lm … --steps 600 --balance-loss 0 --seed $s --output runs/spare$s; done
    python benchmarks/pruning_recovery.py scratch runs/small0 runs/small1 runs/small2
    python benchmarks/pruning_recovery.py spare100 runs/spare0 runs/spare1 runs/spare2
    python benchmarks/pruning_recovery.py tables
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pruning import RESULTS, change, cut_windows, joined, measured
from torch import Tensor, nn

from growmoe import moe_layers
from growmoe.compress import collect, layers_of, next_token_loss, prune
from growmoe.compress.least_squares import match_outputs, mixtures
from growmoe.compress.measure import interval
from growmoe.compress.recovery import recover
from growmoe.compress.runs import load_run
from growmoe.lm import batch, load_domains

RATIO, TEST, CALIBRATION = 0.3, 96, 128  # windows of each domain
# act -> how the cut is made, and with how many experts per token the model goes on
CUTS: dict[str, dict[str, Any]] = {
    "recover": {"saliency": "reap", "per_layer": "uniform"},
    "spare": {"saliency": "gate-mass", "per_layer": "global"},
}
TAKEN = {("recover", 400): (2, 3)}


def recovered(folder: Path, act: str, steps: int) -> dict[str, Any]:
    """One model pruned and trained, and its control.

    With as many experts per token as before; and with more, which costs more arithmetic per token
    and no memory. What the result file has is not trained again.
    """
    run = load_run(folder)
    config = run.config
    domains = load_domains(config.domains, config.bytes_per_domain)
    test = cut_windows(domains, "test", TEST)
    calibration = joined(cut_windows(domains, "train", CALIBRATION))

    def batches(step: int) -> Tensor:
        x_BS, y_BS, _ = batch(domains, None, config.steps + step, config.seed, 32, 128)
        return torch.cat([x_BS, y_BS[:, -1:]], 1)

    path = RESULTS / f"{act}-{steps}-seed{config.seed}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = before.get("losses", {"whole": measured(run.model, test)})
    seconds: dict[str, float] = before.get("cpu_seconds", {})
    taken = TAKEN.get((act, steps), (2,))
    for name, k in (("control", 2), *((f"pruned, k {k}", k) for k in taken)):
        if name in found:
            continue
        model, clock = copy.deepcopy(run.model), time.process_time()
        teacher = None if name == "control" else run.model
        if teacher is not None:
            model = with_k(model, k)
            prune(model, calibration, ratio=RATIO, **CUTS[act])
            layers = layers_of(model)
            target = mixtures(run.model, layers_of(run.model), calibration, next_token_loss)
            match_outputs(model, layers, target, calibration, next_token_loss)
            seconds["cut, " + name] = round(time.process_time() - clock, 1)
            found[name + ", not recovered"] = measured(model, test)
            clock = time.process_time()
        recover(
            model, batches, steps, lr=2e-3, teacher=teacher, anneal=act != "recover" or steps > 400
        )
        seconds[name] = round(time.process_time() - clock, 1)
        found[name] = measured(model, test)
        print(folder.name, act, steps, name, flush=True)
    return {
        "seed": config.seed,
        "pretraining_steps": config.steps,
        "steps": steps,
        "lowest_load": lowest_load(run.model, calibration),
        "losses": found,
        "cpu_seconds": seconds,
    }


def with_k(model: nn.Module, k: int) -> nn.Module:
    for layer in moe_layers(model).values():
        layer.router.k = k  # type: ignore[assignment]
    return model


def lowest_load(model: nn.Module, batches: list[Tensor]) -> float:
    """The share of rows that the least loaded 30% of each layer's experts receive together."""
    statistics, _ = collect(model, layers_of(model), batches)
    lowest = total = 0.0
    for seen in statistics.values():
        lowest += float(seen.count.sort().values[: round(RATIO * seen.num_experts)].sum())
        total += float(seen.count.sum())
    return round(lowest / total, 5)


def from_scratch(folder: Path) -> dict[str, Any]:
    """What a model costs that was pretrained as long with 30% fewer experts from the start."""
    run = load_run(folder)
    domains = load_domains(run.config.domains, run.config.bytes_per_domain)
    test = cut_windows(domains, "test", TEST)
    return {
        "seed": run.config.seed,
        "experts": run.config.experts,
        "losses": measured(run.model, test),
    }


def mean_of(losses: Mapping[str, list[float]]) -> float:
    return sum(map(sum, losses.values())) / sum(map(len, losses.values()))


def tables() -> None:
    lines = [
        "30% pruned (REAP + least squares), all parameters trained on text and the whole model's",
        "distribution, minus the control: the whole model trained on the same batches for as many",
        "steps. Nats per byte, paired over test windows, with 95% intervals. CPU s: of cut and",
        "training.",
        *_recovery("recover"),
        "",
        "Pretrained as long with 22 experts from the start, minus the whole model before any of",
        "this: what 30% fewer experts cost by themselves.",
        *_from_scratch(),
        "",
        "The same for models that were pretrained for 600 steps without a balance loss, so that",
        "their load is uneven; by gate mass under one threshold + least squares (both chosen on a",
        "model of another seed).",
        *_recovery("spare"),
    ]
    (RESULTS / "recovery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _recovery(act: str) -> list[str]:
    lines = [
        "",
        "| seed | model | load of the lowest 30% | whole | cut | cut − whole | steps "
        "| of pretraining | CPU s | control | recovered | recovered − control |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    paths = RESULTS.glob(f"{act}-*.json")
    for path in sorted(paths, key=lambda path: (int(path.stem.split("-")[1]), path.stem)):
        found = json.loads(path.read_text())
        loss, steps = found["losses"], found["steps"]
        load = f"{found['lowest_load']:.1%}" if "lowest_load" in found else "–"
        for name in (n for n in loss if f"{n}, not recovered" in loss):
            cut = f"{name}, not recovered"
            spent = found["cpu_seconds"][name] + found["cpu_seconds"]["cut, " + name]
            lines.append(
                f"| {found['seed']} | {name} | {load} | {mean_of(loss['whole']):.4f} "
                f"| {mean_of(loss[cut]):.4f} | {_shown(loss['whole'], loss[cut])} | {steps} "
                f"| {steps / found['pretraining_steps']:.0%} | {spent:.0f} "
                f"| {mean_of(loss['control']):.4f} | {mean_of(loss[name]):.4f} "
                f"| {_shown(loss['control'], loss[name])} |"
            )
    return lines


def _shown(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    mean, low, high = interval(change(before, after))
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _from_scratch() -> list[str]:
    lines = [
        "",
        "| seed | whole | fewer from the start | difference | 95% interval |",
        "|---:|---:|---:|---:|---:|",
    ]
    means = []
    for path in sorted(RESULTS.glob("scratch-seed*.json")):
        small = json.loads(path.read_text())
        beside = RESULTS / f"recover-400-seed{small['seed']}.json"
        whole = json.loads(beside.read_text())["losses"]["whole"]
        mean, low, high = interval(change(whole, small["losses"]))
        means.append(mean)
        lines.append(
            f"| {small['seed']} | {mean_of(whole):.4f} | {mean_of(small['losses']):.4f} "
            f"| {mean:+.4f} | [{low:+.4f}, {high:+.4f}] |"
        )
    mean, low, high = interval(torch.tensor(means))
    return [*lines, f"| mean of seeds | | | {mean:+.4f} | [{low:+.4f}, {high:+.4f}] |"]


def main() -> None:
    torch.set_num_threads(1)
    act, folders = sys.argv[1], [Path(p) for p in sys.argv[2:]]
    for folder in folders:
        if act == "scratch":
            result, name = from_scratch(folder), "scratch"
        else:
            kind = act.rstrip("0123456789")
            steps = int(act.removeprefix(kind))
            result, name = recovered(folder, kind, steps), f"{kind}-{steps}"
        path = RESULTS / f"{name}-seed{result['seed']}.json"
        path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    if act == "tables":
        tables()


if __name__ == "__main__":
    main()
