"""SoftMoE mixes the tokens of each sequence into slots, and slots into tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from growmoe import FFN, MoE, surgery
from growmoe.routers import SoftMoE


def layer_of(experts: int = 3, slots: int = 2, **options: object) -> MoE:
    return MoE(4, FFN(6, bias=True), experts, SoftMoE(slots), seed=0, **options)


def test_one_expert_of_one_slot_gives_every_token_its_output_on_their_mean_by_hand() -> None:
    layer = MoE(2, nn.Identity, 1, SoftMoE(1), seed=0)
    with torch.no_grad():
        layer.experts[0].entries.key.copy_(torch.tensor([[0.0, 5.0]]))
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # cosines 0 and 1
    part = math.e / (1 + math.e)
    want = torch.tensor([[2 * (1 - part), 3 * part]]).expand(2, 2)
    torch.testing.assert_close(layer(x), want)
    with torch.no_grad():
        layer.router.scale.fill_(2.0)
    part = math.e**2 / (1 + math.e**2)
    want = torch.tensor([[2 * (1 - part), 3 * part]]).expand(2, 2)
    torch.testing.assert_close(layer(x), want)


def test_sequences_do_not_touch_each_other() -> None:
    layer = layer_of()
    x = torch.randn(3, 5, 4)
    y = layer(x)
    other = x.clone()
    other[1] += 1
    z = layer(other)
    assert torch.equal(z[[0, 2]], y[[0, 2]]) and not torch.isclose(z[1], y[1]).all(1).any()
    alone = torch.cat([layer(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, y, rtol=1e-5, atol=1e-6)


def test_the_context_may_say_how_long_a_sequence_is() -> None:
    layer = layer_of()
    x = torch.randn(6, 4)
    torch.testing.assert_close(
        layer(x, {"length": 3}), layer(x.view(2, 3, 4)).view(6, 4), rtol=1e-6, atol=1e-6
    )
    assert not torch.allclose(layer(x, {"length": 3}), layer(x))
    with pytest.raises(ValueError, match="6 tokens are no whole sequences of 4"):
        layer(x, {"length": 4})


def test_the_order_of_tokens_does_not_matter() -> None:
    layer = layer_of()
    x = torch.randn(2, 7, 4)
    order = torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-5, atol=1e-6)


def test_every_expert_runs_the_same_number_of_rows_and_all_weights_sum_to_one() -> None:
    routing = layer_of().route(torch.randn(10, 4))
    a = routing.assignment
    assert a.counts_E.tolist() == [2, 2, 2]
    torch.testing.assert_close(a.dispatch_BNES.sum(1), torch.ones(1, 3, 2))
    torch.testing.assert_close(a.combine_BNES.sum((2, 3)), torch.ones(1, 10))
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(10))
    assert a.observed().weight_R.sum().item() == pytest.approx(10)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert layer_of(d_out=5)(x).shape == (*shape[:-1], 5)
    assert layer_of(shared=FFN(4))(x).isfinite().all()


def test_a_newborn_turns_to_the_inputs_it_is_born_for() -> None:
    layer = layer_of()
    child = surgery.spawn(layer, None, toward=torch.tensor([0.0, 3, 0, 0])).child
    key = layer.experts[child].entries.key
    assert key.shape == (2, 4)
    torch.testing.assert_close(
        torch.cosine_similarity(key, torch.tensor([[0.0, 1, 0, 0]])), torch.ones(2)
    )


@pytest.mark.parametrize("slots", [0, -1, 1.5])
def test_bad_slots_are_refused(slots: float) -> None:
    with pytest.raises(ValueError, match="slots must be a positive integer"):
        SoftMoE(slots)  # type: ignore[arg-type]
