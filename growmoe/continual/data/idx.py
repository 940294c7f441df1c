"""Reads and checks the IDX files in which MNIST and Fashion-MNIST are distributed.

The format (yann.lecun.com/exdb/mnist): four bytes of magic, two zeros, 0x08 for unsigned bytes and
the number of dimensions; one big-endian 32-bit size per dimension; then the bytes, row by row.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np


class DataError(Exception):
    """The data of a stream is missing or damaged; the message says which file, and what to do."""


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array with that many dimensions.

    Raises:
        DataError: the file cannot be read, is not IDX, or its header gives another length.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, or is torn: {error}") from error
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise DataError(f"{path}: {len(raw)} bytes are too few for an IDX header of {header}")
    magic = bytes([0, 0, 8, dimensions])
    if raw[:4] != magic:
        raise DataError(f"{path}: magic number {raw[:4].hex()}, expected {magic.hex()}")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise DataError(
            f"{path}: {len(raw)} bytes, but its header says {expected}: the file is truncated "
            "or not what it claims to be"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def read_pair(images: Path, labels: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of images and the file of their labels.

    Returns:
        Images, uint8 [N, H, W], and labels, uint8 [N], in 0..num_classes-1.

    Raises:
        DataError: either file is damaged, or the two do not belong together.
    """
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} has {len(pixels)} images, but {labels} has {len(classes)} labels"
        )
    if len(classes) and int(classes.max()) >= num_classes:
        raise DataError(f"{labels}: label {int(classes.max())}, expected 0 to {num_classes - 1}")
    return pixels, classes
