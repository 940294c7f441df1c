"""Imports point one way, and the core needs torch, numpy, scipy and safetensors alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import growmoe

ROOT = Path(growmoe.__file__).parent
# from the ground up; a room imports from its own level or from below
LEVELS = [
    {"assignment"},
    {"experts"},
    {"routers"},
    {"signals", "losses", "capacity", "lineage", "live", "structure", "forwards"},
    {"moe"},
    {"models"},
    {"optim", "consent", "ema"},
    {"surgery", "rules"},
    {"organizer"},
    {"checkpoint"},
    {"distributed"},
    {"testing"},
]
CORE = set().union(*LEVELS)
# imported inside functions, and named with their extra where they are missing
OF_A_ROOM = {"distributed": {"ray", "rich"}}
HEAVY = {
    "accelerate",
    "avalanche",
    "lightning",
    "matplotlib",
    "pytorch_lightning",
    "ray",
    "rich",
    "sklearn",
    "torchvision",
    "transformers",
    "typer",
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of all that the file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in ROOT.rglob("*.py") if room_of(path) in CORE)


def test_every_room_of_the_core_is_there() -> None:
    assert {room_of(path) for path in FILES} == CORE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_imports_its_four_libraries_alone(path: Path) -> None:
    allowed = {"growmoe", "torch", "numpy", "scipy", "safetensors", *sys.stdlib_module_names}
    allowed |= OF_A_ROOM.get(room_of(path), set())
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    level = next(i for i, rooms in enumerate(LEVELS) if room_of(path) in rooms)
    below = set().union(*LEVELS[: level + 1])
    for name in imported(path):
        if name.split(".")[0] == "growmoe":
            assert name.split(".")[1] in below, f"{path.name} imports {name}"


def test_importing_growmoe_loads_nothing_heavy() -> None:
    code = "import sys, growmoe; growmoe.MoE; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    modules = set(done.stdout.split())
    assert "growmoe.moe" in modules
    assert not {name.split(".")[0] for name in modules} & HEAVY
    # the compiler and scipy's rooms would take as long again as torch
    assert not modules & {"torch._dynamo", "torch._inductor", "scipy.optimize"}


def test_all_that_is_announced_is_there() -> None:
    for name in growmoe.__all__:
        assert hasattr(growmoe, name)
