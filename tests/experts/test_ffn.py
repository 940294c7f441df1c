"""A feed-forward expert computes its formula, and averaging respects that units may be permuted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_parameters import but_slow
from torch import nn

from growmoe import FFN, MoE
from growmoe.experts.expert import clone_body, fresh_body, merged_body
from growmoe.experts.ffn import activate, activate_backward

ACTIVATIONS = ["gelu", "relu", "swiglu"]
every_kind = pytest.mark.parametrize(
    ("activation", "bias"), [(a, b) for a in ACTIVATIONS for b in (False, True)]
)


def an_expert(activation: str, bias: bool, seed: int = 0, **options: int) -> FFN:
    generator = torch.Generator().manual_seed(seed)
    widths = {"d_hidden": 7, "d_model": 5, "d_out": 3} | options
    return FFN(**widths, activation=activation, bias=bias, generator=generator).double()


def permuted(expert: FFN, order: list[int]) -> FFN:
    """The same function with its hidden units in another order."""
    unit = torch.tensor(order)
    column = torch.cat([unit, unit + len(unit)]) if expert.activation == "swiglu" else unit
    result = expert.fresh().double()
    with torch.no_grad():
        result.w_in.copy_(expert.w_in[:, column])
        result.w_out.copy_(expert.w_out[unit])
        if expert.bias:
            result.b_in.copy_(expert.b_in[column])
            result.b_out.copy_(expert.b_out)
    return result


@every_kind
def test_shapes_and_names(activation: str, bias: bool) -> None:
    expert = an_expert(activation, bias)
    width = 14 if activation == "swiglu" else 7
    want = {"w_in": (5, width), "w_out": (7, 3)}
    want |= {"b_in": (width,), "b_out": (3,)} if bias else {}
    assert {name: tuple(p.shape) for name, p in expert.named_parameters()} == want
    assert expert(torch.randn(2, 4, 5).double()).shape == (2, 4, 3)


def test_outputs_worked_out_by_hand() -> None:
    x = torch.tensor([[2.0, -1.0]])
    expert = FFN(1, "relu", bias=True, d_model=2)
    values = {"w_in": [[1.0], [1.0]], "w_out": [[2.0, -3.0]], "b_in": [0.5], "b_out": [1.0, 1.0]}
    expert.load_state_dict({name: torch.tensor(v) for name, v in values.items()})
    torch.testing.assert_close(expert(x), torch.tensor([[4.0, -3.5]]))  # hidden 1.5
    expert = FFN(1, "swiglu", d_model=2, d_out=1)
    values = {"w_in": [[1.0, 3.0], [0.0, 1.0]], "w_out": [[1.0]]}  # gate 2, up 5
    expert.load_state_dict({name: torch.tensor(v) for name, v in values.items()})
    torch.testing.assert_close(expert(x), torch.tensor([[2 / (1 + math.exp(-2)) * 5]]))
    expert = FFN(1, "gelu", d_model=2, d_out=1)
    expert.load_state_dict({"w_in": torch.tensor([[1.0], [1.0]]), "w_out": torch.tensor([[1.0]])})
    torch.testing.assert_close(expert(x), torch.tensor([[0.8413447]]))  # Φ(1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_backward_of_each_activation_is_autograds(activation: str) -> None:
    h = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    y = activate(h, activation)
    grad = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, h, grad)
    torch.testing.assert_close(activate_backward(grad, h.detach(), activation), want)


@pytest.mark.parametrize(
    ("activation", "bias"),
    but_slow([(a, b) for a in ACTIVATIONS for b in (False, True)], ("swiglu", True)),
)
@given(data=st.data())
def test_merged_with_a_permutation_of_itself_it_is_itself(
    activation: str, bias: bool, data: st.DataObject
) -> None:
    expert = an_expert(activation, bias, data.draw(st.integers(0, 10**6)))
    others = [
        permuted(expert, order)
        for order in data.draw(st.lists(st.permutations(range(7)), min_size=1, max_size=3))
    ]
    weights = data.draw(
        st.lists(st.floats(0.1, 1e6), min_size=len(others) + 1, max_size=len(others) + 1)
    )
    merged = expert.merged(others, weights)
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, getattr(expert, name))
    x = torch.randn(4, 5).double()
    torch.testing.assert_close(merged(x), others[0](x))


@every_kind
def test_a_merger_has_the_widths_and_dtype_of_its_parents(activation: str, bias: bool) -> None:
    a, b = (an_expert(activation, bias, seed) for seed in (1, 2))
    merged = a.merged([b], [1, 1])
    assert merged.config() == a.config()
    assert all(p.dtype is torch.float64 and p.requires_grad for p in merged.parameters())
    assert all(p is not q for p in merged.parameters() for q in (*a.parameters(), *b.parameters()))


@every_kind
def test_the_mean_is_weighted(activation: str, bias: bool) -> None:
    a, b = (an_expert(activation, bias, seed) for seed in (1, 2))
    only_a, only_b = a.merged([b], [1, 0]), a.merged([b], [0, 3])
    mean = a.merged([b], [3, 1])
    for name, p in mean.named_parameters():
        torch.testing.assert_close(getattr(only_a, name), getattr(a, name))
        want = 0.75 * getattr(only_a, name) + 0.25 * getattr(only_b, name)
        torch.testing.assert_close(p, want)
    x = torch.randn(4, 5).double()
    torch.testing.assert_close(only_b(x), b(x))  # aligned to a, but the function of b


def test_the_aligned_mean_is_nearer_to_both_than_the_plain_mean() -> None:
    base = an_expert("relu", False, d_hidden=32)
    near = permuted(base, torch.randperm(32).tolist())
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.005 * torch.randn_like(p))
    x = torch.randn(200, 5).double()
    aligned = base.merged([near], [1, 1])
    plain = base.fresh().double()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_((getattr(base, name) + getattr(near, name)) / 2)
    assert (aligned(x) - base(x)).norm() < 0.2 * (plain(x) - base(x)).norm()


def test_merging_leaves_the_parents_alone() -> None:
    a, b = (an_expert("swiglu", True, seed) for seed in (1, 2))
    before = [p.detach().clone() for e in (a, b) for p in e.parameters()]
    a.merged([b], [1, 2])
    after = [p for e in (a, b) for p in e.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_modules_that_know_no_merging_are_averaged_tensor_by_tensor() -> None:
    bodies = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    with torch.no_grad():
        bodies[1][1].running_mean.fill_(4.0)
    merged = merged_body(bodies, [1, 3])
    torch.testing.assert_close(
        merged[0].weight, bodies[0][0].weight / 4 + bodies[1][0].weight * 0.75
    )
    torch.testing.assert_close(merged[1].running_mean, torch.full((3,), 3.0))


@pytest.mark.parametrize(
    "other",
    [
        FFN(8, d_model=5, d_out=3),
        FFN(7, "relu", d_model=5, d_out=3),
        FFN(7, bias=True, d_model=5, d_out=3),
        nn.Linear(5, 3),
    ],
    ids=repr,
)
def test_experts_of_different_kinds_cannot_be_merged(other: nn.Module) -> None:
    with pytest.raises(ValueError, match="different kinds"):
        merged_body([FFN(7, d_model=5, d_out=3), other], [1, 1])


def test_fresh_experts_are_drawn_within_the_bounds_and_by_the_generator() -> None:
    template = FFN(64, "swiglu", bias=True)
    a, b, c = (
        template.fresh(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    for name, p in a.named_parameters():
        bound = (16 if name.endswith("in") else 64) ** -0.5
        assert p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.35)
        assert torch.equal(p, getattr(b, name))
        assert not torch.equal(p, getattr(c, name))
    assert a.config() == {**template.config(), "d_model": 16, "d_out": 8}


def test_a_template_has_no_weights_and_cannot_be_called() -> None:
    template = FFN(8)
    assert list(template.parameters()) == []
    with pytest.raises(ValueError, match="template without weights"):
        template(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["d_hidden", "d_model", "d_out"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8"])
def test_a_width_must_be_a_positive_integer(name: str, value: object) -> None:
    widths = {"d_hidden": 8, "d_model": 4, "d_out": 4} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        FFN(**widths)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of .*'gelu'.*, got 'silu'"):
        FFN(8, "silu")


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_clone_is_perturbed_in_proportion_to_each_weight(noise: float) -> None:
    body = FFN(200, d_model=100)
    with torch.no_grad():
        body.w_out.mul_(1000)
    clone = clone_body(body, noise, torch.Generator().manual_seed(0))
    for name, p in clone.named_parameters():
        own = getattr(body, name)
        assert ((p - own).norm() / own.norm()).item() == pytest.approx(noise, rel=0.03)
        assert p is not own and p.grad is None


def test_a_fresh_body_does_not_inherit_that_its_template_was_frozen() -> None:
    template = nn.Linear(4, 4).requires_grad_(False)
    place = (torch.Generator(), torch.device("cpu"), torch.float32)
    assert all(p.requires_grad for p in fresh_body(template, 4, 4, *place).parameters())


def test_the_parameters_counted_are_those_of_the_formula() -> None:
    layer = MoE(16, FFN(24, "swiglu", bias=True), 3, seed=0)
    each = 16 * 48 + 48 + 24 * 16 + 16 + 16  # both matrices and biases, and the key
    assert sum(p.numel() for p in layer.parameters()) == 3 * each
