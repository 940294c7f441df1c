"""What pruning and merging a trained language model cost, by criterion and by share removed.

Three byte-level language models (32 experts, k 2, two layers, three domains) are trained by
`growmoe train-lm`; then every criterion and merge removes 12.5, 25, 30 and 50% of the experts,
with random choices as the null. Training text calibrates, validation text selects, test text
measures; one domain (cpp) is left out of the calibration in a second arm.

    for s in 0 1 2; do growmoe train-lm --d-model 64 --hidden 64 --heads 4 --experts 32 \\
        --batch-size 32 --steps 1500 --seed $s --output runs/seed$s; done
    python benchmarks/pruning.py cut runs/seed0 runs/seed1 runs/seed2
    python benchmarks/pruning.py recover runs/seed0 runs/seed1 runs/seed2
    python benchmarks/pruning.py tables
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.compress import layers_of, losses, merge, next_token_loss, prune
from growmoe.compress.calibrate import collect
from growmoe.compress.choose import Evidence, saliencies
from growmoe.compress.measure import interval
from growmoe.compress.recovery import recover
from growmoe.compress.runs import LoadedRun, load_run
from growmoe.lm import batch, load_domains
from growmoe.lm.data import windows
from growmoe.lm.domains import Domain

RESULTS = Path(__file__).parent / "results" / "pruning"
RATIOS = (0.125, 0.25, 0.3, 0.5)
CALIBRATION, SELECTION, TEST = 64, 32, 96  # windows of each domain
HELD_OUT = "cpp"
RANDOM_DRAWS = 4
RECOVERY_STEPS = (150, 600)

Windows = dict[str, list[Tensor]]
Cut = Callable[[nn.Module, float], Any]


def cut_windows(domains: dict[str, Domain], split: Any, number: int) -> Windows:
    return {n: list(windows(d, split, number, 128).split(32)) for n, d in domains.items()}


def joined(found: Windows, without: str = "") -> list[Tensor]:
    return [b for name, batches in found.items() if name != without for b in batches]


def measured(model: nn.Module, test: Windows) -> dict[str, list[float]]:
    """The loss of each test window, rounded to what a table can use."""
    return {n: [round(v, 5) for v in losses(model, b).tolist()] for n, b in test.items()}


def methods(run: LoadedRun, calibration: list[Tensor], selection: list[Tensor]) -> dict[str, Cut]:
    """Every way to cut, by name."""
    model = run.model
    layers = layers_of(model)
    statistics, _ = collect(model, layers, calibration, next_token_loss)
    evidence = Evidence(model, layers, statistics, selection, next_token_loss)
    alone = saliencies(evidence, "leave-one-out")  # the one that costs a pass for each expert

    def cut(saliency: Any, **settings: Any) -> Cut:
        return lambda m, ratio: prune(
            m, calibration, ratio=ratio, saliency=saliency, selection=selection, **settings
        )

    def join(method: str, **settings: Any) -> Cut:
        return lambda m, ratio: merge(m, calibration, ratio=ratio, method=method, **settings)

    found = {f"random {i}": cut("random", seed=i) for i in range(RANDOM_DRAWS)}
    for name in ("frequency", "gate-mass", "ean", "man", "msan", "reap", "aimer", "taylor"):
        found[name] = cut(name)
    found["naee"] = cut("naee")
    found["mone (novices)"] = cut("mone")
    found["leave-one-out"] = cut(alone)
    found["reap, searched"] = cut("reap", per_layer="searched")
    found["greedy-loss"] = cut("greedy-loss", per_layer="searched")
    for method in ("m-smoe", "hc-smoe", "ream", "frequency"):
        found[f"merge {method}"] = join(method)
        found[f"merge {method} + least squares"] = join(method, match=True)
    found["random + least squares"] = cut("random", match=True)
    found["reap + least squares"] = cut("reap", match=True)
    found["leave-one-out + least squares"] = cut(alone, match=True)
    found["greedy-loss + least squares"] = cut("greedy-loss", per_layer="searched", match=True)
    return found


def one_shot(folder: Path) -> dict[str, Any]:
    """All methods at all ratios on one model."""
    run = load_run(folder)
    domains = load_domains(run.config.domains, run.config.bytes_per_domain)
    train, validation, test = (
        cut_windows(domains, split, number)
        for split, number in (("train", CALIBRATION), ("validation", SELECTION), ("test", TEST))
    )
    result: dict[str, Any] = {"seed": run.config.seed, "whole": measured(run.model, test)}
    for arm, without in (("all domains", ""), (f"without {HELD_OUT}", HELD_OUT)):
        ways = methods(run, joined(train, without), joined(validation, without))
        found: dict[str, Any] = {}
        for name, way in ways.items():
            if without and name not in ("reap", "leave-one-out", "reap + least squares"):
                continue
            for ratio in RATIOS:
                model, clock = copy.deepcopy(run.model), time.process_time()
                report = way(model, ratio)
                spent = time.process_time() - clock
                found.setdefault(name, {})[str(ratio)] = {
                    "losses": measured(model, test),
                    "experts": [layer.experts_after for layer in report.layers],
                    "cpu_seconds": round(spent, 2),
                }
            print(folder.name, arm, name, flush=True)
        result[arm] = found
    return result


def recovered(folder: Path) -> dict[str, Any]:
    """The way of pruning 30%, recovered, beside the whole model trained as long."""
    run = load_run(folder)
    config = run.config
    domains = load_domains(config.domains, config.bytes_per_domain)
    test = cut_windows(domains, "test", TEST)
    calibration = joined(cut_windows(domains, "train", 128))
    selection = joined(cut_windows(domains, "validation", SELECTION))

    def batches(step: int) -> Tensor:
        x_BS, y_BS, _ = batch(domains, None, config.steps + step, config.seed, 32, 128)
        return torch.cat([x_BS, y_BS[:, -1:]], 1)

    result: dict[str, Any] = {"seed": config.seed, "pretraining_steps": config.steps}
    for steps in RECOVERY_STEPS:
        control = copy.deepcopy(run.model)
        clock = time.process_time()
        recover(control, batches, steps, lr=2e-3)
        seconds = {"control": round(time.process_time() - clock, 1)}
        found = {"control": measured(control, test)}
        clock = time.process_time()
        small = copy.deepcopy(run.model)
        prune(
            small,
            calibration,
            ratio=0.3,
            saliency="greedy-loss",
            per_layer="searched",
            selection=selection,
            match=True,
        )
        found["pruned, not recovered"] = measured(small, test)
        seconds["cut"] = round(time.process_time() - clock, 1)
        clock = time.process_time()
        recover(small, batches, steps, lr=2e-3, teacher=run.model, distill=0.5)
        seconds["recovery"] = round(time.process_time() - clock, 1)
        found["pruned"] = measured(small, test)
        result[str(steps)] = {"losses": found, "cpu_seconds": seconds}
        print(folder.name, "recovery", steps, flush=True)
    return result


def change(before: dict[str, list[float]], after: dict[str, list[float]]) -> Tensor:
    """Paired differences of all test windows, domains weighing the same."""
    return torch.cat([torch.tensor(after[n]) - torch.tensor(before[n]) for n in before]).double()


def tables() -> None:
    """Write table.md and the plot from what the seeds gave."""
    seeds = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("cut-seed*.json"))]
    arm = "all domains"
    names = [n for n in seeds[0][arm] if not n.startswith("random ") or "+" in n]
    curves = {
        "random": [
            torch.stack(
                [
                    torch.tensor(
                        [
                            float(
                                change(s["whole"], s[arm][f"random {i}"][str(r)]["losses"]).mean()
                            )
                            for i in range(RANDOM_DRAWS)
                        ]
                    ).mean()
                    for s in seeds
                ]
            )
            for r in RATIOS
        ]
    }
    for name in names:
        curves[name] = [
            torch.tensor(
                [float(change(s["whole"], s[arm][name][str(r)]["losses"]).mean()) for s in seeds]
            )
            for r in RATIOS
        ]
    lines = [
        f"Rise of the loss in nats per byte, mean of {len(seeds)} seeds ± half the 95% interval",
        "over seeds; 32 experts, k 2. CPU s: of the cut at 30%, calibration included.",
        "",
        "| method | " + " | ".join(f"{r:.1%}" for r in RATIOS) + " | CPU s |",
        "|---|" + "---:|" * (len(RATIOS) + 1),
    ]
    for name in sorted(curves, key=lambda n: float(curves[n][2].mean())):
        cells = []
        for value in curves[name]:
            mean, low, _ = interval(value)
            cells.append(f"{mean:.3f} ± {mean - low:.3f}")
        key = "random 0" if name == "random" else name
        spent = sum(s[arm][key]["0.3"]["cpu_seconds"] for s in seeds) / len(seeds)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {spent:.1f} |")
    lines += ["", *_against(seeds, arm), "", *_held_out(seeds), "", *_recovery()]
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(curves)


def _against(seeds: list[dict[str, Any]], arm: str) -> list[str]:
    """Paired over test windows, each seed by itself: the least-squares cut against its rivals."""
    best = "greedy-loss + least squares"
    lines = [
        f"{best} minus another, paired over test windows, 95% interval of each seed:",
        "",
        "| against | removed | " + " | ".join(f"seed {s['seed']}" for s in seeds) + " |",
        "|---|---:|" + "---:|" * len(seeds),
    ]
    for rival in ("reap", "leave-one-out", "reap + least squares"):
        for ratio in ("0.25", "0.3", "0.5"):
            cells = []
            for s in seeds:
                rise = change(s[arm][rival][ratio]["losses"], s[arm][best][ratio]["losses"])
                mean, low, high = interval(rise)
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append(f"| {rival} | {float(ratio):.1%} | " + " | ".join(cells) + " |")
    return lines


def _held_out(seeds: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"Calibrated with and without {HELD_OUT}: rise of the loss at 25% on {HELD_OUT} and on the",
        "other domains, mean of seeds.",
        "",
        f"| method | {HELD_OUT} in | {HELD_OUT} out | others, {HELD_OUT} in | others, out |",
        "|---|---:|---:|---:|---:|",
    ]
    arms = ("all domains", f"without {HELD_OUT}")
    for name in seeds[0][arms[1]]:
        cells = []
        for wanted in (lambda n: n == HELD_OUT, lambda n: n != HELD_OUT):
            for arm in arms:
                rises = [
                    float(change({n: s["whole"][n]}, s[arm][name]["0.25"]["losses"]).mean())
                    for s in seeds
                    for n in s["whole"]
                    if wanted(n)
                ]
                cells.append(f"{sum(rises) / len(rises):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _recovery() -> list[str]:
    paths = sorted(RESULTS.glob("recover-seed*.json"))
    if not paths:
        return []
    lines = [
        "30% pruned (greedy-loss + least squares), all parameters trained on text and the whole",
        "model's distribution, minus the whole model trained on the same batches for as many",
        "steps: nats per byte, paired over test windows.",
        "",
        "| seed | steps | share of pretraining | control | pruned | difference | 95% interval |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for path in paths:
        found = json.loads(path.read_text())
        for steps in (k for k in found if k.isdigit()):
            loss = found[steps]["losses"]
            rise = change(loss["control"], loss["pruned"])
            mean, low, high = interval(rise)
            level = [
                sum(map(sum, loss[n].values())) / sum(map(len, loss[n].values()))
                for n in ("control", "pruned")
            ]
            lines.append(
                f"| {found['seed']} | {steps} | {int(steps) / found['pretraining_steps']:.0%} | "
                f"{level[0]:.4f} | {level[1]:.4f} | {mean:+.4f} | [{low:+.4f}, {high:+.4f}] |"
            )
    return lines


def _plot(curves: dict[str, list[Tensor]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    x = [100 * r for r in RATIOS]
    for name, values in curves.items():
        style = "-" if "least squares" in name else "--" if "merge" in name else ":"
        axes.plot(x, [float(v.mean()) for v in values], style, marker=".", label=name)
    axes.set_xlabel("experts removed, %")
    axes.set_ylabel("rise of the loss, nats per byte")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(RESULTS / "loss.png", dpi=90)


def main() -> None:
    torch.set_num_threads(1)
    act, folders = sys.argv[1], [Path(p) for p in sys.argv[2:]]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        result = one_shot(folder) if act == "cut" else recovered(folder)
        path = RESULTS / f"{act}-seed{result['seed']}.json"
        path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    if act == "tables":
        tables()


if __name__ == "__main__":
    main()
