"""Mixtures of transformers models in memory: masked, pruned, merged, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import GROUPED, OWN, double, families, logits, masked_by_hand, tiny, tokens

import growmoe
from growmoe import hf
from growmoe.compress import CompressError, collect, merge, prune

HALF = [0, 3, 5, 6]  # two of each group of four


def loaded(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_family_has_a_test() -> None:
    assert set(hf.FAMILIES) == set(OWN)


@families()
def test_masking_equals_masking_by_hand_and_leaves_no_trace(family: str) -> None:
    model = tiny(family)
    layers = hf.layers_of(model)
    before = logits(model, tokens())
    with masked_by_hand(model, {layer.name: HALF for layer in layers}):
        expected = logits(model, tokens())
    from contextlib import ExitStack

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.masked(HALF))
        assert torch.equal(logits(model, tokens()), expected)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.equal(logits(model, tokens()), before)


def test_masks_within_masks_add_up() -> None:
    model = tiny("deepseek_v3")
    (first, *_) = hf.layers_of(model)
    before = logits(model, tokens())
    with first.masked(HALF):
        expected = logits(model, tokens())
    with first.masked([0, 5]):
        outer = logits(model, tokens())
        with first.masked(HALF):
            assert torch.equal(logits(model, tokens()), expected)
        assert torch.equal(logits(model, tokens()), outer)
    assert torch.equal(logits(model, tokens()), before)


def test_a_new_family_is_one_declaration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("olmoe")
    model.config.model_type = "new"
    with pytest.raises(CompressError, match="'new' is no mixture of experts that is known here"):
        hf.layers_of(model)
    monkeypatch.setitem(hf.FAMILIES, "new", hf.Family(count="num_experts"))
    names = [layer.name for layer in hf.layers_of(model)]
    hf.remove_experts(model, dict.fromkeys(names, HALF))
    assert model.config.num_experts == 4


@families()
def test_pruned_to_half_loads_in_transformers_and_equals_the_masked(
    family: str, tmp_path: Path
) -> None:
    model = tiny(family)
    names = [layer.name for layer in hf.layers_of(model)]
    whole = sum(p.numel() for p in model.parameters())
    with masked_by_hand(model, dict.fromkeys(names, HALF)):
        expected = logits(model, tokens())
    hf.remove_experts(model, dict.fromkeys(names, HALF))
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-5)
    hf.save(model, tmp_path / "half")
    again = loaded(tmp_path / "half")
    assert sum(p.numel() for p in again.parameters()) < 0.8 * whole
    assert all(layer.count == 4 for layer in hf.layers_of(again))
    assert torch.allclose(logits(again, tokens()), expected, atol=1e-5)


@families()
def test_what_is_observed_is_what_the_block_computes(family: str) -> None:
    model = tiny(family)
    layer = hf.layers_of(model)[0]
    seen: list[Any] = []
    with layer.observe(seen.append):
        logits(model, tokens())
    (one,) = seen
    mixture = one.assignment.combine(one.out_RO)
    assert torch.allclose(mixture, one.mixture_TO, atol=1e-5)
    weights = layer.weights(one.x_TD)
    assert torch.allclose(weights, one.assignment.dense().to(weights), atol=1e-6)
    for e, id in enumerate(layer.ids):
        own = one.assignment.expert_R == e
        out = layer.ffn(id)(one.x_TD[one.assignment.token_R[own]])
        assert torch.allclose(out, one.out_RO[own], atol=1e-5)
    assert one.logits_TE.shape == (len(one.x_TD), 8)


@families()
def test_one_call_prunes_by_any_criterion(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    batches = [tokens(2, 17, seed) for seed in range(2)]
    report = prune(model, batches, ratio=0.5, saliency="reap", guard=False)
    assert report.experts_after == report.experts_before / 2
    names = {layer.name: layer.removed for layer in report.layers}
    with masked_by_hand(whole := tiny(family), names):
        expected = logits(whole, tokens())
    hf.save(model, tmp_path / "half")
    assert torch.allclose(logits(loaded(tmp_path / "half"), tokens()), expected, atol=1e-5)


def test_every_criterion_runs_on_a_transformers_model() -> None:
    batches = [tokens(2, 9)]
    for name in ("taylor", "naee", "leave-one-out", "greedy-loss", "aimer", "mone"):
        model = tiny("qwen2_moe", num_hidden_layers=1)
        report = prune(model, batches, keep=6, saliency=name, novices=False, guard=False)
        assert report.experts_after == 6, name


def test_least_squares_brings_the_outputs_nearer() -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    report = prune(model, [tokens(8, 17)], keep=5, match=True)
    before, after = report.layers[0].gap  # type: ignore[misc]
    assert 0 < after < before


def test_the_taylor_criterion_is_the_derivative_by_a_scale_of_the_expert() -> None:
    model = double(tiny("mixtral"))
    layer = hf.layers_of(model)[1]
    batch = tokens(2, 9)
    statistics, _ = collect(model, [layer], [batch], gradients=True)
    taylor = statistics[layer.name].taylor
    step = 1e-3  # the router itself is in float32
    for e in range(3):
        found = []
        for sign in (1, -1):
            model = double(tiny("mixtral"))
            block = hf.layers_of(model)[1]
            with torch.no_grad():
                block.experts.down_proj[e] *= 1 + sign * step
            found.append(growmoe.compress.next_token_loss(model, batch).sum().item())
        assert taylor[e].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=2e-3)


@families(*GROUPED)
def test_merging_leaves_one_expert_for_several(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    batches = [tokens(2, 17)]
    report = merge(model, batches, keep=4)
    assert [layer.experts_after for layer in report.layers] == [4] * len(report.layers)
    hf.save(model, tmp_path / "merged")
    again = loaded(tmp_path / "merged")
    assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_merging_twins_changes_nothing(family: str) -> None:
    """Two experts equal but for the order of their hidden units give what one gives, k = 1."""
    model = tiny(family, **{"moe_k" if "ernie" in family else "num_experts_per_tok": 1})
    for layer in hf.layers_of(model):
        with torch.no_grad():
            body = layer.ffn(2)
            order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
            import copy

            twin = copy.deepcopy(body)
            for name, p in twin.named_parameters():
                if name in ("w_out", "b_gate", "b_up"):
                    p.copy_(p[order])
                elif name == "w_in":
                    p.copy_(p[:, torch.cat([order, order + 24])])
                elif name in ("w_gate", "w_up"):
                    p.copy_(p[:, order])
            layer.put(5, twin)
            for name, dim in layer.family.rows.items():
                row = layer.row(name)
                row.select(dim, 5).copy_(row.select(dim, 2))
    before = logits(model, tokens())
    from growmoe.compress.merging import merge_groups

    for layer in hf.layers_of(model):
        merge_groups(layer, [[2, 5]], [1.0] * 8)
        assert layer.ids == [0, 1, 2, 3, 4, 6, 7]
    after = logits(model, tokens())
    if family in ("gpt_oss",):  # its weight is a softmax over the chosen: 1 for one
        assert torch.allclose(after, before, atol=1e-5)
    else:
        assert after.shape == before.shape and bool(after.isfinite().all())


class TestRefused:
    def test_fewer_than_k(self) -> None:
        model = tiny("mixtral")
        with pytest.raises(CompressError, match="1 of 8 experts"):
            prune(model, [tokens()], keep=1)
        with pytest.raises(CompressError, match="takes 2 for each token"):
            hf.remove_experts(model, {hf.layers_of(model)[0].name: range(7)})
        assert hf.layers_of(model)[0].count == 8

    def test_unequal_groups(self) -> None:
        model = tiny("deepseek_v3")
        layer = hf.layers_of(model)[0]
        with pytest.raises(CompressError, match="must stay equal"):
            layer.prune([0, 1])
        with pytest.raises(CompressError, match="groups"):
            prune(model, [tokens()], keep=5)
        assert layer.count == 8 and model.config.n_routed_experts == 8

    def test_merging_grouped_experts(self) -> None:
        with pytest.raises(CompressError, match="groups of experts unequal"):
            merge(tiny("glm4_moe"), [tokens()], keep=4)

    def test_different_counts_per_layer(self) -> None:
        model = tiny("olmoe")
        first, second, _ = (layer.name for layer in hf.layers_of(model))
        with pytest.raises(CompressError, match="one number for all"):
            hf.remove_experts(model, {first: [0], second: [1, 2]})
        with pytest.raises(CompressError, match="same number of experts in every layer"):
            prune(model, [tokens()], ratio=0.3, per_layer="global")
        assert {layer.count for layer in hf.layers_of(model)} == {8}

    def test_an_unknown_block_or_expert(self) -> None:
        model = tiny("olmoe")
        with pytest.raises(CompressError, match="no block 'there'"):
            hf.remove_experts(model, {"there": [0]})
        with pytest.raises(CompressError, match="has no expert 9"):
            hf.remove_experts(model, {hf.layers_of(model)[0].name: [9]})

    def test_an_unknown_family_and_a_dense_model(self) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )  # fmt: skip
        with pytest.raises(CompressError, match="no mixture of experts that is known here"):
            prune(transformers.LlamaForCausalLM(config), [tokens()], keep=1)
        dense = tiny("deepseek_v3", first_k_dense_replace=3)
        with pytest.raises(CompressError, match="holds no mixture"):
            prune(dense, [tokens()], keep=1)

    def test_constants_in_place_of_experts(self) -> None:
        model = tiny("olmoe")
        with pytest.raises(CompressError, match="no expert that is a constant"):
            prune(model, [tokens()], keep=4, saliency="mone")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_growmoes_own_format_holds_different_counts(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    names = [layer.name for layer in hf.layers_of(model)]
    gone = {names[0]: [1, 2], names[1]: [7]}
    with masked_by_hand(model, gone):
        expected = logits(model, tokens())
    hf.remove_experts(model, gone, uneven=True)
    with pytest.raises(CompressError, match="could not load"):
        hf.save(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())
    hf.save(model, tmp_path / "own", uneven=True)
    again = hf.load(tmp_path / "own")
    assert [layer.count for layer in hf.layers_of(again)] == [6, 7, 8][: len(names)]
    assert torch.allclose(logits(again, tokens()), expected, atol=1e-5)
    import transformers

    with pytest.raises((ValueError, KeyError)):  # never silently wrong
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")


def test_one_threshold_for_all_layers_in_growmoes_own_format(tmp_path: Path) -> None:
    model = tiny("olmoe")
    with hf.allow_uneven():
        report = prune(model, [tokens(4, 17)], ratio=0.3, per_layer="global", guard=False)
    assert report.experts_after == 24 - 7
    hf.save(model, tmp_path / "own", uneven=True)
    again = hf.load(tmp_path / "own")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
