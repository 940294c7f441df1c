"""CN-DPM: responsibilities are probabilities; experts are born of a full short-term memory."""

import pytest
import torch
from rows import rows

from growmoe.continual import metrics
from growmoe.continual.rivals.cn_dpm import CNDPM
from growmoe.continual.rivals.learner import Budget, run_learner


def made(short_term=60, log_alpha=-400.0):
    torch.manual_seed(0)
    return CNDPM(
        (1, 8, 8),
        6,
        hidden=32,
        latent=4,
        learning_rate=2e-3,
        short_term=short_term,
        log_alpha=log_alpha,
        chill=0.01,
        sleep_steps=250,
    )


def images_of(stream, classes, count):
    chosen = torch.isin(stream.data.train_labels, torch.tensor(classes)).nonzero().flatten()[:count]
    return stream.train_images(chosen), stream.data.train_labels[chosen]


@pytest.mark.slow
def test_an_expert_is_born_when_the_short_term_memory_is_full_and_not_before():
    stream, learner = rows(), made()
    x, y = images_of(stream, [0, 1], 80)
    learner.learn(x[:59], y[:59])
    assert not learner.experts and (learner(x) == 0).all()
    learner.learn(x[59:60], y[59:60])
    assert len(learner.experts) == 1 and learner.counts == [60.0]
    # what it explains trains it and is not kept
    learner.learn(x[60:], y[60:])
    assert sum(map(len, learner._waiting_y)) == 0 and learner.counts[0] == 80
    # what it does not explain waits
    other, labels = images_of(stream, [4, 5], 60)
    learner.learn(other[:30], labels[:30])
    assert sum(map(len, learner._waiting_y)) == 30 and len(learner.experts) == 1
    learner.learn(other[30:], labels[30:])
    assert len(learner.experts) == 2 and learner.counts[1] == 60
    births = [e for e in learner.lineage() if e["act"] == "spawn"]
    assert len(births) == 1 and "60 examples" in births[0]["reason"]


def test_responsibilities_sum_to_one_and_follow_alpha():
    stream, learner = rows(), made()
    x, y = images_of(stream, [0, 1], 60)
    learner.learn(x, y)
    log_rho = learner.log_responsibilities(x, y)
    assert log_rho.shape == (60, 2)
    torch.testing.assert_close(log_rho.logsumexp(1), torch.zeros(60), rtol=0, atol=1e-4)
    learner.log_alpha = 1e6
    assert (learner.log_responsibilities(x, y).argmax(1) == 1).all()  # all would be new


@pytest.mark.slow
def test_it_remembers_without_boundaries():
    learner = made()
    cell = run_learner(rows(), lambda fraction, text: None, learner, Budget(16, 12))
    assert metrics.final_accuracy(cell.accuracy_matrix) > 0.8
    assert cell.extras["experts"] == 3
    assert cell.memory.examples == 60 * 65  # the short-term memory, full or not
    assert cell.parameters == 3 * sum(p.numel() for p in learner.base.parameters())
