"""CIFAR-10 and CIFAR-100 in the pickled layout in which they are distributed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growmoe.continual.data.fetch import cache_folder, download
from growmoe.continual.data.idx import DataError
from growmoe.continual.stream import Data


def read_cifar10(data_dir: Path | None) -> Data:
    """50,000 + 10,000 colour images of 32x32 in 10 classes."""
    train = tuple(f"data_batch_{i}" for i in range(1, 6))
    return _read("CIFAR10", "cifar-10-batches-py", train, "test_batch", "labels", 10, data_dir)


def read_cifar100(data_dir: Path | None) -> Data:
    """50,000 + 10,000 colour images of 32x32 in 100 classes."""
    return _read("CIFAR100", "cifar-100-python", ("train",), "test", "fine_labels", 100, data_dir)


def _read(
    dataset: str,
    folder: str,
    train: tuple[str, ...],
    test: str,
    key: str,
    num_classes: int,
    data_dir: Path | None,
) -> Data:
    root = data_dir or cache_folder()
    places = [root / folder, root]
    found = next((p for p in places if any((p / name).exists() for name in (*train, test))), None)
    if found is None:
        download(dataset, root, f"unpack it as {root / folder}, or name another --data-dir")
        found = root / folder
    missing = [name for name in (*train, test) if not (found / name).exists()]
    if missing:
        raise DataError(f"{found} lacks {', '.join(missing)}")
    parts = [_read_batch(found / name, key, num_classes) for name in train]
    test_pixels, test_labels = _read_batch(found / test, key, num_classes)
    return Data(
        torch.cat([pixels for pixels, _ in parts]),
        torch.cat([labels for _, labels in parts]),
        test_pixels,
        test_labels,
        white=255,
    )


class _Plain(pickle.Unpickler):
    """Reads numpy arrays and plain containers, and calls nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("ndarray", "dtype", "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batch(path: Path, key: str, num_classes: int) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _Plain(file, encoding="latin1").load()
        pixels, labels = np.asarray(content["data"]), np.asarray(content[key])
    except Exception as error:  # a torn pickle can raise anything
        raise DataError(f"{path}: cannot be read, or is torn: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32:
        raise DataError(f"{path}: pixels are {pixels.dtype} {pixels.shape}, expected [N, 3072]")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {len(pixels)} images, but labels are {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"{path}: a label is outside 0 to {num_classes - 1}")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))
