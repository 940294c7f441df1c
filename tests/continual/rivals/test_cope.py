"""CoPE's loss is Avalanche's; its prototypes remember."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from rows import rows

from growmoe.continual import metrics
from growmoe.continual.rivals.cope import CoPE, ppp_loss
from growmoe.continual.rivals.learner import Budget, run_learner, two_layers


@pytest.mark.parametrize("labels", [[0, 1, 1, 2, 0, 3], [2, 2, 2], [1]])
def test_the_loss_and_its_gradient_are_avalanches(labels):
    pytest.importorskip("avalanche")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from avalanche.training.plugins.cope import PPPloss
    generator = torch.Generator().manual_seed(0)
    p = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    f = F.normalize(torch.randn(len(labels), 4, generator=generator), dim=1)
    mine, theirs = (f.clone().requires_grad_() for _ in range(2))
    y = torch.tensor(labels)
    loss = ppp_loss(mine, y, p, 0.5)
    expected = PPPloss({k: p[k : k + 1] for k in range(5)}, T=0.5)(theirs, y)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.slow
def test_it_remembers_without_boundaries_or_task_labels():
    torch.manual_seed(0)
    learner = CoPE(
        two_layers(64, 32), 32, 6, embedding=16, exemplars=60, learning_rate=3e-3, momentum=0.9
    )
    cell = run_learner(rows(), lambda fraction, text: None, learner, Budget(10, 25))
    assert metrics.final_accuracy(cell.accuracy_matrix) > 0.9
    assert cell.memory.examples == 60 * 65
    torch.testing.assert_close(learner.p_KD.norm(dim=1), torch.ones(6))
    assert not set(learner(torch.zeros(1, 1, 8, 8)).isneginf().nonzero().flatten().tolist())
