"""A small growing model that trains alone or on several workers, step by step."""

from types import SimpleNamespace

import torch

from growmoe import FFN, MoE, Organizer, TopK, aux_loss, moe_layers, surgery
from growmoe.distributed import expert_parallel
from growmoe.rules import MergeSimilar, SpawnOnNovelty

D, ROWS = 8, 24


def begin(size, seed=0, dtype=torch.float64, experts=5, group=None):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(D, D),
        MoE(D, FFN(16), experts, TopK(2), warmup=3, seed=seed),
        torch.nn.Linear(D, 2),
    ).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    parallel = expert_parallel(model, group, optimizer) if size > 1 else None
    rules = [SpawnOnNovelty(0.5), MergeSimilar(0.95, min_age=20)]
    organizer = Organizer(model, optimizer, rules, every=10, cooldown=10, tolerance=0.5)
    return SimpleNamespace(
        model=model, optimizer=optimizer, parallel=parallel, organizer=organizer, losses={}
    )


def batch(step, dtype):
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, D, generator=draw, dtype=torch.float64) + (3 if step % 40 > 20 else 0)
    return x.to(dtype), torch.stack([x.sin().sum(1), x.cos().sum(1)], 1).to(dtype)


def one_step(run, rank, size, step):
    layer = next(iter(moe_layers(run.model).values()))
    x, y = batch(step, next(run.model.parameters()).dtype)
    part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    loss = (run.model(x[part]) - y[part]).square().mean() + aux_loss(run.model)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.organizer.step(loss.detach())
    if step % 10 == 6 and len(layer.experts) < 8:
        surgery.spawn(layer, list(layer.experts)[-1], run.optimizer)
    if step % 10 == 9 and len(layer.experts) > 5:
        surgery.prune(layer, [list(layer.experts)[1]], run.optimizer)
    total = run.parallel.workers.total(loss.detach()) / size if run.parallel else loss
    run.losses[step] = total.item()


def advance(run, rank, size, start, stop):
    for step in range(start, stop):
        one_step(run, rank, size, step)


def everything(run):
    """Weights, moments, statistics, lineage and counters, whole on every worker."""
    layer = next(iter(moe_layers(run.model).values()))
    with layer.gathered(None, [run.optimizer]):
        state = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        state |= {n: b.detach().clone() for n, b in run.model.named_buffers()}
        for n, p in run.model.named_parameters():
            for key, value in run.optimizer.state.get(p, {}).items():
                state[f"{n}/{key}"] = value.clone()
    state["events"] = [str(e) for e in layer.lineage]
    state["counters"] = [layer.next_id, layer.steps, run.organizer.state_dict()]
    state["generator"] = layer.generator.get_state().clone()
    state["admission"] = {id: (e.admission, e.frozen) for id, e in layer.experts.items()}
    return state
