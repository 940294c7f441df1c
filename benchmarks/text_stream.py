"""A language model on a stream of text domains: what it forgets, learns, costs and finds by itself.

    python benchmarks/text_stream.py                     # 3 seeds, about 40 CPU-minutes
    python benchmarks/text_stream.py --seeds 1 --first-seed 100 --output /tmp/tuning   # to tune

Bytes of Python sources, then C++ headers, then English documentation, each once; nobody tells the
models when the domain changes or, at test time, which one it is (rows marked "oracle" excepted).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import small_lm
import text_stream_detection as detection
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe import TopK, surgery
from growmoe.lm import Domain, load_domains
from growmoe.lm.data import windows
from growmoe.lm.growing import GrowingLM, StreamLearner, TextStream
from growmoe.lm.optimize import parameter_groups
from growmoe.models import TransformerLM

DOMAINS = small_lm.DOMAINS
ORDERS = ("shuffled", "documents")
RANKS = (16,)
D_MODEL, LAYERS, HEADS, LENGTH = 64, 2, 4, 128
WINDOWS = 64  # of each domain's test part, each with as many bytes before it


def stream(
    phases: list[tuple[str, int]], domains: dict[str, Domain], order: str, seed: int
) -> TextStream:
    # boundaries fall inside batches: rows change one after the other, over four of them
    return TextStream(domains, phases, order, sequence_length=LENGTH, stagger=4, seed=seed)


def sequence(steps: int) -> list[tuple[str, int]]:
    return [(name, steps) for name in DOMAINS]


def mixed(steps: int) -> list[tuple[str, int]]:
    return [("+".join(DOMAINS), steps * len(DOMAINS))]


# What is measured.


@torch.no_grad()
def bits(predict: Callable[[Tensor, Tensor], Tensor], domain: Domain) -> float:
    """Test bits per byte: `predict` gets x [B, S] and the S bytes before it, gives logits."""
    total = 0.0
    tokens_NS = windows(domain, "test", WINDOWS, 2 * LENGTH)
    for batch in tokens_NS.split(16):
        before, x, y = batch[:, :LENGTH], batch[:, LENGTH:-1], batch[:, LENGTH + 1 :]
        total += float(F.cross_entropy(predict(x, before).flatten(0, 1), y.flatten())) * len(x)
    return total / len(tokens_NS) / math.log(2)


def test(model: nn.Module, domains: dict[str, Domain], how: str = "") -> dict[str, float]:
    """Bits per byte of each domain; `how` is the gate of a `GrowingLM`."""
    model.eval()

    def predict(x: Tensor, before: Tensor) -> Tensor:
        if not isinstance(model, GrowingLM):
            return model(x)
        if how == "cold":
            return model(x)  # by likelihood, knowing nothing of what came before
        return model(x, before)

    if isinstance(model, GrowingLM):
        model.gate = "trigrams" if how == "trigrams" else "likelihood"
    result = {name: bits(predict, domain) for name, domain in domains.items()}
    model.train()
    return result


def test_paths(model: GrowingLM, domains: dict[str, Domain]) -> dict[str, dict[str, float]]:
    """Bits per byte of each domain by each path alone."""
    model.eval()
    found = {
        str(e.id): {
            name: bits(lambda x, before, id=e.id: model.path_logits(x, id), domain)
            for name, domain in domains.items()
        }
        for e in model.paths
    }
    model.train()
    return found


def oracle(by_path: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: min(path[name] for path in by_path.values()) for name in DOMAINS}


# What is trained.


def grow(
    phases: list[tuple[str, int]],
    order: str,
    seed: int,
    rank: int | None = None,
    sharing: bool = False,
) -> dict[str, Any]:
    domains = load_domains(DOMAINS, small_lm.BYTES_PER_DOMAIN)
    model = GrowingLM(256, D_MODEL, LAYERS, HEADS, rank=rank, seed=seed)
    learner = StreamLearner(model)
    text = stream(phases, domains, order, seed)
    events, after, active = [], [], []
    ends = [*text.boundaries, len(text)]
    for step, batch in enumerate(text, start=1):
        events += [e.to_json() for e in learner.step(batch)]
        if step in ends:
            gates = {how: test(model, domains, how) for how in ("likelihood", "trigrams", "cold")}
            after.append({**gates, "oracle": oracle(test_paths(model, domains))})
        active.append(learner.active)
    model.gate = "likelihood"
    result = {
        "after": after,
        "bits": after[-1]["likelihood"],
        "events": events,
        "active": active,
        "boundaries": text.boundaries,
        "paths": len(model.paths),
        "parameters": model.num_params(),
        "flops": {
            "likelihood": model.flops_per_token(LENGTH),
            "trigrams": model.flops_per_token(LENGTH) / len(model.paths),
        },
    }
    if sharing:
        result["compressed"] = {r: compressed(model, domains, r) for r in (8, 16, 32)}
        result["merged"] = merged(model, domains)
    return result


def dense(
    phases: list[tuple[str, int]], order: str, seed: int, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One model in sequence, trained as `StreamLearner` trains a path.

    It is told the boundaries: its learning rate begins anew there, which helps it learn.
    """
    domains = load_domains(DOMAINS, small_lm.BYTES_PER_DOMAIN)
    torch.manual_seed(seed)
    model = TransformerLM(
        256, D_MODEL, LAYERS, HEADS, seed=seed, **({"num_experts": 0} | (options or {}))
    )
    rate = StreamLearner(GrowingLM(256, 16, 1, 2, seed=0)).learning_rate
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95), fused=True)
    text = stream(phases, domains, order, seed)
    ends, begun, after = [*text.boundaries, len(text)], 0, []
    for step, batch in enumerate(text, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1 - begun)
        small_lm.step_of(model, optimizer, batch[:, :-1], batch[:, 1:])
        if step in ends:
            begun = step
            after.append({"": test(model, domains)})
    return {
        "after": after,
        "bits": after[-1][""],
        "parameters": model.num_params(),
        "flops": {"": model.flops_per_token(LENGTH)},
    }


def alone(steps: int, order: str, seed: int) -> dict[str, Any]:
    """A separate model for each domain, each told at test time which it is."""
    each = {name: dense([(name, steps)], order, seed) for name in DOMAINS}
    return {
        "bits": {name: each[name]["bits"][name] for name in DOMAINS},
        "parameters": sum(one["parameters"] for one in each.values()),
        "flops": each[DOMAINS[0]]["flops"],
    }


@torch.no_grad()
def compressed(model: GrowingLM, domains: dict[str, Domain], rank: int) -> dict[str, Any]:
    """Of each later path, keep a truncated SVD of how its matrices differ from the first path's."""
    small = copy.deepcopy(model)
    first = dict(small.paths[0].body.lm.named_parameters())
    kept = sum(p.numel() for p in first.values())
    for expert in small.paths[1:]:
        for name, p in expert.body.lm.named_parameters():
            if not name.startswith("blocks.") or p.dim() != 2 or rank * sum(p.shape) >= p.numel():
                kept += p.numel()
                continue
            u, s, v = torch.linalg.svd(p - first[name], full_matrices=False)
            p.copy_(first[name] + (u[:, :rank] * s[:rank]) @ v[:rank])
            kept += rank * sum(p.shape)
    return {
        "parameters": kept + len(small.paths) * small.layer.router.buckets,
        "bits": test(small, domains, "likelihood"),
    }


def merged(model: GrowingLM, domains: dict[str, Domain]) -> dict[str, Any]:
    """The first two paths become their mean; and what consent would have said."""
    small = copy.deepcopy(model)
    event = surgery.merge(small.layer, [e.id for e in small.paths[:2]])
    return {"bits": test(small, domains, "likelihood"), "change": event.change}


def cells(steps: int) -> dict[str, Callable[[int], dict[str, Any]]]:
    """name -> what measures it for a seed, the most important first."""
    hidden = -(-D_MODEL // 3) * 8
    # nine experts of half the width, two of them active: as many parameters as three paths
    mixture = {"num_experts": 9, "d_hidden": hidden // 2, "router": TopK(2)}
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    for order in ORDERS:
        on = {"order": order}
        found[f"growmoe-{order}"] = partial(
            _seeded, grow, phases=sequence(steps), sharing=order == "shuffled", **on
        )
        found[f"dense-{order}"] = partial(_seeded, dense, phases=sequence(steps), **on)
    found["alone-shuffled"] = partial(_seeded, alone, steps=steps, order="shuffled")
    found["mixed-shuffled"] = partial(_seeded, grow, phases=mixed(steps), order="shuffled")
    for rank in RANKS:
        found[f"rank{rank}-shuffled"] = partial(
            _seeded, grow, phases=sequence(steps), order="shuffled", rank=rank
        )
    found["moe-shuffled"] = partial(
        _seeded, dense, phases=sequence(steps), order="shuffled", options=mixture
    )
    for name in detection.STREAMS:
        found[f"detect-{name}"] = partial(_seeded, detection.detect, name=name, steps=steps)
    return found


def _seeded(what: Callable[..., dict[str, Any]], seed: int, **settings: Any) -> dict[str, Any]:
    return what(seed=seed, **settings)


def work(cell: str, steps: int) -> dict[str, Any]:
    began = time.process_time()
    name, seed = cell.rsplit("-seed", 1)
    result = cells(steps)[name](int(seed))
    if "bits" in result:
        result["mean_bits"] = statistics.mean(result["bits"].values())
    result["cpu_seconds"] = time.process_time() - began
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="batches of each domain")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", help="comma-separated names: run these and write no table")
    parser.add_argument("--table", action="store_true", help="only write it, of what is done")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/text_stream"))
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    names = arguments.only.split(",") if arguments.only else list(cells(arguments.steps))
    order = [f"{name}-seed{seed}" for seed in seeds for name in names]
    folder = arguments.output / "cells"
    if arguments.table:
        order = [cell for cell in order if (folder / f"{cell}.json").exists()]
    done = small_lm.run_cells(
        order,
        partial(work, steps=arguments.steps),
        folder,
        arguments.workers,
        shown="cpu_seconds",
    )
    if arguments.only:
        return
    import text_stream_report as report

    report.write(done, seeds, arguments.steps, arguments.output, " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
