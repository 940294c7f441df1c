"""Measures what the distributed path costs with one worker, and the bytes sent with two.

    python benchmarks/distributed_overhead.py --output benchmarks/results/distributed_overhead.json

One worker: the plain layer and the shared-out one train interleaved in one process. Two workers:
the bytes that each hands to gloo, by purpose, against what routing needs: every row that leaves its
worker, there and back, in forward and backward. Counted at the calls, not on the wire.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

import growmoe
from growmoe.distributed import expert_parallel

TOKENS, D, F, EXPERTS, K = 4096, 64, 128, 8, 2


def layer() -> growmoe.MoE:
    return growmoe.MoE(D, growmoe.FFN(F), EXPERTS, growmoe.TopK(K), seed=0)


def meet(rank: int, size: int, where: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=size
    )


def overhead(where: str, repeats: int, queue) -> None:
    meet(0, 1, where)
    plain, shared = layer(), layer()
    expert_parallel(shared)
    x = torch.randn(TOKENS, D)
    times: dict[str, list[float]] = {"plain": [], "one worker": []}
    for repeat in range(repeats + 3):
        for name, module in (("plain", plain), ("one worker", shared)):
            start = time.perf_counter()
            module(x.clone().requires_grad_()).square().mean().backward()
            if repeat >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    queue.put({name: statistics.median(t) for name, t in times.items()})


def two(rank: int, where: str, steps: int, queue) -> None:
    meet(rank, 2, where)
    module = layer()
    parallel = expert_parallel(module)
    torch.manual_seed(rank)
    needed = 0
    for _ in range(steps):
        module(torch.randn(TOKENS, D).requires_grad_()).square().mean().backward()
        tally = module.experts.tally
        away = [e for e, id in enumerate(module.experts) if not module.experts.holds(id)]
        here = [e for e, id in enumerate(module.experts) if module.experts.holds(id)]
        leaving = int(tally.counts_E[away].sum())
        arriving = int(tally.counts_WE[1 - rank][here].sum())
        # out and back: the backward sends gradients as the forward sends rows and outputs
        needed += 2 * (leaving + arriving) * D * 4
    queue.put(
        {"needed": needed / steps, **{k: v / steps for k, v in parallel.workers.sent.items()}}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        one = context.Process(
            target=overhead, args=(os.path.join(folder, "a"), arguments.repeats, queue)
        )
        one.start()
        times = queue.get(timeout=300)
        one.join()
        pair = [
            context.Process(target=two, args=(rank, os.path.join(folder, "b"), 5, queue))
            for rank in range(2)
        ]
        for process in pair:
            process.start()
        sent = [queue.get(timeout=300) for _ in pair]
        for process in pair:
            process.join()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "growmoe": growmoe.__version__},
        "shape": {"tokens a worker": TOKENS, "D": D, "F": F, "experts": EXPERTS, "k": K},
        "forward_backward_ms": times,
        "one_worker_ratio": times["one worker"] / times["plain"],
        "bytes_a_step_of_each_worker": sent,
        "rows_over_needed": [s["rows"] / s["needed"] for s in sent],
        "all_over_needed": [
            sum(v for k, v in s.items() if k != "needed") / s["needed"] for s in sent
        ],
        "all_over_needed_and_gradients": [
            sum(v for k, v in s.items() if k != "needed") / (s["needed"] + s["gradients"])
            for s in sent
        ],
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
