"""What each command says of itself fits 80 columns and holds no control codes when piped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")

CODE = """
import io, contextlib, sys
from growmoe import cli
import typer
for name in ["", *sorted(typer.main.get_command(cli.app).commands)]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([name, "--help"] if name else ["--help"])
    print("=====", name)
    print(out.getvalue())
"""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    for name in ("FORCE_COLOR", "PY_COLORS"):
        environment.pop(name, None)
    environment.pop("GITHUB_ACTIONS", None)  # where typer forces colours
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("===== ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_every_command_is_there(pages: dict[str, str]) -> None:
    assert "--tensorboard" in pages["bench"] and "--tensorboard" in pages["train-lm"]
    wanted = {"", "bench", "train-lm", "prune", "merge", "inspect", "report", "watch", "streams"}
    assert wanted <= set(pages)


def test_every_page_fits_80_columns_without_control_codes(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert "\x1b" not in page, name
        assert max(map(len, page.splitlines())) <= 80, name


def test_every_command_and_option_says_what_it_does(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        lines = page.splitlines()
        usage = next(i for i, line in enumerate(lines) if "Usage:" in line)
        described = [line for line in lines[usage + 1 :] if line.strip()]
        assert described and len(described[0].strip()) > 15, name
        for line in lines:
            words = line.strip(" │*").split()
            if words and words[0].startswith("--") and words[0] != "--help":
                assert len(words) >= 3, f"{name}: {line}"
