"""Pruning layer by layer and tensor by tensor gives what pruning in memory gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import contents, families, save_with_tokenizer, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slow_parameters import but_slow

from growmoe import hf
from growmoe.compress import CompressError
from growmoe.compress.options import Options
from growmoe.hf import shards, streaming
from growmoe.hf.command import prune_folder
from growmoe.hf.shards import Checkpoint

TEXT = "".join(f"The {n}th of these lines differs from the {n - 1}th.\n" for n in range(400))


def silent(*_: object) -> None:
    pass


def options(place: Path, output: str = "out", **more: Any) -> Options:
    given = dict(
        act="prune", model=place / "model", output=place / output, ratio=0.5, guard=False,
        calibration=place / "text.txt", evaluation={"lines": place / "text.txt"}, samples=10,
        sequence_length=24, batch_size=4, streaming=True,
    )  # fmt: skip
    return Options(**{**given, **more})  # type: ignore[arg-type]


def place_of(place: Path, model: Any, shard: str = "60KB") -> Path:
    save_with_tokenizer(model, place / "model", shard=shard)
    (place / "text.txt").write_text(TEXT)
    return place


def place_with(family: str, place: Path, shard: str = "60KB", **changes: Any) -> Path:
    return place_of(place, tiny(family, **changes), shard)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@families()
def test_it_gives_the_same_model_as_in_memory(family: str, tmp_path: Path) -> None:
    place = place_with(family, tmp_path)
    before = contents(place / "model")
    whole = prune_folder(options(place, "whole", streaming=False), silent, silent)
    found = prune_folder(options(place), silent, silent)
    for mine, theirs in zip(found.layers, whole.layers, strict=True):
        assert mine.removed == theirs.removed
        assert mine.load == theirs.load
        assert mine.saliency == pytest.approx(theirs.saliency, rel=1e-4)
    for name, change in whole.domains.items():
        assert found.domains[name].before == pytest.approx(change.before, abs=1e-5)
        assert found.domains[name].after == pytest.approx(change.after, abs=1e-5)
    assert found.parameters_after == whole.parameters_after
    mine, theirs = tensors(place / "out"), tensors(place / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    hf.load(place / "out")  # complete, by its config
    for name in ("tokenizer.json", "config.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert contents(place / "model") == before
    assert sorted(p.name for p in place.iterdir()) == ["model", "out", "text.txt", "whole"]


@pytest.mark.parametrize("saliency", but_slow(["aimer", "random", "frequency"], "frequency"))
def test_other_criteria_choose_as_in_memory(saliency: str, tmp_path: Path) -> None:
    place = place_with("mixtral", tmp_path, shard="5GB", tie_word_embeddings=True)
    whole = prune_folder(
        options(place, "whole", saliency=saliency, streaming=False), silent, silent
    )
    found = prune_folder(options(place, saliency=saliency), silent, silent)
    assert [x.removed for x in found.layers] == [x.removed for x in whole.layers]
    assert not (place / "out" / shards.INDEX).exists()


def test_bfloat16_is_computed_in_float32_and_written_as_it_is(tmp_path: Path) -> None:
    half = tiny("olmoe", tie_word_embeddings=True).bfloat16()
    whole = place_of(tmp_path / "wide", half.float())
    place = place_of(tmp_path / "half", half.bfloat16())
    expected = prune_folder(options(whole, guard=True, streaming=False), silent, silent)
    found = prune_folder(options(place, guard=True), silent, silent)
    assert [x.removed for x in found.layers] == [x.removed for x in expected.layers]
    assert [x.spared for x in found.layers] == [x.spared for x in expected.layers]
    assert any(x.spared for x in found.layers)
    for name, change in expected.domains.items():
        assert found.domains[name].after == pytest.approx(change.after, abs=1e-5)
    written = tensors(place / "out")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    for name, tensor in tensors(whole / "out").items():
        assert torch.equal(written[name].float(), tensor)


def test_a_small_checkpoint_is_taken_whole_and_a_large_one_streamed(tmp_path: Path) -> None:
    place = place_with("mixtral", tmp_path)
    size = Checkpoint(place / "model").bytes
    chosen = options(place, streaming=None)
    assert streaming.streams(chosen, available=size)
    assert not streaming.streams(chosen, available=3 * size)
    assert not streaming.streams(options(place, streaming=None, saliency="naee"), available=1)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("step", but_slow(range(0, 16, 3), 9))
def test_interrupted_anywhere_it_resumes_to_the_same_bytes(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_with("qwen2_moe", tmp_path)
    prune_folder(options(place, "expected"), silent, silent)
    done = 0
    keep, replace = streaming.Work.keep, os.replace

    def tire(*_: object) -> None:
        nonlocal done
        done += 1
        if done > step:
            raise Interrupted

    def keep_and_tire(self: Any, **told: Any) -> None:
        keep(self, **told)
        tire()

    def tire_and_replace(source: Any, target: Any) -> None:
        if str(target).endswith(".safetensors"):
            tire()
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(streaming.Work, "keep", keep_and_tire)
        patched.setattr(os, "replace", tire_and_replace)
        with pytest.raises(Interrupted):
            prune_folder(options(place), silent, silent)
    assert not (place / "out").exists()
    found = prune_folder(options(place), silent, silent)
    assert found.model["runs"] == 2
    expected = contents(place / "expected")
    for name, content in contents(place / "out").items():
        if not name.startswith("report"):
            assert content == expected[name], name
    assert not list(place.glob(".*"))


@pytest.mark.slow
def test_killed_it_leaves_no_model_and_goes_on(tmp_path: Path) -> None:
    place = place_with("mixtral", tmp_path, num_hidden_layers=24)
    command = [
        sys.executable, "-m", "growmoe", "prune", place / "model", "--ratio", "0.5",
        "--calibration", place / "text.txt", "--samples", "100", "--sequence-length", "32",
        "--streaming", "--no-guard", "--output", place / "out",
    ]  # fmt: skip
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.DEVNULL)
    state = place / ".out.unfinished" / "state.json"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if state.is_file() and json.loads(state.read_text()).get("before", {}).get("layers", 0) > 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (place / "out").exists()
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["model"]["runs"] == 2
    assert {layer.count for layer in hf.layers_of(hf.load(place / "out"))} == {4}
    assert not list(place.glob(".*"))


def test_another_job_is_not_mixed_with_an_unfinished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_with("mixtral", tmp_path)

    def fail(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "_write_model", fail)
        with pytest.raises(Interrupted):
            prune_folder(options(place), silent, silent)
    with pytest.raises(CompressError, match="unfinished run with other settings"):
        prune_folder(options(place, ratio=0.25), silent, silent)
    shutil.rmtree(place / ".out.unfinished")
    prune_folder(options(place, ratio=0.25), silent, silent)


def test_a_full_disk_is_told_and_what_was_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_with("mixtral", tmp_path)
    before = contents(place / "model")
    copied = 0

    def full(*arguments: Any) -> None:
        nonlocal copied
        copied += 1
        if copied > 9:
            raise OSError(28, "No space left on device")
        copy(*arguments)

    copy = shards._copy
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_copy", full)
        with pytest.raises(CompressError, match="No space left on device; what was done is in"):
            prune_folder(options(place), silent, silent)
    assert not (place / "out").exists() and contents(place / "model") == before
    assert not list(place.glob(".out.unfinished/model/*.partial"))
    assert prune_folder(options(place), silent, silent).model["runs"] == 2


def test_a_layer_that_the_config_does_not_count_is_left_out_and_told(tmp_path: Path) -> None:
    """Multi-token prediction, which transformers ignores."""
    place = place_with("deepseek_v3", tmp_path, shard="5GB")
    file = place / "model" / "model.safetensors"
    held = load_file(file)
    last = {
        n.replace("layers.2.", "layers.3."): t.clone() for n, t in held.items() if "layers.2." in n
    }
    save_file({**held, **last}, file, metadata={"format": "pt"})
    found = prune_folder(options(place), silent, silent)
    assert set(found.model["left_out"]) == set(last)
    assert not any("layers.3." in name for name in tensors(place / "out"))
    hf.load(place / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(saliency="leave-one-out"), "looks at a whole model"),
        (dict(ratio=None, max_loss=0.1), "the same for each layer"),
        (dict(per_layer="global"), "the same for each layer"),
        (dict(recover=10), "training and least squares"),
        (dict(ratio=0.9), "each token takes"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = place_with("mixtral", tmp_path)
    with pytest.raises(CompressError, match=message):
        prune_folder(options(place, **more), silent, silent)
    assert sorted(p.name for p in place.iterdir()) == ["model", "text.txt"]


def test_shapes_that_the_config_does_not_have_are_refused(tmp_path: Path) -> None:
    place = place_with("mixtral", tmp_path)
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 20}))
    with pytest.raises(CompressError, match="the config asks for"):
        prune_folder(options(place), silent, silent)
    assert sorted(p.name for p in place.iterdir()) == ["model", "text.txt"]


@pytest.mark.slow
def test_memory_of_its_own_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    place = tmp_path
    wide = dict(hidden_size=256, intermediate_size=512, num_local_experts=16, num_hidden_layers=8)
    save_with_tokenizer(tiny("mixtral", **wide).bfloat16(), place / "model", shard="30MB")
    (place / "text.txt").write_text(TEXT)
    command = [
        sys.executable, "-m", "growmoe", "prune", place / "model", "--ratio", "0.5",
        "--calibration", place / "text.txt", "--samples", "4", "--sequence-length", "32",
        "--output",
    ]  # fmt: skip

    def peak(name: str) -> tuple[int, int]:
        run = [str(c) for c in [*command, place / name, "--streaming"]]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        told = json.loads((place / name / "report.json").read_text())["model"]
        return told["peak_anonymous_bytes"], told["checkpoint_bytes"]

    # what else a process happens to hold comes and goes by 30 MB: the lesser of two
    (whole, checkpoint), (again, _) = peak("out"), peak("again")
    config = json.loads((place / "model" / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (place / "model" / "config.json").write_text(json.dumps(config))
    less, _ = peak("less")
    assert checkpoint > 100e6
    # four times as many layers, 75 MB, take no more: one is in memory at a time
    assert min(whole, again) - less < 30e6


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    place = place_with("mixtral", tmp_path)
    path = place / "model" / "config.json"
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    with pytest.raises(CompressError, match="quantized"):
        prune_folder(options(place), silent, silent)


def test_what_is_cut_is_what_index_select_gives(tmp_path: Path) -> None:
    held = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(12).view(1, 4, 3).to(torch.int8)}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(tmp_path)
    cuts = {"a": shards.Cut("x", 1, (0, 2, 3)), "b": shards.Cut("y", 1, (3, 0))}
    shards.write_cut(source, ["a", "b"], cuts, tmp_path / "cut.safetensors")
    with safe_open(tmp_path / "cut.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("x"), held["a"][:, [0, 2, 3]])
        assert torch.equal(opened.get_tensor("y"), held["b"][:, [3, 0]])
