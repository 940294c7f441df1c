"""The layer computes what the reference computes, by its fast path and by its slow one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import close, compare, pooled, reference
from torch import Tensor, nn

import growmoe
from growmoe import FFN, ExpertChoice, MoE, TopK

FAST, SLOW = 1e-5, 1e-12  # float32 by the pool, float64 by the loop
TOP_K = [
    TopK(k, score, renormalize)
    for k in (1, 2, 3)
    for score in ("softmax", "softmax_topk", "sigmoid")
    for renormalize in (True, False)
]
KINDS = {f"{a}{'-bias' * b}": FFN(16, a, b) for a in ("gelu", "relu", "swiglu") for b in (0, 1)}


def sequential(d_out: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, d_out))


def both_paths(layer: MoE, x: Tensor) -> None:
    """Compare in float32, and in float64, which no pool takes."""
    compare(layer.float(), x, FAST)
    compare(layer.double(), x.double(), SLOW)
    assert not pooled(layer)


def far_from_ties(layer: MoE, x: Tensor) -> bool:
    return reference(layer, x).margin > 1e-5


@st.composite
def layers(draw: st.DrawFn) -> tuple[MoE, Tensor]:
    """Any layer with any input."""
    router = draw(st.sampled_from(TOP_K) | st.sampled_from([0.5, 1.0, 2.0, 9.0]).map(ExpertChoice))
    num_experts = draw(st.integers(router.min_experts, 5))
    d_out = draw(st.sampled_from([8, 8, 16, 24, 5]))
    kinds = [*KINDS.values(), sequential(d_out)]
    experts = draw(
        st.sampled_from(kinds)
        | st.lists(st.sampled_from(kinds), min_size=num_experts, max_size=num_experts)
    )
    shared = draw(st.sampled_from([None, None, FFN(8), nn.Linear(8, d_out)]))
    seed = draw(st.integers(0, 2**31))
    layer = MoE(8, experts, num_experts, router, d_out=d_out, shared=shared, seed=seed)
    layer.train(draw(st.booleans()))
    for id in draw(st.sets(st.integers(0, num_experts - 1), max_size=2)):
        layer.experts[id].freeze()
    shape = draw(st.sampled_from([(0,), (1,), (7,), (12,), (2, 3), (2, 1, 2), (0, 3), ()]))
    x = torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed + 1))
    return layer, x


@settings(max_examples=80)
@given(layers())
def test_output_and_every_gradient_are_the_references(case: tuple[MoE, Tensor]) -> None:
    layer, x = case
    assume(far_from_ties(layer, x))
    both_paths(layer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", [TopK(2), ExpertChoice()], ids=["topk", "expert-choice"])
def test_each_kind_of_feed_forward_expert(kind: str, router: growmoe.Router) -> None:
    layer = MoE(8, KINDS[kind], 4, router, seed=3)
    x = torch.randn(10, 8)
    assert far_from_ties(layer, x)
    compare(layer, x, FAST)
    assert pooled(layer) == [0, 1, 2, 3]
    compare(layer.double(), x.double(), SLOW)
    assert pooled(layer) == []


@pytest.mark.parametrize("router", TOP_K, ids=repr)
def test_each_way_of_choosing_k(router: TopK) -> None:
    both_paths(MoE(8, FFN(16), 4, router, seed=4), torch.randn(9, 8))


def test_a_plain_module_is_an_expert() -> None:
    layer = MoE(8, sequential(), 4, seed=5)
    both_paths(layer, torch.randn(9, 8))


def test_kinds_can_be_mixed_in_one_bank() -> None:
    kinds = [FFN(16), sequential(), FFN(16), FFN(16, "swiglu", True), FFN(16, "swiglu", True)]
    layer = MoE(8, kinds, 5, seed=6)
    x = torch.randn(20, 8)
    compare(layer, x, FAST)
    assert pooled(layer) == [0, 2, 3, 4]
    assert sorted(where for where, _ in layer.experts._layout) == [[0, 2], [1], [3, 4]]
    compare(layer.double(), x.double(), SLOW)


def test_one_expert() -> None:
    both_paths(MoE(8, FFN(16), 1, TopK(1), seed=7), torch.randn(6, 8))


@pytest.mark.parametrize("shape", [(1, 8), (8,), (2, 3, 8), (1, 1, 1, 8)], ids=str)
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    both_paths(MoE(8, FFN(16, bias=True), 4, d_out=16, seed=8), torch.randn(shape))


@pytest.mark.parametrize("expert", [FFN(16, bias=True), sequential()], ids=["ffn", "module"])
@pytest.mark.parametrize("router", [TopK(2), ExpertChoice()], ids=["topk", "expert-choice"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)], ids=str)
def test_no_inputs_give_no_outputs_and_no_gradients(
    expert: nn.Module, router: growmoe.Router, shape: tuple[int, ...]
) -> None:
    layer = MoE(8, expert, 3, router, shared=FFN(8), seed=9)
    both_paths(layer, torch.zeros(shape))
    assert all(p.grad is None for e in layer.experts.values() for p in e.body.parameters())


@pytest.mark.parametrize("expert", [FFN(16, "swiglu", True), sequential()], ids=["ffn", "module"])
def test_all_inputs_on_one_expert(expert: nn.Module) -> None:
    layer = MoE(8, expert, 4, TopK(1, renormalize=False), seed=10)
    with torch.no_grad():
        layer.experts[2].entries.key.fill_(5.0)
    x = torch.rand(9, 8) + 0.5
    both_paths(layer, x)
    for id, e in layer.experts.items():
        assert all((p.grad is None) == (id != 2) for p in e.body.parameters())


@pytest.mark.parametrize("expert", [FFN(16, "relu", True), sequential()], ids=["ffn", "module"])
def test_frozen_experts_get_no_gradient_and_pass_the_inputs_on(expert: nn.Module) -> None:
    layer = MoE(8, expert, 4, seed=11)
    for id in (0, 3):
        layer.experts[id].freeze()
    x = torch.randn(12, 8)
    both_paths(layer, x)
    assert all(p.grad is None for id in (0, 3) for p in layer.experts[id].parameters())
    for id in (1, 2):
        layer.experts[id].freeze()
    both_paths(layer, x)


def test_one_parameter_alone_can_stand_still() -> None:
    layer = MoE(8, FFN(16, bias=True), 4, seed=12)
    layer.experts[1].body.w_in.requires_grad_(False)
    layer.experts[2].body.b_out.requires_grad_(False)
    compare(layer, torch.randn(12, 8), FAST)
    assert pooled(layer) == [0, 1, 2, 3]


def test_gradients_of_several_backwards_add_up() -> None:
    layer = MoE(8, FFN(16), 4, seed=13)
    x1, x2 = torch.randn(2, 6, 8)
    layer(x1).sum().backward()
    layer(x2).sum().backward()
    want: dict[str, Tensor] = {}
    for x in (x1, x2):
        for name, g in reference(layer, x).gradients(torch.ones(6, 8)).items():
            if g is not None:
                want[name] = want.get(name, 0) + g
    for name, p in layer.named_parameters():
        close(p.grad, want[name], FAST, floor=0.1, name=name)


def test_a_newborn_is_offset_by_the_log_of_its_admission() -> None:
    layer = MoE(8, FFN(16), 3, warmup=10, seed=14)
    x = torch.randn(20, 8)
    growmoe.surgery.spawn(layer, 0)
    compare(layer, x, FAST)
    for _ in range(3):
        layer(x)
    assert layer.experts[3].admission == pytest.approx(0.4)
    layer.eval()
    both_paths(layer, x)


def test_the_shared_expert_sees_every_input() -> None:
    layer = MoE(8, FFN(16), 3, shared=FFN(24, "swiglu"), d_out=16, seed=15)
    both_paths(layer, torch.randn(2, 5, 8))


def test_an_input_that_is_not_contiguous() -> None:
    layer = MoE(8, FFN(16), 3, seed=16)
    x = torch.randn(8, 5)
    close(layer(x.T), reference(layer, x.T.contiguous()).y, FAST)


def test_an_expanded_gradient_is_taken() -> None:
    layer = MoE(8, FFN(16), 3, seed=17)
    x = torch.randn(5, 8)
    layer(x).sum().backward()  # the gradient of a sum has strides of zero
    want = reference(layer, x).gradients(torch.ones(5, 8))
    for name, p in layer.named_parameters():
        if want[name] is not None:
            close(p.grad, want[name], FAST, floor=0.1, name=name)


# Other dtypes. Weights and inputs are rounded first, so that the gate decides alike.


def rounded(dtype: torch.dtype, expert: nn.Module) -> tuple[MoE, Tensor]:
    layer = MoE(16, expert, 4, seed=18).to(dtype).float()
    return layer, torch.randn(32, 16).to(dtype).float()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)],  # about five roundings of 2⁻⁸ and 2⁻¹¹
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("autocast", [False, True], ids=["converted", "autocast"])
def test_half_precision_is_float32_within_rounding(
    dtype: torch.dtype, tolerance: float, activation: str, autocast: bool
) -> None:
    layer, x = rounded(dtype, FFN(24, activation, bias=True))
    x.requires_grad_()
    layer(x).square().sum().backward()
    want = {name: p.grad.double() for name, p in layer.named_parameters()} | {"x": x.grad.double()}
    y = layer(x).detach().double()
    layer.zero_grad()
    weights = torch.float32 if autocast else dtype
    layer, x = layer.to(weights), x.detach().to(weights).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(x)
    assert out.dtype is dtype
    assert pooled(layer) == [0, 1, 2, 3]
    close(out, y, tolerance)
    out.float().square().sum().backward()
    floor = max(float(g.norm()) for g in want.values()) / 100
    for name, p in {"x": x, **dict(layer.named_parameters())}.items():
        assert p.grad.dtype is weights
        close(p.grad, want[name], tolerance, floor, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_a_plain_module(dtype: torch.dtype) -> None:
    layer = MoE(8, [sequential(), sequential(), FFN(16), FFN(16)], 4, seed=19)
    x = torch.randn(20, 8)
    want = layer(x).detach().double()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    close(y, want, 2e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())


# Which path is taken.


def test_widths_that_do_not_align_take_the_slow_path() -> None:
    x = torch.randn(12, 5)
    layer = MoE(5, FFN(16), 3, seed=20)
    compare(layer, x, FAST)
    assert pooled(layer) == []
    layer = MoE(8, FFN(12), 3, seed=20)
    compare(layer, torch.randn(12, 8), FAST)
    assert pooled(layer) == []


def test_an_expert_with_a_hook_leaves_the_pool_until_it_is_removed() -> None:
    layer = MoE(8, FFN(16), 3, seed=21)
    x = torch.randn(12, 8)
    for module in (layer.experts[1], layer.experts[1].body):
        seen = []
        handle = module.register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        layer(x)
        assert seen and pooled(layer) == [0, 2]
        handle.remove()
        layer(x)
        assert pooled(layer) == [0, 1, 2]


def test_a_global_hook_sees_every_expert() -> None:
    layer = MoE(8, FFN(16), 3, seed=22)
    x = torch.randn(12, 8)
    layer(x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        layer(x)
    finally:
        handle.remove()
    assert seen.count(FFN) == 3
    layer(x)
    assert pooled(layer) == [0, 1, 2]


def test_frozen_experts_have_a_pool_of_their_own() -> None:
    layer = MoE(8, FFN(16), 4, seed=23)
    layer.experts[2].freeze()
    layer(torch.randn(9, 8))
    assert sorted(where for where, pool in layer.experts._layout if pool) == [[0, 1, 3], [2]]


# Auxiliary losses and modes.


def test_each_forwards_auxiliary_loss_is_given_once() -> None:
    layer = MoE(8, FFN(16), 4, balance_loss=0.5, z_loss=0.25, seed=24)
    model = nn.Sequential(layer, MoE(8, FFN(16), 4, balance_loss=0.0, seed=25))
    x = torch.randn(9, 8)
    model(x)
    routing = layer.route(x)
    want = 0.5 * growmoe.losses.balance_loss(routing)
    want = want + 0.25 * growmoe.losses.z_loss(routing)
    torch.testing.assert_close(growmoe.aux_loss(model), want)
    assert growmoe.aux_loss(model) == 0
    model.eval()(x)
    assert growmoe.aux_loss(model) == 0


def test_the_auxiliary_loss_trains_the_keys_alone() -> None:
    layer = MoE(8, FFN(16), 4, z_loss=0.1, seed=26)
    layer(torch.randn(9, 8))
    growmoe.aux_loss(layer).backward()
    for e in layer.experts.values():
        assert e.entries.key.grad.any()
        assert all(p.grad is None for p in e.body.parameters())


def test_a_layer_that_ran_without_gradients_says_that_its_loss_is_lost() -> None:
    layer = MoE(8, FFN(16), 4, seed=27)
    with torch.no_grad():
        layer(torch.randn(9, 8))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        growmoe.aux_loss(layer)


def test_the_same_seed_gives_the_same_layer() -> None:
    a, b = (MoE(8, FFN(16), 4, seed=28) for _ in range(2))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    expert = sequential()
    before = torch.get_rng_state()
    MoE(8, expert, 4, seed=29)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_experts_differ() -> None:
    for kind in (FFN(16), sequential(), sequential):
        bodies = [e.body.state_dict() for e in MoE(8, kind, 3, seed=30).experts.values()]
        for name, value in bodies[0].items():
            assert not torch.equal(value, bodies[1][name]), name


def test_output_of_the_living_is_the_output_and_leaves_no_trace() -> None:
    layer = MoE(8, FFN(16), 4, seed=31).eval()
    x = torch.randn(9, 8)
    y = layer(x)
    pool = layer.experts._layout[0][1]
    close(layer.output_of(x, list(layer.experts.values())), y.detach().double(), FAST)
    layer(x)
    assert layer.experts._layout[0][1] is pool and layer.steps == 0


@settings(max_examples=30)
@given(st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 10**6))
def test_rows_do_not_depend_on_each_other(count: int, dtype: torch.dtype, seed: int) -> None:
    layer = MoE(8, FFN(16), 4, seed=seed).eval().to(dtype)
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assume(far_from_ties(layer, x))
    each = torch.cat([layer(row[None]) for row in x])
    close(layer(x), each.detach().double(), FAST if dtype is torch.float32 else SLOW)
