"""A gate solved in closed form lives through surgery and checkpoints; see also test_moments."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from snapshots import copied, differences, of_everything, of_experts
from torch import Tensor

import growmoe
from growmoe import Capacity, MoE, surgery
from growmoe.experts.moments import Moments
from growmoe.routers import ClosedFormGate

LABELS = 3


def layer_of(labels: int = LABELS, seed: int = 0, **options: object) -> MoE:
    return MoE(
        4,
        [lambda c=c: Moments(LABELS, c % LABELS, 4) for c in range(labels)],
        labels,
        ClosedFormGate(),
        d_out=LABELS,
        evidence="moments",
        seed=seed,
        **options,
    )


def clusters(seed: int, count: int = 90) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(LABELS, 4, generator=torch.Generator().manual_seed(9))
    y = torch.randint(LABELS, (count,), generator=g)
    return centre[y] + torch.randn(count, 4, generator=g), y


def taught(steps: int = 25, **options: object) -> MoE:
    layer = layer_of(**options)
    for seed in range(steps):
        layer(*clusters(seed))
    return layer


def answers(layer: MoE) -> Tensor:
    y = layer.eval()(clusters(99)[0])
    layer.train()
    return y


@pytest.mark.parametrize("parent", [1, None])
def test_a_birth_changes_no_answer_and_nobody_else(parent: int | None) -> None:
    layer = taught()
    y, before = answers(layer), of_experts(layer, [])
    surgery.spawn(layer, parent)
    torch.testing.assert_close(answers(layer), y, rtol=1e-6, atol=1e-6)
    assert differences(before, of_experts(layer, [], [0, 1, 2])) == []


def test_a_merge_adds_up_and_leaves_the_others_as_they_were() -> None:
    layer = taught()
    child = surgery.spawn(layer, 1).child
    for seed in range(30):
        x, y = clusters(seed)
        layer(torch.where((y == 1)[:, None], x + 30, x), y)
    moment = layer.experts[1].body.moment + layer.experts[child].body.moment
    before = of_experts(layer, [], [0, 2])
    assert layer.experts[child].body.count > 0
    event = surgery.merge(layer, [1, child])
    assert torch.equal(layer.experts[event.child].body.moment, moment)
    assert differences(before, of_experts(layer, [], [0, 2])) == []
    assert answers(layer).isfinite().all()


def test_a_prune_leaves_the_others_down_to_one() -> None:
    layer = taught()
    before = of_experts(layer, [], [2])
    surgery.prune(layer, [0, 1])
    assert differences(before, of_experts(layer, [])) == []
    assert (answers(layer).argmax(1) == 2).all()
    everything = of_everything(layer)
    with pytest.raises(ValueError, match="needs at least 1 experts"):
        surgery.prune(layer, [2])
    assert differences(everything, of_everything(layer)) == []


def test_a_frozen_expert_stands_still() -> None:
    layer = taught()
    surgery.freeze(layer, [1])
    before = copied(dict(layer.experts[1].body.state_dict()))
    layer(*clusters(50))
    assert differences(before, copied(dict(layer.experts[1].body.state_dict()))) == []


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_like_the_original(how: str, tmp_path: Path) -> None:
    layer = taught()
    surgery.spawn(layer, 1)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        # its template is a function, which only a state dict can do without
        layer._template = [Moments(LABELS, 0, 4)]
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = layer_of(6, seed=5)
        other._template = [Moments(LABELS, 0, 4)]
        if how == "file":
            growmoe.save(tmp_path / "c.safetensors", layer)
            growmoe.load(tmp_path / "c.safetensors", other)
        else:
            other.load_state_dict(layer.state_dict())
    for seed in range(3):
        assert torch.equal(answers(layer), answers(other))
        layer(*clusters(200 + seed)), other(*clusters(200 + seed))
    assert torch.equal(answers(layer), answers(other))


def test_later_inputs_change_no_earlier_answer_and_it_takes_no_capacity() -> None:
    layer = taught()
    x, _ = clusters(99)
    other = torch.cat([x[:40], x[40:] + 5])
    y, z = layer.eval()(x), layer(other)
    torch.testing.assert_close(y[:40], z[:40], rtol=1e-6, atol=1e-6)
    layer_of(causal=True)
    with pytest.raises(ValueError, match="sets the load of its experts by itself"):
        layer_of(capacity=Capacity())


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "learns from labels"),
        (torch.zeros(4), "must be 5 integer labels, got 4"),
        (torch.zeros(5), "must be 5 integer labels, got 5 of torch.float32"),
    ],
)
def test_a_bad_label_is_refused_and_nothing_is_learned(label: Tensor | None, message: str) -> None:
    layer = taught(3)
    before = [e.body.moment.clone() for e in layer.experts.values()]
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(5, 4), label)
    after = [e.body.moment for e in layer.experts.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_inputs_give_no_answers() -> None:
    layer = taught(3)
    assert layer(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, LABELS)
    assert layer.eval()(torch.zeros(0, 4)).shape == (0, LABELS)


@pytest.mark.parametrize("options", [{"shortlist": 0}, {"ridge": 0.0}, {"local_ridge": -1.0}])
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ClosedFormGate(**options)
