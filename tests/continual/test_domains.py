"""Domains: their sums add up, and what is usual in them is learned from their own inputs."""

import pytest
import torch

from growmoe.continual.domains import Domain
from growmoe.continual.usual import Usual
from growmoe.continual.view import View
from growmoe.routers import ClosedFormGate
from growmoe.rules import FreezeSettled

LABELS, VIEW, BLOCKS = 3, 4, (5, 3)
WIDTH = VIEW + sum(BLOCKS)


def domain(pooled):
    rules = [FreezeSettled()]
    return Domain(LABELS, VIEW, WIDTH, ClosedFormGate(), rules, 0, BLOCKS, pooled)


def draw(count, seed=0, labels=LABELS):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % labels
    return torch.randn(count, WIDTH, generator=g) + 2 * y[:, None], y


def assert_same_totals(one, other):
    for mine, theirs in zip(one.totals(), other.totals(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_pooled_heads_and_label_experts_sum_up_the_same():
    x, y = draw(90)
    one, other = domain(pooled=True), domain(pooled=False)
    one.learn(x, y), other.learn(x, y)
    assert_same_totals(one, other)
    assert (one.num_experts, other.num_experts) == (1, LABELS)
    assert (one.eval()(x).argmax(1) == y).float().mean() > 0.7


@pytest.mark.parametrize("kinds", [(True, True), (False, True), (True, False), (False, False)])
def test_merged_domains_hold_what_one_would_that_had_seen_all(kinds):
    parts = [domain(kind) for kind in kinds]
    whole = domain(pooled=True)
    for seed, part in enumerate(parts):
        x, y = draw(60 + 30 * seed, seed, labels=LABELS - seed)
        part.learn(x, y), whole.learn(x, y)
    merged = parts[0].merged(parts[1:], [60, 90])
    assert_same_totals(merged, whole)
    assert (merged.layer is None) == all(kinds)
    torch.testing.assert_close(merged.usual.sum_CV, whole.usual.sum_CV, rtol=1e-4, atol=1e-4)
    assert merged.eval()(draw(9)[0]).isfinite().all()


@pytest.mark.parametrize("pooled", [True, False])
def test_what_is_taken_back_was_never_there(pooled):
    x, y = draw(90)
    one, other = domain(pooled), domain(pooled)
    one.learn(x, y), other.learn(x[:60], y[:60])
    one.take_back(x[60:], y[60:])
    assert_same_totals(one, other)
    torch.testing.assert_close(one.usual.cross_VV, other.usual.cross_VV, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pooled", [True, False])
def test_samples_have_the_means_that_were_seen(pooled):
    x, y = draw(600)
    one = domain(pooled)
    one.learn(x, y)
    sample = one.sample(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.mean(0), x.mean(0), atol=0.2, rtol=0)


def test_what_it_knows_is_seldom_novel_and_what_moved_is():
    usual, g = Usual(2, 6), torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 2
    v = torch.randn(2000, 6, generator=g) + 3 * y[:, None]
    usual.add(v, y)
    fresh = torch.randn(2000, 6, generator=g) + 3 * y[:, None]
    assert float((usual.novelty(fresh, y) > 2).float().mean()) < 0.06
    assert float((usual.novelty(fresh + 3, y) > 2).float().mean()) > 0.9
    child = usual.child()
    assert child.count_C.sum() == 0 and child.novelty(fresh, y).isnan().all()


class Flat:
    num_features, blocks, memory_bytes = 6, (6,), 0

    def settings(self):
        return {}

    def fit(self, images, generator):
        return self

    def __call__(self, images):
        return images.flatten(1)


def test_a_view_comes_before_the_features_and_is_as_wide_as_it_says():
    x = torch.rand(40, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    view = View(Flat(), size=4).fit(x, torch.Generator().manual_seed(0))
    y = view(x)
    assert y.shape == (40, view.num_features) and view.width == 8
    assert torch.equal(y[:, view.width :], x.flatten(1))
    components, projections = y[:, :4], y[:, 4:8]
    assert float(projections.std(0).mean() / components.std()) == pytest.approx(1, rel=0.3)
    constant = View(Flat()).fit(torch.ones(5, 6), torch.Generator())
    assert constant(torch.ones(5, 6)).isfinite().all()
