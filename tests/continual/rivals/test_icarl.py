"""Herding picks as the paper's algorithm does; the budget is kept."""

import torch
from rows import rows

from growmoe.continual import metrics
from growmoe.continual.rivals.icarl import ICaRL, herd
from growmoe.continual.rivals.learner import Budget, run_learner, two_layers


def test_herding_picks_what_brings_the_running_mean_nearest():
    phi = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    mean, chosen = phi.mean(0), []
    for k in range(1, 6):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(
            min(rest, key=lambda i: float((mean - phi[[*chosen, i]].sum(0) / k).square().sum()))
        )
    assert herd(phi, 5).tolist() == chosen
    assert sorted(herd(phi, 50).tolist()) == list(range(12))


def test_it_remembers_within_its_budget():
    stream = rows()
    learner = ICaRL(two_layers(64, 32), 32, 6, exemplars=30, learning_rate=3e-3)
    cell = run_learner(stream, lambda fraction, text: None, learner, Budget(16, 40))
    assert {len(x) for x in learner.exemplars.values()} == {5}
    assert cell.memory.examples == 30 * stream.bytes_per_example
    assert metrics.final_accuracy(cell.accuracy_matrix) > 0.9


def test_a_class_that_comes_back_is_herded_anew_within_the_budget():
    stream = rows(scenario="domain")
    learner = ICaRL(two_layers(64, 8), 8, stream.num_classes, exemplars=8, learning_rate=1e-3)
    run_learner(stream, lambda fraction, text: None, learner, Budget(16))
    assert sum(map(len, learner.exemplars.values())) == 8
