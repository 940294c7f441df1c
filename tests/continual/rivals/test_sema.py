"""SEMA: adapters are added where every descriptor is surprised, and older ones stand still."""

import pytest
import torch
from plain_features import Plain as _Plain

from growmoe.continual.rivals.sema import SEMA, DescribedAdapter


class Plain(_Plain):
    num_features = 16


def batches(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, 16, generator=torch.Generator().manual_seed(7))
    for _ in range(count):
        labels = torch.randint(0, 3, (32,), generator=generator)
        code = torch.randn(32, 2, generator=generator)
        x = code @ basis.roll(int(shift), 1) + 0.1 * torch.randn(32, 16, generator=generator)
        yield x.view(32, 1, 4, 4), labels


def made():
    torch.manual_seed(0)
    return SEMA(Plain(), 3, bottleneck=4, threshold=1.0, settle=60, learning_rate=1e-2, early=1)


@pytest.mark.slow
def test_it_expands_on_a_shift_and_not_without_one():
    learner = made()
    for x, y in batches(150):
        learner.learn(x, y)
    assert len(learner.adapters) == 1
    kept = {name: p.clone() for name, p in learner.layer.experts[0].learned().items()}
    for x, y in batches(80, shift=5, seed=1):
        learner.learn(x, y)
    assert len(learner.adapters) == 2
    assert learner.layer.experts[0].frozen and not learner.layer.experts[1].frozen
    moved = learner.layer.experts[0].learned()
    assert all(torch.equal(moved[name], value) for name, value in kept.items() if "key" in name)
    # what returns is not novel: the first descriptor knows it
    for x, y in batches(20, seed=2):
        learner.learn(x, y)
    assert len(learner.adapters) == 2
    assert [e["act"] for e in learner.lineage()] == ["init", "freeze", "spawn"]


def test_z_is_the_error_in_standard_deviations():
    adapter = DescribedAdapter(4, 2)
    r = torch.tensor([1.0, 2.0, 3.0, 6.0])
    adapter.remember(r, horizon=10**9)
    adapter.remember(torch.tensor([4.0, 8.0]), horizon=10**9)
    everything = torch.cat([r, torch.tensor([4.0, 8.0])])
    expected = (5.0 - everything.mean()) / everything.std(correction=0)
    assert float(adapter.z(torch.tensor([5.0]))) == pytest.approx(float(expected), abs=1e-4)


def test_a_newborn_adapter_changes_no_feature():
    adapter = DescribedAdapter(4, 2)
    assert (adapter(torch.randn(3, 4)) == 0).all()


def test_absent_classes_are_not_unlearned():
    learner = made()
    for x, y in batches(5):
        learner.learn(x, y)
    bias = learner.head.bias.detach().clone()
    x, _ = next(batches(1, seed=3))
    learner.optimizer = torch.optim.SGD(
        [*learner.layer.parameters(), *learner.head.parameters()], lr=0.1
    )
    learner.learn(x, torch.ones(32, dtype=torch.long))
    assert torch.equal(learner.head.bias, bias)  # one class alone: nothing to tell apart
