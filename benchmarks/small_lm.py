"""Trains one small language model and measures it: what the language-model benchmarks share.

Bytes of three embedded domains (Python sources, C++ headers, English documentation), mixed evenly;
split by file, tested on files not trained on. Everything is a pure function of the seed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growmoe
from growmoe.lm import batch, evaluate, load_domains
from growmoe.lm.optimize import parameter_groups
from growmoe.models import TransformerLM

DOMAINS = ("python", "cpp", "english")
BYTES_PER_DOMAIN = 2_000_000


@dataclass(frozen=True)
class Setting:
    """One way to train: sizes of the model and of the training."""

    d_model: int = 96
    layers: int = 3
    heads: int = 3
    steps: int = 500
    batch_size: int = 16
    length: int = 128
    lr: float = 3e-3
    constant_lr: bool = False


@dataclass
class Measured:
    """What a run gave.

    Attributes:
        bits: test bits per byte by domain, at the end.
        curve: [training FLOPs, mean validation bits per byte] along the way.
        imbalance: max load / mean load, mean over layers and the last fifth of training.
        dropped: share of rows that capacity dropped, likewise.
        experts_per_token: mean over layers and the last fifth of training.
        dead: experts that got less than a tenth of the mean load in the last fifth.
        flops_per_token: forward and backward, with the experts_per_token measured.
    """

    bits: dict[str, float]
    curve: list[list[float]] = field(default_factory=list)
    imbalance: float = 1.0
    dropped: float = 0.0
    experts_per_token: float = 0.0
    dead: float = 0.0
    flops_per_token: float = 0.0
    parameters: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0

    @property
    def mean_bits(self) -> float:
        return statistics.mean(self.bits.values())


def make_model(setting: Setting, seed: int, **options: Any) -> TransformerLM:
    return TransformerLM(256, setting.d_model, setting.layers, setting.heads, seed=seed, **options)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, x_BS: Tensor, y_BS: Tensor
) -> Tensor:
    """One training step; the language model's loss."""
    loss = F.cross_entropy(model(x_BS).flatten(0, 1), y_BS.flatten())
    (loss + growmoe.aux_loss(model)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(setting: Setting, seed: int, options: dict[str, Any], evaluations: int = 0) -> Measured:
    """Train and test once.

    Args:
        options: of `TransformerLM`.
        evaluations: how often to validate along the way, at even distances.
    """
    began = time.process_time()
    torch.manual_seed(seed)
    domains = load_domains(DOMAINS, BYTES_PER_DOMAIN)
    model = make_model(setting, seed, **options)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.1), lr=setting.lr, betas=(0.9, 0.95), fused=True
    )
    watch = Watch(model)
    warmup, last_fifth = max(1, setting.steps // 20), setting.steps * 4 // 5
    every = setting.steps // evaluations if evaluations else 0
    validation: list[list[float]] = []
    per_step = setting.batch_size * setting.length
    for step in range(setting.steps):
        fraction = (step - warmup) / max(1, setting.steps - warmup)
        factor = min(1.0, (step + 1) / warmup)
        if step >= warmup and not setting.constant_lr:
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * fraction))
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * factor
        watch.on = step >= last_fifth
        x_BS, y_BS, _ = batch(domains, None, step, seed, setting.batch_size, setting.length)
        step_of(model, optimizer, x_BS, y_BS)
        if every and (step + 1) % every == 0:
            bits = evaluate(model, domains, "validation", 32, sequence_length=setting.length)
            validation.append([float((step + 1) * per_step), statistics.mean(bits.values())])
    result = Measured(
        bits=evaluate(model, domains, "test", 64, sequence_length=setting.length),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=setting.steps * per_step,
        flops_per_token=3 * flops_per_token(model, setting, watch.experts_per_token()),
        **watch.measured(),
    )
    result.curve = [[tokens * result.flops_per_token, bits] for tokens, bits in validation]
    result.cpu_seconds = time.process_time() - began
    return result


def flops_per_token(model: TransformerLM, setting: Setting, experts_per_token: float) -> float:
    """Forward FLOPs, two for each multiply-add, with the number of experts that were used."""
    layers = growmoe.moe_layers(model)
    whole = float(model.flops_per_token(setting.length))
    for layer in layers.values():
        bodies = [sum(p.numel() for p in e.body.parameters()) for e in layer.experts.values()]
        k = getattr(layer.router, "k", None) or len(bodies)
        # replaces the model's assumption by what was measured
        whole += 2 * statistics.mean(bodies) * (experts_per_token - k)
    return whole


class Watch:
    """Counts, while `on`, what each mixture of a model routed where."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self.layers = growmoe.moe_layers(model)
        self.counts: dict[str, Tensor] = {}
        self.chosen = dict.fromkeys(self.layers, 0)
        self.tokens = 0
        self.before = 0.0
        for name, layer in self.layers.items():
            layer.router.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, routing: growmoe.Routing) -> None:
            if not (self.on and module.training):
                return
            counts_E = routing.assignment.counts_E.double()
            self.counts[name] = self.counts.get(name, torch.zeros_like(counts_E)) + counts_E
            self.chosen[name] += len(routing.assignment.token_R)
            self.tokens += routing.assignment.num_tokens

        return see

    def experts_per_token(self) -> float:
        return sum(self.chosen.values()) / max(self.tokens, 1)

    def measured(self) -> dict[str, float]:
        loads = [counts_E / counts_E.mean() for counts_E in self.counts.values()]
        dropped = [float(layer.recorder.dropped[0]) for layer in self.layers.values()]
        return {
            "imbalance": statistics.mean(float(load_E.max()) for load_E in loads) if loads else 1.0,
            "dead": statistics.mean(float((load_E < 0.1).sum()) for load_E in loads)
            if loads
            else 0.0,
            "dropped": statistics.mean(dropped) if dropped else 0.0,
            "experts_per_token": self.experts_per_token(),
        }


# Many runs, each kept as soon as it is done.


def run_cells(
    cells: Iterable[str],
    work: Callable[[str], dict[str, Any]],
    folder: Path,
    workers: int,
    shown: str = "mean_bits",
) -> dict[str, dict[str, Any]]:
    """Run `work` on each cell not done yet, in processes of one thread; return all by name."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(cells)
    todo = [name for name in names if not (folder / f"{name}.json").exists()]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(work, name): name for name in todo}
        for done in as_completed(futures):
            name = futures[done]
            path = folder / f"{name}.json"
            path.with_suffix(".part").write_text(json.dumps(done.result()))
            path.with_suffix(".part").rename(path)
            print(f"{name}: {shown} {done.result()[shown]:.4f}", flush=True)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def as_cell(measured: Measured) -> dict[str, Any]:
    return {**asdict(measured), "mean_bits": measured.mean_bits}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95% confidence interval by Student's t."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "growmoe": growmoe.__version__,
        "hardware": f"{platform.processor() or platform.machine()}, one thread a run",
    }
