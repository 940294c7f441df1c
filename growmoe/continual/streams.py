"""The streams of the bench: image data cut into experiences of a few classes each.

A stream is class-incremental: each experience brings classes never seen before, every test asks for
the class among all of them, and nothing says which experience a test image comes from. The order of
the classes is drawn from the seed.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growmoe.continual import require
from growmoe.continual.idx import DataError, read_pair

__all__ = ["STREAMS", "DataError", "Stream", "StreamSource", "class_incremental", "load"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT_SECONDS = 10.0
_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


@dataclass(frozen=True)
class Data:
    """Images and labels before they are cut into experiences.

    Pixels are uint8 [N, 1, H, W] from 0 to `white`; labels are int64 [N].
    """

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    white: int


@dataclass(frozen=True)
class Stream:
    """A class-incremental stream, held in memory as unsigned bytes.

    Attributes:
        name: as in `STREAMS`.
        seed: what the class order was drawn from.
        data: pixels, uint8 [N, 1, H, W], and labels, int64 [N], of the train and test images.
        class_order: the classes in the order in which they arrive.
        experience_classes: the classes of each experience.
        train_index: for each experience, the positions of its train images, int64.
        test_index: for each experience, the positions of its test images, int64.
    """

    name: str
    seed: int
    data: Data = field(repr=False)
    class_order: tuple[int, ...]
    experience_classes: tuple[tuple[int, ...], ...]
    train_index: tuple[Tensor, ...] = field(repr=False)
    test_index: tuple[Tensor, ...] = field(repr=False)

    @property
    def num_experiences(self) -> int:
        return len(self.experience_classes)

    @property
    def num_classes(self) -> int:
        return len(self.class_order)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.data.train_pixels.shape[1:]
        return channels, height, width

    @property
    def bytes_per_example(self) -> int:
        """What keeping one example costs: a byte per pixel and a byte for the label."""
        return self.data.train_pixels[0].numel() + 1

    @property
    def test_counts(self) -> list[int]:
        """The number of test images of each experience."""
        return [len(index) for index in self.test_index]

    def train_images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Train images as float32 [N, 1, H, W] in [0, 1]."""
        return self.data.train_pixels[index].float() / self.data.white

    def test_images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Test images as float32 [N, 1, H, W] in [0, 1]."""
        return self.data.test_pixels[index].float() / self.data.white

    def digest(self) -> str:
        """A fingerprint of the pixels and labels, the same whatever the order of the classes."""
        digest = hashlib.sha256()
        for part in (
            self.data.train_pixels,
            self.data.train_labels,
            self.data.test_pixels,
            self.data.test_labels,
        ):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def benchmark(self) -> Any:
        """The stream as an Avalanche benchmark, with task label 0 everywhere.

        Returns:
            A benchmark whose `train_stream` and `test_stream` have `num_experiences` experiences of
            (image float32 [1, H, W], label, 0).

        Raises:
            ImportError: Avalanche is not installed.
        """
        generators = require("avalanche.benchmarks.scenarios.deprecated.generators")
        return generators.nc_benchmark(
            _Examples(self.data.train_pixels, self.data.train_labels, self.data.white),
            _Examples(self.data.test_pixels, self.data.test_labels, self.data.white),
            n_experiences=self.num_experiences,
            task_labels=False,
            shuffle=False,
            fixed_class_order=list(self.class_order),
        )


class _Examples(torch.utils.data.Dataset):
    """(image, label) pairs for Avalanche, which reads `targets`."""

    def __init__(self, pixels: Tensor, labels: Tensor, white: int) -> None:
        self.pixels, self.white = pixels, white
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pixels[i] / self.white, self.targets[i]


@dataclass(frozen=True)
class StreamSource:
    """A stream by name.

    Attributes:
        description: one line for the user.
        read: takes the data directory (or None) and gives the data.
        num_experiences: how many experiences the classes are cut into.
    """

    description: str
    read: Callable[[Path | None], Data]
    num_experiences: int = 5


def class_incremental(name: str, data: Data, seed: int, num_experiences: int = 5) -> Stream:
    """Cut data into experiences of equally many classes, in an order drawn from the seed.

    Raises:
        ValueError: the classes cannot be divided evenly, or a class has no train or test image.
    """
    classes = sorted(set(data.train_labels.tolist()))
    if classes != list(range(len(classes))) or set(data.test_labels.tolist()) != set(classes):
        raise ValueError(f"stream {name!r} needs classes 0 to K-1, each with train and test images")
    if len(classes) % num_experiences:
        raise ValueError(f"{len(classes)} classes cannot be cut into {num_experiences} experiences")
    order = np.random.default_rng(seed).permutation(len(classes)).tolist()
    size = len(classes) // num_experiences
    groups = tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))

    def positions(labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.isin(labels, torch.tensor(group)).nonzero().flatten() for group in groups
        )

    return Stream(
        name=name,
        seed=seed,
        data=data,
        class_order=tuple(order),
        experience_classes=groups,
        train_index=positions(data.train_labels),
        test_index=positions(data.test_labels),
    )


def load(name: str, seed: int, data_dir: str | Path | None = None) -> Stream:
    """Load a stream by name.

    Args:
        name: one of `STREAMS`.
        seed: draws the order of the classes; the same seed gives the same stream.
        data_dir: where the data lies, laid out like torchvision's (`data_dir/MNIST/raw/...`), or
            the folder of the IDX files itself. Without it: the Debian package where there is one,
            then a download into the cache. `split-digits` needs no data.

    Raises:
        KeyError: no stream has this name; the message gives the nearest.
        DataError: the data is missing or damaged.
        ImportError: the package that holds the data is not installed.
    """
    if name not in STREAMS:
        raise KeyError(f"no stream {name!r}{nearest(name, STREAMS)}")
    source = STREAMS[name]
    data = source.read(None if data_dir is None else Path(data_dir).expanduser())
    return class_incremental(name, data, seed, source.num_experiences)


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of a message about an unknown name: the nearest ones, or all."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else f": choose from {', '.join(known)}"


def _read_digits(data_dir: Path | None) -> Data:
    datasets = require("sklearn.datasets")
    selection = require("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return Data(pixels[train], labels[train], pixels[test], labels[test], white=16)


def _plain_or_gz(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    return zipped if zipped.exists() and not path.exists() else path


def _read_idx_folder(folder: Path) -> Data | None:
    """The four files in `folder`, or None if none of them is there."""
    paths = {name: _plain_or_gz(folder / name) for pair in _FILES for name in pair}
    missing = [name for name, path in paths.items() if not path.exists()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} (with or without .gz)")
    (train_pixels, train_labels), (test_pixels, test_labels) = (
        read_pair(paths[images], paths[labels], num_classes=10) for images, labels in _FILES
    )
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        raise DataError(
            f"{folder}: train images are {train_pixels.shape[1:]}, test {test_pixels.shape[1:]}"
        )
    return Data(
        torch.from_numpy(train_pixels).unsqueeze(1),
        torch.from_numpy(train_labels.astype(np.int64)),
        torch.from_numpy(test_pixels).unsqueeze(1),
        torch.from_numpy(test_labels.astype(np.int64)),
        white=255,
    )


def _read_mnist(dataset: str, data_dir: Path | None, packaged: Path | None) -> Data:
    """Find MNIST or Fashion-MNIST: the given folder, the packaged one, the cache, a download."""
    root = data_dir or _cache_folder()
    folders = [root / dataset / "raw", root]
    if data_dir is None and packaged is not None:
        folders.insert(0, packaged)
    for folder in folders:
        data = _read_idx_folder(folder)
        if data is not None:
            return data
    _download(dataset, root, packaged)
    data = _read_idx_folder(root / dataset / "raw")
    if data is None:
        raise DataError(f"{dataset} was downloaded, but {root / dataset / 'raw'} is empty")
    return data


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growmoe"


def _download(dataset: str, root: Path, packaged: Path | None) -> None:
    how = f"download its four files into {root / dataset / 'raw'}, or name another --data-dir"
    if packaged is not None:
        how += f", or install Debian's dataset-fashion-mnist ({packaged})"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        getattr(require("torchvision.datasets"), dataset)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise DataError(f"{dataset} is not here and cannot be fetched ({reason}): {how}") from error
    finally:
        socket.setdefaulttimeout(before)


STREAMS: dict[str, StreamSource] = {
    "split-digits": StreamSource(
        "scikit-learn's 8x8 digits, 1,347 + 450; no download", _read_digits
    ),
    "split-mnist": StreamSource(
        "MNIST, 60,000 + 10,000 images of 28x28",
        lambda data_dir: _read_mnist("MNIST", data_dir, None),
    ),
    "split-fashion-mnist": StreamSource(
        "Fashion-MNIST, 60,000 + 10,000 images of 28x28",
        lambda data_dir: _read_mnist("FashionMNIST", data_dir, DEBIAN_FASHION_MNIST),
    ),
}
