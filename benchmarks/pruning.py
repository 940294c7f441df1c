"""What pruning and merging a trained language model cost, by criterion and by share removed.

Three byte-level language models (32 experts, k 2, two layers, three domains) are trained by
`growmoe train-lm`; then every criterion and merge removes 12.5, 25, 30 and 50% of the experts,
with random choices as the null. Training text calibrates, validation text selects, test text
measures; one domain (cpp) is left out of the calibration in a second arm. What training after the
cut brings back is in pruning_recovery.py.

    for s in 0 1 2; do growmoe train-lm --d-model 64 --hidden 64 --heads 4 --experts 32 \\
        --batch-size 32 --steps 1500 --seed $s --output runs/seed$s; done
    python benchmarks/pruning.py cut runs/seed0 runs/seed1 runs/seed2
    python benchmarks/pruning.py tables
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growmoe.compress import layers_of, losses, merge, next_token_loss, prune
from growmoe.compress.calibrate import collect
from growmoe.compress.choose import SHORTLIST, Evidence, saliencies
from growmoe.compress.criteria import super_experts
from growmoe.compress.measure import interval
from growmoe.compress.runs import LoadedRun, load_run
from growmoe.compress.search import search
from growmoe.lm import load_domains
from growmoe.lm.data import windows
from growmoe.lm.domains import Domain

RESULTS = Path(__file__).parent / "results" / "pruning"
RATIOS = (0.125, 0.25, 0.3, 0.5)
CALIBRATION, SELECTION, TEST = 64, 24, 64  # windows of each domain
HELD_OUT = "cpp"
RANDOM_DRAWS = 3

Windows = dict[str, list[Tensor]]
Cut = Callable[[nn.Module, float], Any]


def cut_windows(domains: dict[str, Domain], split: Any, number: int) -> Windows:
    return {n: list(windows(d, split, number, 128).split(32)) for n, d in domains.items()}


def joined(found: Windows, without: str = "") -> list[Tensor]:
    return [b for name, batches in found.items() if name != without for b in batches]


def measured(model: nn.Module, test: Windows) -> dict[str, list[float]]:
    """The loss of each test window, rounded to what a table can use."""
    return {n: [round(v, 5) for v in losses(model, b).tolist()] for n, b in test.items()}


def methods(
    run: LoadedRun, calibration: list[Tensor], selection: list[Tensor], *, asks_loss: bool
) -> dict[str, Cut]:
    """Every way to cut, by name."""
    model = run.model
    layers = layers_of(model)
    statistics, _ = collect(model, layers, calibration, next_token_loss)
    evidence = Evidence(model, layers, statistics, selection, next_token_loss)

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
    found["reap + least squares"] = cut("reap", match=True)
    if not asks_loss:
        return found
    # what asks the loss itself costs a pass for each expert, or many
    alone = saliencies(evidence, "leave-one-out")
    found["leave-one-out"] = cut(alone)
    # a search for half of the experts holds those for fewer, so one serves all shares
    searched = order_of(evidence, saliencies(evidence, "reap"), 1)
    greedy = order_of(evidence, alone, SHORTLIST)
    found["reap, searched"] = cut(searched, per_layer="global")
    found["greedy-loss"] = cut(greedy, per_layer="global")
    for method in ("m-smoe", "hc-smoe", "ream", "frequency"):
        found[f"merge {method}"] = join(method)
        found[f"merge {method} + least squares"] = join(method, match=True)
    found["random + least squares"] = cut("random", match=True)
    found["leave-one-out + least squares"] = cut(alone, match=True)
    found["greedy-loss + least squares"] = cut(greedy, per_layer="global", match=True)
    return found


def order_of(evidence: Evidence, values: dict[str, Tensor], shortlist: int) -> dict[str, Tensor]:
    """The order of a search as saliencies below 0; what it did not remove has 0."""
    total = sum(len(size.ids) for size in evidence.sizes.values())
    gone: list[tuple[str, int]] = []
    spared = super_experts(evidence.statistics)
    plan = search(
        evidence.model,
        evidence.layers,
        evidence.batches,
        evidence.loss,
        values,
        total=total // 2,
        shortlist=shortlist,
        spared=spared,
        removed=lambda name, position: gone.append((name, position)),
    )
    order = {name: torch.zeros(len(size.ids)).double() for name, size in plan.sizes.items()}
    for i, (name, position) in enumerate(gone):
        order[name][position] = i - total
    return order


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
        ways = methods(
            run, joined(train, without), joined(validation, without), asks_loss=not without
        )
        found: dict[str, Any] = {}
        for name, way in ways.items():
            if without and name not in ("frequency", "reap", "reap + least squares"):
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
    lines += ["", *_against(seeds, arm), "", *_held_out(seeds)]
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(curves)


def _against(seeds: list[dict[str, Any]], arm: str) -> list[str]:
    """Paired over test windows, each seed by itself: the least-squares cut against its rivals."""
    best = "reap + least squares"
    lines = [
        f"{best} minus another, paired over test windows, with the 95% interval of each",
        "seed over its windows; the mean over seeds; and its rise as a share of the other's,",
        "geometric mean of seeds. Both with the 95% interval over seeds.",
        "",
        "| against | removed | "
        + " | ".join(f"seed {s['seed']}" for s in seeds)
        + " | mean | share of its rise |",
        "|---|---:|" + "---:|" * (len(seeds) + 2),
    ]
    rivals = ("reap", "leave-one-out", "leave-one-out + least squares", "random + least squares")
    for rival in rivals:
        for ratio in ("0.25", "0.3", "0.5"):
            cells, means, shares = [], [], []
            for s in seeds:
                theirs, ours = (
                    float(change(s["whole"], s[arm][name][ratio]["losses"]).mean())
                    for name in (rival, best)
                )
                shares.append(math.log(ours / theirs))
                rise = change(s[arm][rival][ratio]["losses"], s[arm][best][ratio]["losses"])
                mean, low, high = interval(rise)
                means.append(mean)
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            mean, low, high = interval(torch.tensor(means))
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            share = [f"{math.exp(v):.2f}" for v in interval(torch.tensor(shares))]
            cells.append(f"{share[0]} [{share[1]}, {share[2]}]")
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


def _plot(curves: dict[str, list[Tensor]]) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = {
        "pruning": lambda n: "merge" not in n and "least" not in n,
        "merging": lambda n: "merge" in n and "least" not in n,
        "with least squares": lambda n: "least" in n,
    }
    figure = Figure(figsize=(12, 6), layout="constrained")
    x = [100 * r for r in RATIOS]
    every = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, wanted) in zip(every, panels.items(), strict=True):
        shown = [n for n in curves if wanted(n) or n in ("random", "reap")]
        for i, name in enumerate(sorted(shown, key=lambda n: -float(curves[n][-1].mean()))):
            null = {"random": "k--", "reap": "k:"}.get(name, ".-")
            colour = {} if name in ("random", "reap") else {"color": colormaps["tab20"](i)}
            axes.plot(x, [float(v.mean()) for v in curves[name]], null, label=name, **colour)
        axes.set_title(title)
        axes.set_xlabel("experts removed, %")
        axes.legend(fontsize=7, loc="upper left")
    every[0].set_ylabel("rise of the loss, nats per byte")
    every[0].set_ylim(bottom=0)
    figure.savefig(RESULTS / "loss.png", dpi=80)


def main() -> None:
    torch.set_num_threads(1)
    act, folders = sys.argv[1], [Path(p) for p in sys.argv[2:]]
    RESULTS.mkdir(parents=True, exist_ok=True)
    if act == "cut":
        for folder in folders:
            result = one_shot(folder)
            path = RESULTS / f"cut-seed{result['seed']}.json"
            path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    elif act == "tables":
        tables()
    else:
        sys.exit(f"{act!r}: cut or tables")


if __name__ == "__main__":
    main()
