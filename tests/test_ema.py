"""The moving average follows experts by id."""

import pytest
import torch
from snapshots import copied, differences

from growmoe import EMA, FFN, MoE, TopK, surgery


def build(num_experts=3):
    return MoE(8, FFN(8), num_experts, TopK(1), seed=0)


def move(model, by=1.0):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def test_the_average_is_the_exponential_one():
    model = build()
    start = copied(dict(model.named_parameters()))
    average = EMA(model, decay=0.9)
    expected = 0.0
    for step in range(1, 6):
        move(model)
        average.update()
        expected = 0.9 * expected + 0.1 * step
    for name, value in average.average.items():
        assert torch.allclose(value, start[name] + expected, atol=1e-5)


def test_a_newborn_begins_at_its_own_weights_and_the_dead_are_forgotten():
    model = build()
    average = EMA(model, decay=0.9)
    old = copied(average.average)
    surgery.prune(model, [1])
    born = surgery.spawn(model, 0, noise=0.5).child
    weights = copied(dict(model.named_parameters()))
    average.update()
    assert set(average.average) == set(weights)
    for name, value in average.average.items():
        if name.startswith(f"experts.{born}."):
            assert torch.equal(value, weights[name])
        else:  # unmoved survivors keep their average, whatever their place in the list
            assert torch.allclose(value, old[name], atol=1e-6)


def test_applied_lends_the_average_and_gives_the_own_weights_back_even_after_an_error():
    model = build()
    average = EMA(model, decay=0.5)
    move(model)
    average.update()
    own = copied(dict(model.named_parameters()))
    with average.applied() as lent:
        assert lent is model
        assert differences(copied(dict(model.named_parameters())), average.state_dict()) == []
        with torch.no_grad():
            assert model(torch.randn(4, 8)).isfinite().all()
    assert differences(own, copied(dict(model.named_parameters()))) == []
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert differences(own, copied(dict(model.named_parameters()))) == []


def test_an_expert_born_since_the_last_update_keeps_its_own_weights_when_applied():
    model = build()
    average = EMA(model)
    move(model)
    born = surgery.spawn(model, 0).child
    own = copied(dict(model.experts[born].named_parameters()))
    with average.applied():
        assert differences(own, copied(dict(model.experts[born].named_parameters()))) == []


def test_the_state_comes_back_and_one_that_does_not_fit_is_named():
    model = build()
    average = EMA(model, 0.5)
    move(model)
    average.update()
    again = EMA(model, 0.5)
    again.load_state_dict(average.state_dict())
    assert differences(copied(average.average), copied(again.average)) == []
    before = copied(again.average)
    with pytest.raises(ValueError, match=r"EMA: experts.3.*does not fit the model"):
        again.load_state_dict(EMA(build(4)).state_dict())
    assert differences(before, copied(again.average)) == []


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(build(), decay)
