"""Folders of images by class: DIR/train/CLASS/*.png and DIR/test/CLASS/*.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growmoe.continual import require
from growmoe.continual.data.idx import DataError
from growmoe.continual.stream import Data

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


def read_folders(data_dir: Path | None) -> Data:
    """Images of one size in folders named by their classes, which are numbered by name.

    All are grey, or all become colour images.
    """
    if data_dir is None:
        raise DataError("name the folder that holds train/CLASS/*.png and test/CLASS/*.png "
                        "with --data-dir")  # fmt: skip
    names: list[str] | None = None
    parts = []
    for kind in ("train", "test"):
        folder = data_dir / kind
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: expected {folder}/CLASS/*.png")
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if names is not None and classes != names:
            odd = sorted(set(names) ^ set(classes))
            raise DataError(f"{data_dir}: train and test differ in the classes {', '.join(odd)}")
        names = classes
        parts.append(_read_classes(folder, classes))
    if not names:
        raise DataError(f"{data_dir / 'train'} holds no folders of classes")
    (train, train_labels), (test, test_labels) = parts
    shapes = {tuple(image.shape[1:]) for image in (*train, *test)}
    if len(shapes) > 1:
        raise DataError(f"{data_dir}: images differ in size ({sorted(shapes)[:3]}): resize them")
    colour = any(len(image) == 3 for image in (*train, *test))

    def stack(images: list[Tensor]) -> Tensor:
        return torch.stack([image.expand(3 if colour else 1, -1, -1) for image in images])

    return Data(
        stack(train), torch.tensor(train_labels), stack(test), torch.tensor(test_labels), 255
    )


def _read_classes(folder: Path, classes: list[str]) -> tuple[list[Tensor], list[int]]:
    image_module = require("PIL.Image")
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _ENDINGS)
        if not paths:
            raise DataError(f"{folder / name} holds no images")
        for path in paths:
            try:
                with image_module.open(path) as picture:
                    grey = picture.mode in ("1", "L", "I;16")
                    array = np.asarray(picture.convert("L" if grey else "RGB"), np.uint8)
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{path}: cannot be read, or is torn: {error}") from error
            images.append(torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1))
            labels.append(label)
    return [image.permute(2, 0, 1).contiguous() for image in images], labels
