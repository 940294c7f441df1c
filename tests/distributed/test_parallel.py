"""Experts on several workers train as in one process."""

import pytest
import torch
from gloo_workers import on_workers
from torch.distributed.device_mesh import init_device_mesh

from growmoe import FFN, Capacity, MoE, Organizer, TopK, aux_loss, moe_layers, surgery
from growmoe.distributed import expert_parallel
from growmoe.distributed.workers import Workers
from growmoe.routers import BiasBalanced, ReMoE
from growmoe.rules import FreezeConverged, MergeSimilar, PruneIdle, SpawnOnNovelty

D = 8
ROWS = 48  # in all


def make(dtype=torch.float64, experts=5, seed=0, router=None, **options):
    torch.manual_seed(seed)
    options = {"warmup": 5, "seed": seed, "shared": FFN(8), **options}
    model = torch.nn.Sequential(
        torch.nn.Linear(D, D),
        MoE(D, FFN(16, bias=True), experts, router or TopK(2), **options),
        torch.nn.Linear(D, 2),
    )
    return model.to(dtype)


def batch(step, dtype):
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, D, generator=draw)
    if step >= 60:
        x = x + 5
    return x.to(dtype), torch.stack([x.sin().sum(1), x.cos().sum(1)], 1).to(dtype)


def train(rank, size, steps, dtype, acts=True, clip=1.0, make=make, replicas=1):
    """The same training on one process (size 1) or several: losses, weights, moments, lineage."""
    width = size // replicas
    model = make(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mesh = init_device_mesh("cpu", (replicas, width)) if replicas > 1 else None
    parallel = expert_parallel(model, mesh, optimizer) if size > 1 else None
    layer = next(iter(moe_layers(model).values()))
    rules = [SpawnOnNovelty(), MergeSimilar(0.9, min_age=30), PruneIdle(40), FreezeConverged(0.05)]
    organizer = Organizer(model, optimizer, rules, every=20, cooldown=20, tolerance=0.5)
    losses, norms = [], []
    for step in range(steps):
        x, y = batch(step, dtype)
        part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        loss = (model(x[part]) - y[part]).square().mean() + aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            norms.append(
                parallel.clip_grad_norm(clip).item()
                if parallel
                else torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
            )
        optimizer.step()
        organizer.step(loss.detach())
        losses.append(
            parallel.workers.total(loss.detach()).item() / size if parallel else loss.item()
        )
        if acts:
            ids = list(layer.experts)
            if step == 30:
                surgery.spawn(layer, ids[1], optimizer)
            if step == 35:
                surgery.spawn(layer, None, optimizer)
            if step == 70:
                surgery.merge(layer, ids[:2], optimizer)
            if step == 90:
                surgery.prune(layer, [ids[1]], optimizer)
            if step == 100:
                surgery.freeze(layer, [ids[0]])
            if step == 120:
                surgery.thaw(layer, [ids[0]], optimizer)
            if parallel and step == 80:
                wanted = {id: (i % width,) for i, id in enumerate(reversed(ids))}
                assert (parallel.place({layer.name: wanted}) > 0) == (width > 1)
            if parallel and step == 110:
                parallel.rebalance(tolerance=1.0)
            if parallel and step == 115:  # two copies of one expert
                parallel.place({layer.name: {ids[0]: sorted({0, width - 1})}})
            for ranks in parallel.holders()[layer.name].values() if parallel else ():
                copies = len(ranks) // replicas  # the same in each replica
                assert [len([r for r in ranks if r // width == i]) for i in range(replicas)] == [
                    copies
                ] * replicas
    state = {}
    if parallel:
        with layer.gathered(None, [optimizer]):
            state = values(model, optimizer)
    else:
        state = values(model, optimizer)
    events = [(e.step, e.act, e.ids, e.parents, e.child, e.accepted) for e in layer.lineage]
    return (
        losses,
        norms,
        state,
        events,
        {id: e.statistics.record.clone() for id, e in layer.experts.items()},
    )


def values(model, optimizer):
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{n}/{key}"] = value.clone()
    return state


def assert_equal(one, many, tolerance):
    losses, norms, state, events, records = one
    for got in many:
        assert got[3] == events
        assert got[2].keys() == state.keys()
        torch.testing.assert_close(got[0], losses, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[1], norms, rtol=tolerance, atol=tolerance)
        for name, value in state.items():
            torch.testing.assert_close(
                got[2][name], value, rtol=tolerance, atol=tolerance, msg=name
            )
        for id, record in records.items():
            assert torch.equal(got[4][id], many[0][4][id])  # the same bits on every worker
            torch.testing.assert_close(got[4][id], record, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def one_process():
    result = train(0, 1, 200, torch.float64)
    assert {e[1] for e in result[3] if e[5]} >= {"spawn", "merge", "prune", "freeze", "thaw"}
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (3, 1), (4, 1), (4, 2), (2, 2)])
def test_double_precision_equals_one_process_through_surgeries(size, replicas, one_process):
    many = on_workers(size, train, 200, torch.float64, True, 1.0, make, replicas)
    assert_equal(one_process, many, 1e-9)


@pytest.mark.slow
def test_single_precision_equals_one_process_to_rounding(one_process):
    one = train(0, 1, 200, torch.float32)
    two = on_workers(2, train, 200, torch.float32)
    assert_equal(one, two, 1e-5)

    def apart(a, b):
        return max(abs(x - y) for x, y in zip(a[0], b[0], strict=True))

    # nearer to each other than single precision is to double
    assert apart(one, two[0]) < apart(one, one_process)


def in_a_mesh(rank, size):
    """Bytes that a worker sends, who holds which expert, and what is refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    model = make(experts=4, balance_loss=0.0, router=TopK(1), shared=None)
    with torch.no_grad():
        for id, expert in model[1].experts.items():
            expert.entries.key.fill_(1.0 if id == 3 else -1.0)
        model[0].weight.fill_(0.1), model[0].bias.zero_()
    parallel = expert_parallel(model, mesh, placement={"1": {3: 0}})
    model(torch.rand(6, D, dtype=torch.float64) + 0.1).sum().backward()  # all to expert 3
    said = [
        raised(Workers, init_device_mesh("cpu", (4,))),
        raised(Workers, None, 3),
        raised(parallel.place, {"1": {0: (2,)}}),
    ]
    return dict(parallel.workers.sent), parallel.holders()["1"], said


def test_in_a_mesh_rows_stay_within_their_replica():
    for sent, holders, said in on_workers(4, in_a_mesh):
        assert holders == {0: (0, 2), 1: (0, 2), 2: (1, 3), 3: (0, 2)}
        row = D * 8  # there and back, forward and backward
        assert sent["rows"] == 2 * 6 * row  # of one from each pair: both send, one a way
        assert "two axes" in said[0] and "do not divide into 3" in said[1]
        assert "ranks 0..1" in said[2]


def raised(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        return str(error)


def idle_and_asked(rank, size):
    model = make(experts=4, balance_loss=0.0, router=TopK(1))
    layer = model[1]
    with torch.no_grad():
        for id, expert in layer.experts.items():
            expert.entries.key.fill_(1.0 if id == 0 else -1.0)
        model[0].weight.fill_(0.1), model[0].bias.zero_()
    parallel = expert_parallel(model, placement={"1": {0: 0, 1: 0, 2: [0, 1], 3: 1}})
    x = torch.rand(6 if rank else 4, D, dtype=torch.float64) + 0.1  # all go to expert 0
    model(x).sum().backward()
    hit = {id: [p.grad is not None for p in e.body.parameters()] for id, e in layer.experts.items()}
    keys = [p.grad for p in parallel.replicated() if p.grad is not None]
    alone = raised(layer.experts[3 if rank == 0 else 0], x[:2])
    with layer.gathered():
        asked = layer.experts[0](x[:1] * 0 + 1)
    norm = parallel.gradient_norm().item()
    squares = (
        sum(p.grad.square().sum().item() for p in layer.experts[0].body.parameters())
        if not rank
        else 0
    )
    rest = sum(g.square().sum().item() for g in keys)
    return hit, alone, asked, norm, squares + 0.0, rest, raised(model.state_dict)


def test_an_expert_idle_everywhere_keeps_no_gradient_and_norms_count_each_once():
    first, second = on_workers(2, idle_and_asked)
    assert all(first[0][0]) and not any(any(v) for id, v in first[0].items() if id)
    assert not any(any(v) for v in second[0].values())
    assert "lives on worker 1" in first[1] and "lives on worker 0" in second[1]
    assert torch.equal(first[2], second[2])
    assert first[3] == second[3] == pytest.approx((first[4] + first[5]) ** 0.5)
    assert "growmoe.distributed.save" in first[6]


def bad_input(rank, size):
    from torch.nn.parallel import DistributedDataParallel

    said = [raised(expert_parallel, torch.nn.Linear(2, 2))]
    said.append(raised(expert_parallel, make(experts=4 + rank)))
    said.append(raised(expert_parallel, make(), placement={"1": {0: 7}}))
    said.append(raised(expert_parallel, make(), placement={"1": {99: 0}}))
    wrapped = DistributedDataParallel(make())
    said.append(raised(expert_parallel, wrapped.module))
    del wrapped
    model = make()
    expert_parallel(model)
    said.append(raised(expert_parallel, model))
    x = torch.rand(4, D, dtype=torch.float64)
    if rank:
        with torch.no_grad():
            said.append(raised(model, x))
    else:
        said.append(raised(model, x))
    return said


def test_bad_input_is_refused_on_every_worker():
    for said in on_workers(2, bad_input):
        for message, part in zip(
            said,
            ["has no MoE layer", "different models", "ranks 0..1", "no experts [99]",
             "DistributedDataParallel or FSDP", "shared out already", "gradient modes"],
            strict=True,
        ):  # fmt: skip
            assert part in message


def wrapped(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return raised(expert_parallel, model)


def test_fsdp_around_a_layer_is_refused_with_the_reason():
    for said in on_workers(2, wrapped):
        assert "FSDP, which keeps its own list of the parameters" in said


def test_without_a_process_group_it_says_what_to_do():
    assert "init_process_group" in raised(expert_parallel, make())


def overflow(rank, size):
    model = make()
    parallel = expert_parallel(model)
    model(torch.rand(8, D, dtype=torch.float64)).sum().backward()
    before = parallel.share_overflow()
    if rank == 1:  # an expert of one worker alone
        for p in parallel.layers["1"].experts.local()[0].body.parameters():
            p.grad = torch.full_like(p, torch.inf)
    return before, parallel.share_overflow(), any(
        not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )  # fmt: skip


def test_what_overflows_in_one_expert_overflows_on_every_worker():
    assert on_workers(2, overflow) == [(False, True, True)] * 2


ROUTERS = {
    "bias": (lambda: BiasBalanced(2, rate=0.05), {}),
    "capacity": (lambda: TopK(1), {"capacity": Capacity(1.0)}),
    "remoe": (lambda: ReMoE(2), {}),
}


def routed(rank, size, name):
    router, options = ROUTERS[name]
    return train(
        rank, size, 25, torch.float64, False, make=lambda d: make(d, router=router(), **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_other_routers_keep_the_same_state_on_every_worker(name):
    first, second = on_workers(2, routed, name)
    assert first[3] == second[3]
    assert all(torch.equal(value, second[2][key]) for key, value in first[2].items())
    if name != "capacity":  # which is of each worker's own rows
        # ReMoE computes its own loss in single precision
        assert first[0] == pytest.approx(routed(0, 1, name)[0], abs=1e-6)
