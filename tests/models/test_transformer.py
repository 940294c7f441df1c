"""TransformerLM: what it computes, generates, counts and refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from growmoe import FFN, ExpertChoice, MoE, TopK, aux_loss, moe_layers, surgery
from growmoe.models import KVCache, TransformerLM
from growmoe.models.attention import rotary
from growmoe.routers import Hash

V, S = 17, 9
SIZE = {"vocab_size": V, "d_model": 16, "num_layers": 2, "num_heads": 4, "d_hidden": 8}


def model_of(**options):
    return TransformerLM(**{**SIZE, "num_experts": 4, "seed": 0, **options})


def tokens(batch=3, length=S):
    return torch.randint(0, V, (batch, length))


KINDS = {
    "plain": {},
    "grouped queries": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "shared expert": {"shared": FFN(8, "swiglu")},
    "every second": {"moe_every": 2},
    "untied": {"tie_embeddings": False},
    "dense": {"num_experts": 0},
    "hash": {"router": Hash(2)},
    "mixed experts": {"expert": [FFN(8), FFN(8), FFN(4, "relu", bias=True), FFN(8, "swiglu")]},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    return model_of(**request.param)


# What it computes.


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * S, [4, 1, 3, 1], [1, S - 1]])
def test_with_a_cache_parts_give_what_the_whole_gives(model, parts) -> None:
    model.eval()
    x = tokens()
    cache = KVCache()
    got = torch.cat([model(part, cache) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)
    assert cache.length == S


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(model) -> None:
    model.eval()
    x = tokens()
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % V
    a, b = model(x), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=1e-6)
    assert (a[:, 5:] - b[:, 5:]).abs().amax((0, 2)).min() > 1e-4  # and all after it see it


def test_rotary_scores_depend_on_distance_alone() -> None:
    from growmoe.models.attention import _rotate

    q, k = torch.randn(2, 1, 1, 1, 8)
    cos, sin = rotary(torch.arange(40), 8, 100.0)

    def score(i, j):
        at = [(cos[n : n + 1], sin[n : n + 1]) for n in (i, j)]
        return float((_rotate(q, at[0]) * _rotate(k, at[1])).sum())

    assert score(3, 1) == pytest.approx(score(30, 28), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_grouped_queries_with_equal_key_heads_are_plain_attention() -> None:
    few, many = model_of(num_kv_heads=2), model_of()
    state = few.state_dict()
    for name, value in state.items():
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            state[name] = value.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
    many.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(few.eval()(x), many.eval()(x), atol=1e-6, rtol=1e-5)


def test_the_first_loss_is_that_of_guessing(model) -> None:
    x = tokens(8)
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.2)


@torch.no_grad()
def test_the_stream_does_not_grow_with_depth() -> None:
    def size(layers):
        model = model_of(num_layers=layers, d_model=64, d_hidden=64)
        seen = []
        model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].std()))
        model(tokens())
        return float(seen[0])

    assert size(16) < 1.6 * size(1)  # more than three times without the scaling


def test_a_fresh_newborn_is_scaled_as_the_first_experts_are() -> None:
    model = model_of(num_layers=8)
    layer = moe_layers(model)["blocks.0.feed_forward"]
    surgery.spawn(layer)
    first, newborn = layer.experts[0].body, layer.experts[4].body
    bound = 8**-0.5 / 4  # 1/sqrt(d_hidden) / sqrt(2 · 8 layers)
    for body in (first, newborn):
        assert 0.8 * bound < body.w_out.abs().max().item() <= bound
        assert body.w_in.abs().max().item() <= 16**-0.5


def test_a_tied_output_is_the_embedding() -> None:
    tied, untied = model_of(), model_of(tie_embeddings=False)
    assert untied.num_params() - tied.num_params() == V * 16
    hidden = []
    tied.norm.register_forward_hook(lambda _, args, out: hidden.append(out))
    logits = tied(tokens())
    torch.testing.assert_close(logits, hidden[0] @ tied.embedding.weight.T)


def test_every_nth_layer_is_a_mixture() -> None:
    model = model_of(num_layers=5, moe_every=2)
    assert list(moe_layers(model)) == ["blocks.1.feed_forward", "blocks.3.feed_forward"]
    assert not moe_layers(model_of(num_experts=0))


def test_layers_do_not_share_a_router() -> None:
    router = TopK(1)
    a, b = moe_layers(model_of(router=router)).values()
    assert a.router is not b.router
    assert a.router is not router
    assert a.router.k == b.router.k == 1


def test_the_routers_are_told_the_tokens_and_what_the_caller_knows() -> None:
    model = model_of(router=Hash(2, by="task")).eval()
    x = tokens(2)
    a, b = model(x, context={"task": 0}), model(x, context={"task": torch.tensor([0, 1])})
    torch.testing.assert_close(a[0], b[0])
    assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_activations_changes_no_gradient(dropout) -> None:
    x, gradients = tokens(), []
    for recompute in (False, True):
        model = model_of(dropout=dropout, checkpoint_activations=recompute)
        torch.manual_seed(1)
        loss = model(x).logsumexp(-1).mean() + aux_loss(model)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert all(layer.steps == 1 for layer in moe_layers(model).values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-7, rtol=1e-5)


def test_checkpointing_keeps_less() -> None:
    def kept(recompute):
        saved = []

        def pack(t):
            saved.append(t.nelement())
            return t

        model = model_of(checkpoint_activations=recompute, moe={"balance_loss": 0})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens())
        return sum(saved)

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize("autocast", [False, True])
def test_it_runs_in_bfloat16(autocast) -> None:
    model, x = model_of(num_kv_heads=2), tokens()
    whole = model.eval()(x)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = KVCache()
        got = torch.cat([model(part, cache) for part in x.split(3, dim=1)], dim=1)
        model.train()(x).float().logsumexp(-1).mean().backward()
    assert got.dtype is torch.bfloat16
    assert ((got.float() - whole).norm() / whole.norm()).item() < 0.05


# Random numbers.


def test_a_seed_decides_all_weights_and_draws_nothing_else() -> None:
    before = torch.get_rng_state()
    a, b, other = model_of(), model_of(), model_of(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name))
        assert p.dim() == 1 or not torch.equal(p, other.get_parameter(name))
    for one, two in zip(moe_layers(a).values(), moe_layers(b).values(), strict=True):
        assert torch.equal(one.generator.get_state(), two.generator.get_state())


def test_without_a_seed_the_global_generator_decides() -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(model_of(seed=None).blocks[1].attention.key.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# Generation.


@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_token_each_time(model) -> None:
    x = tokens()
    got = model.generate(x, 6, temperature=0)
    model.eval()
    for _ in range(6):
        x = torch.cat([x, model(x)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, x)


def test_generation_draws_from_its_generator_alone() -> None:
    model, x = model_of(), tokens()

    def draw(seed):
        return model.generate(x, 20, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_sequence_that_has_stopped_repeats_its_stop() -> None:
    model, x = model_of(), tokens(8, 2)
    out = model.generate(x, 200, stop=(3, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(out[:, :2], x)
    for row in out[:, 2:].tolist():
        first = next(i for i, token in enumerate(row) if token in (3, 5))
        assert set(row[first:]) == {row[first]}
    ended = [next(i for i, t in enumerate(r) if t in (3, 5)) for r in out[:, 2:].tolist()]
    assert out.shape[1] == 2 + max(ended) + 1  # no more is drawn than the last one needs
    assert len(set(ended)) > 1


def test_a_stop_in_the_prompt_stops_nothing() -> None:
    x = torch.tensor([[3, 3]])
    assert model_of().generate(x, 4, temperature=0, stop=3).shape[1] > 2


def test_generation_leaves_every_module_in_its_mode_and_records_nothing() -> None:
    model = model_of(dropout=0.5).train()
    layer = moe_layers(model)["blocks.0.feed_forward"]
    surgery.freeze(layer, [1])
    model.blocks[1].norm_attention.eval()
    modes = [m.training for m in model.modules()]
    out = model.generate(tokens(), 3)
    assert [m.training for m in model.modules()] == modes
    assert True in modes and False in modes
    assert not out.requires_grad
    assert layer.steps == 0
    with pytest.raises(AttributeError):  # seen only when it draws
        model.generate(tokens(), 3, generator="none")
    assert [m.training for m in model.modules()] == modes


def test_no_new_tokens_give_the_prompt() -> None:
    x = tokens().int()
    assert torch.equal(model_of().generate(x, 0), x.long())


# Counts.


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_flops_are_what_torch_counts(options) -> None:
    if options == KINDS["mixed experts"]:
        options = {"expert": FFN(8, bias=True)}  # of unequal experts it tells the mean
    model, x = model_of(**options).eval(), tokens()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() / x.numel() == pytest.approx(model.flops_per_token(S))


def test_active_parameters_are_those_of_k_experts_and_all_keys() -> None:
    many, few = model_of(num_experts=6), model_of(num_experts=2)
    keys = 2 * 4 * 16  # two layers, four more experts, one key of 16 each
    assert many.num_params(active=True) == few.num_params() + keys
    assert few.num_params(active=True) == few.num_params()
    assert model_of(num_experts=0).num_params(active=True) == model_of(num_experts=0).num_params()


def test_parameters_are_counted_by_hand() -> None:
    attention, expert, key, norms = 4 * 16 * 16, 3 * 16 * 8, 16, 2 * 16
    block = attention + 4 * (expert + key) + norms
    assert model_of().num_params() == V * 16 + 2 * block + 16
    assert sum(p.numel() for p in model_of().parameters()) == model_of().num_params()


def test_counts_follow_surgery() -> None:
    model = model_of()
    before = model.num_params(), model.num_params(active=True), model.flops_per_token(S)
    surgery.spawn(moe_layers(model)["blocks.1.feed_forward"], 0)
    after = model.num_params(), model.num_params(active=True), model.flops_per_token(S)
    expert, key = 3 * 16 * 8, 16
    assert [b - a for a, b in zip(before, after, strict=True)] == [expert + key, key, 2 * key]


def test_expert_choice_counts_its_capacity_and_a_router_without_k_all() -> None:
    model = model_of(router=ExpertChoice(1.5), causal_routing=False)
    expert, rest = 3 * 16 * 8, model.num_params() - 2 * 4 * 3 * 16 * 8
    assert model.num_params(active=True) == rest + 2 * 1.5 * expert


# What it refuses.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"d_model": 18}, "num_heads"),
        ({"d_model": 12}, "pairs"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"num_layers": True}, "num_layers"),
        ({"num_experts": -1}, "num_experts"),
        ({"num_experts": 0, "router": TopK(1)}, "router would have no effect"),
        ({"num_experts": 1}, "at least 2 experts"),
        ({"moe_every": 3}, "moe_every=3 leaves no mixture"),
        ({"moe_every": 0}, "moe_every"),
        ({"dropout": 1.0}, "dropout"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"router": TopK}, "router must be a Router"),
        ({"router": ExpertChoice()}, "later tokens"),
        ({"moe": {"balance": 1}}, "balance_loss"),
        ({"moe": {"d_model": 3}}, "d_model"),
        ({"moe": 3}, "mapping"),
        ({"expert": FFN(8, d_model=5)}, "d_model=16"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_options_are_refused(options, says) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(**options)


def test_a_router_that_sees_the_future_may_be_insisted_on() -> None:
    model = model_of(router=ExpertChoice(), causal_routing=False)
    assert model(tokens()).shape == (3, S, V)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[B, S\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one"),
        ([[1, 2]], r"\[\[1, 2\]\]"),
        (torch.zeros(1, 2), "torch.float32"),
        (torch.tensor([[0, V]]), f"0 to {V - 1}"),
        (torch.tensor([[0, -1]]), "from -1"),
    ],
)
def test_bad_tokens_are_refused(x, says) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=says):
        model(x)
    with pytest.raises(ValueError, match=says):
        model.generate(x, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": V}, "stop"),
        ({"stop": [1, "a"]}, "stop"),
    ],
)
def test_bad_generation_settings_are_refused(options, says) -> None:
    with pytest.raises(ValueError, match=says):
        model_of().generate(tokens(), **{"max_new_tokens": 1, **options})


def test_a_cache_of_another_batch_or_model_is_refused_and_stays_as_it_was() -> None:
    model, cache = model_of().eval(), KVCache()
    x = tokens()
    model(x[:, :4], cache)
    for other, part in ((model, x[:2, 4:]), (model_of(num_layers=1), x[:, 4:])):
        with pytest.raises(ValueError, match="cache"):
            other(part, cache)
    with pytest.raises(ValueError, match="context"):
        model(x[:, 4:], cache, context=3)
    broken = copy.deepcopy(model)
    broken.blocks[1].feed_forward = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        broken(x[:, 4:], cache)
    assert cache.length == 4
    torch.testing.assert_close(model(x[:, 4:], cache), model(x)[:, 4:], atol=1e-5, rtol=1e-5)


def test_mixtures_are_layers_of_growmoe() -> None:
    layers = moe_layers(model_of(moe={"warmup": 7, "z_loss": 0.5}))
    assert all(isinstance(layer, MoE) and layer.z_loss == 0.5 for layer in layers.values())
    assert all(layer.recorder.warmup == 7 for layer in layers.values())
