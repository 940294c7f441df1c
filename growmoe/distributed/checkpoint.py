"""Checkpoints in shards: each worker writes the experts it leads, all at the same time.

A checkpoint is a folder. Its ``main.safetensors`` holds all that is replicated and names the
shards; it is replaced last and at once, so that a folder is always one whole checkpoint. Every
expert has its own checksum and is read by those who need it: on any number of workers, or whole
by `growmoe.load`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growmoe import checkpoint
from growmoe.distributed.carried import materialize
from growmoe.distributed.parallel import Parallel
from growmoe.organizer import Organizer
from growmoe.structure import differs, saved_structure


def save(
    path: str | Path,
    parallel: Parallel,
    organizer: Organizer | None = None,
    *,
    scheduler: Any = None,
    extra: Any = None,
) -> None:
    """Write a checkpoint into a folder that all workers see; all of them call it.

    Args:
        path: the folder; the checkpoint in it is replaced once the new one is complete.
        organizer, scheduler, extra: as for `growmoe.save`, taken from the first worker.

    Raises:
        OSError: a worker could not write. All raise it, and what was there is untouched.
        ValueError: as `growmoe.save`.
    """
    folder, workers = Path(path), parallel.workers
    tag = workers.told(uuid.uuid4().hex[:12], 0)
    names = [f"experts-{tag}-{rank}.safetensors" for rank in range(workers.size)]
    own = folder / names[workers.rank]

    def write_shard() -> None:
        checkpoint.write_shard(own, _parts(parallel))

    def write_main() -> None:
        if workers.rank:
            return
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise OSError(f"{folder}: {missing[0]} is not there: all workers must see one folder")
        content = _replicated(parallel, organizer, scheduler, extra) | {"shards": names}
        content["randoms"] = randoms
        tensors: dict[str, torch.Tensor] = {}
        text = json.dumps(checkpoint._encode(content, "", tensors))
        metadata = {"format": checkpoint.FORMAT, "content": text}
        metadata["checksum"] = checkpoint._checksum(text, tensors)
        checkpoint._write(folder / checkpoint.MAIN, tensors, metadata)

    randoms = workers.objects(checkpoint._random_state())
    try:
        _together(parallel, write_shard)
        _together(parallel, write_main)
    except (OSError, ValueError):
        # after any other error, as when a worker died, the new main file may be there already
        own.unlink(missing_ok=True)
        raise
    if workers.rank == 0:
        for old in (*folder.glob("experts-*.safetensors"), *folder.glob(".*.safetensors.*")):
            if old.name not in names:
                old.unlink(missing_ok=True)


def load(
    path: str | Path,
    parallel: Parallel,
    organizer: Organizer | None = None,
    *,
    scheduler: Any = None,
    experts: dict[str, Callable[[], nn.Module]] | None = None,
    random_state: bool = True,
) -> Any:
    """Read a checkpoint of any number of workers; each reads the experts it holds.

    Args:
        path: what `save` wrote.
        experts: as for `growmoe.load`.
        random_state: also restore each worker's, if there were as many as now.

    Returns:
        `extra`, as saved.

    Raises:
        ValueError: as `growmoe.load`, on all workers. What is found before anything is read into
            the model leaves it as it was.
    """
    folder, workers = Path(path), parallel.workers
    found: dict[str, Any] = {}

    def read() -> None:
        found.update(checkpoint._read_file(folder / checkpoint.MAIN))
        for name in [n for n in found["shards"] if not (folder / n).is_file()]:
            raise ValueError(f"{folder}: shard {name} is missing")
        saved = [k for k in found["model"] if "._extra_state" in k or k == "_extra_state"]
        mine = [n for n, _ in parallel.layers.items()]
        if not saved or any(not _structure(found, parallel, n) for n in mine):
            raise ValueError(f"{folder} is of another model: its layers are not {mine}")
        if len(found["optimizers"]) != len(parallel.optimizers):
            raise ValueError(
                f"{folder}: {len(found['optimizers'])} optimizers were saved, there are "
                f"{len(parallel.optimizers)}"
            )
        for given, key in ((organizer, "organizer"), (scheduler, "scheduler")):
            if given is not None and found[key] is None:
                raise ValueError(f"{folder}: no {key} was saved")

    _together(parallel, read)
    _restructure(parallel, found, experts)
    rank = workers.rank
    held = {n for n, ranks in _holders_by_name(parallel).items() if rank in ranks}

    def take() -> None:
        parts = (
            part
            for shard in found["shards"]
            for part in checkpoint.read_shard(folder / shard, held.__contains__)
        )
        _install(folder, parallel, found, parts)

    _together(parallel, take)
    if organizer is not None:
        organizer.load_state_dict(found["organizer"])
    if scheduler is not None:
        scheduler.load_state_dict(found["scheduler"])
    if random_state and len(found["randoms"]) == workers.size:
        checkpoint._set_random_state(found["randoms"][workers.rank])
    return found["extra"]


def _together(parallel: Parallel, act: Callable[[], None]) -> None:
    """Do it on all workers; if it fails on one, raise on all."""
    error: Exception | None = None
    try:
        act()
    except Exception as caught:
        error = caught
    said = parallel.workers.objects(None if error is None else (type(error).__name__, str(error)))
    for rank, failure in enumerate(said):
        if failure is not None:
            kind = ValueError if failure[0] == "ValueError" else OSError
            raise kind(f"worker {rank}: {failure[0]}: {failure[1]}") from error


def _prefix(parallel: Parallel, name: str) -> str:
    return "" if parallel.layers[name] is parallel.model else f"{name}."


def _structure(content: dict[str, Any], parallel: Parallel, name: str) -> dict[int, Any]:
    return saved_structure(content["model"], f"{_prefix(parallel, name)}experts.")


def _bodies(parallel: Parallel, led: bool) -> dict[str, nn.Module]:
    """Bodies by their name in the model: all, or those this worker leads."""
    return {
        f"{_prefix(parallel, name)}experts.{id}.body.": e.body
        for name, layer in parallel.layers.items()
        for id, e in layer.experts.items()
        if not led or layer.experts.holders[id][0] == parallel.workers.rank
    }


def _parts(parallel: Parallel) -> dict[str, Any]:
    return {
        prefix: {
            "model": {prefix + k: v for k, v in body.state_dict().items()},
            "state": [
                {prefix + n: dict(o.state[p]) for n, p in body.named_parameters() if p in o.state}
                for o in parallel.optimizers
            ],
        }
        for prefix, body in _bodies(parallel, led=True).items()
    }


def _replicated(
    parallel: Parallel, organizer: Organizer | None, scheduler: Any, extra: Any
) -> dict[str, Any]:
    model = parallel.model
    prefixes = tuple(_bodies(parallel, led=False))
    with parallel.without_bodies():
        state = model.state_dict()
    optimizers = [checkpoint._optimizer_state(o, model) for o in parallel.optimizers]
    for saved in optimizers:
        saved["state"] = {n: s for n, s in saved["state"].items() if not n.startswith(prefixes)}
    return {
        "model": state,
        "optimizers": optimizers,
        "organizer": None if organizer is None else organizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": checkpoint._random_state(),
        "extra": extra,
    }


def _holders_by_name(parallel: Parallel) -> dict[str, tuple[int, ...]]:
    """The ranks that hold each body, by its name in the model."""
    return {
        f"{_prefix(parallel, name)}experts.{id}.body.": layer.experts.holders[id]
        for name, layer in parallel.layers.items()
        for id in layer.experts
    }


def _restructure(
    parallel: Parallel,
    found: dict[str, Any],
    experts: dict[str, Callable[[], nn.Module]] | None,
) -> None:
    """Hold an expert for each that was saved; nothing of it is here yet."""
    for name, layer in parallel.layers.items():
        structure = _structure(found, parallel, name)
        if differs(layer.experts, structure):
            layer.restructure(structure, experts)
        layer.experts.settle(parallel.optimizers)


def _install(
    where: Any, parallel: Parallel, found: dict[str, Any], parts: Iterable[tuple[str, Any]]
) -> None:
    """Take the replicated part and the experts that are held here into the model.

    Args:
        where: it comes from, for errors.
        parts: body's name in the model and what `_parts` gave for it; others are left alone.
    """
    model, prefixes = parallel.model, tuple(_bodies(parallel, led=False))
    held = {
        f"{_prefix(parallel, name)}experts.{e.id}.body.": e
        for name, layer in parallel.layers.items()
        for e in layer.experts.local()
    }
    chosen = {name: part for name, part in parts if name in held}
    if len(chosen) < len(held):
        raise ValueError(f"{where}: {len(held) - len(chosen)} experts are in no shard")
    plans = [
        checkpoint._plan(where, o, model, saved)
        for o, saved in zip(parallel.optimizers, found["optimizers"], strict=True)
    ]
    with parallel.states_open():
        missing, unknown = model.load_state_dict(found["model"], strict=False)
    if wrong := [*unknown, *(k for k in missing if not k.startswith(prefixes))]:
        raise ValueError(f"{where} is of another model: {wrong[0]}")
    parameters = dict(model.named_parameters())
    for o, (groups, state) in zip(parallel.optimizers, plans, strict=True):
        for group, new in zip(o.param_groups, groups, strict=True):
            group.update(new)
        o.state.clear()
        o.state.update(state)  # type: ignore[arg-type]
    for name, part in chosen.items():
        materialize(held[name])
        held[name].body.load_state_dict({k[len(name) :]: v for k, v in part["model"].items()})
        for o, states in zip(parallel.optimizers, part["state"], strict=True):
            on_device = any(g.get("capturable") or g.get("fused") for g in o.param_groups)
            for n, entry in states.items():
                p = parameters[n]
                o.state[p] = {
                    k: checkpoint._place(k, v, p, bool(on_device)) for k, v in entry.items()
                }
