"""What every host must do: learn, grow, be copied, be saved, and be reproduced by a seed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from slow_parameters import but_slow
from snapshots import differences, of_experts
from torch import Tensor, nn

from growmoe import FFN, MoE, Organizer, aux_loss, load, moe_layers, save, surgery
from growmoe.models import MLP, ConvNet, MixtureDensity, MultiTask, TransformerLM, ViT
from growmoe.rules import SpawnOnOverload

B = 16


def classes(x: Tensor) -> Tensor:
    """Which of the first four numbers of each input is largest."""
    return x.flatten(1)[:, :4].argmax(1)


class Host:
    """A small host, a batch for it and its loss for each input."""

    def __init__(self, build, batch, loss):
        self.build, self.batch, self.loss = build, batch, loss


def classified(model, x):
    return F.cross_entropy(model(x), classes(x), reduction="none")


def next_token(model, x):
    logits = model(x[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")


def counting(generator):
    """Sequences in which each token is the one before plus one."""
    return (torch.randint(0, 11, (B, 1), generator=generator) + torch.arange(8)) % 11


def normal(*shape):
    return lambda g: torch.randn(B, *shape, generator=g)


HOSTS = {
    "TransformerLM": Host(
        lambda **o: TransformerLM(11, 16, 2, 2, d_hidden=16, **o), counting, next_token
    ),
    "MLP": Host(lambda **o: MLP(6, 16, 4, d_hidden=16, **o), normal(6), classified),
    "flat MLP": Host(
        lambda **o: MLP(12, 16, 4, d_hidden=16, flatten=True, **o), normal(3, 2, 2), classified
    ),
    "ViT": Host(
        lambda **o: ViT(4, 2, 4, in_channels=1, d_model=16, num_layers=2, d_hidden=16, **o),
        normal(1, 4, 4),
        classified,
    ),
    "ConvNet": Host(
        lambda **o: ConvNet(1, 4, (8, 16), d_hidden=16, **o), normal(1, 4, 4), classified
    ),
    "MixtureDensity": Host(
        lambda **o: MixtureDensity(4, 1, d_model=16, **o),
        normal(4),
        lambda model, x: model.loss(x, x[:, :1].sin(), reduction="none"),
    ),
    "MultiTask": Host(
        lambda **o: MultiTask(4, {"a": 4, "b": 1}, d_hidden=16, **o),
        normal(4),
        lambda model, x: F.cross_entropy(model(x)["a"], classes(x), reduction="none"),
    ),
}  # fmt: skip


@pytest.fixture(params=HOSTS.values(), ids=HOSTS)
def host(request):
    return request.param


def train(host: Host, model: nn.Module, optimizer, steps: int, organizer=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    seen, events = [], []
    for _ in range(steps):
        loss = host.loss(model, host.batch(g))
        (loss.mean() + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.mean().item())
        if organizer is not None:
            events += organizer.step(loss.detach())
    return seen, events


def output(host: Host, model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return host.loss(model, host.batch(torch.Generator().manual_seed(99)))


@pytest.mark.slow
def test_it_learns_grows_and_learns_on(host) -> None:
    model = host.build(num_experts=3, moe={"warmup": 5}, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first, _ = train(host, model, optimizer, 30)
    before = output(host, model)
    model.train()
    for layer in moe_layers(model).values():
        survivors = of_experts(layer, [optimizer])
        surgery.spawn(layer, 0, optimizer)
        assert not differences(survivors, of_experts(layer, [optimizer], survivors))
    torch.testing.assert_close(output(host, model), before, atol=1e-4, rtol=1e-4)
    model.train()
    newborns = [layer.experts[3] for layer in moe_layers(model).values()]
    weights = [n.body.w_in.detach().clone() for n in newborns]
    second, _ = train(host, model, optimizer, 30, seed=1)
    assert sum(second[-5:]) < sum(first[-5:]) < sum(first[:5])
    for newborn, was in zip(newborns, weights, strict=True):
        assert newborn.admission == 1
        assert not torch.equal(newborn.body.w_in, was)


@pytest.mark.parametrize(
    "host", but_slow(HOSTS.values(), HOSTS["MLP"], HOSTS["TransformerLM"]), ids=HOSTS
)
def test_an_organizer_grows_it_and_tells_the_layer_by_name(host) -> None:
    model = host.build(num_experts=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rules = [SpawnOnOverload(0.1, min_age=5)]
    organizer = Organizer(model, optimizer, rules, every=8, max_experts=4, cooldown=0)
    _, events = train(host, model, optimizer, 20, organizer)
    layers = moe_layers(model)
    assert {e.layer for e in events if e.act == "spawn"} <= set(layers)
    assert any(e.act == "spawn" and e.accepted for e in events)
    assert max(len(layer.experts) for layer in layers.values()) > 2


def test_any_structure_is_saved_and_goes_on_as_if_it_had_not_stopped(host, tmp_path) -> None:
    def run(experts, seed):
        model = host.build(num_experts=experts, seed=seed)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = run(3, 0)
    train(host, model, optimizer, 4)
    layer = next(iter(moe_layers(model).values()))
    surgery.spawn(layer, 1, optimizer)
    surgery.prune(layer, [0], optimizer)
    train(host, model, optimizer, 2)
    save(tmp_path / "model.safetensors", model, optimizer)
    other, again = run(2, 1)
    load(tmp_path / "model.safetensors", other, again)
    assert list(next(iter(moe_layers(other).values())).experts) == [1, 2, 3]
    a, _ = train(host, model, optimizer, 3, seed=5)
    b, _ = train(host, other, again, 3, seed=5)
    assert a == b
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name))


def test_a_copy_computes_the_same_and_shares_nothing(host) -> None:
    model = host.build(num_experts=3, seed=0)
    want = output(host, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(host, twin), want)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1.0)
        assert torch.equal(output(host, model), want)
        surgery.spawn(next(iter(moe_layers(twin).values())))  # newborns are still built alike
    assert all(len(layer.experts) == 3 for layer in moe_layers(model).values())


def test_a_state_dict_carries_the_structure(host) -> None:
    model, other = host.build(num_experts=3, seed=0), host.build(num_experts=2, seed=1)
    surgery.spawn(next(iter(moe_layers(model).values())), 0)
    assert not torch.equal(output(host, model), output(host, other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(host, model), output(host, other))


def test_a_seed_decides_all_and_draws_nothing_else(host) -> None:
    before = torch.get_rng_state()
    a, b, other = (host.build(num_experts=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(output(host, a), output(host, b))
    assert not torch.equal(output(host, a), output(host, other))
    for model in (a, b):
        surgery.spawn(next(iter(moe_layers(model).values())))
    assert torch.equal(*(next(iter(moe_layers(m).values())).experts[3].body.w_in for m in (a, b)))
    torch.manual_seed(5)
    c = host.build(num_experts=3)
    torch.manual_seed(5)
    assert torch.equal(output(host, c), output(host, host.build(num_experts=3)))


def test_it_takes_other_kinds_of_experts(host) -> None:
    model = host.build(num_experts=2, expert=[FFN(8, "relu"), FFN(4, bias=True)], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(host, model, optimizer, 1)
    layers = list(moe_layers(model).values())
    assert all(isinstance(layer, MoE) for layer in layers)
    assert [e.body.d_hidden for e in layers[0].experts.values()] == [8, 4]


@pytest.mark.parametrize("options", [{"num_experts": True}, {"seed": "a"}, {"moe": {"seed": 1}}])
def test_bad_options_are_refused(host, options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        host.build(**options)
