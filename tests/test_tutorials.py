"""Every tutorial runs from a clean kernel, and is kept with its outputs and pictures."""

from __future__ import annotations

import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
assert _spec is not None and _spec.loader is not None
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each
def test_it_is_kept_as_it_ran_with_pictures_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))  # once, from the top
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size <= execute.MOST_BYTES
    assert notebook.cells[0].source.startswith("# ")
    shown = [
        text
        for output in outputs
        for text in (output.get("text", ""), output.get("data", {}).get("text/plain", ""))
    ]
    assert "/tmp/" not in "".join(shown)
    assert not [c for c in "".join(shown) if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_there_are_pictures() -> None:
    for path in NOTEBOOKS:
        if not path.stem.startswith("7"):  # code has little to show
            assert "image/png" in path.read_text() or "image/gif" in path.read_text(), path.name


@pytest.mark.slow
@each
def test_it_runs_from_a_clean_kernel(path: Path) -> None:
    if path.stem.startswith("6"):
        pytest.importorskip("ray")
    notebook = execute.execute(path, timeout=600)
    assert all(cell.execution_count for cell in code(notebook))
