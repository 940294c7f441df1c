"""Lifelong-MoE: earlier experts and gate columns stand still; outputs are held."""

import torch
from rows import rows

from growmoe.continual.rivals.learner import Experience
from growmoe.continual.rivals.lifelong_moe import LifelongMoE, output_divergence


def test_old_experts_and_gate_columns_stay_bit_for_bit():
    torch.manual_seed(0)
    stream = rows()
    learner = LifelongMoE(
        (1, 8, 8), 6, width=16, hidden=8, added=2, regularisation=1.0, learning_rate=1e-2
    )
    before = {}
    for i, index in enumerate(stream.train_index):
        images, labels = stream.train_images(index), stream.data.train_labels[index]
        learner.learn_experience(Experience(images, labels, 16, 2))
        experts = learner.net.layer.experts
        assert len(experts) == 2 * (i + 1)
        for id, state in before.items():
            for name, value in experts[id].learned().items():
                assert torch.equal(value, state[name]), (id, name)
        before = {
            id: {name: p.detach().clone() for name, p in e.learned().items()}
            for id, e in experts.items()
        }
        moved = [e.frozen for e in experts.values()]
        assert moved == [True] * (2 * i) + [False] * 2
    assert "entries.key" in before[0]


def test_outputs_are_held_to_those_before_and_cost_nothing_where_they_agree():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert float(output_divergence(scores, scores + 2.0)) < 1e-6  # softmax ignores a shift
    assert float(output_divergence(scores, -scores)) > 0.1
    p, q = (scores[:1].softmax(1), (-scores[:1]).softmax(1))
    by_hand = float((q * (q / p).log()).sum())
    assert abs(float(output_divergence(scores[:1], -scores[:1])) - by_hand) < 1e-5
