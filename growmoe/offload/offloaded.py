"""Offloads a model's experts, and brings them back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from growmoe.moe import MoE, moe_layers
from growmoe.offload.bank import OffloadedBank, enter, refuse_load
from growmoe.offload.cache import Cache, Loader, Stats
from growmoe.offload.cold import Files, Pinned, Store
from growmoe.offload.eligible import budgets_of, check_layer, refuse_sharing, tensors_of

_id = id  # `id` is an expert's, here as everywhere


@torch.inference_mode(False)
def offload(
    model: nn.Module,
    cache: int | None = None,
    *,
    cache_bytes: int | None = None,
    directory: str | Path | None = None,
    device: torch.device | str | None = None,
    prefetch: bool = False,
) -> Offloaded:
    """Keep only the hot experts of each MoE layer on the device, for inference.

        with growmoe.offload.offload(model.eval(), cache=8, directory="experts") as offloaded:
            with torch.no_grad():
                y = model(x)
        print(offloaded.hit_rate)

    All else, shared experts and routers among it, stays where it is. The layers refuse training
    mode, gradients, loading, conversion, copies and new structure until `restore`; `freeze`, saving
    and calling single experts work as ever.

    Args:
        model: with at least one `MoE` layer.
        cache: experts that each layer keeps on the device.
        cache_bytes: instead, bytes of experts on the device in all, shared out among the layers
            by their size.
        directory: where the others lie, one file each. It is written once; one that was written
            for the same weights before is checked and used again, and it is never deleted. If left
            out they lie in pinned CPU memory, which makes sense for a CUDA device alone.
        device: where experts run, and where all else in the model is moved meanwhile; each layer's
            own device if left out.
        prefetch: load early what the next layer seems to want; it costs one more run of each
            router.

    Returns:
        A handle with the statistics, to be used as a context manager or by its `restore`.

    Raises:
        ValueError: neither or both of cache and cache_bytes, or one that does not hold a layer's
            largest expert; no MoE layer; a CPU without a directory; a directory of other weights or
            with a damaged file; experts that share memory with anything else (tied), hold mixtures
            of their own, or hold anything but plain tensors; a router that reads its experts'
            weights (`ClosedFormGate`). Nothing has changed then.
        OSError: the directory cannot be written. Nothing has changed in the model then.
    """
    layers = moe_layers(model)
    if (cache is None) == (cache_bytes is None):
        raise ValueError(f"offload: give cache or cache_bytes, got {cache!r} and {cache_bytes!r}")
    for argument, value in (("cache", cache), ("cache_bytes", cache_bytes)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"offload: {argument} must be a positive integer, got {value!r}")
    if not layers:
        raise ValueError(f"offload: {type(model).__name__} has no MoE layer")
    for name, layer in layers.items():
        check_layer(name, layer)
    refuse_sharing(model, layers)
    held = {name: tensors_of(name, layer) for name, layer in layers.items()}
    budgets = budgets_of(held, cache, cache_bytes)
    target = None if device is None else _indexed(torch.device(device))
    origin = _only_device(model) if target is not None else None
    devices = {name: target or layer.recorder.novel.device for name, layer in layers.items()}
    kinds = {d.type for d in devices.values()}
    if not kinds <= {"cpu", "cuda"}:
        raise ValueError(f"offload: device must be a CPU or CUDA, got {sorted(kinds)}")
    if directory is None and "cpu" in kinds:
        raise ValueError("offload: experts on a CPU can only go to disk: give directory=")
    flat = {(name, id): own for name, of in held.items() for id, own in of.items()}
    store: Store = Pinned(flat) if directory is None else Files(directory, flat, "cuda" in kinds)
    loaders = {d: Loader(store, d) for d in dict.fromkeys(devices.values())}
    caches = {
        name: Cache(name, held[name], loaders[devices[name]], *budgets[name]) for name in layers
    }
    return Offloaded(
        model, layers, caches, (target, origin) if target and origin else None, prefetch
    )


class Offloaded:
    """A model whose experts come and go; leaving the context brings them back.

    Attributes:
        stats: for each layer by its name, what its cache was asked for and what it had.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MoE],
        caches: Mapping[str, Cache],
        move: tuple[torch.device, torch.device] | None,
        prefetch: bool,
    ) -> None:
        self.stats: dict[str, Stats] = {name: c.stats for name, c in caches.items()}
        self._model, self._layers, self._caches = model, dict(layers), dict(caches)
        self._origin = {
            _id(t): t.device
            for c in caches.values()
            for own in c.tensors.values()
            for t in own.values()
        }
        self._move = move
        if move is not None:
            _move_rest(model, layers, move[0])
        following = [*layers][1:]
        self._hooks = [model.register_load_state_dict_pre_hook(refuse_load)]
        for name, layer in layers.items():
            later = following.pop(0) if following and prefetch else None
            after = None if later is None else (layers[later], caches[later])
            self._hooks += enter(layer, caches[name], after)

    @property
    def hit_rate(self) -> float:
        """Over all layers: experts that were there when they were needed; NaN at first."""
        return sum(self.stats.values(), Stats()).hit_rate

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Bring all experts back to where they were, and end the loading threads.

        Parameters are the objects they were, with the values they had. Restoring twice is once.

        Raises:
            ValueError: a file cannot be read; then all stays offloaded.
        """
        with ExitStack() as locks:
            for c in self._caches.values():
                locks.enter_context(c.lock)
                if c.loader.device.type == "cuda":
                    torch.cuda.synchronize(c.loader.device)
            back = [
                (t, values[n].to(self._origin[_id(t)]))
                for c in self._caches.values()
                for id, own in c.tensors.items()
                for values in [c.read(id)]
                for n, t in own.items()
            ]
            for t, value in back:
                t.data = value
            for name, layer in self._layers.items():
                cast(OffloadedBank, layer.experts).leave()
                self._caches[name].loader.close()
            for hook in self._hooks:
                hook.remove()
            if self._move is not None:
                _move_rest(self._model, {}, self._move[1])
        self._layers, self._caches, self._hooks, self._move = {}, {}, [], None

    def __enter__(self) -> Offloaded:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "offloaded" if self._layers else "restored"
        return f"Offloaded({len(self.stats)} layers, {state}, hit rate {self.hit_rate:.1%})"


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _only_device(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(
            f"offload: with device= the model must lie on one device, it lies on "
            f"{sorted(map(str, devices))}"
        )
    return devices.pop()


def _move_rest(model: nn.Module, layers: Mapping[str, MoE], device: torch.device) -> None:
    """Move all modules but the bodies of these layers' experts."""
    stays = {
        _id(m)
        for layer in layers.values()
        for e in layer.experts.values()
        for m in e.body.modules()
    }
    for module in model.modules():
        if _id(module) not in stays:
            module._apply(lambda t: t.to(device), recurse=False)
