"""A small language model and token windows for the tests of pruning and merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growmoe.models import TransformerLM


@pytest.fixture
def model() -> TransformerLM:
    return TransformerLM(32, 16, 2, 2, d_hidden=16, num_experts=8, seed=1).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 32, (4, 17), generator=generator) for _ in range(4)]
