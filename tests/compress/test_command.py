"""The commands on a run of train-lm."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from growmoe import cli
from growmoe.compress.layer import CompressError
from growmoe.compress.runs import load_run
from growmoe.compress.text import read_texts
from growmoe.lm import ByteTokenizer, TrainConfig, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lm")
    text = place / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(4000)))
    config = TrainConfig(
        domains=(f"squares={text}",),
        d_model=16,
        layers=2,
        heads=2,
        experts=6,
        steps=2,
        batch_size=4,
        sequence_length=32,
        windows=2,
        sample_length=0,
        device="cpu",
    )
    train(config, output=place / "run")
    return place / "run"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_pruned_then_merged_and_the_source_stays(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    small = ("--samples", 8, "--batch-size", 4)
    assert call("prune", run, "--ratio", 0.34, "--match", *small, "--output", tmp_path / "p") == 0
    assert contents(run) == before
    assert "12 experts -> 8" in capsys.readouterr().out
    assert set(contents(tmp_path / "p")) == {
        "checkpoint.safetensors",
        "config.json",
        "lineage.jsonl",
        "report.html",
        "report.json",
    }
    report = json.loads((tmp_path / "p" / "report.json").read_text())
    assert report["domains"]["squares"]["samples"] > 1
    assert [len(layer["removed"]) for layer in report["layers"]] == [2, 2]
    assert call("merge", tmp_path / "p", "--keep", 3, *small, "--output", tmp_path / "m") == 0
    model = load_run(tmp_path / "m" / "checkpoint.safetensors").model
    assert [len(block.feed_forward.experts) for block in model.blocks] == [3, 3]
    capsys.readouterr()
    assert call("inspect", run, *small, "--output", tmp_path / "i") == 0
    assert (tmp_path / "i" / "inspect.png").exists()
    table = capsys.readouterr().out.partition("written:")[0]
    assert "most like" in table and "\x1b" not in table, "no colour where it is piped"
    assert max(map(len, table.splitlines())) <= 80


def test_recovery_is_told_beside_its_control(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    small = ("--samples", 8, "--batch-size", 4, "--recover", 2, "--router-steps", 1)
    assert call("prune", run, "--keep", 4, *small, "--output", out) == 0
    recovery = json.loads((out / "report.json").read_text())["recovery"]
    assert set(recovery["tables"]) == {"recovered", "against control"}


def test_a_text_to_evaluate_on_is_used_whatever_calibrates(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("something else altogether, and more of it. " * 20)
    for i, calibration in enumerate(((), ("--calibration", text))):
        out = tmp_path / str(i)
        given = ("--samples", 8, "--eval", f"other={text}", *calibration, "--output", out)
        assert call("prune", run, "--keep", 4, *given) == 0
        report = json.loads((out / "report.json").read_text())
        assert set(report["domains"]) == {"other", "(calibration)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", 0.9), "would leave 1 of 6"),
        (("--ratio", 0.5, "--keep", 3), "exactly one"),
        (("--ratio", 0.5, "--saliency", "odd"), "no saliency"),
        (("--ratio", 0.5, "--calibration", "EMPTY"), "holds no text"),
        (("--ratio", 0.5, "--calibration", "missing.txt"), "cannot read"),
        (("--ratio", 0.5, "--saliency", "router-norm"), "--reference"),
        (("--ratio", 0.5, "--samples", 0), "--samples"),
        (("--ratio", 0.5, "--eval", "a=EMPTY", "--eval", "a=EMPTY"), "two texts"),
        (("--ratio", 0.5, "--calibration", "SHORT"), "a window takes"),
        (("--keep", 6), "removes nothing"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("short\n")
    texts = {"EMPTY": tmp_path / "empty.txt", "SHORT": tmp_path / "short.txt"}
    given = [texts.get(str(argument), argument) for argument in arguments]
    before = contents(run)
    assert call("prune", run, *given, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0, error
    assert contents(run) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_a_damaged_checkpoint_and_what_is_no_model_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    for name, content in contents(run).items():
        (torn / name).write_bytes(content[: len(content) // 2] if "safe" in name else content)
    for folder, message in ((torn, "torn"), (tmp_path, "neither a run"), (tmp_path / "x", "no ")):
        assert call("prune", folder, "--ratio", 0.5, "--output", tmp_path.parent / "none") == 2
        assert message in capsys.readouterr().err


def test_calibration_and_selection_share_no_window(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i}, "}) + "\n" for i in range(500)))
    texts = read_texts(
        path, {}, ByteTokenizer().encode, sequence_length=16, samples=40, batch_size=8
    )
    windows = [tuple(w.tolist()) for b in (*texts.calibration, *texts.selection) for w in b]
    assert len(windows) == len(set(windows)) == 40
    assert sum(map(len, texts.selection)) == 8
    path.write_text('{"no text": 1}\n')
    with pytest.raises(CompressError, match="line 1"):
        read_texts(path, {}, ByteTokenizer().encode, sequence_length=16, samples=4, batch_size=2)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    def limit() -> None:  # no file may grow beyond this, as on a disk with little room
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "growmoe", "prune", str(run), "--ratio", "0.34"]
    done = subprocess.run(
        [*command, "--samples", "8", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "cannot" in done.stderr
    assert not list(tmp_path.iterdir())
