"""What consent measures, and that asking changes nothing."""

import math

import pytest
import torch
from snapshots import differences
from torch import nn

import growmoe
from growmoe import FFN, MoE, surgery
from growmoe.consent import output_change
from growmoe.experts.moments import Moments
from growmoe.organizer import snapshot
from growmoe.routers import ClosedFormGate


def trained(layer, forwards=40, d=8):
    torch.manual_seed(1)
    for _ in range(forwards):
        layer(torch.randn(64, d))
    return layer


def test_an_output_that_is_not_finite_refuses_rather_than_passing_as_no_change():
    layer = trained(MoE(8, FFN(16), 4, seed=0))
    with torch.no_grad():
        layer.experts[0].body.w_out.fill_(math.nan)
    with pytest.raises(surgery.Refused, match="not finite"):
        surgery.prune(layer, [1], tolerance=1e9)
    assert surgery.prune(layer, [1]).change is None


def test_without_any_evidence_nothing_is_measured_and_nothing_consented():
    layer = MoE(8, FFN(16), 4, seed=0)
    with pytest.raises(surgery.Refused, match="evidence"):
        surgery.prune(layer, [0], tolerance=1e9)
    assert surgery.prune(layer, [0]).change is None


def test_the_candidate_of_a_merger_does_not_learn_from_being_asked():
    def expert():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    layer = trained(MoE(8, expert(), 3, seed=0))
    state = torch.get_rng_state()
    event = surgery.merge(layer, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    child = layer.experts[event.child]
    assert child.training and child.body.training
    parents = 40  # each forward that hit a parent is one batch
    assert child.body[1].num_batches_tracked <= parents


def test_merging_moments_in_training_is_an_exact_sum():
    layer = MoE(
        4,
        [lambda: Moments(2, 0, 4), lambda: Moments(2, 0, 4), lambda: Moments(2, 1, 4)],
        3,
        router=ClosedFormGate(),
        d_out=2,
        evidence="moments",
        balance_loss=0.0,
        seed=0,
    )
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(60) % 2
        layer(torch.randn(60, 4, generator=g) + 4 * y[:, None], context=y)
        layer.experts[1].body(torch.randn(5, 4, generator=g))
        layer.experts[1].statistics.view()["hits"] += 1
        layer.experts[1].statistics.view()["rows"] += 5
    total = layer.experts[0].body.moment + layer.experts[1].body.moment
    event = surgery.merge(layer, [0, 1])
    torch.testing.assert_close(layer.experts[event.child].body.moment, total)


def test_a_shared_expert_counts_in_what_the_layer_puts_out():
    layer = trained(MoE(8, FFN(16), 3, shared=FFN(16), seed=0))
    with torch.no_grad():
        layer.shared.w_out.mul_(1e4)
    assert surgery.prune(layer, [0]).change < 1e-3


def test_asking_changes_nothing_that_is_drawn_later():
    layer = trained(MoE(8, FFN(16), 3, evidence="moments", seed=0))
    before = layer.generator.get_state()
    found = snapshot(layer)
    found.similarity(), found.usefulness()
    output_change(layer, list(layer.experts.values())[1:], [layer.experts[0]])
    assert torch.equal(layer.generator.get_state(), before)


def test_a_newborn_is_let_in_alike_in_a_checkpointed_forward_and_its_repetition():
    from copy import deepcopy

    from torch.utils.checkpoint import checkpoint

    plain = MoE(8, FFN(16), 3, warmup=4, balance_loss=0.0, seed=0)
    surgery.spawn(plain, 0)
    plain.experts[3].admission = 0.25
    saving = deepcopy(plain)
    x = torch.randn(32, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).square().sum().backward()
    checkpoint(saving, b, use_reentrant=False).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert plain.experts[3].admission == saving.experts[3].admission == 0.5


def test_part_of_a_layer_loads_into_living_experts_without_removing_the_others():
    source, target = MoE(8, FFN(16), 5, seed=0), MoE(8, FFN(16), 5, seed=1)
    part = {k: v for k, v in source.state_dict().items() if k.startswith("experts.3.")}
    target.load_state_dict(part, strict=False)
    assert list(target.experts) == [0, 1, 2, 3, 4]
    assert torch.equal(target.experts[3].body.w_in, source.experts[3].body.w_in)


def test_a_body_with_layers_of_its_own_is_saved_and_loaded(tmp_path):
    def nested():
        return MoE(8, lambda: MoE(8, FFN(8), 2, seed=0), 3, seed=0)

    source, target = nested(), nested()
    surgery.spawn(source.experts[1].body, 0)
    surgery.prune(source, [0])
    growmoe.save(tmp_path / "c.safetensors", source)
    growmoe.load(tmp_path / "c.safetensors", target)
    assert list(target.experts) == [1, 2] and list(target.experts[1].body.experts) == [0, 1, 2]
    mine, theirs = source.state_dict(), target.state_dict()
    tensors = [k for k, v in mine.items() if isinstance(v, torch.Tensor)]
    assert differences([mine[k] for k in tensors], [theirs[k] for k in tensors]) == []


def test_an_average_of_bfloat16_weights_keeps_moving():
    model = nn.Linear(2, 2).bfloat16()
    ema = growmoe.EMA(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(5000):
        ema.update()
    assert (ema.average["weight"] > 0.98).all()


def test_the_default_gate_of_a_single_choice_learns_from_the_task():
    layer = MoE(8, FFN(16), 3, router=growmoe.TopK(1), balance_loss=0.0, seed=0)
    layer(torch.randn(32, 8)).square().sum().backward()
    assert layer.experts[0].entries.key.grad.abs().max() > 1e-3


def test_frozen_experts_stay_frozen_when_the_whole_model_is_made_trainable():
    layer = MoE(8, FFN(16), 3, seed=0)
    surgery.freeze(layer, [1])
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = [p.detach().clone() for p in layer.experts[1].parameters()]
    for _ in range(3):
        layer(torch.randn(64, 8)).square().sum().backward()
        optimizer.step()
    assert differences(before, list(layer.experts[1].parameters())) == []


def test_what_was_frozen_when_the_optimizer_was_built_trains_after_a_thaw():
    layer = MoE(8, FFN(16), 3, seed=0)
    surgery.freeze(layer, [1])
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    surgery.thaw(layer, [1], optimizer)
    before = layer.experts[1].body.w_in.detach().clone()
    layer(torch.randn(64, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.experts[1].body.w_in)


def test_a_copied_organizer_goes_on_deciding():
    from copy import deepcopy

    layer = MoE(8, FFN(16), 3, seed=0)
    optimizer = torch.optim.AdamW(layer.parameters())
    organizer = growmoe.Organizer(layer, optimizer, every=5)
    layer, optimizer, organizer = deepcopy((layer, optimizer, organizer))
    for _ in range(20):
        layer(torch.randn(64, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        organizer.step()
    assert organizer.steps >= 19


@pytest.mark.slow
def test_novelty_is_the_same_under_autocast():
    shares = []
    for enabled in (False, True):
        layer = MoE(8, FFN(16), 4, seed=0)
        g = torch.Generator().manual_seed(0)
        centre = 30 * torch.randn(4, 8, generator=g)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for step in range(60):
                x = centre[torch.randint(4, (64,), generator=g)]
                noise = torch.randn(64, 8, generator=g) * (1 if step < 50 else 100)
                layer(x + noise)
        shares.append(float(layer.recorder.novel[1]))
    assert shares[0] > 0.2 and shares[1] == pytest.approx(shares[0], abs=0.1)
