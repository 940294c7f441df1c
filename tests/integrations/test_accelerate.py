"""The organizer takes what Accelerate's `prepare` returned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import growmoe
from growmoe.rules.rule import Proposal
from growmoe.signals import Signals

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


class SpawnOnce:
    """Clones the first expert at the first decision."""

    def propose(self, signals: Signals) -> list[Proposal]:
        if len(signals.ids) > 2:
            return []
        return [Proposal("spawn", (signals.ids[0],), "a test asks for it")]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_model_grows_under_accelerate_and_the_newborn_learns(settings: dict[str, Any]) -> None:
    accelerator = Accelerator(cpu=True, **settings)
    moe = growmoe.MoE(16, growmoe.FFN(32), 2, warmup=2)
    net = nn.Sequential(nn.Linear(8, 16), moe, nn.Linear(16, 3))
    x = torch.randn(96, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.AdamW(net.parameters(), lr=1e-2), loader
    )
    organizer = growmoe.Organizer(model, optimizer, [SpawnOnce()], every=3)
    events, born, losses = [], {}, []
    for _ in range(2):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss + growmoe.aux_loss(model))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
            if new := organizer.step(loss.detach()):
                events += new
                born = {n: p.detach().clone() for n, p in net.named_parameters()}
    (event,) = events
    assert (event.act, event.step, event.child) == ("spawn", 3, 2)
    assert organizer.steps == 24 // settings.get("gradient_accumulation_steps", 1)
    assert [event.act for event in moe.lineage] == ["init", "spawn"]
    for name, p in net.named_parameters():
        if ".experts.2." in name:
            assert not torch.equal(p, born[name]), name
    assert sum(losses[-4:]) < sum(losses[:4])


def test_surgery_takes_the_prepared_optimizer_or_the_one_inside() -> None:
    accelerator = Accelerator(cpu=True)
    moe = growmoe.MoE(16, growmoe.FFN(32), 2)
    inner = torch.optim.AdamW(moe.parameters())
    model, optimizer = accelerator.prepare(moe, inner)
    for given in (optimizer, inner):
        child = growmoe.surgery.spawn(model, 0, given).child
        held = [p for group in inner.param_groups for p in group["params"]]
        for p in moe.experts[child].parameters():
            assert sum(p is q for q in held) == 1
    with pytest.raises(ValueError, match="pass it as optimizer="):
        growmoe.surgery.spawn(model, 0)
