"""Times a growmoe layer beside a fixed stacked MoE, a loop over experts, and the dense limit.

    python benchmarks/layer_speed.py --output benchmarks/results/layer_speed.json

All have the same active FLOPs and are timed interleaved in one process, one thread on a CPU. The
*stacked* layer holds each matrix of all experts in one tensor and cannot change its structure; the
difference to it is what separate, growable experts cost. Signals are recorded, as in training.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growmoe
from growmoe.experts.bank import run_each

SHAPES = [  # tokens, d_model, d_hidden, experts, k
    (1024, 256, 512, 8, 2),
    (4096, 256, 512, 16, 2),
    (2048, 64, 128, 64, 2),
]


class Stacked(nn.Module):
    """A fixed top-k MoE on stacked tensors, with the same grouped matmul."""

    def __init__(self, d_model: int, d_hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.router = growmoe.TopK(k)
        self.key = nn.Parameter(torch.randn(experts, d_model) * d_model**-0.5)
        self.w_in = nn.Parameter(torch.randn(experts, d_model, d_hidden) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(experts, d_hidden, d_model) * d_hidden**-0.5)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = (x @ self.key.T).softmax(-1).topk(self.k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        a = growmoe.Assignment.from_choice(chosen, weight, len(self.key))
        offsets = a.counts_E.cumsum(0).to(torch.int32)
        hidden = F.gelu(F.grouped_mm(a.dispatch(x), self.w_in, offs=offsets))
        return a.combine(F.grouped_mm(hidden, self.w_out, offs=offsets))


class Loop(growmoe.MoE):
    """The same experts run one after another, as most simple implementations do."""

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        experts = list(self.experts.values())
        a = self.route(x, experts).assignment
        return a.combine(run_each(experts, a.dispatch(x), a, self.d_out))


def measure(shape: tuple[int, ...], repeats: int, device: str, dtype: torch.dtype) -> dict:
    """Median milliseconds of forward and backward, and of the optimizer's step."""
    tokens, d_model, d_hidden, experts, k = shape
    torch.manual_seed(0)
    expert = growmoe.FFN(d_hidden)
    layers: dict[str, nn.Module] = {
        "dense": growmoe.FFN(d_hidden * k, d_model=d_model),
        "stacked": Stacked(d_model, d_hidden, experts, k),
        "growmoe": growmoe.MoE(d_model, expert, experts, growmoe.TopK(k)),
        "loop": Loop(d_model, expert, experts, growmoe.TopK(k)),
    }
    for layer in layers.values():
        layer.to(device=device, dtype=dtype)
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in layers.items()}
    x = torch.randn(tokens, d_model, device=device, dtype=dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for repeat in range(repeats + 3):
        for name, layer in layers.items():
            start = now()
            layer(x.clone().requires_grad_()).square().mean().backward()
            middle = now()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat >= 3:
                times[name].append((middle - start, now() - middle))
    return {
        name: {
            "forward_backward_ms": 1e3 * statistics.median(t[0] for t in pairs),
            "optimizer_ms": 1e3 * statistics.median(t[1] for t in pairs),
        }
        for name, pairs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("forward and backward / optimizer step, ms (ratio to dense of their sum)")
    for shape in SHAPES:
        result = measure(
            shape, arguments.repeats, arguments.device, getattr(torch, arguments.dtype)
        )
        total = {n: r["forward_backward_ms"] + r["optimizer_ms"] for n, r in result.items()}
        label = "T {} D {} F {} E {} k {}".format(*shape)
        print(label)
        for name, r in result.items():
            r["ratio_to_dense"] = total[name] / total["dense"]
            print(
                f"  {name:8} {r['forward_backward_ms']:8.2f} / {r['optimizer_ms']:6.2f}"
                f"   ({r['ratio_to_dense']:.2f})"
            )
        rows.append({"shape": dict(zip("TDFEk", shape, strict=True)), "layers": result})
    if arguments.output:
        device = (
            torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
        )
        arguments.output.write_text(
            json.dumps(
                {
                    "command": " ".join(["python", *sys.argv]),
                    "hardware": f"{device or platform.machine()}, one thread",
                    "versions": {"torch": torch.__version__, "growmoe": growmoe.__version__},
                    "dtype": arguments.dtype,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
