"""How well a model predicts each domain, and how evenly its experts are used.

B  sequences in a batch
S  tokens in a sequence
N  windows
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.lm.data import windows as windows_of
from growmoe.lm.domains import Domain, Split
from growmoe.lm.routing import RoutingCounts
from growmoe.moe import MoE, moe_layers


@torch.no_grad()
def evaluate(
    model: nn.Module,
    domains: Mapping[str, Domain],
    split: Split = "validation",
    windows: int = 32,
    *,
    sequence_length: int = 128,
    batch_size: int = 16,
    precision: str = "float32",
    counts: RoutingCounts | None = None,
) -> dict[str, float]:
    """Bits per byte of each domain, in eval mode, on the same windows whenever it is called.

    bits per byte = (Σ −ln p(token | those before it in its window)) / (N · S · ln 2)
                    · tokens per byte of the split

    The first tokens of a window have little before them, so longer windows give lower figures:
    compare at the same `sequence_length`.

    Args:
        model: int64 [B, S] -> logits [B, S, V].
        windows: N per domain at even distances, fewer where they would overlap.
        counts: told which expert takes what of each domain.

    Raises:
        TrainError: a domain's part is shorter than S + 1 tokens.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    result = {}
    try:
        for i, (name, domain) in enumerate(domains.items()):
            tokens_NS1 = windows_of(domain, split, windows, sequence_length)
            total = 0.0
            for tokens_BS1 in tokens_NS1.split(batch_size):
                tokens_BS1 = tokens_BS1.to(device)
                x_BS, y_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
                domain_B = torch.full((len(x_BS),), i, device=device)
                watched = nullcontext() if counts is None else counts.of(name)
                with watched, autocast(device, precision):
                    logits_BSV = model(x_BS, **context(model, domain_B))
                total += float(cross_entropy(logits_BSV, y_BS).double().sum())
            nats = total / (len(tokens_NS1) * sequence_length)
            result[name] = nats / math.log(2) * domain.tokens_per_byte(split)
    finally:
        for module, training in modes:
            module.training = training
    return result


def cross_entropy(logits_BSV: Tensor, y_BS: Tensor) -> Tensor:
    """−ln p of each token, in float32: [B · S]."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), y_BS.flatten(), reduction="none")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def context(model: nn.Module, domain_B: Tensor) -> dict[str, Any]:
    """The domain of each sequence as its task, for a model whose routers choose by the task."""
    wanted = any(getattr(x.router, "wants", None) == "task" for x in moe_layers(model).values())
    return {"context": {"task": domain_B}} if wanted else {}


def unigram_bits(domain: Domain, vocab_size: int, split: Split = "test") -> float:
    """Bits per byte of a model that knows how frequent each token is, and nothing else.

    Frequencies are of the train part, one added to each count.
    """
    counts_V = torch.bincount(domain.train.long(), minlength=vocab_size).double() + 1
    bits_V = -(counts_V / counts_V.sum()).log2()
    tokens = domain.tokens(split).long()
    return float(bits_V[tokens].mean()) * domain.tokens_per_byte(split)


def expert_use(model: nn.Module) -> dict[str, Any]:
    """Of each MoE layer: how many experts, max over mean of their running loads, the share of rows
    dropped, and each expert's share of the rows.

    All are of the last training forwards, as the layer's recorder saw them.
    """
    layers = moe_layers(model)
    return {
        "experts": {name: len(layer.experts) for name, layer in layers.items()},
        "imbalance": {name: imbalance(layer) for name, layer in layers.items()},
        "dropped": {name: float(layer.recorder.dropped[0]) for name, layer in layers.items()},
        "load": {name: shares(layer) for name, layer in layers.items()},
    }


def imbalance(layer: MoE) -> float:
    """The largest running load over the mean: 1 is even, E is all on one expert."""
    load_E = layer.recorder.records(list(layer.experts.values()))["load"]
    total = float(load_E.sum())
    return float(load_E.max()) * len(load_E) / total if total else 1.0


def shares(layer: MoE) -> dict[str, float]:
    """Expert id -> its share of the running load, rounded for a log."""
    load_E = layer.recorder.records(list(layer.experts.values()))["load"]
    share_E = (load_E / load_E.sum().clamp_min(1e-12)).tolist()
    return {str(id): round(share, 4) for id, share in zip(layer.experts, share_E, strict=True)}
