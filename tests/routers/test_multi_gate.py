"""MultiGate is as many soft mixtures of the same experts as there are tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from growmoe import FFN, MoE, TopK
from growmoe.routers import Dense, MultiGate, Router

J = 3


def layer_of(k: int | None = None, **options: object) -> MoE:
    return MoE(4, FFN(6), 5, MultiGate(J, k), seed=0, **options)


def single(layer: MoE, task: int, router: Router) -> MoE:
    """A layer of the same experts with one gate, that of this task."""
    one = MoE(4, FFN(6), 5, router, seed=0)
    for a, b in zip(one.experts.values(), layer.experts.values(), strict=True):
        a.body = b.body
        a.entries.key = nn.Parameter(b.entries.key[task].detach().clone())
    return one


@pytest.mark.parametrize("k", [None, 1, 2])
def test_it_equals_a_layer_for_each_task(k: int | None) -> None:
    layer = layer_of(k)
    x = torch.randn(2, 7, 4)
    y = layer(x)
    assert y.shape == (2, 7, J, 4)
    for j in range(J):
        router = Dense() if k is None else TopK(k, renormalize=True)
        want = single(layer, j, router)(x)
        torch.testing.assert_close(y[..., j, :], want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x, j), want, rtol=1e-5, atol=1e-6)


def test_each_token_may_be_of_another_task() -> None:
    layer = layer_of(2)
    x, task = torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])
    want = layer(x)[torch.arange(6), task]
    torch.testing.assert_close(layer(x, {"task": task}), want, rtol=1e-5, atol=1e-6)
    by_sequence = layer(x.view(2, 3, 4), torch.tensor([2, 0]))
    torch.testing.assert_close(
        by_sequence.view(6, 4), layer(x)[torch.arange(6), torch.tensor([2] * 3 + [0] * 3)]
    )


def test_the_shared_expert_is_added_to_every_task() -> None:
    layer = layer_of(shared=FFN(4))
    x = torch.randn(5, 4)
    with_shared, shared = layer(x), layer.shared(x)
    layer.shared = None
    torch.testing.assert_close(with_shared, layer(x) + shared[:, None])


def test_each_expert_computes_a_token_once_for_all_tasks() -> None:
    assert layer_of().route(torch.randn(6, 4)).assignment.counts_E.tolist() == [6] * 5
    a = layer_of(1).route(torch.randn(30, 4)).assignment
    assert a.weight_R.shape == (len(a.token_R), J) and len(a.token_R) < 30 * J
    torch.testing.assert_close(a.dense().sum(1), torch.ones(30, J))


@pytest.mark.parametrize("task", [3, -1, torch.tensor([0, 3])])
def test_a_task_out_of_range_is_refused(task: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tasks must be in 0..2"):
        layer_of()(torch.randn(2, 4), task)


def test_tasks_must_be_whole_numbers() -> None:
    with pytest.raises(ValueError, match="context 'task' must be integers"):
        layer_of()(torch.randn(2, 4), torch.zeros(2))


@pytest.mark.parametrize("options", [(0,), (2.0,), (None,), (2, 0)])
def test_bad_settings_are_refused(options: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        MultiGate(*options)
