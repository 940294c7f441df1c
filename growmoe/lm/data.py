"""Batches: random windows of the domains, drawn anew from the seed and the step alone.

B  sequences in a batch
S  tokens in a sequence
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from growmoe.lm.config import TrainError
from growmoe.lm.domains import Domain, Split


def batch(
    domains: Mapping[str, Domain],
    weights: Sequence[float] | None,
    step: int,
    seed: int,
    batch_size: int,
    sequence_length: int,
    split: Split = "train",
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: the same for the same arguments, whatever was drawn before.

    Each sequence takes a domain with probability proportional to its weight, then a window of
    S + 1 tokens at any place of it with the same probability.

    Args:
        weights: one for each domain, in order; equal if left out.

    Returns:
        x_BS: int64 [B, S], the tokens.
        y_BS: int64 [B, S], the token after each.
        domain_B: int64 [B], the position in `domains` of each sequence's domain.

    Raises:
        TrainError: a domain with a weight is shorter than S + 1 tokens.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, step))
    chances = torch.ones(len(domains)) if weights is None else torch.tensor(weights).float()
    domain_B = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
    place_B = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    window = torch.arange(sequence_length + 1)
    tokens_BS1 = torch.empty(batch_size, sequence_length + 1, dtype=torch.int64)
    for i, domain in enumerate(domains.values()):
        rows = (domain_B == i).nonzero()[:, 0]
        if len(rows):
            tokens = domain.tokens(split)
            starts = _starts(domain, split, sequence_length)
            start = (place_B[rows] * starts).long()
            tokens_BS1[rows] = tokens[start[:, None] + window].long()
    return tokens_BS1[:, :-1].contiguous(), tokens_BS1[:, 1:].contiguous(), domain_B


def windows(domain: Domain, split: Split, count: int, sequence_length: int) -> Tensor:
    """int64 [N, S + 1]: up to `count` windows at even distances, which share no target.

    Raises:
        TrainError: the domain's part is shorter than S + 1 tokens.
    """
    starts = _starts(domain, split, sequence_length)
    count = min(count, (starts - 1) // sequence_length + 1)
    start = torch.linspace(0, starts - 1, count, dtype=torch.float64).long()
    return domain.tokens(split)[start[:, None] + torch.arange(sequence_length + 1)].long()


def phase_weights(
    curriculum: str, weights: Sequence[float], domains: int, step: int, steps: int
) -> list[float]:
    """The weights of the domains at a step; in "phases" that of the phase is 1, the others 0."""
    if curriculum == "phases":
        now = min(step * domains // steps, domains - 1)
        return [float(i == now) for i in range(domains)]
    return list(weights) or [1.0] * domains


def _starts(domain: Domain, split: Split, sequence_length: int) -> int:
    """How many windows of S + 1 tokens begin in a domain's part."""
    starts = len(domain.tokens(split)) - sequence_length
    if starts < 1:
        raise TrainError(
            f"domain {domain.name!r}: its {split} part has {len(domain.tokens(split))} tokens, "
            f"sequence_length={sequence_length} needs {sequence_length + 1}"
        )
    return starts


def _seed_of(seed: int, step: int) -> int:
    # hashed, for neighbouring seeds of a generator begin alike
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
