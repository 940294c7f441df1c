"""The handwritten digits that come with scikit-learn, 8x8, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from growmoe.continual import require
from growmoe.continual.stream import Data


def read_digits(data_dir: Path | None = None) -> Data:
    """1,347 train and 450 test images, split by class, always in the same way."""
    datasets = require("sklearn.datasets")
    selection = require("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return Data(pixels[train], labels[train], pixels[test], labels[test], white=16)
