"""Save and load a model of any structure, with optimizer, organizer, lineage and random state.

A checkpoint is one safetensors file: its tensors, and in its metadata a JSON text that refers to
them. There is no pickle, so loading one runs no code.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growmoe.live import refuse_unseen_optimizers
from growmoe.moe import MoE, moe_layers
from growmoe.optim import as_optimizers
from growmoe.organizer import Organizer
from growmoe.structure import differs, saved_structure

FORMAT = "growmoe-checkpoint-1"
SHARD = "growmoe-shard-1"
MAIN = "main.safetensors"  # of a folder; the other files are shards, which it names


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    organizer: Organizer | None = None,
    *,
    scheduler: Any = None,
    extra: Any = None,
) -> None:
    """Write a checkpoint; a file that was there is replaced only once the new one is complete.

    The random state of torch, numpy and Python is saved too, so that a run continued on the same
    machine goes on bit for bit as if it had not stopped.

    Args:
        path: the file, by habit ``….safetensors``.
        scheduler: anything with a `state_dict` of plain values and tensors.
        extra: plain values and tensors of yours, returned by `load`.

    Raises:
        ValueError: an optimizer holds a parameter that is not the model's, or something cannot be
            written as JSON and tensors.
        OSError: the file cannot be written; what was there is untouched.
    """
    tensors: dict[str, Tensor] = {}
    content = {
        "model": model.state_dict(),
        "optimizers": [_optimizer_state(o, model) for o in as_optimizers(optimizer)],
        "organizer": None if organizer is None else organizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": _random_state(),
        "extra": extra,
    }
    text = json.dumps(_encode(content, "", tensors))
    metadata = {"format": FORMAT, "content": text, "checksum": _checksum(text, tensors)}
    _write(Path(path), tensors, metadata)


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    organizer: Organizer | None = None,
    *,
    scheduler: Any = None,
    experts: dict[str, Callable[[], nn.Module]] | None = None,
    random_state: bool = True,
) -> Any:
    """Read a checkpoint into a model built with any number of experts.

    Args:
        path: what `save` wrote, or the folder that `growmoe.distributed.save` did.
        model: of the same architecture; its MoE layers take the saved structure.
        optimizer, organizer, scheduler: those that were saved, in the same order. One that was
            saved may be left out, but where the structure differs no optimizer that is alive on
            the model may.
        experts: kind -> a function that builds a body, for kinds of expert other than `FFN` and
            those the model already has.
        random_state: also restore the random state of torch, numpy and Python.

    Returns:
        `extra`, as saved.

    Raises:
        ValueError: the file is torn, foreign, or of another architecture; something passed was not
            saved. Nothing has changed then.
        FileNotFoundError: there is no such file.
    """
    content = _read(Path(path))
    optimizers = as_optimizers(optimizer)
    for name, given, saved in (
        ("organizer", organizer, content["organizer"]),
        ("scheduler", scheduler, content["scheduler"]),
    ):
        if given is not None and saved is None:
            raise ValueError(f"{path}: no {name} was saved")
    if optimizers and len(optimizers) != len(content["optimizers"]):
        raise ValueError(
            f"{path}: {len(content['optimizers'])} optimizers were saved, "
            f"{len(optimizers)} are passed"
        )
    layers = moe_layers(model)
    before = {
        name: (list(layer.experts.values()), layer.next_id, layer.generator.get_state())
        for name, layer in layers.items()
    }
    try:
        done: set[str] = set()
        while todo := [item for item in moe_layers(model).items() if item[0] not in done]:
            name, layer = todo[0]  # an expert may hold layers of its own, which come and go with it
            prefix = "" if layer is model else name + "."
            _restructure(path, prefix, layer, content, optimizers, experts)
            done.add(name)
        _compare(path, model.state_dict(), content["model"])
        plans = [
            _plan(path, o, model, saved)
            for o, saved in zip(optimizers, content["optimizers"], strict=False)
        ]
        if organizer is not None and set(content["organizer"]["acted"]) != set(organizer.layers):
            raise ValueError(f"{path}: the organizer's layers are not this model's")
    except BaseException:
        for name, layer in layers.items():
            living, next_id, generator = before[name]
            layer.experts.replace(living)
            layer.next_id = next_id
            layer.generator.set_state(generator)
        raise
    model.load_state_dict(content["model"])
    for o, (groups, state) in zip(optimizers, plans, strict=True):
        for group, new in zip(o.param_groups, groups, strict=True):
            group.update(new)
        o.state.clear()
        o.state.update(state)  # type: ignore[arg-type]
    if organizer is not None:
        organizer.load_state_dict(content["organizer"])
    if scheduler is not None:
        scheduler.load_state_dict(content["scheduler"])
    if random_state:
        _set_random_state(content["random"])
    return content["extra"]


# The model.


def _restructure(
    path: str | Path,
    prefix: str,
    layer: MoE,
    content: dict[str, Any],
    optimizers: list[Optimizer],
    factories: dict[str, Callable[[], nn.Module]] | None,
) -> None:
    saved = saved_structure(content["model"], f"{prefix}experts.")
    if not saved:
        raise ValueError(f"{path}: has no experts for layer {prefix.rstrip('.') or 'moe'!r}")
    if differs(layer.experts, saved):
        refuse_unseen_optimizers(layer, optimizers)
        layer.restructure(saved, factories)


def _compare(path: str | Path, mine: dict[str, Any], saved: dict[str, Any]) -> None:
    def shape(value: Any) -> Any:
        return tuple(value.shape) if isinstance(value, Tensor) else None

    wrong = [f"{key} is missing" for key in mine if key not in saved]
    wrong += [f"{key} is not in the model" for key in saved if key not in mine]
    wrong += [
        f"{key} has shape {shape(saved[key])}, the model {shape(value)}"
        for key, value in mine.items()
        if key in saved and shape(saved[key]) != shape(value)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} is of another model: {'; '.join(wrong[:3])}{more}")


# The optimizer, by parameter name.


def _optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(p.shape)} that "
                    "is not the model's"
                )
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {**group, "params": [names[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ],
        "state": {names[id(p)]: dict(state) for p, state in optimizer.state.items()},
    }


def _plan(
    path: str | Path, optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[nn.Parameter, Any]]:
    if saved["class"] != type(optimizer).__name__:
        raise ValueError(
            f"{path}: the optimizer was {saved['class']}, not {type(optimizer).__name__}"
        )
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"{path}: the optimizer had {len(saved['groups'])} parameter groups, "
            f"this one has {len(optimizer.param_groups)}"
        )
    parameters = dict(model.named_parameters())
    unknown = [n for g in saved["groups"] for n in g["params"] if n not in parameters]
    if unknown:
        raise ValueError(f"{path}: the optimizer trains {unknown[0]!r}, which the model has not")
    groups: list[dict[str, Any]] = []
    state: dict[nn.Parameter, Any] = {}
    for group in saved["groups"]:
        groups.append({**group, "params": [parameters[n] for n in group["params"]]})
        on_device = group.get("capturable") or group.get("fused")
        for name in group["params"]:
            p = parameters[name]
            if name in saved["state"]:
                state[p] = {
                    key: _place(key, value, p, bool(on_device))
                    for key, value in saved["state"][name].items()
                }
    return groups, state


def _place(key: str, value: Any, p: Tensor, on_device: bool) -> Any:
    # as torch.optim does: counters stay on the CPU unless the kernels want them beside the weights
    if not isinstance(value, Tensor):
        return value
    clock = key in ("step", "mu_product") and value.dim() == 0
    return value.clone() if clock and not on_device else value.to(p.device, copy=True)


# Random state.


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


# The file: plain values as JSON, tensors by reference.


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while where in tensors:  # {"a/b": …} beside {"a": {"b": …}}
            where += "'"
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, dict):
        pairs = [
            [_encode(k, f"{where}/key", tensors), _encode(v, f"{where}/{k}", tensors)]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"cannot save {where.lstrip('/')}: {type(value).__name__} {value!r:.80}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in inner}
    items = [_decode(v, tensors) for v in inner]
    return tuple(items) if kind == "tuple" else items


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        raw = tensors[name].reshape(-1).view(torch.uint8) if tensors[name].numel() else None
        kind = f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}"
        crc = zlib.crc32(kind.encode(), crc)
        crc = zlib.crc32(b"" if raw is None else raw.numpy(), crc)  # type: ignore[arg-type]
    return f"{crc:08x}"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:
            kind = OSError if "I/O error" in str(error) else ValueError
            raise kind(f"{path}: cannot be written: {error}") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return _read_file(path)
    content = _read_file(path / MAIN)
    for name in content["shards"]:
        for _, part in read_shard(path / name):
            content["model"] |= part["model"]
            for saved, state in zip(content["optimizers"], part["state"], strict=True):
                saved["state"] |= state
    return content


def write_shard(path: Path, parts: dict[str, Any]) -> None:
    """Write experts, each with a checksum of its own, so that it can be read by itself.

    Args:
        parts: name -> {"model": state dict entries, "state": those of each optimizer}.
    """
    tensors: dict[str, Tensor] = {}
    listed = {}
    for name, part in parts.items():
        own: dict[str, Tensor] = {}
        text = json.dumps(_encode(part, name, own))
        listed[name] = [text, _checksum(text, own), list(own)]
        tensors |= own
    _write(path, tensors, {"format": SHARD, "parts": json.dumps(listed)})


def read_shard(
    path: Path, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Any]]:
    """The parts that are wanted, with their names; raises ValueError as `load` does."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != SHARD:
                raise ValueError(f"{path} is no shard of a checkpoint")
            for name, (text, checksum, names) in json.loads(metadata["parts"]).items():
                if wanted(name):
                    own = {n: file.get_tensor(n) for n in names}
                    if _checksum(text, own) != checksum:
                        raise ValueError(f"{path} is damaged: the checksum of {name} is wrong")
                    yield name, _decode(json.loads(text), own)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is torn or no shard: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} was not written by growmoe.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is torn or no checkpoint: {error}") from error
    if _checksum(metadata.get("content", ""), tensors) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    return _decode(json.loads(metadata["content"]), tensors)
