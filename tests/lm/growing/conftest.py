"""Domains that a tiny model can tell apart and learn in seconds."""

from __future__ import annotations

import pytest
import torch

from growmoe.lm import Domain

WORDS = {
    "low": [b"aba ", b"acada ", b"bad ", b"cab "],
    "high": [b"XYX ", b"ZWY ", b"WXYZ ", b"ZZ "],
    "digits": [b"12;", b"3434;", b"567;", b"89;"],
}


def domain_of(name: str, length: int = 40_000) -> Domain:
    generator = torch.Generator().manual_seed(len(name))
    parts = [WORDS[name][int(i)] for i in torch.randint(4, (length // 3,), generator=generator)]
    tokens = torch.tensor(list(b"".join(parts)[:length]), dtype=torch.uint8)
    train, rest = tokens[: length * 8 // 10], tokens[length * 8 // 10 :]
    half = len(rest) // 2
    return Domain(name, train, rest[:half], rest[half:], (len(train), half, len(rest) - half))


@pytest.fixture(scope="session")
def alphabets() -> dict[str, Domain]:
    """Three domains over disjoint alphabets."""
    return {name: domain_of(name) for name in WORDS}
