"""A cosine gate goes by angle alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe import FFN, MoE, TopK, surgery
from growmoe.routers import Cosine


def layer_of(gate: Cosine, experts: int = 3) -> MoE:
    return MoE(4, FFN(4), experts, TopK(2, gate=gate), seed=0)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.sampled_from([None, 2]))
def test_how_long_inputs_and_keys_are_does_not_matter(
    a: float, b: float, width: int | None
) -> None:
    layer = layer_of(Cosine(width))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    logits = layer.route(x).logits_TE
    with torch.no_grad():
        for e in layer.experts.values():
            e.entries.key *= b
    torch.testing.assert_close(layer.route(a * x).logits_TE, logits, rtol=1e-5, atol=1e-5)
    assert logits.abs().max() <= 10 + 1e-4


def test_logits_worked_out_by_hand() -> None:
    layer = layer_of(Cosine(scale=5.0), 2)
    with torch.no_grad():
        layer.experts[0].entries.key.copy_(torch.tensor([3.0, 0, 0, 0]))
        layer.experts[1].entries.key.copy_(torch.tensor([1.0, 1, 0, 0]))
    logits = layer.route(torch.tensor([[0.0, 7.0, 0, 0], [3.0, 4.0, 0, 0]])).logits_TE
    want = torch.tensor([[0, 5 * 0.5**0.5], [5 * 0.6, 5 * 1.4 * 0.5**0.5]])
    torch.testing.assert_close(logits, want)


def test_the_scale_is_learned_up_to_its_bound() -> None:
    layer = layer_of(Cosine(scale=2.0, largest=4.0))
    gate = layer.router.gate
    layer.route(torch.randn(5, 4)).assignment.dense()[:, 0].sum().backward()
    assert gate.log_scale.grad is not None and gate.log_scale.grad != 0
    with torch.no_grad():
        gate.log_scale.fill_(9.0)
        layer.experts[0].entries.key.copy_(torch.eye(4)[0])
    assert layer.route(torch.eye(4)[:1]).logits_TE[0, 0].item() == pytest.approx(4.0)


def test_a_zero_input_has_even_logits_and_finite_gradients() -> None:
    layer = layer_of(Cosine())
    x = torch.zeros(2, 4, requires_grad=True)
    assert not layer.route(x).logits_TE.any()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_newborn_turns_to_the_inputs_it_is_born_for() -> None:
    for gate in (Cosine(), Cosine(3)):
        layer = layer_of(gate)
        mean = torch.tensor([0.0, 2.0, -1.0, 0.0])
        child = surgery.spawn(layer, None, toward=mean, admitted=True).child
        logits = layer.route(mean[None]).logits_TE[0]
        assert logits[child].item() == pytest.approx(10.0, rel=1e-5)


def test_one_gate_serves_one_layer() -> None:
    gate = Cosine()
    layer_of(gate)
    with pytest.raises(ValueError, match="this Cosine already belongs to a layer"):
        layer_of(gate)


@pytest.mark.parametrize(
    "options", [{"d_proj": 0}, {"d_proj": 1.5}, {"scale": 0}, {"scale": math.inf}, {"scale": 101}]
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Cosine: (d_proj|scale) must be"):
        Cosine(**options)
