"""Every public name says what it is, and the examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import growmoe
from growmoe.experts.expert import Kind

ROOT = Path(growmoe.__file__).parent
ROOMS = [
    "growmoe",
    *(f"growmoe.{m.name}" for m in pkgutil.iter_modules([str(ROOT)]) if m.ispkg),
]


def public(room: str) -> Iterator[tuple[str, Any]]:
    """The names that a package announces, with what they are."""
    try:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            yield f"{room}.{name}", getattr(module, name)
    except ImportError as error:
        pytest.skip(str(error))


def documented() -> set[str]:
    """Names of methods that some class says the meaning of: others of that name mean the same."""
    names = {"forward", "extra_repr"}
    for room in ROOMS:
        try:
            announced = list(vars(importlib.import_module(room)).get("__all__", ()))
            things = [getattr(importlib.import_module(room), name) for name in announced]
        except ImportError:
            continue
        for thing in filter(inspect.isclass, things):
            for base in (thing, *thing.__mro__):
                if own(base):
                    names |= {n for n, f in vars(base).items() if inspect.getdoc(f) and callable(f)}
    return names | {n for n, f in vars(Kind).items() if inspect.getdoc(f)}


def own(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("growmoe")


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_docstring_and_so_have_its_methods(room: str) -> None:
    bare, elsewhere = [], documented()
    assert importlib.import_module(room).__doc__
    for name, thing in public(room):
        if inspect.ismodule(thing) or not callable(thing) or not own(thing):
            continue
        if not (inspect.getdoc(thing) or "").strip():
            bare.append(name)
        if inspect.isclass(thing):
            bare += [
                f"{name}.{method}"
                for method, function in vars(thing).items()
                if inspect.isfunction(function)
                and not method.startswith("_")
                and method not in elsewhere
                and function.__name__ != "<lambda>"
                and not (inspect.getdoc(getattr(thing, method)) or "").strip()
            ]
    assert bare == []


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_docstring_says_of_arguments_is_of_arguments_that_exist(room: str) -> None:
    wrong = []
    for name, thing in public(room):
        if not callable(thing) or not own(thing):
            continue
        doc = inspect.getdoc(thing) or ""
        if "\nArgs:\n" not in doc:
            continue
        section = doc.split("\nArgs:\n")[1].split("\n\n")[0]
        try:
            known = set(inspect.signature(thing).parameters)
        except ValueError:
            continue
        for line in section.splitlines():
            if line.startswith("    ") and not line.startswith("     ") and ":" in line:
                said = [part.strip(" *") for part in line.split(":")[0].split(",")]
                wrong += [f"{name}: {word}" for word in said if word not in known]
    assert wrong == []


WITH_EXAMPLES = sorted(
    path for path in ROOT.rglob("*.py") if re.search(r"^ *>>> ", path.read_text(), flags=re.M)
)


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_are_true(path: Path) -> None:
    name = ".".join(["growmoe", *path.relative_to(ROOT).with_suffix("").parts])
    module = importlib.import_module(name.removesuffix(".__init__"))
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
