"""MultiTask mixes shared experts for each task by its own gate; SharedBottom is its control."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from growmoe import surgery
from growmoe.models import MultiTask, SharedBottom

TASKS = {"income": 2, "items": 1, "a.b": 3}  # names that torch's own containers would refuse


def model_of(**options: object) -> MultiTask:
    return MultiTask(5, TASKS, **{"num_experts": 4, "d_hidden": 8, "seed": 0, **options})


@torch.no_grad()
def test_each_task_is_its_tower_of_its_mixture() -> None:
    model = model_of().double().eval()
    x = torch.randn(6, 5).double()
    got = model(x)
    assert list(got) == list(TASKS)
    experts = list(model.mixture.experts.values())
    out_TEO = torch.stack([e.body(x) for e in experts], dim=1)
    for j, (name, tower) in enumerate(zip(TASKS, model.towers, strict=True)):
        keys = torch.stack([e.entries.key[j] for e in experts])
        gate = (x @ keys.T).softmax(-1)
        torch.testing.assert_close(got[name], tower((gate[..., None] * out_TEO).sum(1)))


@torch.no_grad()
@pytest.mark.parametrize("k", [None, 2])
def test_a_task_alone_gives_what_it_gives_among_all(k: int | None) -> None:
    model = model_of(k=k).eval()
    x = torch.randn(3, 2, 5)
    every = model(x)
    for name, width in TASKS.items():
        assert every[name].shape == (3, 2, width)
        alone = model(x, task=name)
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], every[name])


def test_one_task_trains_its_own_tower_and_gate_alone() -> None:
    model = model_of()
    model(torch.randn(6, 5), task="items")["items"].sum().backward()
    for name, tower in zip(TASKS, model.towers, strict=True):
        assert (tower[0].weight.grad is None) == (name != "items")
    for e in model.mixture.experts.values():
        moved = e.entries.key.grad.abs().sum(-1) > 0
        assert moved.tolist() == [False, True, False]


def test_a_single_task_will_do() -> None:
    model = MultiTask(5, {"only": 2}, 3, 8, seed=0)
    assert model(torch.randn(4, 5))["only"].shape == (4, 2)


def losses(model: MultiTask | SharedBottom, steps: int, optimizer) -> list[float]:
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(steps):
        x = torch.randn(64, 5, generator=g)
        out = model(x)
        loss = F.mse_loss(out["items"], x[:, :1].sin()) + F.mse_loss(out["income"], -x[:, 1:3])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.slow
def test_it_learns_grows_and_learns_on() -> None:
    model = model_of(moe={"warmup": 10})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = losses(model, 60, optimizer)
    surgery.spawn(model.mixture, 2, optimizer)
    before = model.mixture.experts[4].body.w_in.detach().clone()
    second = losses(model, 60, optimizer)
    assert first[-1] < 0.6 * first[0]
    assert second[-1] < 0.6 * first[-1]
    assert not torch.equal(before, model.mixture.experts[4].body.w_in)


@torch.no_grad()
@pytest.mark.parametrize("k", [None, 2])
def test_a_newborn_changes_no_task(k: int | None) -> None:
    model = model_of(k=k).eval()
    x = torch.randn(6, 5)
    before = model(x)
    surgery.spawn(model.mixture, 0)
    for name, value in model(x).items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("options", [{}, {"d_shared": 3}, {"d_tower": 2}, {"num_experts": 1}])
def test_the_control_has_as_many_parameters(options: dict) -> None:
    model = model_of(**options)
    control = SharedBottom.sized_as(model, seed=0)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, control)]
    assert abs(count[0] - count[1]) <= (5 + 1 + model.d_shared) / 2
    for a, b in zip(model.towers.parameters(), control.towers.parameters(), strict=True):
        assert a.shape == b.shape


@torch.no_grad()
def test_the_control_is_its_towers_of_one_bottom() -> None:
    control = SharedBottom(5, TASKS, 8, seed=0)
    x = torch.randn(4, 5)
    for name, tower in zip(TASKS, control.towers, strict=True):
        want = tower(control.bottom(x))
        torch.testing.assert_close(control(x)[name], want)
        torch.testing.assert_close(control(x, task=name)[name], want)


def test_a_seed_decides_all_weights() -> None:
    for build in (model_of, lambda: SharedBottom(5, TASKS, 8, seed=0)):
        before = torch.get_rng_state()
        a, b = build().state_dict(), build().state_dict()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(a[n], b[n]) for n in a if isinstance(a[n], torch.Tensor))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": {}}, "tasks must map"),
        ({"tasks": ["a"]}, "tasks must map"),
        ({"tasks": {"a": 0}}, "tasks\\['a'\\]"),
        ({"tasks": {3: 1}}, "names must be strings"),
        ({"d_hidden": 0}, "d_hidden"),
    ],
)
@pytest.mark.parametrize("kind", [MultiTask, SharedBottom])
def test_bad_options_are_refused(kind: type, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**{"d_in": 5, "tasks": TASKS, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_experts": 0}, "num_experts"), ({"k": 5}, "at least 5"), ({"k": 0}, "k must")],
)
def test_a_bad_mixture_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(**options)


def test_unknown_tasks_and_wrong_widths_are_refused() -> None:
    for model in (model_of(), SharedBottom(5, TASKS)):
        with pytest.raises(ValueError, match="'age' is unknown"):
            model(torch.randn(2, 5), task="age")
        with pytest.raises(ValueError, match="=5"):
            model(torch.randn(2, 4))
