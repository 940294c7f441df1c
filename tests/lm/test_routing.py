"""Which expert takes which domain is counted at an evaluation, and shown in the report."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import growmoe
from growmoe.lm import Domain, TrainConfig, evaluate, train
from growmoe.lm.growing import GrowingLM
from growmoe.lm.routing import RoutingCounts
from growmoe.report import read_run
from growmoe.routers import SoftMoE

TINY = {
    "steps": 4, "d_model": 16, "layers": 2, "heads": 2, "experts": 3, "batch_size": 4,
    "sequence_length": 16, "windows": 4, "log_every": 2, "evaluate_every": 2, "device": "cpu",
}  # fmt: skip


def domains(*token: int) -> dict[str, Domain]:
    parts = {str(t): torch.full((200,), t, dtype=torch.uint8) for t in token}
    return {name: Domain(name, t, t, t, (200,) * 3) for name, t in parts.items()}


class OneToken(nn.Module):
    """A token's own one-hot vector through a mixture, as logits."""

    def __init__(self, router: growmoe.routers.Router, num_experts: int = 4) -> None:
        super().__init__()
        self.moe = growmoe.MoE(8, growmoe.FFN(4), num_experts=num_experts, router=router)

    def forward(self, token_BS: torch.Tensor) -> torch.Tensor:
        return self.moe(torch.eye(8)[token_BS.long()])


def test_every_token_of_a_domain_is_counted_for_the_experts_that_it_goes_to() -> None:
    torch.manual_seed(0)
    model, known = OneToken(growmoe.TopK(2)), domains(1, 2, 5)
    counts = RoutingCounts(model)
    bits = evaluate(model, known, windows=4, sequence_length=8, counts=counts)
    assert bits == evaluate(model, known, windows=4, sequence_length=8)  # it changes nothing
    assert not model.moe.router._forward_hooks
    (found,) = counts.maps()["moe"]
    assert found["by"] == "domain" and found["groups"] == ["1", "2", "5"]
    assert found["experts"] == [0, 1, 2, 3]
    wanted = torch.zeros(4, 3)
    for g, token in enumerate((1, 2, 5)):
        chosen_R = model.moe.eval().route(torch.eye(8)[[token]]).assignment.expert_R
        wanted[chosen_R, g] = 4 * 8
    assert found["counts"] == wanted.tolist()


def test_rows_that_belong_to_no_token_are_left_out() -> None:
    model = OneToken(SoftMoE())
    counts = RoutingCounts(model)
    evaluate(model, domains(1), windows=2, sequence_length=4, counts=counts)
    assert counts.maps() == {}


def test_paths_count_by_the_weight_of_the_gate() -> None:
    torch.manual_seed(0)
    model = GrowingLM(vocab_size=8, d_model=8, num_layers=1, num_heads=1)
    counts = RoutingCounts(model)
    evaluate(model, domains(1, 2), windows=2, sequence_length=4, counts=counts)
    assert counts.maps()["layer"][0]["counts"] == [[8.0, 8.0]]
    growmoe.surgery.spawn(model.layer, parent=0)
    counts = RoutingCounts(model)
    evaluate(model, domains(1, 2), windows=2, sequence_length=4, counts=counts)
    (found,) = counts.maps()["layer"]
    assert found["experts"] == [0, 1]
    assert torch.tensor(found["counts"]).sum(0).tolist() == pytest.approx([8.0, 8.0], abs=0.02)


@pytest.mark.slow
def test_a_run_keeps_the_last_and_the_report_shows_it_layer_by_layer(texts, tmp_path) -> None:
    train(TrainConfig(domains=texts, **TINY), output=tmp_path)
    run = read_run(tmp_path)
    assert [growth.name for growth in run.growths] == [
        "layer blocks.0.feed_forward", "layer blocks.1.feed_forward",
    ]  # fmt: skip
    for growth in run.growths:
        (found,) = growth.routing
        assert found["groups"] == ["words", "numbers"] and found["step"] == 4
        assert [sum(column) for column in zip(*found["counts"], strict=True)] == [2 * 4 * 16] * 2
    assert run.note == ""
    (tmp_path / "routing.json").unlink()  # as of a run of an earlier version
    assert read_run(tmp_path).note == (
        "Which expert takes which domain was not recorded in this run."
    )


@pytest.mark.slow
def test_a_dense_model_has_no_map(texts, tmp_path) -> None:
    train(TrainConfig(domains=texts, **{**TINY, "experts": 0}), output=tmp_path)
    assert not (tmp_path / "routing.json").exists() and read_run(tmp_path).note == ""
    assert json.loads((tmp_path / "results.json").read_text())["experts"] == {}
