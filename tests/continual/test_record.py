"""The recorder: it measures what it says, at small cost, and changes nothing by asking."""

import dataclasses
import itertools
import time

import pytest
import torch
from rows import rows
from slow_parameters import but_slow
from torch import nn

from growmoe import MoE
from growmoe.continual import METHODS, metrics, record
from growmoe.continual.cell import Memory
from growmoe.continual.methods import online
from growmoe.continual.record import Recorder, Subject, drifts, mixture_shares, prediction_flops
from growmoe.continual.rivals.learner import Budget, Learner, run_learner
from growmoe.continual.scenarios import permuted
from growmoe.experts.ffn import FFN


def silent(fraction, text):
    pass


class Memorising(Learner):
    """Knows the classes it has been shown, by the bright row; an expert for each."""

    num_parameters = 6

    def __init__(self, classes=6):
        self.known = torch.zeros(classes, dtype=torch.bool)
        self.asked = 0

    def learn(self, images, labels):
        self.known[labels] = True

    def __call__(self, images):
        self.asked += len(images)
        torch.rand(3)  # as a careless method might
        bright = images.mean(3)[:, 0, : len(self.known)]
        return bright.masked_fill(~self.known, -1)

    def memory(self, bytes_per_example):
        return Memory(statistics=int(self.known.sum()))

    @property
    def births(self):
        return max(0, int(self.known.sum()) - 1)

    def shares(self, images):
        label = images.mean(3)[:, 0, : len(self.known)].argmax(1)
        return {k: (label == k).float() for k in range(len(self.known))}


def test_any_time_accuracy_is_that_of_what_is_known_by_then():
    stream = rows()
    cell = run_learner(stream, silent, Memorising(), Budget(8))
    ends = [80, 160, 240]
    assert [point for point in cell.anytime if point[0] in ends] == [
        [80, pytest.approx(1 / 3)],
        [160, pytest.approx(2 / 3)],
        [240, 1.0],
    ]
    assert all(a == pytest.approx(1 / 3) for seen, a in cell.anytime if 8 < seen <= 80)
    assert [seen for seen, _ in cell.anytime] == sorted({seen for seen, _ in cell.anytime})
    assert cell.memory_history[-1] == [240, 6] and cell.memory_history[0][1] < 6


def test_prequential_accuracy_is_wrong_on_what_is_new_and_right_on_what_is_known():
    stream = rows(drift="none", each=300)
    cell = run_learner(stream, silent, Memorising(), Budget(64))
    assert all(accuracy == 1 for seen, accuracy in cell.prequential if seen > 128)
    assert len(cell.prequential) > 10
    sharp = run_learner(rows(each=60), silent, Memorising(), Budget(8))
    # chunks that reach into classes not met yet
    assert 0 < metrics.curve_mean(sharp.prequential) < 1


def test_chunks_that_are_asked_before_they_are_learned_never_overlap():
    stream = rows(each=100)
    recorder = Recorder(stream, Subject(lambda x, i: torch.zeros(len(x), 6)), points=200)
    for batch in stream.batches(7):
        recorder.before()
        recorder.after(batch.num_new)
    curve = recorder.cell(0, Memory()).prequential
    assert curve[-1][0] == 600
    assert all(b[0] - a[0] >= 64 for a, b in itertools.pairwise(curve[:-1]))


def test_what_a_batch_has_learned_of_the_next_experience_counts_and_is_not_asked_again():
    stream = rows(each=60)
    recorder = Recorder(stream, Subject(lambda x, i: torch.zeros(len(x), 6)), points=0)
    for batch in stream.batches(50):
        recorder.after(batch.num_new)
        for _ in batch.ends:
            recorder.test()
    assert recorder.seen == 360
    assert [seen for seen, _ in recorder.cell(0, Memory()).anytime] == [150, 250, 360]


def test_a_second_pass_is_neither_asked_before_nor_counted():
    cell = run_learner(rows(), silent, Memorising(), Budget(8, min_steps=30))
    assert cell.anytime[-1] == [240, 1.0] and cell.prequential[-1][0] <= 240
    new = [batch.num_new for batch in rows().batches(16, epochs=3)]
    assert sum(new) == 240 and new[5] == 0


@pytest.mark.parametrize(
    "name", but_slow(["naive", "replay", "cn-dpm", "ridge", "dynmoe", "growmoe"], "naive", "dynmoe")
)
def test_asking_changes_nothing(name, monkeypatch):
    stream = rows(experiences=2, classes=4, each=20)
    matrices = []
    for points in (20, 0):
        monkeypatch.setattr(record, "POINTS", points)
        torch.manual_seed(0)
        matrices.append(online(4)[name].run(stream, 0, silent).accuracy_matrix)
    assert matrices[0] == matrices[1]


def test_what_waits_is_not_asked_and_counts_as_wrong():
    class Waiting(Memorising):
        ready = False

    learner = Waiting()
    cell = run_learner(rows(), silent, learner, Budget(8))
    assert learner.asked == 3 * 90 + 3 * 30  # the rows of the matrix, and their FLOPs
    assert metrics.curve_mean(cell.prequential) == 0


def test_seconds_are_of_learning_alone():
    class Slow(Memorising):
        def __call__(self, images):
            time.sleep(0.01)
            return super().__call__(images)

    cell = run_learner(rows(), silent, Slow(), Budget(8))
    assert cell.seconds < 0.1 and cell.seconds_history[-1][1] == pytest.approx(cell.seconds)
    recorder = Recorder(rows(), Subject(lambda x, i: Slow()(x)))
    with recorder.learning():  # asked in the midst, as Avalanche's strategies are
        recorder.before(*[torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)])
    assert recorder.seconds < 0.009


def test_experts_that_follow_the_class_are_fully_specialised():
    cell = run_learner(rows(), silent, Memorising(), Budget(8))
    assert metrics.mutual_information(cell.class_routing) == pytest.approx(1)
    assert metrics.mutual_information(cell.routing) == pytest.approx(1)
    assert sum(map(sum, cell.routing)) == pytest.approx(90)
    assert all(sum(e["load"].values()) == pytest.approx(1, abs=1e-3) for e in cell.load_history)


def test_births_are_detections_beside_the_true_drifts():
    stream = rows(family=permuted, drift="recurring", scenario="domain", visits=2)
    assert drifts(stream) == [120, 240]
    assert drifts(rows(drift="none"))[-1] < 20
    cell = run_learner(rows(), silent, Memorising(), Budget(8))
    assert cell.drifts == [80, 160]
    assert len(cell.detections) == 5 and cell.detections[-1] in (168, 176)


def test_flops_are_two_for_each_product_and_grouped_ones_count():
    x = torch.zeros(4, 10)
    assert prediction_flops(lambda: nn.Linear(10, 3)(x)) == 2 * 4 * 10 * 3
    moe = MoE(16, FFN(32, "relu"), num_experts=4).eval()
    found = prediction_flops(lambda: moe(torch.zeros(8, 16)))
    assert found >= 8 * 2 * 2 * 16 * 32  # one expert each, and the gate
    assert found <= 2 * 8 * 2 * 2 * 16 * 32 + 2 * 8 * 16 * 4


def test_shares_of_a_mixture_sum_to_one():
    moe = MoE(16, FFN(32, "relu"), num_experts=4)
    shares = mixture_shares(moe, torch.randn(8, 16))
    assert list(shares) == [0, 1, 2, 3] and moe.training
    torch.testing.assert_close(sum(shares.values()), torch.ones(8))


@pytest.mark.parametrize("name", ["naive", "replay", "lwf", "si", "dynmoe", "sema"])
def test_methods_fill_the_curves_that_they_can(name):
    torch.manual_seed(0)
    cell = online(10)[name].run(rows(experiences=2, classes=4, each=20), 0, silent)
    assert cell.prediction_flops > 0 and cell.memory_history[-1] == [80, cell.memory_bytes]
    assert cell.parameter_history[-1] == [80, cell.parameters]
    assert (cell.prequential is None) == (name == "si")  # it learns whole experiences
    assert (cell.routing is None) == (name in ("naive", "replay", "lwf", "si"))
    assert set(dataclasses.asdict(cell)) >= {"drifts", "class_routing"}
    assert METHODS[name] and record.answers(object())


def test_tests_of_a_domain_that_returns_are_asked_once_for_each_row():
    stream = rows(family=permuted, drift="recurring", scenario="domain", visits=2)
    recorder = Recorder(stream, Subject(lambda x, i: torch.zeros(len(x), 6)), points=0)
    asked = []
    recorder._accuracy = lambda j, task, index: asked.append(j) or 0.5
    recorder.test()
    assert recorder.matrix == [[0.5] * 6] and sorted(asked) == [0, 1, 2]
