"""Times a model whose experts lie on disk, for several sizes of the cache, beside a resident one.

    python benchmarks/offload.py --output benchmarks/results/offload.json

A residual stack of MoE layers reads a stream of tokens whose frequencies follow Zipf's law, one at
a time as in generation ("decode") or many at a time ("prefill"). All settings read the same tokens,
interleaved in one process, one thread on a CPU beside the loading thread; the hit rate is of the
timed part alone. *pool* and *loop* hold every expert in memory, the latter running them one after
another as an offloaded layer must; a cache of one reloads nearly every expert each time. The files
are in the page cache after the first read, so a load costs what copying and checking it costs: from
a cold disk it is slower. Routers are untrained, so the skew is that of the tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growmoe
from growmoe.experts.bank import run_each
from growmoe.offload import Offloaded, Stats, offload

LAYERS, D_MODEL, D_HIDDEN, EXPERTS, K, VOCABULARY = 4, 256, 512, 16, 2, 512
CACHES = [1, 2, 4, 8, 12, 16]
SHAPES = {"decode": (1, 64), "prefill": (64, 4)}  # tokens in a forward, forwards in a round


class Stack(nn.Module):
    """What a transformer's feed-forward blocks see: a normed residual stream."""

    def __init__(self, zipf: float) -> None:
        super().__init__()
        expert = growmoe.FFN(D_HIDDEN, "swiglu")
        layers = [
            growmoe.MoE(D_MODEL, expert, EXPERTS, growmoe.TopK(K), seed=i) for i in range(LAYERS)
        ]
        self.layers = nn.ModuleList(layers)
        self.embedding = torch.randn(VOCABULARY, D_MODEL)
        self.frequency = torch.arange(1, VOCABULARY + 1).float() ** -zipf

    def tokens(self, count: int) -> Tensor:
        return self.frequency.multinomial(count, replacement=True)

    def forward(self, token_T: Tensor) -> Tensor:
        x = self.embedding[token_T]
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (D_MODEL,)))
        return x


class Loop(growmoe.MoE):
    """The same experts, all in memory, run one after another."""

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        experts = list(self.experts.values())
        a = self.route(x, experts).assignment
        return a.combine(run_each(experts, a.dispatch(x), a, self.d_out))


def measure(shape: str, rounds: int, zipf: float, directory: str) -> list[dict]:
    """A row for each setting: its speed relative to the pool's, and what its cache did."""
    torch.manual_seed(0)
    model = Stack(zipf).eval()
    settings: dict[str, tuple[nn.Module, Offloaded | None]] = {"pool": (model, None)}
    loop = copy.deepcopy(model)
    for layer in loop.layers:
        layer.__class__ = Loop
    settings["loop"] = (loop, None)
    for cache in CACHES:
        for prefetch in (False, True):
            mine = copy.deepcopy(model)
            handle = offload(mine, cache, directory=directory, prefetch=prefetch)
            settings[f"cache {cache}{' + prefetch' if prefetch else ''}"] = (mine, handle)
    size, forwards = SHAPES[shape]
    times: dict[str, list[float]] = {name: [] for name in settings}
    before: dict[str, Stats] = {}
    for turn in range(rounds + 2):
        batches = [model.tokens(size) for _ in range(forwards)]
        expected: list[Tensor] = []
        for name, (setting, handle) in sorted(settings.items(), key=lambda s: s[0] != "loop"):
            if turn == 2 and handle is not None:
                before[name] = sum(handle.stats.values(), Stats())
            start = time.perf_counter()
            got = [setting(batch) for batch in batches]
            seconds = time.perf_counter() - start
            if name == "loop":
                expected = got
            elif name != "pool" and not all(map(torch.equal, got, expected)):
                raise AssertionError(f"{name} computed something else")
            if turn >= 2:
                times[name].append(seconds)
    rows = []
    for name, (_, handle) in settings.items():
        ratios = [t / p for p, t in zip(times[name], times["pool"], strict=True)]
        row = {
            "tokens": shape,
            "setting": name,
            "tokens_per_second": size * forwards / statistics.median(times[name]),
            "speed_relative_to_pool": statistics.median(ratios),
            "speed_relative_to_loop": statistics.median(
                [t / p for p, t in zip(times[name], times["loop"], strict=True)]
            ),
        }
        if handle is not None:
            stats = sum(handle.stats.values(), Stats()) - before[name]
            row |= {
                "hit_rate": stats.hit_rate,
                "prefetched": stats.prefetched,
                "prefetch_hits": stats.prefetch_hits,
                "loaded_mib_per_forward": stats.bytes_loaded / 2**20 / rounds / forwards,
                "share_of_time_waited": stats.seconds_waited / sum(times[name]),
            }
            handle.restore()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--zipf", type=float, default=1.2, help="exponent of the frequencies")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            rows += measure(shape, arguments.rounds, arguments.zipf, directory)
        print(f"{shape}: tokens/s, relative to pool, to loop, hit rate, share of time waited")
        for row in rows:
            if row["tokens"] == shape:
                print(
                    f"  {row['setting']:20} {row['tokens_per_second']:8.0f}"
                    f" {row['speed_relative_to_pool']:6.2f} {row['speed_relative_to_loop']:6.2f}"
                    f" {row.get('hit_rate', 1):6.1%} {row.get('share_of_time_waited', 0):6.1%}"
                )
    if arguments.output:
        arguments.output.write_text(
            json.dumps(
                {
                    "command": " ".join(["python", *sys.argv]),
                    "hardware": f"{platform.processor() or platform.machine()}, one thread and a "
                    "loading thread; files in the page cache",
                    "versions": {"torch": torch.__version__, "growmoe": growmoe.__version__},
                    "model": {
                        "layers": LAYERS,
                        "d_model": D_MODEL,
                        "d_hidden": D_HIDDEN,
                        "experts": EXPERTS,
                        "k": K,
                        "mib_per_expert": 3 * D_MODEL * D_HIDDEN * 4 / 2**20,
                        "zipf": arguments.zipf,
                    },
                    "rounds": arguments.rounds,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
