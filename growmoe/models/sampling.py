"""Draws the next token from a model's logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for settings of `sample` that are out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row: float [B, V] -> int64 [B].

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens.
        top_p: of these, only the fewest whose probabilities sum to p or more (Holtzman et al.
            2019, arXiv 1904.09751).
        generator: to draw from, on its own device; torch's global one if left out.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    # ranked: the filters below are then a prefix, and ties are cut
    sorted_BV, token_BV = (logits_BV.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = -math.inf
    probs_BV = sorted_BV.softmax(-1)
    if top_p is not None:
        before_BV = probs_BV.cumsum(-1) - probs_BV
        outside_BV = before_BV >= top_p
        outside_BV[:, 0] = False  # the likeliest always stays, whatever p rounds to
        probs_BV = probs_BV.masked_fill(outside_BV, 0.0)
    if generator is not None:
        probs_BV = probs_BV.to(generator.device)
    rank_B1 = torch.multinomial(probs_BV, 1, generator=generator).to(token_BV.device)
    return token_BV.gather(1, rank_B1)[:, 0]
