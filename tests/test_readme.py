"""What the README shows runs when pasted, and its figures are those of the result files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_first_block_of_code_grows_an_expert_when_the_inputs_move(capsys):
    torch.manual_seed(0)
    (first, *_) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(first, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.search(r"step 350: layer 0 spawned 4 from \d: novel inputs", out)
    assert "4 (born at 350" in out


@pytest.mark.parametrize("stream", ["split-digits", "split-fashion-mnist"])
def test_its_tables_are_those_of_the_result_files(stream):
    folder = ROOT / "benchmarks" / "results" / stream
    table = (folder / "table.md").read_text()
    rows = table.split("\n\n")[1].splitlines()  # what came on the way is in the file alone
    assert "\n".join(rows) in README
    results = json.loads((folder / "results.json").read_text())
    assert results["stream"] == stream
    for name, entry in results["methods"].items():
        mean = 100 * entry["final_accuracy"]["mean"]
        row = next(line for line in rows if line.startswith(f"| {name} "))
        assert f"{mean:.1f} ±" in row


def test_every_picture_it_shows_is_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_every_room_it_names_is_there_after_import_growmoe_alone():
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.S))
    rooms = sorted(set(re.findall(r"\bgrowmoe\.(\w+)", blocks)))
    assert {"compress", "hf", "report", "distributed"} <= set(rooms)
    code = (
        "import sys, growmoe\n"
        "heavy = {'avalanche', 'ray', 'transformers', 'matplotlib'}\n"
        "early = heavy & set(sys.modules)\n"
        "assert not early, early\n"
        f"for room in {rooms}: getattr(growmoe, room)\n"
        "assert not hasattr(growmoe, 'nowhere')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
