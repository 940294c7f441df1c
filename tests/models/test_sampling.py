"""Sampling draws from the distribution that its settings leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe.models.sampling import sample

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3])


def frequencies(draws: int = 20_000, **settings: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = sample(PROBS.log().expand(draws, 4), generator=generator, **settings)
    return torch.bincount(drawn, minlength=4) / draws


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
)
def test_frequencies_are_what_the_settings_say(settings: dict, want: list[float]) -> None:
    torch.testing.assert_close(
        frequencies(**settings), torch.tensor(want).float(), atol=0.015, rtol=0
    )


@given(
    seed=st.integers(0, 1000),
    top_k=st.none() | st.integers(1, 8),
    top_p=st.none() | st.floats(1e-6, 1.0),
)
def test_no_token_outside_the_filters_is_drawn(
    seed: int, top_k: int | None, top_p: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 6, generator=generator)
    drawn = sample(logits, 1.0, top_k, top_p, generator)
    for row, token in zip(logits.double().softmax(-1), drawn.tolist(), strict=True):
        likelier = row[row > row[token]]
        assert top_k is None or len(likelier) < top_k
        assert top_p is None or float(likelier.sum()) < top_p + 1e-6 or not len(likelier)
