"""Offloaded experts compute what resident ones do, and nothing of them is lost."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import growmoe
from growmoe import FFN, MoE, TopK, surgery
from growmoe.experts.bank import run_each
from growmoe.offload import Offloaded, offload
from growmoe.offload.cache import Cache, Loader
from growmoe.offload.cold import MANIFEST
from growmoe.routers import Stochastic

D = 16


class Stack(nn.Module):
    """Several layers on a residual stream, one of them called twice if `again`."""

    def __init__(self, layers: list[MoE], again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x + self.layers[0](x) if self.again else x


class Normed(nn.Module):
    """A body with buffers, a transposed weight, a tied one and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D).T)
        self.again = self.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.norm = nn.BatchNorm1d(D)
        self.norm.running_mean.normal_()
        self.register_buffer("count", torch.tensor([3, 4]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.weight) @ self.again * self.scale + self.count.sum()

    def reset_parameters(self) -> None:
        pass


class Nothing(nn.Module):
    """A body without tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def mixed(num: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32, k: int = 2) -> MoE:
    kinds = [FFN(24), Normed, FFN(8, "swiglu", bias=True), Nothing, lambda: nn.Linear(D, D)]
    return MoE(
        D, [kinds[i % len(kinds)] for i in range(num)], num, TopK(k), seed=seed, dtype=dtype
    ).eval()


def plain(num: int = 8, seed: int = 0, **options: object) -> MoE:
    return MoE(D, FFN(24), num, TopK(2), seed=seed, **options).eval()


@torch.no_grad()
def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """The layer's output by the plain loop: the reference that must be met bit for bit."""
    x_TD = x.reshape(-1, layer.d_model)
    a = layer.route(x_TD).assignment
    y = a.combine(run_each(list(layer.experts.values()), a.dispatch(x_TD), a, layer.d_out))
    return layer.with_shared(x_TD, y).reshape(*x.shape[:-1], layer.d_out)


@torch.no_grad()
def stack_by_hand(model: Stack, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = x + by_hand(layer, x)
    return x + by_hand(model.layers[0], x) if model.again else x


def bodies(model: nn.Module) -> list[Tensor]:
    return [
        t
        for layer in growmoe.moe_layers(model).values()
        for e in layer.experts.values()
        for t in (*e.body.parameters(), *e.body.buffers())
    ]


def resident(model: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in bodies(model))


def threads() -> int:
    return sum(t.name.startswith("growmoe-offload") for t in threading.enumerate())


# What is computed.


@pytest.mark.slow
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cache=st.integers(1, 9),
    prefetch=st.booleans(),
    again=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_inputs_and_any_cache_give_the_same_bits(
    sizes: list[int], cache: int, prefetch: bool, again: bool, dtype: torch.dtype, seed: int
) -> None:
    model = Stack([mixed(6, 1, dtype), mixed(5, 2, dtype), mixed(7, 3, dtype)], again).eval()
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, D, generator=generator).to(dtype) for n in sizes]
    expected = [stack_by_hand(model, x) for x in xs]
    with tempfile.TemporaryDirectory() as directory:
        with offload(model, cache, directory=directory, prefetch=prefetch), torch.no_grad():
            got = [model(x) for x in xs]
        with torch.no_grad():
            after = [stack_by_hand(model, x) for x in xs]
    for y, want, again_ in zip(got, expected, after, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, want)
        assert torch.equal(again_, want)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("cache", [1, 3, 6])
def test_mixed_kinds_in_several_layers_give_the_same_bits(
    tmp_path: Path, cache: int, prefetch: bool
) -> None:
    model = Stack([mixed(6, 1), mixed(6, 2)], again=True).eval()
    xs = [torch.randn(n, D) for n in (1, 30, 0, 3)]
    expected = [stack_by_hand(model, x) for x in xs]
    with offload(model, cache, directory=tmp_path, prefetch=prefetch), torch.no_grad():
        for x, want in zip(xs, expected, strict=True):
            assert torch.equal(model(x), want)


def test_the_pooled_path_agrees_within_rounding(tmp_path: Path) -> None:
    layer, x = plain(), torch.randn(50, D)
    with torch.no_grad():
        pooled = layer(x)
        with offload(layer, 3, directory=tmp_path):
            torch.testing.assert_close(layer(x), pooled)
        assert torch.equal(layer(x), pooled)


def test_shared_experts_and_autocast_stay_as_they_are(tmp_path: Path) -> None:
    layer = plain(shared=FFN(8))
    x = torch.randn(20, D)
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(layer, x)
        with offload(layer, 2, directory=tmp_path), torch.no_grad():
            assert torch.equal(layer(x), expected)
            assert layer.shared.w_in.numel() == D * 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_leaves_ordinary_parameters(tmp_path: Path, mode: type) -> None:
    layer, x = plain(), torch.randn(30, D)
    expected = by_hand(layer, x)
    with mode():
        offloaded = offload(layer, 2, directory=tmp_path)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.flip(0)).flip(0), expected)
        offloaded.restore()
    layer.train()(x).sum().backward()
    assert all(not p.is_inference() for p in layer.parameters())


def test_a_router_that_draws_in_eval_mode_draws_the_same_under_prefetch(tmp_path: Path) -> None:
    def build() -> Stack:
        routers = [Stochastic(2, train="uniform", inference="uniform") for _ in range(3)]
        return Stack([MoE(D, FFN(8), 6, r, seed=i) for i, r in enumerate(routers)]).eval()

    model, x = build(), torch.randn(30, D)
    torch.manual_seed(5)
    expected = stack_by_hand(model, x)
    with offload(model, 2, directory=tmp_path, prefetch=True) as offloaded, torch.no_grad():
        torch.manual_seed(5)
        assert torch.equal(model(x), expected)
        assert offloaded.stats["layers.1"].prefetched > 0


def test_a_router_that_wants_a_context_is_not_asked_early(tmp_path: Path) -> None:
    hashed = MoE(D, FFN(8), 4, growmoe.routers.Hash(1), seed=1).eval()
    first = plain(4)
    both = nn.ModuleList([first, hashed])
    x, token = torch.randn(9, D), torch.arange(9)
    with torch.no_grad():
        expected = hashed(first(x), {"token": token})
        with offload(both, 2, directory=tmp_path, prefetch=True) as offloaded:
            got = hashed(first(x), {"token": token})
    torch.testing.assert_close(got, expected)
    assert offloaded.stats["1"].prefetched == 0


def test_threads_may_share_a_model(tmp_path: Path) -> None:
    model = Stack([plain(8, 1), plain(8, 2)]).eval()
    xs = [torch.randn(11, D) for _ in range(4)]
    expected = [stack_by_hand(model, x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(xs[i]), expected[i]):
                    wrong.append(i)

    with offload(model, 2, directory=tmp_path, prefetch=True):
        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    assert not wrong


# What is on the device.


def test_no_more_than_the_cache_is_in_memory(tmp_path: Path) -> None:
    layer, x = plain(), torch.randn(40, D)
    one = sum(p.nbytes for p in layer.experts[0].body.parameters())
    with torch.no_grad():
        layer(x)  # pooled: the pool must go too
    seen = []
    for e in layer.experts.values():
        e.register_forward_hook(lambda *_: seen.append(resident(layer)))
    with offload(layer, 3, directory=tmp_path) as offloaded, torch.no_grad():
        assert resident(layer) == 0
        layer(x)
        assert resident(layer) == 3 * one
    assert len(seen) == 8 and max(seen) <= 3 * one
    assert offloaded.stats["moe"].evictions == 5


def test_cache_bytes_is_shared_out_by_size(tmp_path: Path) -> None:
    model = Stack([plain(8, 1), plain(4, 2)])
    one = sum(p.nbytes for p in model.layers[0].experts[0].body.parameters())
    with offload(model.eval(), cache_bytes=6 * one, directory=tmp_path), torch.no_grad():
        for _ in range(3):
            model(torch.randn(40, D))
        assert [resident(layer) // one for layer in model.layers] == [4, 2]


def test_hits_and_misses_are_told(tmp_path: Path) -> None:
    layer = plain(4)
    size = sum(p.nbytes for p in layer.experts[0].body.parameters())
    ids = layer.route(torch.randn(1, D)).assignment
    x = torch.randn(1, D)
    hit = int((layer.route(x).assignment.counts_E > 0).sum())
    assert hit == 2 and len(ids.counts_E) == 4
    with offload(layer, 2, directory=tmp_path) as offloaded, torch.no_grad():
        layer(x)
        stats = offloaded.stats["moe"]
        assert (stats.hits, stats.misses, stats.bytes_loaded) == (0, 2, 2 * size)
        layer(x)
        assert (stats.hits, stats.misses, stats.evictions) == (2, 2, 0)
        assert offloaded.hit_rate == stats.hit_rate == 0.5
        assert stats.seconds_waited > 0
        layer(torch.randn(50, D))
        assert (stats.hits, stats.misses, stats.evictions) == (4, 4, 2)


class Instant(Loader):
    """A loader that tells in which order it was asked."""

    def __init__(self, store: object, device: torch.device) -> None:
        super().__init__(store, device)
        self.asked: list[int] = []

    def begin(self, key: tuple[str, int]) -> object:
        self.asked.append(key[1])
        return super().begin(key)


class Memory:
    def __init__(self, num: int) -> None:
        self.num = num

    def read(self, key: tuple[str, int]) -> dict[str, Tensor]:
        return {"w": torch.full((2,), float(key[1]))}


def tiny_cache(num: int, capacity: int) -> tuple[Cache, Instant]:
    loader = Instant(Memory(num), torch.device("cpu"))
    tensors = {i: {"w": nn.Parameter(torch.full((2,), float(i)))} for i in range(num)}
    cache = Cache("moe", tensors, loader, capacity, dict.fromkeys(range(num), 1))
    cache.empty()
    return cache, loader


@settings(max_examples=100)
@given(
    calls=st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 6), st.integers(1, 9)),
            st.dictionaries(st.integers(0, 6), st.integers(1, 9)),
        ),
        max_size=8,
    ),
    capacity=st.integers(1, 7),
)
def test_whatever_is_guessed_each_expert_is_there_when_it_runs(
    calls: list[tuple[dict[int, int], dict[int, int]]], capacity: int
) -> None:
    cache, _ = tiny_cache(7, capacity)
    for rows, guess in calls:
        there = {i for i, own in cache.tensors.items() if own["w"].numel()}
        cache.prefetch(guess)
        order = []
        meanwhile: list[int] = []
        for id in cache.serve(rows, partial(meanwhile.append, 1)):
            assert cache.tensors[id]["w"].tolist() == [id, id]
            assert sum(t["w"].numel() > 0 for t in cache.tensors.values()) <= capacity
            order.append(id)
        assert sorted(order) == sorted(rows)
        assert len(meanwhile) == (1 if rows else 0)
        if not guess:  # those that were there ran first, without being loaded again
            assert set(order[: len(there & set(rows))]) == there & set(rows)
    cache.loader.close()


def test_what_was_used_longest_ago_makes_room() -> None:
    cache, loader = tiny_cache(4, 2)

    def run(**rows: int) -> None:
        list(cache.serve({int(k[1:]): n for k, n in rows.items()}, lambda: None))

    run(e0=1)
    run(e1=1)
    run(e0=1)
    run(e2=1)  # 1 was used longest ago
    run(e0=1)
    assert loader.asked == [0, 1, 2]
    assert cache.stats.hits == 2
    loader.close()


def test_of_what_one_forward_used_the_least_used_makes_room() -> None:
    cache, loader = tiny_cache(6, 3)
    list(cache.serve({0: 5, 1: 1, 2: 9}, lambda: None))
    list(cache.serve({3: 1}, lambda: None))  # 1 goes
    list(cache.serve({4: 1}, lambda: None))  # 0 goes
    list(cache.serve({2: 1, 3: 1, 4: 1}, lambda: None))
    assert sorted(loader.asked) == [0, 1, 2, 3, 4]
    assert cache.stats.hits == 3
    loader.close()


def test_a_wrong_guess_is_the_first_to_go() -> None:
    cache, loader = tiny_cache(4, 2)
    list(cache.serve({0: 1}, lambda: None))
    cache.prefetch({3: 1})
    list(cache.serve({0: 1}, lambda: None))
    list(cache.serve({1: 1}, lambda: None))
    list(cache.serve({0: 1}, lambda: None))
    assert loader.asked == [0, 3, 1]
    assert (cache.stats.prefetched, cache.stats.prefetch_hits) == (1, 0)
    cache.prefetch({2: 1})
    list(cache.serve({2: 1}, lambda: None))
    assert (cache.stats.prefetched, cache.stats.prefetch_hits) == (2, 1)
    loader.close()


def test_a_guess_does_not_displace_what_it_wants() -> None:
    cache, loader = tiny_cache(4, 2)
    list(cache.serve({0: 1, 1: 1}, lambda: None))
    cache.prefetch({2: 9, 3: 9, 0: 1, 1: 1})
    assert loader.asked == [0, 1]
    loader.close()


@pytest.mark.slow
def test_memory_of_the_process_falls(tmp_path: Path) -> None:
    code = f"""
import gc, torch, growmoe
from growmoe.offload import offload
def anonymous():
    gc.collect()
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024
torch.set_num_threads(1)
body = torch.nn.Linear(3072, 3072, bias=False)  # 36 MiB, which malloc always gives back
layer = growmoe.MoE(3072, body, 5, growmoe.TopK(1), seed=0).eval()
del body
x = torch.randn(64, 3072)
with torch.no_grad():
    layer(x[:1])
    before = anonymous()
    with offload(layer, 1, directory={str(tmp_path)!r}) as offloaded:
        for _ in range(3):
            layer(x)
        print(before - anonymous(), offloaded.stats["moe"].misses)
    print(before - anonymous())
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fell, misses, restored = (int(word) for word in done.stdout.split())
    assert misses > 5, done.stdout
    assert fell > 3.5 * 36, done.stdout  # four of five are gone
    assert abs(restored) < 40


# What is kept.


def test_restoring_gives_back_every_object_and_bit(tmp_path: Path) -> None:
    model = Stack([mixed(6, 1), plain(4, 2)]).eval()
    bank, names = model.layers[0].experts, [n for n, _ in model.named_parameters()]
    objects = {n: t for n, t in (*model.named_parameters(), *model.named_buffers())}
    values = {n: t.detach().clone() for n, t in objects.items()}
    strides = {n: t.stride() for n, t in objects.items()}
    next(iter(objects.values())).grad = gradient = torch.ones(24 * D).view(D, 24)
    with offload(model, 2, directory=tmp_path, prefetch=True) as offloaded, torch.no_grad():
        model(torch.randn(5, D))
        model.layers[1].experts[1].freeze()
    assert model.layers[0].experts is bank and type(bank) is growmoe.ExpertBank
    assert [n for n, _ in model.named_parameters()] == names
    for n, t in (*model.named_parameters(), *model.named_buffers()):
        assert t is objects[n]
        assert t.stride() == strides[n]
        assert torch.equal(t, values[n]), n
    assert next(iter(objects.values())).grad is gradient
    assert model.layers[1].experts[1].frozen
    assert not model.layers[1].experts[1].body.w_in.requires_grad
    assert not any(m._forward_pre_hooks or m._state_dict_hooks for m in model.modules())
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    offloaded.restore()
    assert threads() == 0
    model.layers[1].train()(torch.randn(5, D)).sum().backward()
    assert surgery.prune(model.layers[1], [0])


def test_what_is_changed_in_place_is_not_lost(tmp_path: Path) -> None:
    layer, x = plain(4), torch.randn(20, D)
    with offload(layer, 1, directory=tmp_path), torch.no_grad():
        layer(x)
        hot = next(e for e in layer.experts.values() if e.body.w_in.numel())
        hot.body.w_in.mul_(2)
        w_in, other = hot.body.w_in.clone(), hot.body.w_out.data.clone()
        hot.body.w_out.data = other * 3  # without its version counter
        cold = next(e for e in layer.experts.values() if not e.body.w_in.numel())
        cold.body.w_in.data = torch.ones(D, 24)
        layer(x)
        layer(x.flip(0))
        state = layer.state_dict()
    for values in (state, layer.state_dict()):
        assert torch.equal(values[f"experts.{hot.id}.body.w_in"], w_in)
        assert torch.equal(values[f"experts.{hot.id}.body.w_out"], other * 3)
        assert torch.equal(values[f"experts.{cold.id}.body.w_in"], torch.ones(D, 24))


def test_a_state_dict_holds_every_weight(tmp_path: Path) -> None:
    model = Stack([mixed(6, 1), plain(4, 2)]).eval()
    expected = {n: v.clone() if isinstance(v, Tensor) else v for n, v in model.state_dict().items()}
    part = {n: v.clone() for n, v in model.layers[0].experts[1].body.state_dict().items()}
    with offload(model, 2, directory=tmp_path), torch.no_grad():
        model(torch.randn(5, D))
        got = model.state_dict()
        body = model.layers[0].experts[1].body.state_dict()
        growmoe.save(tmp_path.parent / "whole.safetensors", model)
    assert list(got) == list(expected)
    for values, wanted in ((got, expected), (body, part)):
        assert values.keys() == wanted.keys()
        for n, v in wanted.items():
            if isinstance(v, Tensor):
                assert torch.equal(values[n], v), n
    fresh = Stack([mixed(6, 3), plain(4, 4)]).eval()
    growmoe.load(tmp_path.parent / "whole.safetensors", fresh)
    x = torch.randn(7, D)
    assert torch.equal(stack_by_hand(fresh, x), stack_by_hand(model, x))


def test_single_experts_and_consent_work_offloaded(tmp_path: Path) -> None:
    layer, x = plain(4), torch.randn(6, D)
    with torch.no_grad():
        expected = [e(x) for e in layer.experts.values()]
        rest = [layer.experts[i] for i in (0, 2, 3)]
        output = layer.output_of(x, rest)
        with offload(layer, 1, directory=tmp_path) as offloaded:
            for e, y in zip(layer.experts.values(), expected, strict=True):
                assert torch.equal(e(x), y)
            assert offloaded.stats["moe"].misses == 4
            assert torch.equal(layer.output_of(x, rest), output)


# What is refused.


@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_training_are_refused_before_anything_changes(
    tmp_path: Path, training: bool
) -> None:
    layer, x = plain(warmup=10), torch.randn(4, D)
    surgery.spawn(layer)
    layer.train(training)
    with offload(layer, 2, directory=tmp_path):
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            layer(x)
        assert layer.experts[8].admission == 0 and layer.steps == 0
        if training:
            with torch.no_grad(), pytest.raises(RuntimeError, match="training mode"):
                layer(x)
        else:
            layer.requires_grad_(False)
            layer(x)
            with pytest.raises(RuntimeError, match="gradients"):
                layer(x.clone().requires_grad_())
            with pytest.raises(RuntimeError, match="gradients"):
                layer(x=x.clone().requires_grad_())


def test_new_structure_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    layer, x = plain(4), torch.randn(20, D)
    expected = by_hand(layer, x)
    with offload(layer, 2, directory=tmp_path), torch.no_grad():
        for act in (
            lambda: surgery.spawn(layer),
            lambda: surgery.spawn(layer, 1),
            lambda: surgery.prune(layer, [0]),
            lambda: surgery.merge(layer, [0, 1]),
        ):
            with pytest.raises((ValueError, RuntimeError)):
                act()
        assert list(layer.experts) == [0, 1, 2, 3] and len(layer.lineage) == 1
        assert torch.equal(layer(x), expected)


def test_loading_copying_and_converting_are_refused(tmp_path: Path) -> None:
    model = Stack([plain(4, 1), plain(4, 2)]).eval()
    growmoe.save(tmp_path / "checkpoint", model)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(20, D)
    expected = stack_by_hand(model, x)
    with offload(model, 2, directory=tmp_path / "experts"), torch.no_grad():
        for act in (
            lambda: model.load_state_dict(state),
            lambda: model.layers[0].load_state_dict(model.layers[0].state_dict()),
            lambda: growmoe.load(tmp_path / "checkpoint", model),
            lambda: copy.deepcopy(model),
            lambda: copy.deepcopy(model.layers[0].experts[1]),
            lambda: copy.deepcopy(model.layers[0].experts[1].body),
            lambda: pickle.dumps(model),
            lambda: model.double(),
        ):
            with pytest.raises(RuntimeError, match=r"restore\(\)"):
                act()
        assert torch.equal(model(x), expected)
    model.load_state_dict(state)
    copy.deepcopy(model)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    layer = plain(4)
    before = [p.detach().clone() for p in layer.parameters()]
    for options, words in (
        ({}, "cache or cache_bytes"),
        ({"cache": 1, "cache_bytes": 1}, "cache or cache_bytes"),
        ({"cache": 0}, "positive integer"),
        ({"cache": 2.0}, "positive integer"),
        ({"cache_bytes": 100}, "largest expert"),
        ({"cache": 2, "directory": None}, "directory="),
        ({"cache": 2, "device": "meta"}, "CPU or CUDA"),
    ):
        with pytest.raises(ValueError, match=words):
            offload(layer, **{"directory": tmp_path, **options})
    with pytest.raises(ValueError, match="no MoE layer"):
        offload(nn.Linear(2, 2), 1, directory=tmp_path)
    with offload(layer, 1, directory=tmp_path), pytest.raises(ValueError, match="already"):
        offload(layer, 1, directory=tmp_path / "other")
    with pytest.raises(ValueError, match="no values"):
        offload(plain(4, device="meta"), 1, directory=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def test_what_is_shared_is_refused(tmp_path: Path) -> None:
    tied = plain(4)
    tied.experts[1].body.w_in = tied.experts[3].body.w_in
    view = plain(4)
    view.experts[1].body.w_in.data = view.experts[3].body.w_in.data[:]
    outside = plain(4)
    outside.extra = nn.Linear(D, 24, bias=False)
    outside.extra.weight = outside.experts[2].body.w_in
    norm = nn.LayerNorm(D)
    module = MoE(D, [nn.Sequential(nn.Linear(D, D)) for _ in range(3)], 3, TopK(1)).eval()
    module.experts[0].body.append(norm)
    module.norm = norm
    nested = MoE(D, [lambda: plain(2), FFN(8)], 2, TopK(1)).eval()
    for layer in (tied, view, outside, module, nested):
        with pytest.raises(ValueError, match=r"shares|mixture of its own"):
            offload(layer, 1, directory=tmp_path)
    with pytest.raises(ValueError, match="decides by"):
        gate = MoE(D, FFN(8), 2, growmoe.routers.ClosedFormGate())
        offload(gate.eval(), 1, directory=tmp_path)
    assert not list(tmp_path.iterdir())


# The directory.


def test_a_directory_is_written_once_and_used_again(tmp_path: Path) -> None:
    layer, x = mixed(), torch.randn(9, D)
    expected = by_hand(layer, x)
    with offload(layer, 2, directory=tmp_path):
        pass
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(stamps) == 5 + 1  # one expert has no tensors
    with offload(layer, 2, directory=tmp_path), torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    for other in (mixed(seed=1), mixed(7)):
        with pytest.raises(ValueError, match="another model"):
            offload(other, 2, directory=tmp_path)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "empty": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "a bit in its data": lambda p: flip(p, -5),
    "a bit in its header": lambda p: flip(p, p.read_bytes().index(b"data_offsets") + 15),
    "a bit in its length": lambda p: flip(p, 5),
    "another's": lambda p: p.write_bytes(
        p.with_name(p.name.replace("expert-1", "expert-2")).read_bytes()
    ),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_file_named(tmp_path: Path, kind: str) -> None:
    layer, x = plain(4), torch.randn(40, D)
    expected = by_hand(layer, x)
    offloaded = offload(layer, 1, directory=tmp_path)
    path = tmp_path / "layer-000-expert-1.safetensors"
    whole = path.read_bytes()
    DAMAGE[kind](path)
    with torch.no_grad():
        for act in (lambda: layer(x), offloaded.restore, layer.state_dict):
            with pytest.raises(
                ValueError, match=r"expert-1\.safetensors is (damaged|torn|missing)"
            ):
                act()
        path.write_bytes(whole)  # nothing was lost by trying
        assert torch.equal(layer(x), expected)
    offloaded.restore()
    assert torch.equal(by_hand(layer, x), expected)
    DAMAGE[kind](path)
    with pytest.raises(ValueError, match=r"expert-1\.safetensors is (damaged|torn|missing)"):
        offload(layer, 1, directory=tmp_path)
    assert torch.equal(by_hand(layer, x), expected)


def test_foreign_and_unfinished_directories_are_told_apart(tmp_path: Path) -> None:
    layer = plain(3)
    with offload(layer, 1, directory=tmp_path):
        pass
    (tmp_path / MANIFEST).unlink()  # as if it had been killed before it was written
    (tmp_path / ".layer-000-expert-1.safetensors.part").write_bytes(b"half")
    with offload(layer, 1, directory=tmp_path):
        pass
    manifest = (tmp_path / MANIFEST).read_text()
    for text in (manifest[:-30], "[]", "{}", json.dumps({"format": "other", "experts": []})):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=MANIFEST):
            offload(layer, 1, directory=tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        offload(layer, 1, directory=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        offload(layer, 1, directory=tmp_path / "file")


# Threads.


def test_no_thread_outlives_the_model(tmp_path: Path) -> None:
    def run() -> None:
        layer = plain(4)
        offload(layer, 2, directory=tmp_path)
        with torch.no_grad():
            layer(torch.randn(9, D))
        assert threads() == 1

    assert threads() == 0
    run()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("growmoe-offload"):
            thread.join(10)
    assert threads() == 0


def test_a_failing_expert_leaves_the_layer_usable(tmp_path: Path) -> None:
    class Brittle(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise OverflowError("too much")
            return super().forward(x)

        broken = False

    layer = MoE(D, [lambda: Brittle(D, D) for _ in range(4)], 4, TopK(2), seed=0).eval()
    x = torch.randn(20, D)
    expected = by_hand(layer, x)
    with offload(layer, 2, directory=tmp_path, prefetch=True), torch.no_grad():
        Brittle.broken = True
        with pytest.raises(OverflowError):
            layer(x)
        Brittle.broken = False
        assert torch.equal(layer(x), expected)


# CUDA.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_gpu_holds_the_cache_alone(tmp_path: Path, on_disk: bool) -> None:
    model = Stack([mixed(6, 1), plain(8, 2)]).eval()
    xs = [torch.randn(n, D).cuda() for n in (3, 40, 1, 17)]
    expected = [stack_by_hand(copy.deepcopy(model).cuda(), x) for x in xs]
    directory = tmp_path if on_disk else None
    with (
        offload(model, 2, directory=directory, device="cuda", prefetch=True) as offloaded,
        torch.no_grad(),
    ):
        for _ in range(3):
            for x, want in zip(xs, expected, strict=True):
                assert torch.equal(model(x), want)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(model(xs[1]), expected[1])
        assert isinstance(offloaded, Offloaded)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
