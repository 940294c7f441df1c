"""A text with a structure that a tiny model can learn."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two domains as "name=path": words in a fixed order, and numbers."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    phrase = "the quick brown fox jumps over the lazy dog and runs away"
    words = phrase.split()
    starts = [draw.randrange(len(words)) for _ in range(600)]
    (folder / "words.txt").write_text(
        " ".join(words[(s + i) % len(words)] for s in starts for i in range(8))
    )
    (folder / "numbers.txt").write_text("\n".join(f"{i} {i * i}" for i in range(2000)))
    return tuple(f"{name}={folder / name}.txt" for name in ("words", "numbers"))
