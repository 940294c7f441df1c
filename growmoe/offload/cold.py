"""Where experts lie while they are not on the device: in checked files, or in pinned memory.

A directory of experts holds one safetensors file for each expert and a manifest, which is written
last: a directory without one is unfinished. Files are read whole into memory of their own rather
than mapped, so that a file cut short is an error and not a crash, and the wait for the disk is the
loader's and not the expert's. Every read is checked against the manifest's checksum (crc32, which
takes half as long as the copy from the page cache that it follows).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = "growmoe-offload-1"
MANIFEST = "growmoe-offload.json"

Key = tuple[str, int]  # the layer's name and the expert's id
Tensors = dict[str, Tensor]


class Store(Protocol):
    """Gives an expert's tensors on the CPU, each with the shape, dtype and strides it had."""

    def read(self, key: Key) -> Tensors: ...


class Pinned:
    """Tensors in page-locked memory, from which an accelerator copies while it computes."""

    def __init__(self, experts: Mapping[Key, Tensors]) -> None:
        self._tensors: dict[Key, Tensors] = {}
        for key, tensors in experts.items():
            self._tensors[key] = {}
            for name, tensor in tensors.items():
                cold = tensor.detach().cpu().pin_memory()
                self._tensors[key][name] = cold
                if tensor.device.type == "cpu":  # the same values: at no time are there two copies
                    tensor.data = cold

    def read(self, key: Key) -> Tensors:
        return self._tensors[key]


@dataclass(frozen=True)
class _File:
    path: Path
    bytes: int
    checksum: str
    tensors: Tensors  # on the meta device: shapes, dtypes and strides


class Files:
    """One file for each expert in a directory, written once and read back.

    A directory that was written for the same weights is used as it is, after each file is checked.

    Args:
        directory: is made if it is not there.
        experts: the tensors of each expert.
        pin: read into page-locked memory.

    Raises:
        ValueError: the directory holds experts of other weights, or files that are not ours; a
            file in it is missing, torn or damaged. The message names it.
        OSError: a file cannot be written; what is left behind is used by the next attempt.
    """

    def __init__(
        self, directory: str | Path, experts: Mapping[Key, Tensors], pin: bool = False
    ) -> None:
        self.directory = Path(directory)
        self._pin = pin
        layers = list(dict.fromkeys(layer for layer, _ in experts))
        names = {
            key: f"layer-{layers.index(key[0]):03d}-expert-{key[1]}.safetensors" for key in experts
        }
        self._files: dict[Key, _File] = {}
        listed = self._manifest()
        if listed is None:
            self._refuse_foreign({*names.values()})
        elif set(listed) != set(experts):
            raise ValueError(
                f"{self.directory} holds {_tell(listed)}, the model has {_tell(experts)}; it is of "
                "another model: give a directory of its own, or delete it"
            )
        for key, tensors in experts.items():
            checksum = _checksum(tensors)
            # of a plain layout; what overlaps itself (an expanded tensor) is laid out anew
            like = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
            path = self.directory / (names[key] if listed is None else listed[key]["file"])
            if listed is None:
                _write(path, tensors)
                size = path.stat().st_size
            else:
                size = listed[key]["bytes"]
                if checksum != listed[key]["checksum"]:
                    raise ValueError(
                        f"{path} holds other weights than expert {key[1]} of layer {key[0]!r}: "
                        f"{self.directory} is of another model: give a directory of its own, or "
                        "delete it"
                    )
            self._files[key] = _File(path, size, checksum, like)
            self.read(key)
        if listed is None:
            self._write_manifest()

    def read(self, key: Key) -> Tensors:
        """An expert's tensors, in memory of their own.

        Raises:
            ValueError: the file is missing, torn or damaged.
        """
        file = self._files[key]
        tensors: Tensors = {}
        try:
            with open(file.path, "rb", buffering=0) as source:
                size = os.fstat(source.fileno()).st_size
                if size != file.bytes:
                    raise ValueError(
                        f"{file.path} is torn: it has {size} bytes, {file.bytes} were written"
                    )
                offsets = _offsets(source, file)
                for name, like in file.tensors.items():
                    tensor = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._pin)
                    source.seek(offsets[name])
                    _fill(source, tensor, file.path)
                    if tensor.stride() != like.stride():
                        # a transposed matrix may be summed in another order
                        plain, tensor = (
                            tensor,
                            torch.empty_strided(
                                like.shape, like.stride(), dtype=like.dtype, pin_memory=self._pin
                            ),
                        )
                        tensor.copy_(plain)
                    tensors[name] = tensor
        except FileNotFoundError:
            raise ValueError(f"{file.path} is missing") from None
        if _checksum(tensors) != file.checksum:
            raise ValueError(f"{file.path} is damaged: its checksum is wrong")
        return tensors

    def _manifest(self) -> dict[Key, dict[str, Any]] | None:
        path = self.directory / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"{path} has format {manifest['format']!r}, not {FORMAT!r}")
            return {
                (e["layer"], e["expert"]): {key: e[key] for key in ("file", "bytes", "checksum")}
                for e in manifest["experts"]
            }
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is torn or damaged: {error!r}") from error

    def _refuse_foreign(self, ours: set[str]) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"directory={str(self.directory)!r} is a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        # an earlier attempt may have been cut short before its manifest
        allowed = ours | {_part(name) for name in [*ours, MANIFEST]}
        foreign = sorted(p.name for p in self.directory.iterdir() if p.name not in allowed)
        if foreign:
            raise ValueError(
                f"directory={str(self.directory)!r} has no {MANIFEST} but holds {foreign[0]!r}: "
                "give an empty directory"
            )

    def _write_manifest(self) -> None:
        experts = [
            {
                "layer": layer,
                "expert": id,
                "file": file.path.name,
                "bytes": file.bytes,
                "checksum": file.checksum,
            }
            for (layer, id), file in self._files.items()
        ]
        text = json.dumps({"format": FORMAT, "experts": experts}, indent=1)
        _replace(self.directory / MANIFEST, text.encode())


def _tell(keys: Mapping[Key, Any]) -> str:
    return f"{len(keys)} experts of layers {sorted({layer for layer, _ in keys})}"


def _part(name: str) -> str:
    return f".{name}.part"


def _write(path: Path, tensors: Tensors) -> None:
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _replace(path, safetensors.torch.save(plain, {"format": FORMAT}))


def _replace(path: Path, content: bytes) -> None:
    part = path.parent / _part(path.name)
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _offsets(source: Any, file: _File) -> dict[str, int]:
    """Where in the file each tensor begins."""
    length = int.from_bytes(source.read(8), "little")
    try:
        header = json.loads(source.read(min(length, file.bytes)))
        spans = {name: header[name]["data_offsets"] for name in file.tensors}
        if any(end - start != file.tensors[name].nbytes for name, (start, end) in spans.items()):
            raise ValueError("a tensor has another size")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.path} is damaged: its header is wrong") from error
    return {name: 8 + length + start for name, (start, _) in spans.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _fill(source: Any, tensor: Tensor, path: Path) -> None:
    if not tensor.numel():
        return
    left = _bytes(tensor)
    while left:
        count = source.readinto(left)
        if not count:
            raise ValueError(f"{path} is torn: {len(left)} bytes are missing at its end")
        left = left[count:]


def _checksum(tensors: Tensors) -> str:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(_bytes(tensor), crc)
    return f"{crc:08x}"
