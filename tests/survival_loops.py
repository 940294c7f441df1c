"""Training loops for `growmoe.distributed.fit`: on the same batches with any number of workers."""

import os
import resource
import signal
import time
from pathlib import Path

import torch
from distributed_training import D, batch

from growmoe import FFN, MoE, Organizer, TopK, aux_loss, moe_layers, surgery
from growmoe.rules import MergeSimilar, SpawnOnNovelty


def build(seed=0, experts=6):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(D, D),
        MoE(D, FFN(16), experts, TopK(2), warmup=3, seed=seed),
        torch.nn.Linear(D, 2),
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rules = [SpawnOnNovelty(0.5), MergeSimilar(0.95, min_age=20)]
    organizer = Organizer(model, optimizer, rules, every=10, cooldown=10, tolerance=0.5)
    return model, optimizer, organizer


def act(layer, optimizer, step):
    """Spawns and prunes at known steps, whatever the organizer does."""
    if step % 20 == 6 and len(layer.experts) < 9:
        surgery.spawn(layer, list(layer.experts)[-1], optimizer)
    if step % 20 == 16 and len(layer.experts) > 6:
        surgery.prune(layer, [list(layer.experts)[1]], optimizer)


def train(config, run):
    """config: steps, `replicas`, and `at`, a function of (phase, step, run) called at every phase.

    Returns losses by step and all weights and moments.
    """
    at = config.get("at") or (lambda *_: None)
    model, optimizer, organizer = build()
    layer = next(iter(moe_layers(model).values()))
    parallel = run.share(model, optimizer, organizer, replicas=config.get("replicas", 1))
    for step in run.steps(config["steps"]):
        at("forward", step, run)
        x, y = map(run.part, batch(step, torch.float64))
        loss = ((model(x) - y).square().mean() + aux_loss(model)) * run.weight
        optimizer.zero_grad()
        at("backward", step, run)
        loss.backward()
        parallel.clip_grad_norm(1.0)
        optimizer.step()
        at("surgery", step, run)
        organizer.step(loss.detach())
        act(layer, optimizer, step)
        total = parallel.workers.total(loss.detach()).item() / run.size
        run.extra.setdefault("losses", {})[step] = total
        run.extra.setdefault("sizes", {})[step] = run.size
        run.extra.setdefault("replicas", {})[step] = parallel.workers.replicas
        at("between", step, run)
    with layer.gathered(None, [optimizer]):
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                state[f"{n}/{key}"] = value.clone()
    events = [(e.step, e.act, e.ids, e.child, e.accepted) for e in layer.lineage]
    return {**run.extra, "state": state, "events": events}


def alone(steps):
    """The same training in one process, without workers."""
    model, optimizer, organizer = build()
    layer = next(iter(moe_layers(model).values()))
    losses = {}
    for step in range(steps):
        x, y = batch(step, torch.float64)
        loss = (model(x) - y).square().mean() + aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        organizer.step(loss.detach())
        act(layer, optimizer, step)
        losses[step] = loss.item()
    events = [(e.step, e.act, e.ids, e.child, e.accepted) for e in layer.lineage]
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{n}/{key}"] = value.clone()
    return {"losses": losses, "state": state, "events": events}


class Once:
    """Does something at one step of one rank, once in a run: a file remembers.

    Args:
        plan: {(phase, step): rank}.
        what: "kill", "hang" or "raise".
    """

    def __init__(self, folder, plan, what="kill"):
        self.folder, self.plan, self.what = str(folder), plan, what

    def __call__(self, phase, step, run):
        rank = self.plan.get((phase, step))
        if rank is None or rank != run.rank:
            return
        mark = Path(self.folder) / f"{phase}-{step}"
        if mark.exists():
            return
        mark.touch()
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "hang":
            time.sleep(1000)
        raise ValueError("a mistake in the loop")


class Pause:
    """Stands still at one step until a file is there, then does what another function does.

    Args:
        at: the phase and the step.
        file: what is waited for, up to a minute.
        then: called at every phase.
    """

    def __init__(self, at, file, then):
        self.at, self.file, self.then = at, str(file), then

    def __call__(self, phase, step, run):
        until = time.monotonic() + 60
        while (phase, step) == self.at and not Path(self.file).exists():
            assert time.monotonic() < until, f"{self.file} never came"
            time.sleep(0.05)
        self.then(phase, step, run)


class Resize:
    """Asks for other numbers of workers: {step: number}; `then` is called at every phase."""

    def __init__(self, plan, then=None):
        self.plan, self.then = plan, then

    def __call__(self, phase, step, run):
        if phase == "between" and step in self.plan:
            run.resize(self.plan[step])
        if self.then:
            self.then(phase, step, run)


class Chain:
    """At a phase and step the last worker dies once, and each other waits for the next one."""

    def __init__(self, *at):
        self.at = at

    def __call__(self, phase, step, run):
        if (phase, step) != self.at or run.generation > 1:
            return
        if run.rank == run.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.recv(
            torch.empty(1), group=run.parallel.workers.group, group_src=run.rank + 1
        )


class Leisurely:
    """Takes its time over each step while a worker is alone, so that others can join it."""

    def __init__(self, then):
        self.then = then

    def __call__(self, phase, step, run):
        if phase == "between" and run.size == 1:
            time.sleep(0.2)
        self.then(phase, step, run)


class FullDisk:
    """From a phase and step on, files that a rank writes are cut off after so many bytes."""

    def __init__(self, at, rank, size):
        self.at, self.rank, self.size = at, rank, size

    def __call__(self, phase, step, run):
        if (phase, step, run.rank) == (*self.at, self.rank):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))
