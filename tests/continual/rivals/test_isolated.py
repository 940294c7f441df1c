"""PNN, PackNet and Expert Gate: what a task has learned, later tasks do not touch."""

import pytest
import torch
from rows import rows

from growmoe.continual import metrics
from growmoe.continual.rivals.expert_gate import ExpertGate
from growmoe.continual.rivals.learner import Budget, Experience, run_learner
from growmoe.continual.rivals.packnet import PackNet
from growmoe.continual.rivals.pnn import PNN
from growmoe.continual.scenarios import permuted

SHAPE = (1, 8, 8)


def experience(stream, i, passes=4):
    index = stream.train_index[i]
    return Experience(stream.train_images(index), stream.data.train_labels[index], 16, passes)


def made(kind, classes=6):
    torch.manual_seed(0)
    if kind is PNN:
        return PNN(SHAPE, classes, hidden=24, learning_rate=3e-3)
    if kind is PackNet:
        return PackNet(SHAPE, classes, hidden=48, learning_rate=3e-3, pruned=0.75)
    return ExpertGate(SHAPE, classes, hidden=24, code=8, learning_rate=3e-3)


@pytest.mark.parametrize("kind", [PNN, PackNet])
def test_scores_of_earlier_tasks_stay_bit_for_bit(kind):
    stream, learner = rows(), made(kind)
    images, before = stream.test_images(), []
    for i in range(3):
        learner.learn_experience(experience(stream, i))
        for task, scores in enumerate(before):
            assert torch.equal(learner.of_task(images, task), scores)
        before.append(learner.of_task(images, i).detach())


@pytest.mark.parametrize("kind", [PNN, PackNet])
def test_each_task_is_learned_and_not_forgotten(kind):
    cell = run_learner(rows(), lambda fraction, text: None, made(kind), Budget(16, 60))
    assert metrics.final_accuracy(cell.accuracy_matrix) > 0.9
    assert metrics.forgetting(cell.accuracy_matrix) < 0.05
    assert cell.memory.model == 4 * cell.parameters and cell.memory.examples == 0


def test_packnet_gives_each_task_a_quarter_of_what_is_free():
    stream, learner = rows(), made(PackNet)
    for i in range(3):
        learner.learn_experience(experience(stream, i, passes=1))
    for owner in learner.owner:
        for task, share in enumerate([0.25, 0.25 * 0.75, 0.25 * 0.75**2]):
            assert float((owner == task).float().mean()) == pytest.approx(share, abs=0.01)
    assert learner.memory(1).buffers == 64 * 48 + 48 * 48  # a byte a weight


@pytest.mark.slow
def test_expert_gate_finds_the_domain_of_an_image_by_itself():
    stream = rows(experiences=2, family=permuted, scenario="domain")
    learner = made(ExpertGate)
    cell = run_learner(stream, lambda fraction, text: None, learner, Budget(16, 200))
    assert metrics.final_accuracy(cell.accuracy_matrix) > 0.9
    assert cell.memory.model == 4 * cell.parameters == cell.memory_bytes
    for i in range(2):
        chosen = learner.choose(stream.test_images(stream.test_index[i]))
        assert float((chosen == i).float().mean()) > 0.8
    assert len(learner.relatedness) == 1 and learner.relatedness[0] < 1


def test_expert_gate_finds_a_task_wholly_related_to_itself():
    stream, learner = rows(), made(ExpertGate)
    first = experience(stream, 0)
    learner.learn_experience(first)
    _, related = learner._most_related(learner.gates[0], first.images)
    assert related == pytest.approx(1.0)
