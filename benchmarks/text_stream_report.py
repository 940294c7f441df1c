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
Cells = Callable[[str], dict[int, Cell]]  # a cell's name -> by seed, those that are done
Row = dict[str, Any]


def row_of(
    label: str,
    found: dict[int, Cell],
    references: dict[int, Cell],
    gate: str = "",
    flops: float | None = None,
) -> Row:
    """One model: by domain at the end, forgetting, and the newest domain beside dense in sequence.

    Args:
        found: by seed.
        references: dense in sequence on the same streams, by seed.
    """
    by_seed = {
        seed: cell["after"][-1][gate] if "after" in cell else cell["bits"]
        for seed, cell in found.items()
    }
    last, some = list(by_seed.values()), next(iter(found.values()))
    row: Row = {
        "label": label,
        "bits": {name: small_lm.interval([b[name] for b in last]) for name in small_lm.DOMAINS},
        "mean": small_lm.interval([statistics.mean(b.values()) for b in last]),
        "by_seed": by_seed,
        "parameters": statistics.mean(cell["parameters"] for cell in found.values()),
        "flops": flops if flops is not None else some["flops"][gate],
    }
    newest = [
        100 * (mine[THIRD] / references[seed]["after"][-1][""][THIRD] - 1)
        for seed, mine in by_seed.items()
        if seed in references
    ]
    row["newest_gap"] = small_lm.interval(newest)
    if all(len(cell.get("after", ())) == 3 for cell in found.values()):
        for i, name in enumerate((FIRST, SECOND)):
            row[f"forgotten_{i + 1}"] = small_lm.interval(
                [
                    100 * (cell["after"][-1][gate][name] / cell["after"][i][gate][name] - 1)
                    for cell in found.values()
                ]
            )
    return row


def rows_of(cells: Cells) -> dict[str, list[Row]]:
    rows: list[tuple[str, str, str, int | None]] = [  # last: models run for a byte
        ("growmoe, gate by likelihood", "growmoe", "likelihood", None),
        ("growmoe, no byte before the window", "growmoe", "cold", 3),
        ("growmoe, gate by trigrams", "growmoe", "trigrams", None),
        ("growmoe, best path by domain (oracle)", "growmoe", "oracle", 1),
        ("growmoe, rank 16, by likelihood", "rank16", "likelihood", None),
        ("growmoe, rank 16, by trigrams", "rank16", "trigrams", None),
        ("dense in sequence, told boundaries", "dense", "", None),
        ("MoE in sequence, 9 experts, told boundaries", "moe", "", None),
        ("three dense models, one a domain (oracle)", "alone", "", None),
        ("joint: one path, all domains mixed", "mixed", "likelihood", None),
    ]
    tables = {}
    for order in ("shuffled", "documents"):
        dense = cells(f"dense-{order}")
        one = next(iter(dense.values()))["flops"][""]
        tables[order] = [
            row_of(label, found, dense, gate, run and run * one)
            for label, name, gate, run in rows
            if (found := cells(f"{name}-{order}"))
        ]
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


def detection_of(cells: Cells) -> list[Row]:
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
        found = list(cells(name).values())
        if not found:
            continue
        judged = [
            detection.judge(detection.acts(c), c["boundaries"], len(c["active"]), acts)
            for c in found
        ]
        rows.append(_detected(stream, "growmoe", judged, sum(len(c["active"]) for c in found)))
    for stream in detection.STREAMS:
        found = list(cells(f"detect-{stream}").values())
        if not found:
            continue
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
    lines = []
    for order, rows in result["tables"].items():
        lines += [
            f"{order.capitalize()}:",
            "",
            f"| model | seeds | {FIRST} | {SECOND} | {THIRD} | {FIRST} forgotten |"
            f" {SECOND} forgotten | {THIRD} beside dense | parameters | MFLOPs |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            forgotten = [
                percent(row[key]) if key in row else "–" for key in ("forgotten_1", "forgotten_2")
            ]
            bits = [interval(row["bits"][name], ".3f") for name in small_lm.DOMAINS]
            cells = [
                row["label"], len(row["by_seed"]), *bits, *forgotten, percent(row["newest_gap"]),
                f"{row['parameters'] / 1e3:.0f}k", f"{row['flops'] / 1e6:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
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
        *detected(result["detection"]),
        "",
        "Test bits per byte at the end of the stream, mean and 95% CI over seeds;"
        f" {result['steps']} batches of 16 · 128 bytes a domain, boundaries spread over four"
        " batches. Forgotten: rise since the end of that domain. Beside dense: bits per byte on"
        f" {THIRD} over those of the dense model in sequence, of the same seed. MFLOPs: of a"
        " forward, per byte. Parameters of growmoe include its trigram counts. Changes: those found"
        " after how many batches from the first with the new text, median (most); false: births and"
        " returns that should not be. ADWIN and Page–Hinkley only say that something changed: any"
        " alarm counts for them.",
    ]
    return "\n".join(lines) + "\n"


def detected(rows: list[Row]) -> list[str]:
    """A line for each stream, a column for each that watched it."""
    names = list(dict.fromkeys(row["by"] for row in rows))
    lines = [
        "| stream | batches | changes | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for stream in dict.fromkeys(row["stream"] for row in rows):
        mine = {row["by"]: row for row in rows if row["stream"] == stream}
        row = mine["growmoe"]
        told = " | ".join(_told(mine[name]) if name in mine else "–" for name in names)
        lines.append(f"| {stream} | {row['batches']} | {row['changes']} | {told} |")
    return lines


def _told(row: Row) -> str:
    delays = row["delays"]
    after = f" after {statistics.median(delays):.0f} ({max(delays):.0f})" if delays else ""
    found = f"{len(delays)} found{after}, " if row["changes"] else ""
    return f"{found}{row['false']} false"


def interval(value: tuple[float, float], form: str) -> str:
    return f"{value[0]:{form}}" + ("" if math.isnan(value[1]) else f" ± {value[1]:{form[-3:]}}")


def percent(value: tuple[float, float]) -> str:
    return interval(value, "+.1f") + "%"


def plot(cells: Cells, path: Path) -> None:
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
                statistics.mean(c["after"][phase][gate][name] for c in cells(cell).values())
                for phase in range(i, 3)
            ]
            ax.plot(range(i + 1, 4), means, style, color=color, label=label, markersize=5, lw=1.4)
        joint = statistics.mean(c["bits"][name] for c in cells("mixed-shuffled").values())
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

    def cells(name: str) -> dict[int, Cell]:
        found = {seed: done.get(f"{name}-seed{seed}") for seed in seeds}
        return {seed: cell for seed, cell in found.items() if cell is not None}

    result = {
        "command": command,
        "versions": small_lm.versions(),
        "seeds": list(seeds),
        "steps": steps,
        "domains": small_lm.DOMAINS,
        "tables": rows_of(cells),
        "sharing": sharing_of(list(cells("growmoe-shuffled").values())),
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
