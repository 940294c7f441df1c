"""Where the documents of a text domain come from: the machine itself, or files of one's own."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from growmoe.lm.config import TrainError

# A source of fewer files is split inside each: a hash of so few names may leave a part empty.
FEW_FILES = 200
_LIBRARIES = ("numpy", "scipy", "torch")  # what every installation of growmoe has
_DOCSTRING = re.compile(rb'"""(.*?)"""', re.DOTALL)
_INDENT = re.compile(rb"^[ \t]+", re.MULTILINE)
_BLANK = re.compile(rb"\n\s*\n")


@dataclass(frozen=True)
class Document:
    """A text that is read when it is needed.

    Attributes:
        key: its name, stable between machines; decides its place in the order and its part.
        read: gives its bytes.
        rank: those of a lower rank come first, whatever their keys.
        whole: whether all of it belongs to one part.
    """

    key: str
    read: Callable[[], bytes]
    rank: int = 0
    whole: bool = True

    @property
    def hash(self) -> int:
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big")


def python_library() -> list[Document]:
    """The sources of Python's own library, without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        Document(key, (root / key).read_bytes)
        for key in _walk(root, "site-packages", "dist-packages")
        if key.endswith(".py")
    ]


def cpp_headers() -> list[Document]:
    """The C++ headers that come with torch; those written by a program count as empty."""
    root = _package("torch") / "include"

    def read(path: Path) -> bytes:
        text = path.read_bytes()
        return b"" if b"@generated" in text[:400] else text

    return [
        Document(key, lambda path=root / key: read(path))  # type: ignore[misc]
        for key in _walk(root)
        if key.endswith((".h", ".hpp", ".cuh", ".inl"))
    ]


def english_documentation() -> list[Document]:
    """Python's language reference as pydoc has it, then docstrings of numpy, scipy and torch.

    Of the docstrings the indentation and the paragraphs that hold examples are left out.
    """
    documents = []
    try:
        from pydoc_data import topics as pydoc
    except ImportError:  # some distributions package it apart
        reference: dict[str, str] = {}
    else:
        reference = pydoc.topics
    for name, text in reference.items():
        documents.append(Document(f"pydoc/{name}", text.encode))
    for library in _LIBRARIES:
        root = _package(library)
        for key in _walk(root, "tests", "testing", "include"):
            if key.endswith(".py"):
                path = root / key
                documents.append(
                    Document(f"{library}/{key}", lambda path=path: docstrings(path.read_bytes()), 1)  # type: ignore[misc]
                )
    return documents


def docstrings(source: bytes) -> bytes:
    """The prose in a Python file's longer triple-quoted strings."""
    kept = []
    for text in _DOCSTRING.findall(source):
        if len(text) < 200:
            continue
        paragraphs = _BLANK.split(_INDENT.sub(b"", text).strip())
        kept += [p for p in paragraphs if b">>>" not in p and b" " in p]
    return b"\n\n".join(kept)


@dataclass(frozen=True)
class Source:
    """A text domain that is already on the machine."""

    description: str
    documents: Callable[[], list[Document]]


EMBEDDED = {
    "python": Source("sources of Python's own library", python_library),
    "cpp": Source("C++ headers that come with torch", cpp_headers),
    "english": Source("reference of Python, docstrings of torch and scipy", english_documentation),
}


def files(path: str, most: int) -> list[Document]:
    """The documents of a file, a folder (all its text files) or a pattern with wildcards.

    A file of a folder is binary, and left out, if it holds a zero byte; hidden ones are left out.
    Of each at most `most` bytes are read.

    Raises:
        TrainError: there is nothing of that name, or no text in it.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [(key, place / key) for key in _walk(place)]
    elif place.exists():
        found = [(place.name, place)]
    elif glob.has_magic(path):
        matches = sorted(glob.glob(str(place), recursive=True))
        found = [(match, Path(match)) for match in matches if Path(match).is_file()]
    else:
        raise TrainError(f"no text at {path}: there is no such file or folder")
    if not found:
        raise TrainError(f"no text at {path}: no files")
    one = len(found) == 1
    whole = len(found) >= FEW_FILES
    return [
        Document(key, lambda file=file: _read(file, most, keep_binary=one), whole=whole)  # type: ignore[misc]
        for key, file in found
    ]


def name_of(argument: str) -> tuple[str, str]:
    """The name and the path of "name=path" or "path"."""
    name, equals, path = argument.partition("=")
    if equals and name and not set("/\\*?[") & set(name):
        return name, path
    parts = [p for p in Path(argument).expanduser().absolute().parts if not glob.has_magic(p)]
    return Path(parts[-1]).stem or parts[-1], argument


def _read(path: Path, most: int, keep_binary: bool) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read(most)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    return text if keep_binary or b"\0" not in text else b""


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is a dependency"
    return Path(spec.origin).parent


def _walk(root: Path, *without: str) -> Iterator[str]:
    """Paths of the files below `root`, relative to it, with slashes, in a fixed order."""
    skipped = {*without, "__pycache__"}
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(d for d in inner if d not in skipped and not d.startswith("."))
        base = Path(folder).relative_to(root).as_posix()
        prefix = "" if base == "." else base + "/"
        yield from (prefix + name for name in sorted(names) if not name.startswith("."))
