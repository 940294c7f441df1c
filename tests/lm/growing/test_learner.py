from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from growmoe.lm import TrainError, evaluate
from growmoe.lm.growing import GrowingLM, StreamLearner, Suspicion, TextStream

SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 2, "seed": 0}


def small_stream(domains, *phases, **options):
    return TextStream(domains, phases, batch_size=8, sequence_length=32, stagger=3, **options)


def learn(stream, **options):
    model = GrowingLM(**SIZES, **options)
    learner = StreamLearner(model, lr=1e-2, settle=60)
    events = [event for batch in stream for event in learner.step(batch)]
    return model, learner, events


def weights(expert):
    state = expert.state_dict()
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "documents"])
def test_a_new_alphabet_is_found_within_eight_batches_and_once(alphabets, order):
    stream = small_stream(alphabets, ("low", 80), ("high", 80), order=order)
    model, _, events = learn(stream)
    born = [event for event in events if event.act == "spawn"]
    assert len(born) == 1
    assert 80 < born[0].step <= 88
    assert "novel text" in born[0].reason
    assert model.layer.lineage.replay() == [0, 1]
    assert model.layer.lineage.frozen() == [0]


@pytest.mark.slow
def test_a_text_that_returns_is_recognised_and_its_path_goes_on(alphabets):
    stream = small_stream(alphabets, ("low", 80), ("high", 80), ("low", 30))
    model, learner, events = learn(stream)
    assert [event.act for event in events] == ["spawn", "freeze", "freeze", "thaw"]
    assert "returned" in events[-1].reason
    assert learner.active == 0
    assert len(model.paths) == 2


@pytest.mark.slow
def test_a_text_that_the_old_path_finds_no_harder_is_found(alphabets):
    # after letters drawn evenly, the same letters in turn cost as much as ever
    drawn = torch.randint(65, 81, (40_000,), generator=torch.Generator().manual_seed(0))
    in_turn = 65 + torch.arange(40_000) % 16
    domains = {
        name: replace(alphabets["low"], train=train.to(torch.uint8))
        for name, train in (("drawn", drawn), ("in turn", in_turn))
    }
    _, _, events = learn(small_stream(domains, ("drawn", 80), ("in turn", 20)))
    assert [event.act for event in events] == ["spawn", "freeze"]
    assert 80 < events[0].step <= 90


@pytest.mark.slow
def test_a_text_that_returns_little_by_little_is_recognised(alphabets):
    phases = ("low", 80), ("high", 80), ("low", 60)
    stream = TextStream(alphabets, phases, batch_size=8, sequence_length=32, stagger=8)
    _, learner, events = learn(stream)
    assert [event.act for event in events] == ["spawn", "freeze", "freeze", "thaw"]
    assert learner.active == 0


@pytest.mark.slow
def test_odd_batches_that_no_path_finds_novel_are_learned_by_the_active_one(alphabets):
    model = GrowingLM(**SIZES)
    learner = StreamLearner(model, lr=1e-2, settle=60, suspicion=Suspicion(novel=1e9))
    for batch in small_stream(alphabets, ("low", 60), ("high", 20)):
        assert learner.step(batch) == []
    assert len(model.paths) == 1
    assert learner._usual(0).steps + len(learner.waiting) == 80


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "documents"])
def test_an_even_mixture_of_texts_grows_nothing(alphabets, order):
    stream = small_stream(alphabets, ("low+high+digits", 150), order=order)
    model, learner, events = learn(stream)
    assert events == []
    assert len(model.paths) == 1
    assert learner._usual(0).steps == 150


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_an_old_path_keeps_every_bit_while_a_new_text_is_learned(alphabets, rank):
    model = GrowingLM(**SIZES, rank=rank)
    learner = StreamLearner(model, lr=1e-2, settle=60)
    before = None
    for batch in small_stream(alphabets, ("low", 80), ("high", 60)):
        if learner.step(batch):
            before = weights(model.layer.experts[0].body)
    assert before is not None
    after = weights(model.layer.experts[0].body)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(model.paths) == 2


@pytest.mark.slow
def test_the_old_text_is_not_forgotten_and_the_new_one_is_learned(alphabets):
    model = GrowingLM(**SIZES)
    learner = StreamLearner(model, lr=1e-2, settle=60)
    for step, batch in enumerate(small_stream(alphabets, ("low", 80), ("high", 80)), start=1):
        learner.step(batch)
        if step == 80:
            first = evaluate(model, alphabets, "test", 8, sequence_length=32)
    last = evaluate(model, alphabets, "test", 8, sequence_length=32)
    # at the start of a window nothing tells the two apart
    assert last["low"] < first["low"] + 0.1
    assert last["high"] < 0.5 * first["high"]


@pytest.mark.slow
def test_every_batch_is_learned_once(alphabets):
    stream = small_stream(alphabets, ("low", 80), ("high", 60), ("digits", 60))
    model, learner, _ = learn(stream)
    steps = sum(learner._usual(expert.id).steps for expert in model.paths)
    assert steps + len(learner.waiting) == len(stream)


@pytest.mark.slow
def test_an_odd_batch_is_no_birth_and_is_learned_late(alphabets):
    model = GrowingLM(**SIZES)
    learner = StreamLearner(model, lr=1e-2, settle=60)
    for batch in small_stream(alphabets, ("low", 60)):
        learner.step(batch)
    odd = next(iter(small_stream(alphabets, ("high", 3))))
    assert learner.step(odd) == []
    assert len(learner.waiting) == 1
    assert learner._usual(0).steps == 60
    for batch in small_stream(alphabets, ("low", 10), seed=1):
        assert learner.step(batch) == []
    assert learner.waiting == []
    assert learner._usual(0).steps == 71


@pytest.mark.slow
def test_at_the_largest_number_of_paths_the_nearest_learns_what_is_novel(alphabets):
    model = GrowingLM(**SIZES)
    learner = StreamLearner(model, lr=1e-2, settle=60, max_paths=1)
    for batch in small_stream(alphabets, ("low", 60), ("high", 40)):
        assert learner.step(batch) == []
    assert learner._usual(0).steps == 100


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_goes_on_bit_for_bit_from_its_file(alphabets, tmp_path, rank):
    batches = list(small_stream(alphabets, ("low", 60), ("high", 60)))
    one = StreamLearner(GrowingLM(**SIZES, rank=rank), lr=1e-2, settle=60)
    for batch in batches[:100]:
        one.step(batch)
    assert len(one.model.paths) == 2
    one.save(tmp_path / "run.safetensors")
    other = StreamLearner(GrowingLM(**{**SIZES, "seed": 5}, rank=rank), lr=1e-2, settle=60)
    other.load(tmp_path / "run.safetensors")
    for batch in batches[100:]:
        one.step(batch)
        other.step(batch)
    x = batches[0][:, :-1]
    assert torch.equal(one.model(x), other.model(x))
    assert other.model.layer.lineage.tree() == one.model.layer.lineage.tree()
    assert other.active == one.active


def test_a_run_stopped_while_batches_wait_goes_on_with_them(alphabets, tmp_path):
    batches = list(small_stream(alphabets, ("low", 60), ("high", 20)))
    one = StreamLearner(GrowingLM(**SIZES), lr=1e-2, settle=60)
    for batch in batches[:62]:
        one.step(batch)
    one.suspicion.sum, one.waiting = 3.0, [batches[61]]
    one.save(tmp_path / "run.safetensors")
    other = StreamLearner(GrowingLM(**SIZES), lr=1e-2, settle=60)
    other.load(tmp_path / "run.safetensors")
    assert other.suspicion.sum == 3.0
    assert torch.equal(other.waiting[0], batches[61])


@pytest.mark.slow
def test_a_low_rank_path_is_smaller_than_a_copy(alphabets):
    phases = ("low", 60), ("high", 20)
    whole = learn(small_stream(alphabets, *phases))[0]
    change = learn(small_stream(alphabets, *phases), rank=2)[0]
    assert len(whole.paths) == len(change.paths) == 2
    assert change.num_params() < whole.num_params()


def test_the_rate_rises_stays_and_falls_with_the_root_of_a_paths_steps():
    learner = StreamLearner(GrowingLM(**SIZES), lr=1.0, warmup=10, settle=50)
    assert learner.learning_rate(0) == pytest.approx(0.1)
    assert learner.learning_rate(20) == 1.0
    assert learner.learning_rate(199) == pytest.approx(0.5)


def test_a_batch_that_is_none_is_refused_and_changes_nothing():
    learner = StreamLearner(GrowingLM(**SIZES))
    short, floats = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 33)
    empty = torch.zeros(0, 33, dtype=torch.long)
    for wrong in (torch.zeros(3), short, empty, floats, [[1, 2]]):
        with pytest.raises(ValueError, match="token ids"):
            learner.step(wrong)
    with pytest.raises(ValueError, match="vocab_size"):
        learner.step(torch.full((2, 33), 256))
    assert learner.steps == 0


def test_a_loss_that_is_not_finite_is_refused(alphabets):
    learner = StreamLearner(GrowingLM(**SIZES))
    with torch.no_grad():
        learner.model.paths[0].body.lm.embedding.weight.fill_(math.nan)
    with pytest.raises((TrainError, ValueError), match="finite"):
        learner.step(torch.randint(256, (2, 33)))
    assert learner._usual(0).steps == 0


@pytest.mark.parametrize("setting", [{"lr": 0}, {"clip": -1}, {"warmup": 0}, {"max_paths": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        StreamLearner(GrowingLM(**SIZES), **setting)


def test_suspicion_needs_several_batches_however_odd_one_is():
    suspicion = Suspicion(slack=1.5, cap=5.0, threshold=10.0)
    assert not suspicion.observe(1e9)
    assert not suspicion.observe(1e9)
    assert suspicion.observe(1e9)
    suspicion.clear()
    # by hand: 0.5 a batch exceeds 10 at the 21st
    alarms = [suspicion.observe(2.0) for _ in range(21)]
    assert alarms == [False] * 20 + [True]


@pytest.mark.parametrize("setting", [{"slack": 0}, {"slack": 6.0}, {"threshold": 0}, {"novel": 0}])
def test_suspicion_refuses_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Suspicion(**setting)
