"""The tables and the figure of `text_stream.py`, from its cells."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import small_lm
import text_stream_detection as detection

FIRST, SECOND, THIRD = small_lm.DOMAINS
BUDGET_MINUTES = 40.0
Cell = dict[str, Any]
Row = dict[str, Any]


def row_of(
    label: str,
    found: list[Cell],
    references: list[Cell],
    gate: str = "",
    flops: float | None = None,
) -> Row:
    """One model: by domain at the end, forgetting, and the newest domain beside dense in sequence.

    Args:
        found: a cell for each seed.
        references: dense in sequence on the same streams.
    """
    last = [cell["after"][-1][gate] if "after" in cell else cell["bits"] for cell in found]
    row: Row = {
        "label": label,
        "bits": {name: small_lm.interval([b[name] for b in last]) for name in small_lm.DOMAINS},
        "mean": small_lm.interval([statistics.mean(b.values()) for b in last]),
        "by_seed": last,
        "parameters": statistics.mean(cell["parameters"] for cell in found),
        "flops": flops if flops is not None else found[0]["flops"][gate],
    }
    newest = [
        100 * (mine[THIRD] / reference["after"][-1][""][THIRD] - 1)
        for mine, reference in zip(last, references, strict=True)
    ]
    row["newest_gap"] = small_lm.interval(newest)
    if all(len(cell.get("after", ())) == 3 for cell in found):
        for i, name in enumerate((FIRST, SECOND)):
            row[f"forgotten_{i + 1}"] = small_lm.interval(
                [
                    100 * (cell["after"][-1][gate][name] / cell["after"][i][gate][name] - 1)
                    for cell in found
                ]
            )
    return row


def rows_of(cells: Callable[[str], list[Cell]]) -> dict[str, list[Row]]:
    tables = {}
    for order in ("shuffled", "documents"):
        grown, dense = cells(f"growmoe-{order}"), cells(f"dense-{order}")
        one = dense[0]["flops"][""]
        rows = [
            row_of("growmoe, gate by likelihood", grown, dense, "likelihood"),
            row_of("growmoe, no byte before the window", grown, dense, "cold",
                   grown[0]["flops"]["likelihood"]),
            row_of("growmoe, gate by trigrams", grown, dense, "trigrams"),
            row_of("growmoe, best path by domain (oracle)", grown, dense, "oracle", one),
        ]  # fmt: skip
        if order == "shuffled":
            shared = cells("rank16-shuffled")
            rows += [
                row_of("growmoe, rank 16, by likelihood", shared, dense, "likelihood"),
                row_of("growmoe, rank 16, by trigrams", shared, dense, "trigrams"),
            ]
        rows.append(row_of("dense in sequence, told boundaries", dense, dense))
        if order == "shuffled":
            rows += [
                row_of("MoE in sequence, 9 experts, told boundaries", cells("moe-shuffled"), dense),
                row_of("three dense models, one a domain (oracle)", cells("alone-shuffled"), dense),
            ]
        if order == "shuffled":
            joint = cells("mixed-shuffled")
            rows.append(row_of("joint: one path, all domains mixed", joint, dense, "likelihood"))
        tables[order] = rows
    return tables


def sharing_of(grown: list[Cell]) -> list[Row]:
    """What is left of the grown paths when they share more, after training."""
    full = [cell["after"][-1]["likelihood"] for cell in grown]
    variants: list[tuple[str, list[tuple[Mapping[str, float], float]]]] = [
        (
            f"later paths as rank {rank} changes of the first",
            [
                (cell["compressed"][rank]["bits"], cell["compressed"][rank]["parameters"])
                for cell in grown
            ],
        )
        for rank in ("32", "16", "8")
    ]
    whole = grown[0]["parameters"]
    variants.append(
        (
            "first two paths merged",
            [(cell["merged"]["bits"], whole * 2 / 3) for cell in grown],
        )
    )
    return [
        {
            "label": label,
            "parameters": pairs[0][1],
            "rise": {
                name: small_lm.interval(
                    [
                        100 * (bits[name] / before[name] - 1)
                        for (bits, _), before in zip(pairs, full, strict=True)
                    ]
                )
                for name in small_lm.DOMAINS
            },
        }
        for label, pairs in variants
    ]


def detection_of(cells: Callable[[str], list[Cell]]) -> list[Row]:
    """How soon each change was found, and what was found that was none."""
    rows = []
    sequence = ["spawn", "spawn"]
    grown: list[tuple[str, str, list[str]]] = [
        ("sequence, shuffled", "growmoe-shuffled", sequence),
        ("sequence, documents", "growmoe-documents", sequence),
        ("sequence, shuffled, rank 16", "rank16-shuffled", sequence),
        ("mixture, shuffled", "mixed-shuffled", []),
    ]
    for stream, name, acts in grown:
        found = cells(name)
        judged = [
            detection.judge(detection.acts(c), c["boundaries"], len(c["active"]), acts)
            for c in found
        ]
        rows.append(_detected(stream, "growmoe", judged, sum(len(c["active"]) for c in found)))
    for stream in detection.STREAMS:
        found = cells(f"detect-{stream}")
        batches = sum(c["batches"] for c in found)
        acts = detection.wanted(found[0]["texts"])
        judged = [
            detection.judge(detection.acts(c), c["boundaries"], c["batches"], acts) for c in found
        ]
        rows.append(_detected(stream, "growmoe", judged, batches))
        for peer in found[0]["peers"]:
            judged = [
                detection.judge(
                    [(step, "") for step in c["peers"][peer]],
                    c["boundaries"],
                    c["batches"],
                    [""] * len(acts),
                )
                for c in found
            ]
            rows.append(_detected(stream, peer, judged, batches))
    return rows


def _detected(stream: str, by: str, judged: list[tuple[list[float], int]], batches: int) -> Row:
    delays = [delay for each, _ in judged for delay in each]
    return {
        "stream": stream,
        "by": by,
        "changes": len(delays),
        "missed": sum(delay == math.inf for delay in delays),
        "delays": sorted(delay for delay in delays if delay < math.inf),
        "false": sum(false for _, false in judged),
        "batches": batches,
    }


def markdown(result: dict[str, Any]) -> str:
    seeds = len(result["seeds"])
    lines = []
    for order, rows in result["tables"].items():
        lines += [
            f"{order.capitalize()}:",
            "",
            f"| model | {FIRST} | {SECOND} | {THIRD} | {FIRST} forgotten | {SECOND} forgotten |"
            f" {THIRD} beside dense | parameters | MFLOPs |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            forgotten = [
                percent(row[key]) if key in row else "–" for key in ("forgotten_1", "forgotten_2")
            ]
            bits = [f"{row['bits'][n][0]:.3f} ± {row['bits'][n][1]:.3f}" for n in small_lm.DOMAINS]
            cells = [
                row["label"], *bits, *forgotten, percent(row["newest_gap"]),
                f"{row['parameters'] / 1e3:.0f}k", f"{row['flops'] / 1e6:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "Sharing after training (shuffled): rise of bits per byte over the grown paths, gate by"
        " likelihood.",
        "",
        f"| paths | parameters | {FIRST} | {SECOND} | {THIRD} |",
        "|---|---|---|---|---|",
    ]
    for row in result["sharing"]:
        rises = " | ".join(percent(row["rise"][name]) for name in small_lm.DOMAINS)
        lines.append(f"| {row['label']} | {row['parameters'] / 1e3:.0f}k | {rises} |")
    lines += [
        "",
        "| stream | found by | changes | missed | delay: median (most) | false | batches |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["detection"]:
        delays = row["delays"]
        delay = f"{statistics.median(delays):.0f} ({max(delays):.0f})" if delays else "–"
        cells = [row[key] for key in ("stream", "by", "changes", "missed")]
        cells += [delay, row["false"], row["batches"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"Test bits per byte at the end of the stream, mean and 95% CI over {seeds} seeds;"
        f" {result['steps']} batches of 16 · 128 bytes a domain, boundaries spread over four"
        " batches. Forgotten: rise since the end of that domain. Beside dense: bits per byte on"
        f" {THIRD} over those of the dense model in sequence, of the same seed. MFLOPs: of a"
        " forward, per byte. Parameters of growmoe include its trigram counts. Delay: batches from"
        " the first with the new text to the decision; false: births and returns that should not"
        " be. ADWIN and Page–Hinkley only say that something changed: any alarm counts for them.",
    ]
    return "\n".join(lines) + "\n"


def percent(value: tuple[float, float]) -> str:
    return f"{value[0]:+.1f} ± {value[1]:.1f}%"


def plot(cells: Callable[[str], list[Cell]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [
        ("growmoe-shuffled", "likelihood", "growmoe, by likelihood", "-o", "#0072b2"),
        ("growmoe-shuffled", "trigrams", "growmoe, by trigrams", "--s", "#56b4e9"),
        ("dense-shuffled", "", "dense in sequence", "-^", "#d55e00"),
        ("moe-shuffled", "", "fixed MoE in sequence", "--v", "#e69f00"),
    ]
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained"
    )
    for i, (name, ax) in enumerate(zip(small_lm.DOMAINS, axes, strict=True)):
        for cell, gate, label, style, color in shown:
            means = [
                statistics.mean(c["after"][phase][gate][name] for c in cells(cell))
                for phase in range(i, 3)
            ]
            ax.plot(range(i + 1, 4), means, style, color=color, label=label, markersize=5, lw=1.4)
        joint = statistics.mean(c["bits"][name] for c in cells("mixed-shuffled"))
        ax.axhline(joint, color="0.5", lw=1, ls=":", label="joint")
        ax.set_title(name, fontsize=10)
        ax.set_xticks([1, 2, 3], [f"after\n{n}" for n in small_lm.DOMAINS], fontsize=8)
        ax.set_xlim(0.8, 3.2)
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test bits per byte")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


def write(done: Mapping[str, Cell], seeds: range, steps: int, folder: Path, command: str) -> None:
    """text_stream.json, .md and .png."""

    def cells(name: str) -> list[Cell]:
        return [done[f"{name}-seed{seed}"] for seed in seeds]

    result = {
        "command": command,
        "versions": small_lm.versions(),
        "seeds": list(seeds),
        "steps": steps,
        "domains": small_lm.DOMAINS,
        "tables": rows_of(cells),
        "sharing": sharing_of(cells("growmoe-shuffled")),
        "detection": detection_of(cells),
        "cpu_minutes": {
            "budget": BUDGET_MINUTES,
            "used": sum(cell["cpu_seconds"] for cell in done.values()) / 60,
        },
    }
    text = markdown(result)
    print(text)
    (folder / "text_stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "text_stream.md").write_text(text)
    plot(cells, folder / "text_stream.png")
