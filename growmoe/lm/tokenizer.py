"""How text becomes token ids: bytes, or a tokenizer one already has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from growmoe.lm.config import TrainError

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """Anything that encodes and decodes; `separator`, if it is there, ends each document.

    `encode` may give a list of ids or an object with a list `ids`.
    """

    vocab_size: int

    def encode(self, text: str, /) -> Any:
        """Text -> token ids."""

    def decode(self, ids: list[int], /) -> str:
        """Token ids -> text."""


class ByteTokenizer:
    """A token is a byte of UTF-8; the zero byte, which text does not hold, ends a document."""

    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json.

    Raises:
        TrainError: the file is not there or is no tokenizer.
        ImportError: the package `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ModuleNotFoundError as error:
            raise ImportError(
                "a tokenizer.json needs tokenizers, which is not installed: "
                "pip install 'growmoe[hf]'"
            ) from error
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the package raises plain Exceptions
            raise TrainError(f"tokenizer: cannot read {path}: {error}") from error
        self.vocab_size: int = self._fast.get_vocab_size()
        known = (self._fast.token_to_id(name) for name in _SEPARATORS)
        self.separator = next((id for id in known if id is not None), None)

    def encode(self, text: str) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=False))


def encode_document(tokenizer: Tokenizer, text: bytes) -> Tensor:
    """A document and the separator after it: uint8 [n] for bytes, else int32 [n].

    Raises:
        TrainError: the tokenizer gave an id outside its vocabulary.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return torch.from_numpy(np.frombuffer(text + b"\0", dtype=np.uint8).copy())
    ids = tokenizer.encode(text.decode("utf-8", errors="replace"))
    ids = list(getattr(ids, "ids", ids))
    separator = getattr(tokenizer, "separator", None)
    if separator is not None:
        ids.append(int(separator))
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise TrainError(
            f"tokenizer: gave ids {min(ids)} to {max(ids)}, its vocab_size is "
            f"{tokenizer.vocab_size}"
        )
    return torch.tensor(ids, dtype=torch.int32)
