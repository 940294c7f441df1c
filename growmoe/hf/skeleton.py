"""A transformers model whose decoder layers are in memory one at a time.

All but the layers (embedding, last norm, head) stays on pages of the checkpoint's files. Hidden
states go through one layer for all sequences, then through the next, and lie in a file meanwhile.

N sequences   S tokens in each   D width
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.compress.calibrate import next_token_loss
from growmoe.compress.layer import CompressError
from growmoe.hf.block import Block, blocks_of
from growmoe.hf.families import family_of
from growmoe.hf.folder import require
from growmoe.hf.shards import Checkpoint


class Tap(nn.Module):
    """In the place of a decoder layer: remembers what it was given, and gives it on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.hidden: Any = None
        self.instead: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # a model may ask a layer of its kind
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.given = hidden_BSD, (args, kwargs)
        return hidden_BSD if self.instead is None else self.instead


class Head(nn.Module):
    """A linear map whose matrix, large and of another dtype, is cast a few rows at a time.

    Args:
        linear: the map.
    """

    ROWS = 4096

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, rows.to(x.dtype)) for rows in self.weight.split(self.ROWS)]
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Skeleton:
    """A model without its layers. It computes in float32 at least.

    Args:
        checkpoint: of a known family, not quantized.
        config: its config.

    Attributes:
        dtype: of what is computed.
        parameters: of the whole model.
        blocks: number of a decoder layer -> the name of the mixture in it.

    Raises:
        CompressError: quantized weights, tensors that the checkpoint lacks, or no mixture.
    """

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        if getattr(config, "quantization_config", None):
            raise CompressError(
                f"{checkpoint.folder} is quantized: calibrate and prune it before quantization"
            )
        self.checkpoint, self.config, self.family = checkpoint, config, family_of(config)
        # many a CPU is a hundred times slower in bfloat16
        dtype = torch.promote_types(getattr(config, "dtype", None) or torch.float32, torch.float32)
        with torch.device("meta"):
            model: Any = require().AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.dtype = dtype
        self.parameters = sum(p.numel() for p in model.parameters())
        self.base: Any = model.get_decoder()
        self.layers = list(self.base.layers)
        self.prefix = next(n for n, m in model.named_modules() if m is self.base.layers)
        self.blocks = {self._layer_number(place.name): place.name for place in blocks_of(model)}
        if not self.blocks:
            raise CompressError(f"{checkpoint.folder}: {config.model_type} without a mixture")
        self.base.layers = nn.ModuleList([Tap(layer) for layer in self.layers])
        self._load_rest()

    @property
    def taps(self) -> list[Tap]:
        return list(self.base.layers)

    def _layer_number(self, block: str) -> int:
        return int(block[len(self.prefix) + 1 :].split(".")[0])

    def _load_rest(self) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        large = [embedding.weight, head.weight]
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name in self.checkpoint.entries:
                value = self.checkpoint.tensor(name)
                as_it_is = any(tensor is weight for weight in large)
                _put(self.model, name, value if as_it_is else value.to(tensor.dtype))
        for module in self.model.modules():  # what is computed from the config, such as rotations
            computed = module._non_persistent_buffers_set
            if any(module._buffers[name] is not None for name in computed):
                own = type(module)(self.config)
                for name in computed:
                    module._buffers[name] = own._buffers[name]
        self.model.tie_weights()
        lacking = [n for n, p in self.model.named_parameters() if p.is_meta]
        if lacking:
            raise CompressError(f"{self.checkpoint.folder} holds no tensor {lacking[0]}")
        embedding.register_forward_hook(lambda module, given, out: out.to(self.dtype))
        self.model.set_output_embeddings(Head(head))

    @contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """A decoder layer, in memory meanwhile."""
        layer = self.layers[number]
        empty = dict(layer.state_dict(keep_vars=True))
        try:
            for name, tensor in empty.items():
                _put(layer, name, self._read(number, name, tensor))
            yield layer
        finally:
            for name, tensor in empty.items():
                _put(layer, name, tensor)

    def _read(self, number: int, name: str, like: Tensor) -> Tensor:
        start = f"{self.prefix}.{number}."
        inner = name.removeprefix(f"{self.family.block}.experts.")
        if self.family.split is None or inner == name:
            return self._checked(start + self.family.on_disk(name), like.shape).to(like.dtype)
        gate, up, down = self.family.split
        parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[inner]
        found = torch.empty(like.shape, dtype=like.dtype)
        shape = (like.shape[1] // len(parts), like.shape[2])
        for e in range(len(found)):
            for half, part in zip(found[e].chunk(len(parts)), parts, strict=True):
                disk = f"{start}{self.family.disk_block}.experts.{e}.{part}"
                half.copy_(self._checked(disk, shape))
        return found

    def _checked(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self.checkpoint.tensor(name)
        if found.shape != tuple(shape):
            raise CompressError(
                f"{self.checkpoint.folder}: {name} is {tuple(found.shape)}, the config asks for "
                f"{tuple(shape)}"
            )
        return found

    def block(self, number: int) -> Block:
        """The mixture of a decoder layer that is loaded."""
        name = self.blocks[number]
        inner = name.removeprefix(f"{self.prefix}.{number}.")
        return Block(name, self.layers[number].get_submodule(inner), self.family, self.model)

    @torch.no_grad()
    def embed(self, token_NS: Tensor, hidden_NSD: Tensor, batch_size: int) -> None:
        """What comes to the first layer, written into `hidden_NSD`."""
        for start in range(0, len(token_NS), batch_size):
            part = slice(start, start + batch_size)
            self.base(token_NS[part], use_cache=False)
            hidden_NSD[part] = self.taps[0].hidden

    @torch.no_grad()
    def through(
        self,
        number: int,
        token_NS: Tensor,
        hidden_NSD: Tensor,
        out_NSD: Tensor,
        batch_size: int,
        listener: Any = None,
        observed: int = 0,
    ) -> None:
        """All sequences through a decoder layer that is loaded: `hidden_NSD` -> `out_NSD`.

        Args:
            listener: told of each forward of the mixture (`growmoe.compress.Observed`) …
            observed: … over the first so many sequences.
        """
        layer = self.layers[number]
        size = None
        start = 0
        while start < len(token_NS):
            watched = listener is not None and start < observed
            stop = min(start + batch_size, observed if watched else len(token_NS))
            if stop - start != size:  # masks and positions depend on the shape alone
                self.base(token_NS[start:stop], use_cache=False)
                args, kwargs = self.taps[number].given
                size = stop - start
            hidden_BSD = hidden_NSD[start:stop].clone()
            if watched:
                with self.block(number).observe(listener):
                    out = layer(hidden_BSD, *args, **kwargs)
            else:
                out = layer(hidden_BSD, *args, **kwargs)
            out_NSD[start:stop] = out[0] if isinstance(out, tuple) else out
            start = stop

    @torch.no_grad()
    def losses(self, token_NS1: Tensor, hidden_NSD: Tensor) -> Tensor:
        """Nats per token of each sequence, from what the last layer gave: float64 [N]."""
        last = self.taps[-1]
        found = []
        try:
            for n in range(len(token_NS1)):  # one by one: logits are large
                last.instead = hidden_NSD[n : n + 1].clone()
                found.append(next_token_loss(self.model, token_NS1[n : n + 1]).double())
        finally:
            last.instead = None
        return torch.cat(found)


def hidden_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file, which is made if it is not there.

    Raises:
        CompressError: the disk has no room for it.
    """
    number = int(torch.tensor(shape).prod())
    size = number * dtype.itemsize
    try:
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk must not be met while it is mapped
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
    except OSError as error:
        raise CompressError(f"cannot write {path}: {error.strerror or error}") from error
    return torch.from_file(str(path), shared=True, size=number, dtype=dtype).view(*shape)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if last in owner._parameters:
        owner._parameters[last] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        owner._buffers[last] = value
