"""Text domains as token tensors, each split by file into train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from growmoe.lm.config import TrainError
from growmoe.lm.sources import EMBEDDED, Document, files, name_of
from growmoe.lm.tokenizer import ByteTokenizer, Tokenizer, encode_document

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# of 20 equal shares of the files, one validates and one tests
_SHARES = 20


@dataclass(frozen=True)
class Domain:
    """The tokens of one text domain; a document is in one part alone.

    Attributes:
        name: of the domain.
        train, validation, test: uint8 [n] of bytes, or int32 [n] of a tokenizer's ids.
        num_bytes: how many bytes of text each of the three tensors stands for, in that order.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    num_bytes: tuple[int, int, int]

    def tokens(self, split: Split) -> Tensor:
        """The token ids of a part, [N]."""
        if split not in SPLITS:
            raise TrainError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        tokens: Tensor = getattr(self, split)
        return tokens

    def tokens_per_byte(self, split: Split) -> float:
        """How many tokens stand for a byte of text, on average."""
        return len(self.tokens(split)) / max(1, self.num_bytes[SPLITS.index(split)])

    def digest(self) -> str:
        """What identifies the content: 16 hexadecimal digits."""
        result = hashlib.blake2b(digest_size=8)
        for split in SPLITS:
            tokens = self.tokens(split)
            result.update(f"{split} {len(tokens)} {tokens.dtype}".encode())
            result.update(tokens.numpy())  # type: ignore[arg-type]
        return result.hexdigest()


def load_domains(
    names: Sequence[str],
    bytes_per_domain: int = 4_000_000,
    *,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Domain]:
    """Read text domains, always in the same order and with the same split.

    Files are ordered by a hash of their path, so that a small `bytes_per_domain` takes a fair
    sample; nothing is read once the parts are full. A document that occurs twice counts once.
    Nine tenths of the bytes train, the rest validates and tests in equal parts. The split is by
    file; where a domain has fewer than 200 files, it is inside each: twentieths 10 and 20 of it
    validate and test.

    Args:
        names: of `EMBEDDED`, or "name=path" of a file, a folder or a pattern with wildcards.
        bytes_per_domain: the most that is kept of each, all parts together.
        tokenizer: bytes if left out.

    Returns:
        name -> domain, in the order of `names`.

    Raises:
        TrainError: an unknown name, two of the same name, or no text.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    domains: dict[str, Domain] = {}
    for argument in names:
        if "=" in argument:
            name, path = name_of(argument)
            documents = files(path, bytes_per_domain)
        elif argument in EMBEDDED:
            name, documents = argument, EMBEDDED[argument].documents()
        else:
            near = get_close_matches(argument, EMBEDDED, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(EMBEDDED)}"
            raise TrainError(f"no domain {argument!r}: {hint}")
        if name in domains:
            raise TrainError(f"two domains are called {name!r}: name one as name=path")
        domains[name] = domain_from(name, documents, bytes_per_domain, tokenizer)
    return domains


def domain_from(
    name: str, documents: Iterable[Document], bytes_per_domain: int, tokenizer: Tokenizer
) -> Domain:
    """Split, deduplicate and encode documents.

    Raises:
        TrainError: they hold no text.
    """
    small = bytes_per_domain // _SHARES
    room = {"train": bytes_per_domain - 2 * small, "validation": small, "test": small}
    size = dict.fromkeys(room, 0)
    kept: dict[str, list[Tensor]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    for document in sorted(documents, key=lambda d: (d.rank, d.hash, d.key)):
        wanted = [s for s in SPLITS if room[s] > 0]
        if document.whole:
            wanted = [s for s in wanted if s == part_of(document)]
        if not wanted:
            if not any(room.values()):
                break
            continue
        text = document.read()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        for split in wanted:
            for piece in [text] if document.whole else _inside(text, split):
                piece = piece[: max(0, room[split] - 1)]
                room[split] -= len(piece) + 1  # a byte for the separator
                size[split] += len(piece) + 1
                if piece:
                    kept[split].append(encode_document(tokenizer, piece))
    if not any(size.values()):
        raise TrainError(f"domain {name!r}: its files hold no text")
    nothing = encode_document(tokenizer, b"")[:0]
    train, validation, test = (torch.cat([nothing, *kept[split]]) for split in SPLITS)
    return Domain(name, train, validation, test, (size["train"], size["validation"], size["test"]))


def part_of(document: Document) -> Split:
    """Where a whole document belongs."""
    share = document.hash % _SHARES
    return "validation" if share == 0 else "test" if share == 1 else "train"


def _inside(text: bytes, split: Split) -> list[bytes]:
    def cut(first: int, last: int) -> bytes:
        return text[first * len(text) // _SHARES : last * len(text) // _SHARES]

    if split == "train":
        return [cut(0, 9), cut(10, 19)]
    return [cut(9, 10)] if split == "validation" else [cut(19, 20)]
