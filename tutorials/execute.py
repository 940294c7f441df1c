"""Runs notebooks from a clean kernel and keeps what they show: `python tutorials/execute.py`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT = 180  # seconds for a whole notebook on two cores
MOST_BYTES = 500_000


def execute(path: Path, timeout: int = TIMEOUT) -> Any:
    """Run all cells of a notebook in a new kernel; gives it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    client.execute()
    for cell in notebook.cells:  # warnings name the machine's folders
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Execute the notebooks named, or all, in place."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        begin = time.perf_counter()
        notebook = execute(path)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
        size = path.stat().st_size
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {size / 1000:.0f} kB", flush=True)
        if size > MOST_BYTES:
            sys.exit(f"{path.name} is larger than {MOST_BYTES / 1000:.0f} kB")


if __name__ == "__main__":
    main()
