"""Domains that are found without labels of them: permuted and rotated Fashion-MNIST.

    python benchmarks/domains.py --output benchmarks/results/domains

Ten domains that share their labels, one after another (sharp), each going gradually over to the
next (fuzzy), or each coming twice (recurring), as many train images each time a domain comes;
boundaries fall inside batches. growmoe beside one
closed-form head of equal memory and growmoe told every domain (oracle-growth), each cell as
`growmoe bench` writes it. Writes a folder for each stream, and domains.md: final accuracy, domains
found, births that were none of the nine drifts, the delay in batches of 64 (of a fuzzy drift since
its first example could have come), forgetting and memory. Cells that are there are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from growmoe.continual import METHODS, metrics, run_bench
from growmoe.continual.methods import controls

BATCH, DOMAINS, OVERLAP = 64, 10, 0.5
FAMILIES, DRIFTS = ("permuted", "rotated"), ("sharp", "fuzzy", "recurring")
METHOD_NAMES = ("growmoe", "ridge-wide", "oracle-growth")


def visits(drift: str) -> int:
    """How often each domain comes."""
    return 2 if drift == "recurring" else 1


def drift_times(drift: str, visit: int) -> list[float]:
    """When each domain but the first comes for the first time, in examples seen."""
    early = OVERLAP / 2 * visit if drift == "fuzzy" else 0.0
    return [d * visit - early + 1 for d in range(1, DOMAINS)]


def row(drift: str, visit: int, name: str, cells: list[dict[str, Any]]) -> str:
    """One line of the table."""

    def mean(values: list[float], digits: int = 1, scale: float = 1.0) -> str:
        middle, half = metrics.mean_ci95([scale * v for v in values])
        return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")

    final = [metrics.final_accuracy(c["accuracy_matrix"], c["test_counts"]) for c in cells]
    forgotten = [metrics.forgetting(c["accuracy_matrix"]) for c in cells]
    memory = [c["memory_bytes"] for c in cells]
    domains = false = delay = worst = "–"
    if name == "growmoe":
        times = drift_times(drift, visit)
        length = DOMAINS * visits(drift) * visit
        found = [metrics.drift_detection(c["detections"], times, length) for c in cells]
        domains = ", ".join(str(c["extras"]["domains"]) for c in cells)
        false = ", ".join(str(f["false_alarms"]) for f in found)
        delays = [f["delay"] / BATCH for f in found if f["delay"] is not None]
        delay = mean(delays) if delays else "–"
        late = [
            min((t - time for t in c["detections"] if time <= t < after), default=float("inf"))
            for c in cells
            for time, after in zip(times, [*times[1:], length + 1], strict=True)
        ]
        missed = late.count(float("inf"))
        worst = f"{missed} missed" if missed else f"{max(late) / BATCH:.1f}"
    elif name == "oracle-growth":
        domains = "given"
    return " | ".join(
        [
            f"| {name}",
            mean(final, 1, 100),
            domains,
            false,
            delay,
            worst,
            mean(forgotten, 2, 100),
            f"{mean(memory, 0, 1e-6)} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=2000, help="train images of a visit")
    parser.add_argument("--tests", type=int, default=300, help="test images of a domain")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--drifts", nargs="+", choices=DRIFTS, default=DRIFTS)
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES)
    parser.add_argument("--data-dir")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    everything = {**METHODS, **controls()}
    chosen = {name: everything[name] for name in given.methods}
    lines = [
        f"{given.examples} train images a visit, {given.tests} test images a domain; "
        "mean ± 95% CI over seeds.",
        "",
    ]
    for drift in given.drifts:
        for family in given.families:
            stream = f"{family}-fashion-mnist:drift={drift}"
            stream += f",examples={given.examples * visits(drift)},tests={given.tests}"
            folder = given.output / f"{family}-{drift}"
            outcome = run_bench(
                stream,
                chosen,
                list(range(given.seeds)),
                folder,
                data_dir=given.data_dir,
                command=f"python {' '.join(sys.argv)}",
                say=print,
            )
            shutil.rmtree(folder / "plots", ignore_errors=True)
            lines += [
                f"**{family}, {drift}**",
                "",
                "| method | accuracy | domains found | false births | mean delay | worst delay |"
                " forgetting | MB |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for name, entry in outcome.results["methods"].items():
                lines.append(row(drift, given.examples, name, entry["seeds"]))
            lines.append("")
            (given.output / "domains.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
