"""Attached, a transformers model computes the same, grows, and goes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import GROUPED, config_of, contents, double, families, logits, tiny, tokens
from safetensors.torch import load_file
from slow_parameters import but_slow

import growmoe
from growmoe import hf, surgery
from growmoe.compress import CompressError, next_token_loss, prune
from growmoe.rules.rule import Proposal


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def loaded(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@families()
def test_attached_and_exported_it_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "before")
    names = [name for name, _ in model.named_parameters()]
    hf.attach(model)
    assert len(growmoe.moe_layers(model)) == len(hf.attached_layers(model)) > 0
    hf.export(model, tmp_path / "after")
    before, after = weights(tmp_path / "before"), weights(tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert config_of(tmp_path / "after") == config_of(tmp_path / "before")
    assert not any(p.is_meta for p in model.parameters())
    hf.detach(model)
    assert not growmoe.moe_layers(model)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path / "again")
    again = weights(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in before.items())


@families()
def test_attached_it_computes_what_it_did(family: str) -> None:
    model = double(tiny(family))
    expected = logits(model, tokens())
    hf.attach(model)
    found = logits(model, tokens())
    # what the family computes in float32 is float32 in both
    assert torch.allclose(found, expected, atol=1e-9)
    single = tiny(family)
    expected = logits(single, tokens())
    assert torch.allclose(logits(hf.attach(single), tokens()), expected, atol=1e-5)


# PhiMoE draws its choices in training
@families("phimoe")
def test_a_training_step_moves_the_same_weights_the_same_way(family: str, tmp_path: Path) -> None:
    """One step of SGD in either form gives the same model."""
    after = []
    for attached in (False, True):
        model = double(tiny(family)).train()
        if attached:
            hf.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        next_token_loss(model, tokens()).mean().backward()
        optimizer.step()
        if attached:
            hf.export(model, tmp_path / "model")
            after.append(weights(tmp_path / "model"))
        else:
            model.save_pretrained(tmp_path / "plain")
            after.append(weights(tmp_path / "plain"))
    for name, value in after[0].items():
        assert torch.allclose(after[1][name], value, atol=1e-7), name


@pytest.mark.parametrize(
    "family", but_slow(["mixtral", "gpt_oss", "ernie4_5_moe", "minimax_m2"], "mixtral")
)
def test_it_grows_an_expert_that_learns_alone(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    plain = logits(model, tokens())
    hf.attach(model, warmup=2)
    layers = growmoe.moe_layers(model)
    for layer in layers.values():
        surgery.freeze(layer, list(layer.experts))
        born = surgery.spawn(layer, parent=3).child
        assert born == 8
    newborn = {id(p) for layer in layers.values() for p in layer.experts[8].parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in newborn)
    assert torch.allclose(logits(model, tokens()), plain, atol=1e-5)  # birth disturbs nothing
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in learning) < sum(p.numel() for p in model.parameters()) / 5
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    model.train()
    found = []
    for _ in range(25):
        loss = next_token_loss(model, tokens()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[3]
    for name, p in model.named_parameters():
        if ".experts.moe.experts.8." not in name:
            assert torch.equal(p, before[name]), name
    model.eval()
    hf.export(model, tmp_path / "grown")
    again = loaded(tmp_path / "grown")
    assert {layer.count for layer in hf.layers_of(again)} == {9}
    assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)


class CloneTheBusiest:
    def propose(self, signals: Any) -> list[Proposal]:
        busiest = max(signals.ids, key=lambda id: signals.of(id)["rows"])
        return [Proposal("spawn", (busiest,), "the busiest")]


@pytest.mark.parametrize("family", but_slow(["olmoe", "deepseek_v3"], "olmoe"))
def test_an_organizer_grows_it_while_it_trains(family: str) -> None:
    model = hf.attach(tiny(family), warmup=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    organizer = growmoe.Organizer(
        model, optimizer, [CloneTheBusiest()], every=3, max_experts=10, cooldown=0
    )
    events = []
    for _ in range(12):
        loss = next_token_loss(model, tokens()).mean() + growmoe.aux_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        events += organizer.step(loss)
    layers = growmoe.moe_layers(model)
    assert {len(layer.experts) for layer in layers.values()} == {10}
    assert sum(event.act == "spawn" and event.accepted for event in events) == 2 * len(layers)


@pytest.mark.parametrize("family", but_slow(["olmoe", "gpt_oss", "granitemoe"], "gpt_oss"))
def test_attached_it_merges_and_prunes(family: str, tmp_path: Path) -> None:
    model = hf.attach(tiny(family))
    for layer in growmoe.moe_layers(model).values():
        surgery.merge(layer, [1, 4])
    report = prune(model, [tokens(2, 17)], keep=5)
    assert report.experts_before == 7 * len(report.layers)
    hf.export(model, tmp_path / "small")
    again = loaded(tmp_path / "small")
    assert {layer.count for layer in hf.layers_of(again)} == {5}
    assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)


@pytest.mark.parametrize("family", GROUPED)
def test_groups_may_be_unequal_while_attached_but_not_when_exported(
    family: str, tmp_path: Path
) -> None:
    model = tiny(family)
    hf.attach(model, warmup=1)
    layers = growmoe.moe_layers(model)
    for layer in layers.values():
        surgery.spawn(layer, parent=1, admitted=True, noise=0.0)
    uneven = logits(model, tokens())
    assert bool(uneven.isfinite().all())
    with pytest.raises(CompressError, match=r"groups hold \[5, 4\] experts"):
        hf.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    for layer in layers.values():
        surgery.spawn(layer, parent=6, admitted=True, noise=0.0)  # tied keys: twins
    hf.export(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert {layer.count for layer in hf.layers_of(again)} == {10}
    assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)


class TestRefused:
    def test_different_counts_unless_in_growmoes_own_format(self, tmp_path: Path) -> None:
        model = hf.attach(tiny("olmoe"))
        surgery.prune(next(iter(growmoe.moe_layers(model).values())), [2])
        with pytest.raises(CompressError, match=r"layers hold \[7, 8\] experts"):
            hf.export(model, tmp_path / "out")
        with pytest.raises(CompressError, match=r"layers hold \[7, 8\] experts"):
            hf.detach(model)
        assert not list(tmp_path.iterdir())
        hf.export(model, tmp_path / "out", uneven=True)
        again = hf.load(tmp_path / "out")
        assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)

    def test_a_newborn_that_is_not_let_in(self, tmp_path: Path) -> None:
        model = hf.attach(tiny("olmoe"))
        for layer in growmoe.moe_layers(model).values():
            surgery.spawn(layer, parent=0)
        with pytest.raises(CompressError, match="is let in to 0% only"):
            hf.export(model, tmp_path / "out")

    def test_an_expert_of_another_kind(self, tmp_path: Path) -> None:
        model = hf.attach(tiny("olmoe"))
        for layer in growmoe.moe_layers(model).values():
            surgery.spawn(layer, expert=growmoe.FFN(16, "gelu"), admitted=True)
        with pytest.raises(CompressError, match="no expert that this family can hold"):
            hf.export(model, tmp_path / "out")
        assert growmoe.moe_layers(model)

    def test_a_model_that_is_not_attached(self, tmp_path: Path) -> None:
        with pytest.raises(CompressError, match="not attached"):
            hf.export(tiny("olmoe"), tmp_path / "out")

    def test_an_optimizer_that_holds_the_model(self) -> None:
        model = tiny("olmoe")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizer"):
            hf.attach(model)
        assert optimizer and not growmoe.moe_layers(model)

    def test_a_router_loss_of_transformers(self) -> None:
        with pytest.raises(ValueError, match="output_router_logits"):
            hf.attach(tiny("olmoe", output_router_logits=True))


def test_a_checkpoint_of_an_attached_model_is_loaded_into_another(tmp_path: Path) -> None:
    model = hf.attach(tiny("gpt_oss"))
    for layer in growmoe.moe_layers(model).values():
        surgery.spawn(layer, parent=2, admitted=True)
    growmoe.save(tmp_path / "checkpoint.safetensors", model)
    other = hf.attach(tiny("gpt_oss", seed=5))
    growmoe.load(tmp_path / "checkpoint.safetensors", other)
    assert torch.equal(logits(other, tokens()), logits(model, tokens()))
    assert contents(tmp_path)
