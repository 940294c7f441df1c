"""Text files as batches of token windows: what calibrates, what selects, what evaluates.

S  tokens in a sequence
N  windows
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from growmoe.compress.layer import CompressError

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Texts:
    """Token windows, int64 [B, S + 1] each, with nothing in common between the three.

    Attributes:
        calibration: statistics are collected on these.
        selection: losses that decide something are measured on these.
        evaluation: domain -> what the report is measured on, and nothing else.
        training: step -> a batch, for recovery.
    """

    calibration: list[Tensor]
    selection: list[Tensor]
    evaluation: dict[str, list[Tensor]]
    training: Callable[[int], Tensor]


def read_texts(
    calibration: Path,
    evaluation: Mapping[str, Path],
    encode: Encode,
    *,
    sequence_length: int,
    samples: int,
    batch_size: int,
    seed: int = 0,
) -> Texts:
    """From files: every fifth window of the calibration text selects, the rest calibrates.

    Raises:
        CompressError: a file cannot be read, is empty, or is shorter than two windows.
    """
    tokens = tokens_of(calibration, encode)
    windows_NS1 = cut(tokens, sequence_length, samples, calibration)
    if len(windows_NS1) < 2:
        raise CompressError(
            f"calibration {calibration} has {len(tokens)} tokens: two windows of "
            f"{sequence_length} + 1 are the least"
        )
    selects = torch.arange(len(windows_NS1)) % 5 == 1
    ends = len(tokens) - sequence_length

    def training(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        start_B = torch.randint(ends, (batch_size,), generator=generator)
        return tokens[start_B[:, None] + torch.arange(sequence_length + 1)].long()

    return Texts(
        list(windows_NS1[~selects].split(batch_size)),
        list(windows_NS1[selects].split(batch_size)),
        {
            name: read_windows(
                path,
                encode,
                sequence_length=sequence_length,
                samples=samples,
                batch_size=batch_size,
            )
            for name, path in evaluation.items()
        },
        training,
    )


def read_windows(
    path: Path, encode: Encode, *, sequence_length: int, samples: int, batch_size: int
) -> list[Tensor]:
    """The windows of one text, in batches.

    Raises:
        CompressError: as `cut` and `tokens_of`.
    """
    return list(cut(tokens_of(path, encode), sequence_length, samples, path).split(batch_size))


def tokens_of(path: Path, encode: Encode) -> Tensor:
    """The tokens of a text file, or of the "text" of each line of a .jsonl: int64 [n].

    Raises:
        CompressError: it cannot be read, or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise CompressError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".jsonl":
        text = "\n".join(_lines(path, text))
    if not text.strip():
        raise CompressError(f"{path} holds no text")
    return torch.tensor(list(encode(text)), dtype=torch.int64)


def _lines(path: Path, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise CompressError(
                f'{path}, line {number}: must be JSON with a field "text"'
            ) from None
    return found


def cut(tokens: Tensor, sequence_length: int, samples: int, path: Path) -> Tensor:
    """Up to `samples` windows at even distances that share no target: int64 [N, S + 1].

    Raises:
        CompressError: the text is shorter than a window.
    """
    starts = len(tokens) - sequence_length
    if starts < 1:
        raise CompressError(
            f"{path} has {len(tokens)} tokens, a window takes {sequence_length} + 1"
        )
    number = min(samples, (starts - 1) // sequence_length + 1)
    start_N = torch.linspace(0, starts - 1, number, dtype=torch.float64).long()
    return tokens[start_N[:, None] + torch.arange(sequence_length + 1)].long()
