"""ReMoE becomes as sparse as it is told to, by a penalty that finds its own strength."""

from __future__ import annotations

import pytest
import torch
from router_cases import layer_with, one

from growmoe import FFN, MoE, aux_loss
from growmoe.routers import ReMoE


def test_weights_are_the_positive_logits() -> None:
    layer = layer_with([0.5, -1.0, 2.0, 0.0], ReMoE())
    assert layer.route(one()).assignment.dense().tolist() == [[0.5, 0, 2.0, 0]]
    none = layer_with([-1.0, -2.0], ReMoE())
    assert not none(one(3)).any()


def test_a_newborns_weight_is_in_proportion_to_its_admission() -> None:
    layer = layer_with([0.5, 2.0], ReMoE())
    layer.experts[1].admission = 0.25
    torch.testing.assert_close(layer.route(one()).assignment.dense(), torch.tensor([[0.5, 0.5]]))


def test_its_loss_worked_out_by_hand() -> None:
    # λ 0.1 · Σ f_e relu_e, with f = rows · E / (k T) = 4 · 3 / (2 · 4) = 1.5 for 0 and 2
    layer = layer_with([0.5, -1.0, 2.0], ReMoE(2, initial=0.1))
    aux = layer.route(one(4)).aux
    assert aux is not None and aux.item() == pytest.approx(0.1 * 1.5 * 2.5)
    layer.router.lambda_steps += 3
    assert layer.route(one(4)).aux.item() == pytest.approx(0.1 * 1.2**3 * 1.5 * 2.5)
    assert layer.eval().route(one(4)).aux is None


@pytest.mark.parametrize(("k", "direction"), [(1, 1), (2, 0), (3, -1)])
def test_the_penalty_grows_where_too_many_are_taken(k: int, direction: int) -> None:
    layer = layer_with([0.5, -1.0, 2.0], ReMoE(k))
    for step in range(4):
        layer(one(5))
        assert int(layer.router.lambda_steps) == direction * step
    layer.eval()(one(5))
    assert int(layer.router.lambda_steps) == direction * 3


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3.5])
def test_training_reaches_the_sparsity_it_is_told(k: float) -> None:
    layer = MoE(8, FFN(8), 8, ReMoE(k, initial=1e-3), seed=0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    taken = []
    for step in range(300):
        # not around 0, where a linear gate is positive on half of the tokens whatever its key
        x = 1 + torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        loss = (layer(x) - x.flip(1)).square().mean() + aux_loss(layer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(layer.recorder._last.token_R.numel() / 64)
    assert sum(taken[-100:]) / 100 == pytest.approx(k, rel=0.1)
    assert not any(abs(n / k - 1) < 0.05 for n in taken[:3])


@pytest.mark.parametrize("options", [{"k": 0}, {"initial": 0.0}, {"rate": 1.0}])
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="k and initial must be positive and rate above 1"):
        ReMoE(**options)
