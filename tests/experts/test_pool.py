"""The pool is a cache: whatever is done to an expert, the output follows its present weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from reference import close, compare, pooled, reference
from slow_parameters import but_slow
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from growmoe import FFN, MoE, TopK, aux_loss, guard, moe_layers, surgery

FAST, SLOW = 1e-5, 1e-12
X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))


def a_layer(activation: str = "gelu", **options: object) -> MoE:
    """A layer that has its pool already; its experts are square, so that shapes hide nothing."""
    layer = MoE(8, FFN(8, activation, bias=True), 4, seed=1, **options)
    layer(X)
    assert pooled(layer) == [0, 1, 2, 3]
    return layer


def double_all(layer: MoE) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)


# What may be done to the weights. Each is followed by a comparison with the reference.


def in_place(layer: MoE) -> None:
    with torch.no_grad():
        layer.experts[1].body.w_in.add_(1)


def set_data(layer: MoE) -> None:
    layer.experts[1].body.w_in.data = torch.randn(8, 8)


def write_through_data(layer: MoE) -> None:
    layer.experts[1].body.w_in.data.add_(1)


def transpose_data(layer: MoE) -> None:
    w = layer.experts[1].body.w_in
    w.data = w.data.t()


def replace_parameter(layer: MoE) -> None:
    layer.experts[1].body.w_in = nn.Parameter(torch.randn(8, 8))


def replace_body(layer: MoE) -> None:
    layer.experts[1].body = FFN(8, bias=True, d_model=8)


def replace_body_by_another_kind(layer: MoE) -> None:
    layer.experts[1].body = nn.Linear(8, 8)


def remove_hidden_units(layer: MoE) -> None:
    body = layer.experts[1].body
    body.w_in = nn.Parameter(body.w_in.detach()[:, :4].clone())
    body.b_in = nn.Parameter(body.b_in.detach()[:4].clone())
    body.w_out = nn.Parameter(body.w_out.detach()[:4].clone())


def slice_hidden_units(layer: MoE) -> None:
    body = layer.experts[1].body
    body.w_in.data = body.w_in.data[:, :4]
    body.b_in.data = body.b_in.data[:4]
    body.w_out.data = body.w_out.data[:4]


def change_activation(layer: MoE) -> None:
    layer.experts[1].body.activation = "relu"


def move_away_and_back(layer: MoE) -> None:
    state = layer.state_dict()
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)


def assign(layer: MoE) -> None:
    state = {k: v + 1 if k.endswith("w_out") else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def load(layer: MoE) -> None:
    layer.load_state_dict(MoE(8, FFN(8, bias=True), 4, seed=2).state_dict())


def vector_to_parameters(layer: MoE) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, layer.parameters())


def swap_two_bodies(layer: MoE) -> None:
    a, b = layer.experts[0], layer.experts[1]
    a.body, b.body = b.body, a.body


def optimizer_step(layer: MoE) -> None:
    layer(X).square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1).step()


CHANGES: list[Callable[[MoE], None]] = [
    in_place,
    set_data,
    write_through_data,
    transpose_data,
    replace_parameter,
    replace_body,
    replace_body_by_another_kind,
    remove_hidden_units,
    slice_hidden_units,
    change_activation,
    move_away_and_back,
    assign,
    load,
    vector_to_parameters,
    swap_two_bodies,
    optimizer_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_output_follows_a_change_of_weights(change: Callable[[MoE], None]) -> None:
    layer = a_layer()
    change(layer)
    compare(layer, X, FAST)
    double_all(layer)
    compare(layer, X, FAST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_output_follows_a_change_of_dtype(dtype: torch.dtype) -> None:
    layer = a_layer().to(dtype)
    x = X.to(dtype)
    tolerance = {torch.float64: SLOW, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    close(layer(x), reference(layer, x).y, tolerance)
    double_all(layer)
    close(layer(x), reference(layer, x).y, tolerance)
    compare(layer.float(), X, FAST)
    assert pooled(layer) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_weights_of_its_own(copied: Callable[[MoE], MoE]) -> None:
    layer = a_layer()
    y = layer.eval()(X).detach()
    twin = copied(layer)
    assert torch.equal(twin(X), y)
    double_all(twin)
    assert torch.equal(layer(X), y)
    compare(twin, X, FAST)
    double_all(layer)
    compare(layer, X, FAST)
    assert surgery.spawn(twin, 0).child == surgery.spawn(layer, 0).child


def test_a_copied_optimizer_trains_the_copied_layer() -> None:
    layer = a_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for twin, other in (
        copy.deepcopy((layer, optimizer)),
        pickle.loads(pickle.dumps((layer, optimizer))),
    ):
        before = twin.eval()(X).detach()
        twin(X).square().sum().backward()
        other.step()
        assert not torch.equal(twin(X), before)
        compare(twin, X, FAST)


# Weights that are not what they seem take the slow path.


def test_two_experts_can_share_a_parameter() -> None:
    layer = a_layer()
    layer.experts[2].body.w_in = layer.experts[0].body.w_in
    compare(layer, X, FAST)
    assert pooled(layer) == [1, 3]
    assert layer.experts[2].body.w_in is layer.experts[0].body.w_in
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    compare(layer, X, FAST)
    layer.experts[2].body.w_in = nn.Parameter(torch.randn(8, 8))
    compare(layer, X, FAST)


def test_two_experts_can_share_memory() -> None:
    layer = a_layer()
    layer.experts[2].body.w_in.data = layer.experts[0].body.w_in.data
    layer(X)
    with torch.no_grad():
        layer.experts[0].body.w_in.add_(1)
    assert torch.equal(layer.experts[0].body.w_in, layer.experts[2].body.w_in)
    compare(layer, X, FAST)


def test_an_expert_can_share_a_parameter_with_itself() -> None:
    layer = a_layer()
    body = layer.experts[0].body
    body.w_out = body.w_in
    layer(X)
    with torch.no_grad():
        body.w_in.add_(1)
    compare(layer, X, FAST)
    assert pooled(layer) == [1, 2, 3]


def test_two_layers_can_share_an_expert() -> None:
    a, b = a_layer(), a_layer()
    b.experts[1].body = a.experts[1].body
    ya, yb = a(X), b(X)
    want = reference(a, X).gradients(torch.ones(24, 8))["experts.1.body.w_in"]
    want = want + reference(b, X).gradients(torch.ones(24, 8))["experts.1.body.w_in"]
    (ya + yb).sum().backward()
    close(a.experts[1].body.w_in.grad, want, FAST)
    torch.optim.SGD(a.parameters(), lr=0.1).step()
    compare(a, X, FAST)
    compare(b, X, FAST)


def test_memory_shared_between_processes_stays_shared() -> None:
    layer = a_layer().share_memory()
    compare(layer, X, FAST)
    assert all(p.is_shared() for p in layer.parameters())


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_a_parametrized_weight_is_computed_at_each_forward() -> None:
    layer = a_layer()
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer.experts[1].body, "w_in", Doubled())
    y = layer(X)
    assert pooled(layer) == [0, 2, 3]
    with torch.no_grad():
        plain.experts[1].body.w_in.mul_(2)
    close(y, reference(plain, X).y, FAST)
    want = reference(plain, X).gradients(torch.ones(24, 8))["experts.1.body.w_in"]
    y.sum().backward()
    close(layer.experts[1].body.parametrizations.w_in.original.grad, 2 * want, FAST)
    parametrize.remove_parametrizations(layer.experts[1].body, "w_in")
    compare(layer, X, FAST)
    assert pooled(layer) == [0, 1, 2, 3]


def test_functional_call_uses_the_weights_it_is_given() -> None:
    layer, other = a_layer(), MoE(8, FFN(8, bias=True), 4, seed=3)
    given = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    y = torch.func.functional_call(layer, given, (X,))
    close(y, reference(other, X).y, FAST)
    y.sum().backward()
    want = reference(other, X).gradients(torch.ones(24, 8))
    for name, p in given.items():
        close(p.grad, want[name], FAST, floor=0.1, name=name)
    assert all(p.grad is None for p in layer.parameters())
    compare(layer, X, FAST)
    assert pooled(layer) == [0, 1, 2, 3]


def test_functional_call_with_one_weight() -> None:
    layer = a_layer()
    w = torch.randn(8, 8, requires_grad=True)
    name = "experts.1.body.w_out"
    y = torch.func.functional_call(layer, {name: w}, (X,))
    assert pooled(layer) == [0, 2, 3]
    twin = copy.deepcopy(layer)
    twin.experts[1].body.w_out = nn.Parameter(w.detach().clone())
    close(y, reference(twin, X).y, FAST)
    y.sum().backward()
    close(w.grad, reference(twin, X).gradients(torch.ones(24, 8))[name], FAST)


@pytest.mark.parametrize("train", [True, False])
def test_functional_gradients(train: bool) -> None:
    layer = a_layer().train(train)
    steps = layer.steps
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (X,)).sum() + aux_loss(layer)

    got = torch.func.grad(loss)(weights)
    (layer(X).sum() + aux_loss(layer)).backward()
    for name, p in layer.named_parameters():
        close(got[name], p.grad.double(), FAST, floor=0.1, name=name)
    assert layer.steps == steps + train  # the transformed forward cannot be recorded


def test_a_patched_forward_is_called() -> None:
    layer = a_layer()
    layer.experts[1].body.forward = lambda x: 0 * x
    twin = copy.deepcopy(layer)
    del layer.experts[1].body.forward
    zero = copy.deepcopy(layer)
    double_none = [zero.experts[1].body.w_out, zero.experts[1].body.b_out]
    with torch.no_grad():
        for p in double_none:
            p.zero_()
    close(twin(X), reference(zero, X).y, FAST)
    compare(layer, X, FAST)


def test_a_hook_may_replace_an_experts_output() -> None:
    layer = a_layer()
    zero = copy.deepcopy(layer)
    with torch.no_grad():
        zero.experts[1].body.w_out.zero_()
        zero.experts[1].body.b_out.zero_()
    layer.experts[1].register_forward_hook(lambda *args: 0 * args[-1])
    close(layer(X), reference(zero, X).y, FAST)


def test_a_hook_on_a_parameter_sees_its_gradient() -> None:
    layer = a_layer()
    w = layer.experts[1].body.w_in
    w.register_hook(lambda grad: 2 * grad)
    want = reference(layer, X).gradients(torch.ones(24, 8))["experts.1.body.w_in"]
    layer(X).sum().backward()
    close(w.grad, 2 * want, FAST)


# Identity and memory.


def test_parameters_keep_their_identity_and_place() -> None:
    layer = a_layer()
    before = {n: (p, p.data_ptr()) for n, p in layer.named_parameters()}
    for _ in range(3):
        layer(X).sum().backward()
    for name, p in layer.named_parameters():
        assert before[name][0] is p and before[name][1] == p.data_ptr(), name


def test_what_was_held_before_the_first_forward_is_what_is_trained() -> None:
    layer = MoE(8, FFN(8), 4, seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held = layer.experts[0].body.w_in
    before = held.detach().clone()
    layer(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(held, before)
    compare(layer, X, FAST)


def saved_size(thing: object) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return len(file.getvalue())


def test_one_experts_file_holds_one_expert() -> None:
    layer = MoE(32, FFN(64), 16, seed=1)
    layer(torch.randn(4, 32))
    expert = layer.experts[3]
    state = expert.state_dict()
    own = sum(t.nbytes for t in state.values() if isinstance(t, Tensor))
    assert saved_size(state) < own + 5_000
    assert saved_size(expert) < own + 8_000
    assert len(pickle.dumps(expert)) < own + 8_000
    everything = sum(t.nbytes for t in layer.state_dict().values() if isinstance(t, Tensor))
    assert len(pickle.dumps(layer)) < 1.2 * everything + 20_000
    assert saved_size(layer) < 1.2 * everything + 60_000


def test_saving_disturbs_neither_the_layer_nor_a_pending_backward() -> None:
    layer = a_layer()
    want = reference(layer, X).gradients(torch.ones(24, 8))
    y = layer(X)
    held = dict(layer.named_parameters())
    pickle.dumps(layer)
    y.sum().backward()
    for name, p in layer.named_parameters():
        assert p is held[name]
        close(p.grad, want[name], FAST, floor=0.1, name=name)
    compare(layer, X, FAST)


def test_a_state_dict_does_not_change_with_the_layer() -> None:
    layer = a_layer()
    state = layer.state_dict()
    before = {k: v.clone() for k, v in state.items() if ".body." in k}
    double_all(layer)
    assert all(torch.equal(state[k], v) for k, v in before.items())


# Between forward and backward.


def test_growth_between_forward_and_backward_leaves_survivors_gradients_right() -> None:
    layer = MoE(8, FFN(8), 5, TopK(2), seed=1)
    x = X.clone().requires_grad_()
    want = reference(layer, x).gradients(torch.ones(24, 8))
    y = layer(x)
    surgery.spawn(layer, 0)
    surgery.prune(layer, [4])
    surgery.merge(layer, [2, 3])
    layer(X)  # the pool is laid out anew
    y.sum().backward()
    for id in (0, 1):
        for name, p in layer.experts[id].named_parameters():
            close(p.grad, want[f"experts.{id}.{name}"], FAST, floor=0.1, name=name)
    close(x.grad, want["x"], FAST)


def test_freezing_between_forward_and_backward_is_an_honest_freeze() -> None:
    layer = a_layer()
    want = reference(layer, X).gradients(torch.ones(24, 8))
    y = layer(X)
    surgery.freeze(layer, [1])
    layer(X)
    y.sum().backward()
    for id in (0, 2, 3):
        for name, p in layer.experts[id].named_parameters():
            close(p.grad, want[f"experts.{id}.{name}"], FAST, floor=0.1, name=name)


def test_a_change_of_activation_between_forward_and_backward_comes_too_late() -> None:
    layer = a_layer()
    want = reference(layer, X).gradients(torch.ones(24, 8))["experts.1.body.w_in"]
    y = layer(X)
    for e in layer.experts.values():
        e.body.activation = "relu"
    y.sum().backward()
    close(layer.experts[1].body.w_in.grad, want, FAST)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_between_forward_and_backward_raises(foreach: bool) -> None:
    layer = a_layer()
    optimizer = torch.optim.Adam(layer.parameters(), foreach=foreach)
    y = layer(X).sum()
    y.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"expert 0: w_in was changed between forward and"):
        y.backward()


def test_a_load_between_forward_and_backward_raises() -> None:
    layer = a_layer()
    y = layer(X).sum()
    layer.load_state_dict(MoE(8, FFN(8, bias=True), 4, seed=2).state_dict())
    with pytest.raises(RuntimeError, match="was changed between forward and backward"):
        y.backward()


def test_a_step_raises_even_if_the_pool_was_laid_out_anew() -> None:
    layer = a_layer()
    y = layer(X).sum()
    surgery.spawn(layer, 0)
    layer(X)
    double_all(layer)
    with pytest.raises(RuntimeError, match="was changed between forward and backward"):
        y.backward()


def test_a_second_derivative_is_refused_in_float32_and_right_in_float64() -> None:
    layer = a_layer()
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()
    layer.double()
    x = X[:3].double().requires_grad_()
    torch.autograd.gradgradcheck(layer.eval(), (x,))


def test_a_forward_in_inference_mode_does_not_spoil_training() -> None:
    layer = MoE(8, FFN(8), 4, seed=1)
    with torch.inference_mode():
        layer(X)
    compare(layer, X, FAST)
    torch.optim.Adam(layer.parameters()).step()
    compare(layer, X, FAST)


# Inside other machinery.


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(8, FFN(8, bias=True), 4, seed=1)
        self.head = nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.head(self.moe(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_gives_the_same_gradients_and_counts_once() -> None:
    plain, saving = Residual(), Residual()
    saving.load_state_dict(plain.state_dict())
    x = X.clone().requires_grad_()
    x2 = X.clone().requires_grad_()
    (plain(x).square().sum() + aux_loss(plain)).backward()
    y = checkpoint(saving.block, x2, use_reentrant=False)
    (y.square().sum() + aux_loss(saving)).backward()
    assert torch.equal(x.grad, x2.grad)
    want, got = gradients(plain), gradients(saving)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert saving.moe.steps == 1
    assert saving.moe.experts[0].statistics["age"] == 1
    assert aux_loss(saving) == 0, "the repeated forward left an auxiliary loss behind"
    for a, b in zip(plain.moe.experts.values(), saving.moe.experts.values(), strict=True):
        assert torch.equal(a.statistics.record, b.statistics.record)


@pytest.mark.parametrize("backend", but_slow(["eager", "aot_eager"], "eager"))
def test_a_compiled_model_equals_the_eager_one_and_survives_a_birth(backend: str) -> None:
    torch.compiler.reset()
    eager, model = Residual(), Residual()
    model.load_state_dict(eager.state_dict())
    compiled = torch.compile(model, backend=backend)
    for act in (
        None,
        lambda m: surgery.spawn(m, 0, admitted=True),
        lambda m: surgery.prune(m, [1]),
    ):
        for m in (eager, model):
            m.zero_grad()
            if act is not None:
                act(m.moe)
        y = eager(X)
        z = compiled(X)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
        want, got = gradients(eager), gradients(model)
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name])


def test_two_layers_in_one_model_keep_apart() -> None:
    model = nn.Sequential(MoE(8, FFN(8), 3, seed=1), MoE(8, FFN(8), 4, seed=2))
    y = model(X)
    first, second = moe_layers(model).values()
    middle = reference(first, X).y
    close(y, reference(second, middle.float()).y, FAST)


def test_a_fused_step_between_forward_and_backward_raises_where_guarded() -> None:
    layer = MoE(8, FFN(16), 3, TopK(2))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard(optimizer, layer)
    x = torch.randn(20, 8)
    layer(x).square().sum().backward()
    y = layer(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.square().sum().backward()
