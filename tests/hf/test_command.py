"""`growmoe prune`, `merge` and `inspect` on Hugging Face folders."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import (
    OWN,
    config_of,
    contents,
    logits,
    masked_by_hand,
    save_with_tokenizer,
    tiny,
    tokens,
)

from growmoe import cli, hf

TEXT = "".join(f"The {n}th of these lines differs from the {n - 1}th.\n" for n in range(400))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hf")
    (place / "text.txt").write_text(TEXT)
    return save_with_tokenizer(tiny("qwen3_moe"), place / "model", shard="100KB")


def ask(folder: Path, output: Path, *more: object) -> tuple[object, ...]:
    return (
        folder, "--output", output, "--calibration", folder.parent / "text.txt",
        "--samples", 8, "--sequence-length", 32, *more,
    )  # fmt: skip


def check_half(family: str, source: Path, output: Path) -> dict[str, Any]:
    """The output loads in plain transformers and equals the masked original."""
    import transformers

    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    gone = {layer["name"]: layer["removed"] for layer in report["layers"]}
    assert all(len(ids) == 4 for ids in gone.values())
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    with masked_by_hand(original, gone):
        expected = logits(original, tokens())
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert torch.allclose(logits(again.eval(), tokens()), expected, atol=1e-5)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (output / "report.html").is_file()
    return report


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("mixtral", "deepseek_v3") else pytest.param(f, marks=pytest.mark.slow)
        for f in OWN
    ],
)
def test_a_folder_is_pruned_to_half_and_loads_in_transformers(family: str, tmp_path: Path) -> None:
    source = save_with_tokenizer(tiny(family), tmp_path / "model", shard="100KB")
    (tmp_path / "text.txt").write_text(TEXT)
    before = contents(source)
    output = tmp_path / "half"
    assert call("prune", *ask(source, output, "--ratio", 0.5, "--no-guard")) == 0
    report = check_half(family, source, output)
    assert report["experts_after"] * 2 == report["experts_before"]
    assert contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "model", "text.txt"]


def test_evaluation_and_recovery_are_reported(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text = folder.parent / "text.txt"
    more = ("--keep", 6, "--eval", f"lines={text}", "--router-steps", 2, "--recover", 2)
    assert call("prune", *ask(folder, output, *more)) == 0
    report = json.loads((output / "report.json").read_text())
    assert set(report["domains"]) == {"lines", "(calibration)"}
    assert set(report["recovery"]["tables"]) == {"recovered", "against control"}
    assert report["model"]["kind"] == "qwen3_moe"
    assert {layer["experts_after"] for layer in report["layers"]} == {6}


def test_merging_a_folder(folder: Path, tmp_path: Path) -> None:
    import transformers

    output = tmp_path / "out"
    assert call("merge", *ask(folder, output, "--keep", 4, "--method", "ream")) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_experts == 4 and bool(logits(model, tokens()).isfinite().all())


@pytest.mark.slow
def test_inspecting_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("inspect", folder) == 0
    assert "8 experts" in capsys.readouterr().out
    output = tmp_path / "seen"
    assert call("inspect", *ask(folder, output)) == 0
    found = json.loads((output / "inspect.json").read_text())
    assert len(found["layers"]) == 3 and len(found["layers"][0]["load"]) == 8


def test_own_format_for_different_counts(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "own"
    more = ("--ratio", 0.3, "--per-layer", "global", "--own-format", "--no-guard")
    assert call("prune", *ask(folder, output, *more)) == 0
    counts = [layer.count for layer in hf.layers_of(hf.load(output))]
    assert sum(counts) == 24 - 7
    again = tmp_path / "again"  # and can be pruned again
    assert call("prune", output, *ask(folder, again, "--keep", 4, "--no-guard")[1:]) == 0
    assert {layer.count for layer in hf.layers_of(hf.load(again))} == {4}


def torn(folder: Path, where: Path) -> Path:
    shutil.copytree(folder, where)
    file = sorted(where.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    return where


def lacking(folder: Path, where: Path) -> Path:
    shutil.copytree(folder, where)
    sorted(where.glob("*.safetensors"))[1].unlink()
    return where


def dense(folder: Path, where: Path) -> Path:
    shutil.copytree(folder, where)
    config = config_of(folder) | {"model_type": "llama"}
    (where / "config.json").write_text(json.dumps(config))
    return where


def without_tokenizer(folder: Path, where: Path) -> Path:
    shutil.copytree(folder, where)
    for file in where.glob("tokenizer*"):
        file.unlink()
    return where


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn, "is torn"),
        (lacking, "missing"),
        (dense, "'llama' is no mixture of experts"),
        (without_tokenizer, "no tokenizer"),
    ],
)
@pytest.mark.parametrize("act", ["prune", "merge"])
def test_a_folder_that_is_not_right_is_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], Path],
    message: str,
    act: str,
) -> None:
    bad = damage(folder, tmp_path / "bad")
    (tmp_path / "text.txt").write_text(TEXT)
    before = contents(bad)
    assert call(act, *ask(bad, tmp_path / "out", "--keep", 4)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0, error
    assert contents(bad) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "text.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratio", 0.9), "each token takes 2"),
        (("--ratio", 0.3, "--per-layer", "global"), "same number of experts in every layer"),
        (("--keep", 4, "--calibration", "EMPTY"), "holds no text"),
        (("--keep", 4, "--saliency", "mone"), "no expert that is a constant"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[object, ...],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("")
    given = [tmp_path / "empty.txt" if a == "EMPTY" else a for a in more]
    before = contents(folder)
    assert call("prune", *ask(folder, tmp_path / "out", *given)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0, error
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def full_disk(folder: Path, tmp_path: Path, *more: object) -> subprocess.CompletedProcess[str]:
    def limit() -> None:  # no file may grow beyond this, as on a disk with little room
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [sys.executable, "-m", "growmoe", "prune"]
    return subprocess.run(
        [*command, *map(str, ask(folder, tmp_path / "out", "--keep", 4, *more))],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    done = full_disk(folder, tmp_path, "--no-streaming")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "cannot" in done.stderr
    assert contents(folder) == before
    assert not list(tmp_path.iterdir())
