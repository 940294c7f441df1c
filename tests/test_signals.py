"""What an expert lived through is recorded as the module's formulas say, in training alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from slow_parameters import but_slow
from torch import Tensor, nn

from growmoe import FFN, MoE, TopK, surgery
from growmoe.organizer import Organizer, snapshot
from growmoe.signals import distance_z

RATE = 0.02


def records(layer: MoE) -> Tensor:
    return torch.stack([e.statistics.record for e in layer.experts.values()]).clone()


def observe_loss(layer: MoE, loss: Tensor) -> None:
    layer.recorder.observe_loss(list(layer.experts.values()), loss)


def one_hot_layer(num_experts: int = 3, **options: object) -> MoE:
    """Expert e receives the tokens whose e-th value is largest."""
    layer = MoE(8, FFN(8), num_experts, TopK(1, renormalize=False), seed=0, **options)
    with torch.no_grad():
        for i, e in enumerate(layer.experts.values()):
            e.entries.key.zero_()[i] = 1.0
    return layer


def tokens_for(*experts: int) -> Tensor:
    x = 0.1 * torch.rand(len(experts), 8)
    for row, e in zip(x, experts, strict=True):
        row[e] = 2.0 + torch.rand(())
    return x


# Counts and running means.


def test_running_means_are_the_formulas() -> None:
    layer = one_hot_layer()
    batches = [[0, 0, 1], [1, 1, 1, 0], [0, 2], [2, 2, 2, 2, 1]]
    want = [dict.fromkeys(["age", "idle", "rows", "hits", "load", "gate_mass"], 0.0) for _ in "abc"]
    for w in want:
        w |= {"confidence": 0.0, "output_norm": 0.0}
    for batch in batches:
        x = tokens_for(*batch)
        probs = layer.route(x).probs_TE.detach()
        norms = {e: layer.experts[e].body(x).norm(dim=1).detach() for e in range(3)}
        layer(x)
        for e, w in enumerate(want):
            mine = [t for t, expert in enumerate(batch) if expert == e]
            mass = sum(float(probs[t, e]) for t in mine)
            w["age"] += 1
            w["rows"] += len(mine)
            rate = max(RATE, 1 / w["age"])
            w["load"] += rate * (len(mine) / len(batch) - w["load"])
            w["gate_mass"] += rate * (mass / len(batch) - w["gate_mass"])
            w["idle"] = 0.0 if mine else w["idle"] + 1
            if mine:
                w["hits"] += 1
                rate = max(RATE, 1 / w["hits"])
                norm = sum(float(norms[e][t]) for t in mine) / len(mine)
                w["confidence"] += rate * (mass / len(mine) - w["confidence"])
                w["output_norm"] += rate * (norm - w["output_norm"])
    for e, w in enumerate(want):
        for field, value in w.items():
            got = layer.experts[e].statistics[field]
            assert got == pytest.approx(value, rel=1e-5, abs=1e-7), (e, field)


def test_loads_sum_to_one_and_gate_mass_to_the_mean_weight() -> None:
    layer = MoE(8, FFN(8), 4, TopK(2), seed=0)
    for _ in range(60):
        layer(torch.randn(16, 8))
    signals = snapshot(layer)
    assert sum(signals.values["load"]) == pytest.approx(1, rel=1e-4)
    assert sum(signals.values["gate_mass"]) == pytest.approx(1, rel=1e-4)
    assert signals.values["age"] == [60.0] * 4
    assert sum(signals.values["rows"]) == 60 * 16 * 2


def test_after_the_first_fifty_forwards_the_running_mean_forgets() -> None:
    layer = one_hot_layer(2)
    for _ in range(100):
        layer(tokens_for(0, 0, 1))
    assert layer.experts[0].statistics["load"] == pytest.approx(2 / 3, rel=1e-4)
    for _ in range(50):
        layer(tokens_for(1, 1))
    want = 2 / 3 * (1 - RATE) ** 50
    assert layer.experts[0].statistics["load"] == pytest.approx(want, rel=1e-4)
    assert layer.experts[0].statistics["idle"] == 50


def test_a_newborn_is_admitted_over_the_warmup() -> None:
    layer = MoE(8, FFN(8), 2, TopK(1), warmup=4, seed=0)
    id = surgery.spawn(layer, 0).child
    admitted = []
    for _ in range(6):
        layer(torch.randn(4, 8))
        admitted.append(layer.experts[id].admission)
    assert admitted == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


# When nothing is recorded.


@pytest.mark.parametrize("mode", ["eval", "inference"])
def test_only_training_is_recorded(mode: str) -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    layer(torch.randn(9, 8))
    before, novel = records(layer), layer.recorder.novel.clone()
    generator = layer.generator.get_state()
    with torch.inference_mode(mode == "inference"):
        layer.train(mode != "eval")(torch.randn(9, 8))
    assert torch.equal(records(layer), before)
    assert torch.equal(layer.recorder.novel, novel)
    assert torch.equal(layer.generator.get_state(), generator)
    assert layer.steps == 1


def test_no_inputs_are_a_step_without_rows() -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    layer(torch.randn(9, 8))
    layer(torch.zeros(0, 8))
    observe_loss(layer, torch.tensor(1.0))
    for e in layer.experts.values():
        assert e.statistics["age"] == 2 and e.statistics["loss_count"] == 0
        assert e.statistics.record.isfinite().all()


# Precision and memory.


@pytest.mark.slow
@pytest.mark.parametrize(
    "convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double], ids=lambda f: f.__name__
)
def test_records_stay_float32_to_the_last_bit(convert: object) -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    for _ in range(300):
        layer(torch.randn(4, 8))
    layer.recorder.novel[2], layer.recorder.lost[0] = 70_001.0, 257.0
    before, novel = records(layer), layer.recorder.novel.clone()
    convert(layer)
    assert torch.equal(records(layer), before) and torch.equal(layer.recorder.novel, novel)
    assert layer.recorder.lost.item() == 257
    x = torch.randn(4, 8).to(next(layer.parameters()).dtype)
    layer(x)
    for e in layer.experts.values():
        assert e.statistics.record.dtype is torch.float32 and e.statistics["age"] == 301
    assert layer.recorder.novel.dtype is torch.float32


def test_a_copys_records_are_its_own() -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    x = torch.randn(4, 8)
    layer(x)
    twin = copy.deepcopy(layer)
    before = records(layer)
    twin(x)
    assert torch.equal(records(layer), before)
    layer(x)
    assert torch.equal(records(layer), records(twin))


def test_a_record_set_by_hand_is_the_one_that_goes_on() -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    x = torch.randn(4, 8)
    layer(x)
    statistics = layer.experts[1].statistics
    statistics.record = statistics.record.clone()
    statistics.view()["age"] = 41.0
    layer(x)
    assert [e.statistics["age"] for e in layer.experts.values()] == [2, 42, 2]


def test_the_records_of_survivors_do_not_move_in_a_birth_or_death() -> None:
    layer = MoE(8, FFN(8), 4, seed=0)
    for _ in range(5):
        layer(torch.randn(9, 8))
    before = {e.id: e.statistics.record.clone() for e in layer.experts.values()}
    surgery.spawn(layer, 0)
    surgery.prune(layer, [2])
    for id in (0, 1, 3):
        assert torch.equal(layer.experts[id].statistics.record, before[id])


# Evidence.


def test_evidence_is_an_experts_own_inputs() -> None:
    layer = one_hot_layer()
    seen = []
    for _ in range(20):
        seen.append(tokens_for(0, 0, 1))
        layer(seen[-1])
    every = torch.cat(seen)
    for id, rows in ((0, every[every.argmax(1) == 0]), (1, every[every.argmax(1) == 1])):
        evidence = layer.experts[id].statistics.view().evidence
        assert evidence.shape == (32, 8)
        held = evidence[evidence.any(1)]
        assert len(held) == 20
        assert all((row == rows).all(1).any() for row in held)
    assert not layer.experts[2].statistics.view().evidence.any()


@pytest.mark.slow
def test_evidence_keeps_the_old_and_takes_the_new() -> None:
    layer = one_hot_layer(2)
    for step in range(640):
        x = tokens_for(0)
        x[0, 7] = step / 1000
        layer(x)
    when = layer.experts[0].statistics.view().evidence[:, 7] * 1000
    assert (when < 320).sum() >= 6 and (when >= 320).sum() >= 6


def test_no_inputs_are_kept_where_only_moments_may_be() -> None:
    layer = one_hot_layer(2, evidence="moments")
    x = torch.cat([tokens_for(0) for _ in range(200)])
    for batch in x.split(2):
        layer(batch)
    view = layer.experts[0].statistics.view()
    assert view.evidence.shape == (0, 8)
    torch.testing.assert_close(view.mean, x.mean(0), rtol=0.1, atol=0.05)
    torch.testing.assert_close(view.var, x.var(0), rtol=0.6, atol=0.02)


# Novelty.


def stationary(generator: torch.Generator, count: int = 64) -> Tensor:
    """Three clusters, one of them heavy-tailed."""
    centre = 4 * torch.eye(16)[torch.randint(3, (count,), generator=generator)]
    noise = torch.randn(count, 16, generator=generator)
    scale = torch.rand(count, 1, generator=generator).clamp_min(0.05) ** -0.25
    return centre + noise * scale


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_stationary_stream_raises_no_false_alarm(seed: int) -> None:
    layer = MoE(16, FFN(16), 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(400):
        layer(stationary(generator))
    assert snapshot(layer).novel_share < 0.25  # the peak over all forwards
    assert layer.recorder.novel[0] < 0.15


@pytest.mark.parametrize("seed", but_slow(range(4), 0))
def test_a_shifted_stream_is_novel_at_once_and_its_mean_is_told(seed: int) -> None:
    layer = MoE(16, FFN(16), 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        layer(stationary(generator))
    layer.recorder.begin_window()
    shift = torch.zeros(16)
    shift[8:] = -6.0
    for _ in range(10):
        layer(stationary(generator) + shift)
    signals = snapshot(layer)
    assert signals.novel_share > 0.5
    assert signals.novel_count > 300
    torch.testing.assert_close(signals.novel_mean[8:], shift[8:], rtol=0.1, atol=0.3)
    assert signals.novel_nearest in layer.experts


@pytest.mark.slow
def test_on_its_own_inputs_an_experts_scores_are_standard() -> None:
    layer = MoE(16, FFN(8), 1, TopK(1), seed=0)
    mean, scale = torch.randn(16), torch.rand(16) + 0.2
    for _ in range(300):
        layer(mean + scale * torch.randn(256, 16))
    view = layer.recorder.records(list(layer.experts.values()))
    torch.testing.assert_close(view.mean[0], mean, rtol=0.02, atol=0.05)
    torch.testing.assert_close(view.var[0], scale.square(), rtol=0.1, atol=0.02)
    z = distance_z(view, mean + scale * torch.randn(20_000, 16))
    assert z.mean().item() == pytest.approx(0, abs=0.06)
    assert z.std().item() == pytest.approx(1, abs=0.05)
    by_hand = (
        (mean + scale - view.mean[0]).square() / (view.var[0] + view.var[0].mean() / 20)
    ).mean()
    want = (by_hand.log() - view["score_mean"][0]) / view["score_var"][0].sqrt()
    got = distance_z(view, (mean + scale)[None])[0, 0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_novel_stream_becomes_familiar() -> None:
    layer = MoE(16, FFN(16), 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        layer(stationary(generator))
    for _ in range(600):
        layer(stationary(generator) - 6)
    assert layer.recorder.novel[0] < 0.2


def test_a_new_window_forgets_the_count_and_if_asked_the_share() -> None:
    layer = MoE(8, FFN(8), 2, seed=0)
    layer.recorder.novel[:] = 1.0
    layer.recorder.begin_window()
    assert layer.recorder.novel[0] == 1 and not layer.recorder.novel[1:].any()
    layer.recorder.begin_window(forget=True)
    assert not layer.recorder.novel.any()
    assert snapshot(layer).novel_mean is None


# Losses.


def test_a_loss_per_token_goes_to_the_experts_of_that_token() -> None:
    layer = one_hot_layer()
    layer(tokens_for(0, 1, 0, 1))
    observe_loss(layer, torch.tensor([1.0, 5.0, 3.0, 7.0]))
    got = [e.statistics["loss_fast"] for e in layer.experts.values()]
    assert got == [2.0, 6.0, 0.0]
    assert [e.statistics["loss_count"] for e in layer.experts.values()] == [1, 1, 0]


def test_a_loss_per_sequence_goes_to_its_tokens() -> None:
    layer = one_hot_layer()
    layer(tokens_for(0, 0, 1, 1).view(2, 2, 8))
    observe_loss(layer, torch.tensor([2.0, 8.0]))
    assert [e.statistics["loss_slow"] for e in layer.experts.values()] == [2.0, 8.0, 0.0]


def test_a_scalar_goes_to_all_that_were_used() -> None:
    layer = one_hot_layer()
    layer(tokens_for(0, 2))
    observe_loss(layer, torch.tensor(3.0))
    assert [e.statistics["loss_fast"] for e in layer.experts.values()] == [3.0, 0.0, 3.0]


def test_running_losses_are_the_formulas() -> None:
    layer = one_hot_layer(2)
    fast = slow = var = 0.0
    for i in range(150):
        value = 1 + math.sin(i)
        layer(tokens_for(0))
        observe_loss(layer, torch.tensor(value))
        fast += max(0.1, 1 / (i + 1)) * (value - fast)
        rate, gap = max(0.01, 1 / (i + 1)), value - slow
        slow += rate * gap
        var += rate * (gap * (value - slow) - var)
    s = layer.experts[0].statistics
    assert (s["loss_fast"], s["loss_slow"], s["loss_var"]) == pytest.approx(
        (fast, slow, var), rel=1e-4
    )
    z = (fast - slow) / math.sqrt(var * 0.1 / 1.9)
    assert snapshot(layer).loss_z(0) == pytest.approx(z, rel=1e-3)
    assert snapshot(layer).loss_z(1) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_counted_and_ignored(bad: float) -> None:
    layer = one_hot_layer()
    layer(tokens_for(0, 1, 2))
    observe_loss(layer, torch.tensor([1.0, 2.0, 3.0]))
    before = records(layer)
    observe_loss(layer, torch.tensor(bad))
    assert torch.equal(records(layer), before)
    assert layer.recorder.lost.item() == 1
    observe_loss(layer, torch.tensor([bad, 4.0, bad]))
    assert layer.recorder.lost.item() == 3
    assert [e.statistics["loss_count"] for e in layer.experts.values()] == [1, 2, 1]
    assert layer.experts[1].statistics["loss_fast"] == 3.0
    organizer = Organizer(layer)
    organizer.step(bad)
    assert organizer.lost_losses == 4


def test_losses_that_do_not_fit_the_inputs_are_refused() -> None:
    layer = one_hot_layer()
    layer(tokens_for(0, 1, 2, 0))
    before = records(layer)
    for count in (0, 3, 8):
        with pytest.raises(ValueError, match=f"loss has {count} values, the last forward 4 inputs"):
            observe_loss(layer, torch.ones(count))
    assert torch.equal(records(layer), before)


def test_a_loss_is_not_given_to_experts_that_came_after_the_forward() -> None:
    layer = one_hot_layer()
    layer(tokens_for(1, 2))
    surgery.prune(layer, [1])
    surgery.spawn(layer, 0)  # as many as before, in other places
    observe_loss(layer, torch.tensor([5.0, 7.0]))
    got = {id: e.statistics["loss_count"] for id, e in layer.experts.items()}
    assert got[0] == 0 and got[3] == 0


def test_a_loss_before_any_forward_is_nobodys() -> None:
    layer = one_hot_layer()
    before = records(layer)
    observe_loss(layer, torch.tensor(1.0))
    assert torch.equal(records(layer), before)


# The snapshot.


def test_a_snapshot_is_a_copy_in_ascending_order_of_id() -> None:
    layer = MoE(8, FFN(8), 3, seed=0)
    layer(torch.randn(9, 8))
    surgery.freeze(layer, [1])
    signals = snapshot(layer)
    assert signals.ids == [0, 1, 2] and signals.frozen == [False, True, False]
    assert signals.of(2)["age"] == 1
    layer(torch.randn(9, 8))
    assert signals.of(2)["age"] == 1


def test_an_expert_is_as_similar_to_itself_as_can_be() -> None:
    layer = MoE(8, FFN(8), 3, TopK(3), seed=0)
    for _ in range(20):
        layer(torch.randn(9, 8))
    twin = surgery.spawn(layer, 1, noise=0.0, admitted=True).child
    similarity = snapshot(layer).similarity()
    torch.testing.assert_close(similarity.diagonal()[:3], torch.ones(3))
    torch.testing.assert_close(similarity, similarity.T)
    assert similarity[1, list(layer.experts).index(twin)] == pytest.approx(1, abs=1e-4)
    assert similarity[0, 1] < 0.9
