"""The loop tells a method what it asks for and nothing more."""

import pytest
import torch
import torch.nn.functional as F

from growmoe.continual.cell import Memory
from growmoe.continual.ordering import arrange
from growmoe.continual.rivals.learner import (
    BOUNDARIES,
    TASK_LABELS,
    Budget,
    Experience,
    Learner,
    TaskLearner,
    run_learner,
)
from growmoe.continual.scenarios import permuted, split
from growmoe.continual.stream import DRIFTS, Data


def data(classes=4, each=30):
    labels = torch.arange(classes).repeat(each)
    pixels = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    pixels[range(len(labels)), 0, labels] = 200
    return Data(pixels, labels, pixels[: 3 * classes], labels[: 3 * classes], white=255)


def stream(family=split, experiences=2, **how):
    return arrange("tiny", family(data(), 0, experiences), 0, **how)


class Listener(Learner):
    def __init__(self, classes):
        self.classes, self.heard = classes, []

    def learn(self, images, labels):
        self.heard.append(labels.tolist())

    def __call__(self, images):
        # the bright row is the class
        return F.pad(images.amax(3)[:, 0], (0, self.classes))[:, : self.classes]

    def memory(self, bytes_per_example):
        return Memory(examples=bytes_per_example)

    num_parameters = 7


class TaskListener(TaskLearner, Listener):
    def __init__(self, classes, needs):
        super().__init__(classes)
        self.needs, self.asked = needs, []

    def learn_experience(self, experience):
        self.heard.append(sorted(experience.labels.tolist()))

    def of_task(self, images, task):
        self.asked.append(task)
        return self(images)


def silent(fraction, text):
    assert 0 <= fraction <= 1 and isinstance(text, str)


def test_without_boundaries_a_mini_batch_may_hold_two_experiences():
    learner = Listener(4)
    made = stream()
    cell = run_learner(made, silent, learner, Budget(25))
    order = torch.cat(made.train_index)
    assert [y for batch in learner.heard for y in batch] == made.data.train_labels[order].tolist()
    assert len(set(learner.heard[2])) > 2  # the first experience ends after 60
    assert cell.accuracy_matrix == [[1.0, 1.0], [1.0, 1.0]]
    assert cell.parameters == 7 and cell.memory.examples == made.bytes_per_example
    # the mini-batch with the last of the first experience ends after 75
    assert {seen for seen, _ in cell.anytime} >= {75, 120} and cell.lineage is None


def test_boundaries_and_task_labels_are_told_to_those_that_need_them():
    told = TaskListener(4, (BOUNDARIES, TASK_LABELS))
    run_learner(stream(), silent, told, Budget(25))
    assert [len(heard) for heard in told.heard] == [60, 60]
    # of an experience not met yet: the newest; after each row, once more for the FLOPs
    assert told.asked == [0, 0, 0, 0, 1, 0]
    untold = TaskListener(4, (BOUNDARIES,))
    run_learner(stream(), silent, untold, Budget(25))
    assert not untold.asked


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_the_matrix_is_square_on_every_stream(drift, scenario):
    made = stream(permuted, 3, scenario=scenario, drift=drift)
    cell = run_learner(made, silent, Listener(made.num_classes), Budget(16))
    side = made.num_experiences
    assert len(cell.accuracy_matrix) == side and {len(r) for r in cell.accuracy_matrix} == {side}


def test_small_experiences_are_gone_through_as_often_as_the_budget_says():
    assert Budget(32).passes(5) == 1
    assert Budget(32, min_steps=300).passes(270) == 34
    assert Budget(32, min_steps=300).passes(12_000) == 1
    learner = Listener(4)
    run_learner(stream(), silent, learner, Budget(20, min_steps=6))
    assert sum(map(len, learner.heard)) == 2 * 120
    experience = Experience(torch.zeros(5, 1), torch.arange(5), batch_size=2, passes=3)
    seen = torch.cat([y for _, y in experience.batches()])
    assert seen.bincount().tolist() == [3] * 5
