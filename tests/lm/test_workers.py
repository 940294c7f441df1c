"""A language model on several workers learns what it learns on one."""

import json
from dataclasses import replace

import pytest
import torch

import growmoe
from growmoe.lm import TrainConfig, TrainError, train
from growmoe.lm.model import build_model
from growmoe.lm.workers import train_on_workers

TINY = TrainConfig(
    d_model=16, layers=1, heads=2, experts=4, hidden=16, batch_size=4, sequence_length=16,
    steps=8, windows=4, log_every=2, evaluate_every=4, sample_length=0, device="cpu",
)  # fmt: skip


@pytest.mark.slow
def test_two_workers_learn_what_one_process_does(texts, tmp_path):
    config = replace(TINY, domains=texts[:1])
    one = train(config)
    heard = []
    two = train_on_workers(config, 2, output=tmp_path / "two", on="processes", listen=heard.append)
    assert heard == two.history
    maps = json.loads((tmp_path / "two" / "routing.json").read_text())
    (layer,) = maps.values()
    assert sum(map(sum, layer[0]["counts"])) == 2 * 4 * 16  # k experts for each token, once
    assert two.finished and two.steps == 8
    kinds = [line["kind"] for line in one.history]
    assert [line["kind"] for line in two.history] == kinds
    for mine, theirs in zip(two.history, one.history, strict=True):
        if mine["kind"] == "train":
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert two.bits_per_byte["words"] == pytest.approx(one.bits_per_byte["words"], rel=1e-3)
    assert [str(e) for e in two.events] == [str(e) for e in one.events]
    model = build_model(config, 256)
    growmoe.load(tmp_path / "two" / "checkpoint", model)
    for name, value in two.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(model.state_dict()[name], value)
    again = train_on_workers(config, 2, output=tmp_path / "two", on="processes")
    assert again.results["domains"] == two.results["domains"]  # nothing is trained twice


def test_what_cannot_be_shared_out_is_refused_before_anything_starts(tmp_path):
    for change, message in (
        ({"experts": 0, "grow": False}, "has none"),
        ({"time_limit": 3.0}, "time_limit"),
    ):
        with pytest.raises(TrainError, match=message):
            train_on_workers(replace(TINY, **change), 2, output=tmp_path / "run")
    with pytest.raises(TrainError, match="1 to batch_size=4, got 5"):
        train_on_workers(TINY, 5, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
