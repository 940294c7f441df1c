"""Pruning and merging of whole models: what must hold whatever the criterion."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from browser import chromium
from torch import Tensor
from torch.nn import Linear

import growmoe
from growmoe import FFN, MoE, TopK, moe_layers, surgery
from growmoe.compress import CompressError, inspect, layers_of, losses, merge, prune
from growmoe.compress.calibrate import next_token_loss
from growmoe.compress.grouping import GROUPINGS
from growmoe.compress.layer import MoELayer, outputs_of
from growmoe.compress.least_squares import match_outputs, mixtures
from growmoe.compress.measure import paired
from growmoe.compress.output import writing
from growmoe.compress.recovery import recover
from growmoe.compress.subset import naee
from growmoe.models import TransformerLM

CRITERIA = ("reap", "taylor", "aimer", "naee", "leave-one-out", "greedy-loss", "random")


@pytest.mark.parametrize("saliency", CRITERIA)
def test_the_share_that_was_asked_for_goes_and_survivors_stay_as_they_were(
    model: TransformerLM, batches: list[Tensor], saliency: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    report = prune(
        model,
        batches,
        ratio=0.25,
        saliency=saliency,
        selection=batches[:1],
        evaluation={"a": batches[:2]},
    )
    for layer, row in zip(moe_layers(model).values(), report.layers, strict=True):
        assert len(layer.experts) == 6 and row.experts_after == 6
        assert set(row.removed) == set(range(8)) - set(layer.experts)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[name]), name
    change = report.domains["a"]
    assert change.after == pytest.approx(float(losses(model, batches[:2]).mean()))
    assert change.low <= change.change <= change.high


def test_what_is_refused_changes_nothing(model: TransformerLM, batches: list[Tensor]) -> None:
    before = copy.deepcopy(model.state_dict())
    for settings, message in (
        ({"ratio": 0.9}, "would leave 1 of 8"),
        ({"ratio": 0.5, "saliency": "odd"}, "no saliency 'odd'"),
        ({"ratio": 0.5, "saliency": "naee", "per_layer": "global"}, "naee"),
        ({"ratio": 0.5, "saliency": "router-norm"}, "before fine-tuning"),
        ({"ratio": 0.5, "saliency": {}}, "no saliency for this layer"),
        ({}, "exactly one"),
    ):
        with pytest.raises(CompressError, match=message):
            prune(model, batches, **settings)
    whole = copy.deepcopy(model)

    def distance(changed: torch.nn.Module, batch: Tensor) -> Tensor:
        return (changed(batch) - whole(batch)).square().flatten(1).mean(1)

    for per_layer in ("uniform", "searched"):
        with pytest.raises(CompressError, match="max_loss"):
            prune(model, batches, max_loss=1e-12, loss=distance, per_layer=per_layer)
    with pytest.raises(CompressError, match="empty"):
        prune(model, [], ratio=0.5)
    with pytest.raises(CompressError, match="no merging method"):
        merge(model, batches, ratio=0.5, method="odd")
    with pytest.raises(CompressError, match="holds no mixture"):
        prune(torch.nn.Linear(2, 2), batches, ratio=0.5)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[name]), name


def test_experts_that_cannot_be_fitted_or_merged_are_refused_before_anything_changes(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    last = list(moe_layers(model).values())[-1]
    for id in list(last.experts)[:3]:  # others than those of the first layer
        surgery.spawn(last, expert=Linear(16, 16), admitted=True)
        surgery.prune(last, [id])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressError, match="least squares takes feed-forward"):
        prune(model, batches, ratio=0.25, match=True)
    for settings in ({"match": True}, {"method": "m-smoe"}):
        with pytest.raises(CompressError):
            merge(model, batches, keep=2, **settings)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(v, before[n]) for n, v in after.items() if isinstance(v, Tensor))


@pytest.mark.parametrize("per_layer", ["uniform", "searched"])
def test_as_many_go_as_the_loss_allows(
    model: TransformerLM, batches: list[Tensor], per_layer: str
) -> None:
    chosen_on = batches[2:]
    base = losses(model, chosen_on).mean()
    report = prune(
        model,
        batches[:2],
        selection=chosen_on,
        max_loss=0.02,
        saliency="reap",
        per_layer=per_layer,
    )
    assert report.experts_after < 16
    assert float(losses(model, chosen_on).mean() - base) <= 0.02


def test_greedy_loss_begins_with_the_expert_whose_absence_costs_least(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    batches = batches[:1]
    alone = {}
    for layer in layers_of(model):
        for id in layer.ids:
            with layer.masked([id]):
                alone[layer.name, id] = float(losses(model, batches).mean())
    report = prune(
        model, batches, keep=7, saliency="greedy-loss", per_layer="searched", guard=False
    )
    gone = [(row.name, id) for row in report.layers for id in row.removed]
    assert min(alone, key=lambda key: alone[key]) in gone


def test_a_novice_gives_the_mean_output_and_keeps_the_router_row() -> None:
    moe = MoE(6, FFN(8), num_experts=4, router=TopK(2), seed=0).eval()
    layer = MoELayer("moe", moe)
    key, value = moe.experts[1].entries.key.detach().clone(), torch.arange(6.0)
    layer.novice(1, value)
    (born,) = set(moe.experts) - {0, 2, 3}
    assert torch.equal(moe.experts[born].entries.key, key)
    assert torch.equal(moe.experts[born](torch.randn(3, 6)), value.expand(3, -1))


def test_novices_load_again(model: TransformerLM, batches: list[Tensor], tmp_path: Path) -> None:
    prune(model, batches, ratio=0.25, saliency="mone")
    growmoe.save(tmp_path / "m.safetensors", model)
    other = TransformerLM(32, 16, 2, 2, d_hidden=16, num_experts=8, seed=2).eval()
    growmoe.load(tmp_path / "m.safetensors", other)
    torch.testing.assert_close(losses(other, batches), losses(model, batches))


@torch.no_grad()
def test_naee_finds_the_best_subset_and_greedy_is_no_better() -> None:
    moe = MoE(6, FFN(8), num_experts=5, router=TopK(2), seed=0).eval()
    layer = MoELayer("moe", moe)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    whole = moe(x)
    gaps = {
        gone: float(
            (moe.output_of(x, [e for e in moe.experts.values() if e.id not in gone]) - whole).norm()
            / whole.norm()
        )
        for gone in itertools.combinations(range(5), 2)
    }
    best, gap, exhaustive = naee(layer, x, 2)
    assert exhaustive and tuple(best) == min(gaps, key=lambda g: gaps[g])
    assert gap == pytest.approx(min(gaps.values()), rel=1e-4)
    _, greedy_gap, exhaustive = naee(layer, x, 2, most_subsets=1)
    assert not exhaustive and greedy_gap >= gap - 1e-9


@pytest.mark.parametrize("method", sorted(GROUPINGS))
def test_merging_leaves_as_many_as_asked_with_a_lineage(
    model: TransformerLM, batches: list[Tensor], method: str
) -> None:
    report = merge(model, batches, ratio=0.5, method=method)
    for layer, row in zip(moe_layers(model).values(), report.layers, strict=True):
        assert len(layer.experts) == row.experts_after == 4
        merged = [e for e in layer.lineage if e.act == "merge"]
        assert sorted(map(sorted, row.merged)) == sorted(sorted(e.parents) for e in merged)
    assert bool(losses(model, batches).isfinite().all())


@pytest.mark.parametrize("method", sorted(GROUPINGS))
def test_permuted_copies_find_each_other_and_merge_without_loss(
    batches: list[Tensor], method: str
) -> None:
    # experts 4-7 are experts 0-3 with other hidden units first, and the same router rows nearly:
    # of each pair the token's second choice is its first choice's copy
    model = TransformerLM(32, 16, 1, 2, d_hidden=16, num_experts=8, seed=1).eval()
    (layer,) = moe_layers(model).values()
    unit = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for e in range(4):
            mine, copied = layer.experts[e], layer.experts[e + 4]
            copied.body.w_in.copy_(mine.body.w_in[:, torch.cat([unit, unit + 16])])
            copied.body.w_out.copy_(mine.body.w_out[unit])
            copied.entries.key.copy_(mine.entries.key)
    (view,) = layers_of(model)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    twins = outputs_of(view, x)
    torch.testing.assert_close(twins[:4], twins[4:])
    report = merge(model, batches, keep=4, method=method)
    groups = sorted(sorted(group) for group in report.layers[0].merged)
    if method == "ream":
        return  # it lets the most salient take others beyond its twin
    if method == "hc-smoe":
        assert groups == [[e, e + 4] for e in range(4)]
    for group in groups:
        if len(group) == 2 and group[1] == group[0] + 4:
            event = next(e for e in layer.lineage if sorted(e.parents) == group)
            y = layer.experts[event.child](x)
            torch.testing.assert_close(y, twins[group[0]], rtol=1e-4, atol=1e-5)


def test_least_squares_comes_nearer_to_the_whole_layer_and_lowers_the_loss_of_a_cut(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    prune(plain, batches, ratio=0.5, saliency="frequency")
    report = prune(fitted, batches, ratio=0.5, saliency="frequency", match=True)
    layers = layers_of(model)
    target = mixtures(model, layers, batches, next_token_loss)
    distance = []
    for cut in (plain, fitted):
        now = mixtures(cut, layers_of(cut), batches, next_token_loss)
        distance.append([float((now[n] - target[n]).norm()) for n in target])
    assert all(after < before for before, after in zip(*distance, strict=True))
    for row, norm in zip(report.layers, target.values(), strict=True):
        assert row.gap is not None and row.gap[1] < row.gap[0]
        assert row.gap[1] == pytest.approx(
            distance[1][report.layers.index(row)] / float(norm.norm()), rel=1e-3
        )


def test_least_squares_of_one_block_is_the_ridge_solution(batches: list[Tensor]) -> None:
    model = (
        TransformerLM(32, 16, 1, 2, d_hidden=8, num_experts=1, router=TopK(1), seed=1)
        .double()
        .eval()
    )
    layers = layers_of(model)
    (layer,) = moe_layers(model).values()
    body = layer.experts[0].body
    seen = []
    with layers[0].observe(seen.append):
        losses(model, batches)
    x = torch.cat([s.x_TD for s in seen])
    gate, up = (x @ body.w_in.detach()).chunk(2, 1)
    h = torch.nn.functional.silu(gate) * up
    h = h * torch.cat([s.assignment.weight_R for s in seen])[:, None]
    y = torch.randn(len(x), 16, generator=torch.Generator().manual_seed(0)).double()
    gram = h.T @ h
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(8).double()
    w = torch.linalg.solve(gram + ridge, h.T @ y + ridge @ body.w_out.detach())
    match_outputs(model, layers, {layers[0].name: y}, batches, next_token_loss, ridge=0.1)
    torch.testing.assert_close(body.w_out.detach(), w)


def test_recovery_lowers_the_loss_and_the_router_stage_moves_routers_alone(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    whole = copy.deepcopy(model)
    prune(model, batches, ratio=0.5, saliency="frequency")
    routers = {id(p) for layer in layers_of(model) for p in layer.router_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recover(model, lambda step: batches[step % 4], 0, teacher=whole, router_steps=3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if id(p) in routers}
    found = recover(model, lambda step: batches[step % 4], 12, lr=1e-2)
    assert found[-1] < found[0] and not model.training
    with pytest.raises(CompressError, match="teacher"):
        recover(model, lambda step: batches[0], 1, router_steps=1)


def test_the_interval_is_students_over_paired_differences() -> None:
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.5, 3.5])
    change = paired(before.double(), after.double())  # differences 1, 1.5, 0.5
    assert change.change == pytest.approx(1.0)
    assert change.high - change.change == pytest.approx(4.302653 * 0.5 / 3**0.5, rel=1e-5)
    assert paired(before[:1], after[:1]).to_json()["low"] is None


def test_inspect_tells_load_saliency_and_similarity(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    found = inspect(model, batches)
    for layer in found.layers:
        assert sum(layer["load"]) == pytest.approx(1)
        assert layer["similarity"][2][2] == pytest.approx(1)
    assert inspect(model).layers[0]["load"] is None


def test_a_report_is_json_and_one_page(
    model: TransformerLM, batches: list[Tensor], tmp_path: Path
) -> None:
    report = prune(model, batches, ratio=0.25, evaluation={"<a>": batches[:1]})
    files = report.write(tmp_path)
    assert [path.name for path in files] == ["report.json", "report.html"]
    assert json.loads(files[0].read_text())["experts_after"] == 12
    page = files[1].read_text()
    assert "&lt;a&gt;" in page and "<a>" not in page
    assert "http" not in page, "it needs nothing else"


@pytest.mark.slow
def test_on_a_phone_the_page_keeps_its_width_and_its_figures_whole(
    model: TransformerLM, batches: list[Tensor], tmp_path: Path
) -> None:
    report = prune(model, batches, ratio=0.25, evaluation={"python": batches[:4]})
    page = report.write(tmp_path)[1]
    with chromium(390) as browser:
        browser.get(page.as_uri())
        run = browser.execute_script
        assert run("return document.documentElement.scrollWidth") <= 390
        heights = run(
            "return [...document.querySelectorAll('.wide td')].map(cell => cell.clientHeight)"
        )
        assert max(heights) < 45, "a figure is broken into lines"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    with pytest.raises(CompressError, match="cannot write"), writing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
    with writing(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(CompressError, match="there already"), writing(tmp_path / "out"):
        pass
