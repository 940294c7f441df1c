"""Kills workers at random while they train, and measures what the run loses by it.

    for seed in 0 1 2 3 4; do
        python benchmarks/survival.py --seed $seed --output benchmarks/results/survival.json
    done

Every worker writes into shared memory what it is doing: forward, backward, surgery, snapshot,
checkpoint. When the last recovery is complete (each expert has a second copy again), a worker and a
delay are drawn, and so long after that worker has entered the phase whose turn it is it gets
`kill -9`, from a thread of its own, which is there in time where another process would not be. If
the phase is over by then it is left alone, and the next time the delay is half as long. At the end
the losses of all steps are compared with those of one process that trains without workers. Each
call adds a run to the file.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import growmoe
from growmoe import FFN, MoE, Organizer, TopK, aux_loss, surgery
from growmoe.distributed import checkpoint, fit
from growmoe.distributed.snapshots import Snapshots
from growmoe.rules import MergeSimilar, SpawnOnNovelty

PHASES = ("forward", "backward", "surgery", "snapshot", "checkpoint")
D, ROWS, SLOT = 16, 48, struct.Struct("qqqq")  # pid, phase, step, generation
ORDER = struct.Struct("qqqqdq")  # rank, phase, first step, generation, delay, done
LONGEST = 0.004  # seconds that a worker may be in a phase before it is killed


class Board:
    """What each worker is doing, and who is to die, in a file mapped into all processes."""

    def __init__(self, path: str, ranks: int) -> None:
        self.path, self.ranks = path, ranks
        if not os.path.exists(path):
            Path(path).write_bytes(bytes(SLOT.size * ranks + ORDER.size))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)

    def write(self, rank: int, phase: int, step: int, generation: int) -> None:
        SLOT.pack_into(self.memory, SLOT.size * rank, os.getpid(), phase, step, generation)

    def read(self, rank: int) -> tuple[int, int, int, int]:
        return SLOT.unpack_from(self.memory, SLOT.size * rank)

    def order(self, rank: int, phase: int, step: int, generation: int, delay: float) -> None:
        """Have a worker die in a phase of this generation, from a step on."""
        ORDER.pack_into(
            self.memory, SLOT.size * self.ranks, rank, phase, step, generation, delay, 0
        )

    def ordered(self) -> tuple[int, int, int, int, float, int]:
        """What was ordered, and whether it is done."""
        return ORDER.unpack_from(self.memory, SLOT.size * self.ranks)

    def done(self) -> None:
        """The order is carried out."""
        ORDER.pack_into(self.memory, SLOT.size * self.ranks, *self.ordered()[:-1], 1)


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, Organizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(D, D),
        MoE(D, FFN(32), 8, TopK(2), warmup=5, seed=0),
        torch.nn.Linear(D, 2),
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rules = [SpawnOnNovelty(0.5), MergeSimilar(0.95, min_age=20)]
    return model, optimizer, Organizer(model, optimizer, rules, every=25, cooldown=25)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, D, generator=draw, dtype=torch.float64) + (3 if step % 80 > 40 else 0)
    return x, torch.stack([x.sin().sum(1), x.cos().sum(1)], 1)


def act(layer: MoE, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step % 10 == 3 and len(layer.experts) < 12:
        surgery.spawn(layer, list(layer.experts)[-1], optimizer)
    if step % 10 == 8 and len(layer.experts) > 8:
        surgery.prune(layer, [list(layer.experts)[1]], optimizer)


def alone(steps: int) -> dict:
    """The same training in this process."""
    model, optimizer, organizer = build()
    layer, losses = model[1], {}
    for step in range(steps):
        x, y = batch(step)
        loss = (model(x) - y).square().mean() + aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        organizer.step(loss.detach())
        act(layer, optimizer, step)
        losses[step] = loss.item()
    return {"losses": losses, "experts": list(layer.experts)}


def train(config, run):
    """One worker; returns the loss of every step."""
    board = Board(config["board"], config["workers"])
    now, tries = {"step": 0}, {"count": 0}

    def at(phase: str) -> None:
        index = PHASES.index(phase)
        board.write(run.rank, index, now["step"], run.generation)
        rank, wanted, step, generation, delay, done = board.ordered()
        mine = (rank, wanted, generation) == (run.rank, index, run.generation)
        if mine and now["step"] >= step and not done:
            tries["count"] += 1
            wait = delay / 2 ** tries["count"] if tries["count"] < 6 else 0.0
            threading.Thread(target=die, args=(index, now["step"], wait), daemon=True).start()

    def die(index: int, step: int, wait: float) -> None:
        time.sleep(wait)
        if board.read(run.rank)[1:] == (index, step, run.generation) or not wait:
            board.done()
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function, phase):
        def call(*args, **options):
            at(phase)
            try:
                return function(*args, **options)
            finally:
                board.write(run.rank, -1, now["step"], run.generation)

        return call

    run._snapshots.take = watched(Snapshots.take.__get__(run._snapshots), "snapshot")
    run._snapshots.wait = watched(Snapshots.wait.__get__(run._snapshots), "snapshot")
    if not hasattr(checkpoint.save, "plain"):
        plain = checkpoint.save

        def save(*args, **options):
            return save.now(*args, **options)

        save.plain = plain
        checkpoint.save = save
    checkpoint.save.now = watched(checkpoint.save.plain, "checkpoint")

    model, optimizer, organizer = build()
    parallel = run.share(model, optimizer, organizer)
    layer = model[1]
    for step in run.steps(config["steps"]):
        now["step"] = step
        with open(f"{config['board']}.{run.rank}", "a") as file:
            file.write(f"{step}\n")
        at("forward")
        x, y = map(run.part, batch(step))
        loss = ((model(x) - y).square().mean() + aux_loss(model)) * run.weight
        at("backward")
        optimizer.zero_grad()
        loss.backward()
        parallel.clip_grad_norm(1.0)
        optimizer.step()
        at("surgery")
        organizer.step(loss.detach())
        act(layer, optimizer, step)
        total = parallel.workers.total(loss.detach()).item() / run.size
        run.extra.setdefault("losses", {})[step] = total
    board.write(run.rank, -2, now["step"], run.generation)
    # who is alive and who was born, to be told from the lineage
    alive = layer.lineage.replay()
    return {"losses": run.extra["losses"], "alive": alive, "experts": list(layer.experts)}


class Killer(threading.Thread):
    """Kills one worker after the other, each when the run has recovered from the last."""

    def __init__(self, board: Board, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.board, self.kills, self.draw = board, kills, random.Random(seed)
        self.done: list[dict[str, object]] = []
        self.status: dict = {}

    def watch(self, status: dict) -> None:
        self.status = status

    def run(self) -> None:
        while len(self.done) < self.kills:
            last = self.done[-1]["generation"] if self.done else 0
            while self.status.get("generation", 0) <= last:  # not yet recovered
                time.sleep(0.005)
            phase = len(self.done) % len(PHASES)
            rank = self.draw.randrange(self.board.ranks)
            wait = self.status["step"] + self.draw.randrange(1, 21)
            generation = self.status["generation"]
            self.board.order(rank, phase, wait, generation, self.draw.uniform(0, LONGEST))
            while not self.board.ordered()[-1]:
                time.sleep(0.001)
            _, now, step, _ = self.board.read(rank)
            print(f"kill {len(self.done) + 1}: {PHASES[phase]} at step {step}", file=sys.stderr)
            self.done.append(
                {"wanted": PHASES[phase], "phase": PHASES[now] if now >= 0 else "between",
                 "step": step, "rank": rank, "generation": generation}
            )  # fmt: skip


def measure(workers: int, kills: int, steps: int, repeat: int, seed: int, folder: str) -> dict:
    path = os.path.join(folder, "board")
    board = Board(path, workers)
    killer = Killer(board, kills, seed)
    killer.start()
    start = time.monotonic()
    result = fit(
        train, {"board": path, "workers": workers, "steps": steps}, on="processes",
        num_workers=workers, repeat=repeat, checkpoint=path + ".run", checkpoint_every=5,
        timeout=60.0, max_failures=kills, watch=killer.watch,
    )  # fmt: skip
    seconds = time.monotonic() - start
    one, value = alone(steps), result.value
    done = [int(line) for line in Path(path + ".0").read_text().split()]
    return {
        "seed": seed,
        "workers": workers,
        "steps": steps,
        "repeat": repeat,
        "seconds": seconds,
        "machine_load": os.getloadavg()[1],
        "kills": killer.done,
        "recoveries": [
            {"seconds": r.seconds, "exact": r.exact, "repeated": r.repeated, "step": r.step}
            for r in result.recoveries
        ],
        "steps_done_by_first_worker": len(done),
        "experts_by_lineage": value["alive"],
        "experts_at_end": value["experts"],
        "experts_of_one_process": one["experts"],
        "final_loss": value["losses"][steps - 1],
        "final_loss_of_one_process": one["losses"][steps - 1],
        "largest_difference_of_a_loss": max(
            abs(value["losses"][s] - loss) for s, loss in one["losses"].items()
        ),
    }


def summary(runs: list[dict]) -> dict:
    kills = [kill for run in runs for kill in run["kills"]]
    recoveries = [r for run in runs for r in run["recoveries"]]
    seconds = [r["seconds"] for r in recoveries]
    return {
        "kills": len(kills),
        "kills_by_phase": {
            p: sum(k["phase"] == p for k in kills) for p in (*PHASES, "between")
        },
        "recoveries": len(recoveries),
        "recovery_seconds": {
            "median": statistics.median(seconds),
            "mean": statistics.mean(seconds),
            "max": max(seconds),
        },
        "restored_bit_for_bit": sum(r["exact"] is True for r in recoveries),
        "restored_before_the_first_snapshot": sum(r["exact"] is None for r in recoveries),
        "most_steps_repeated": max(r["repeated"] for r in recoveries),
        "experts_lost": sum(
            len(set(run["experts_by_lineage"]) - set(run["experts_at_end"])) for run in runs
        ),
        "largest_difference_of_a_loss": max(r["largest_difference_of_a_loss"] for r in runs),
        "final_losses": [[r["final_loss"], r["final_loss_of_one_process"]] for r in runs],
        "machine_load": [run["machine_load"] for run in runs],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = 24 * arguments.kills + 10
    with tempfile.TemporaryDirectory() as folder:
        run = measure(
            arguments.workers, arguments.kills, steps, arguments.repeat, arguments.seed, folder
        )
    runs = []
    if arguments.output and arguments.output.exists():
        runs = json.loads(arguments.output.read_text())["runs"]
    runs.append(run)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "growmoe": growmoe.__version__},
        "summary": summary(runs),
        "runs": runs,
    }
    print(json.dumps(result["summary"], indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
