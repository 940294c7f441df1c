"""A model grows while Lightning's Trainer trains it, and a resumed run goes on unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import growmoe
from growmoe.rules.rule import Proposal
from growmoe.signals import Signals

pl = pytest.importorskip("pytorch_lightning")

from growmoe.integrations.torch_lightning import OrganizerCallback  # noqa: E402


class SpawnOnce:
    """Clones the first expert of each layer at the first decision."""

    def propose(self, signals: Signals) -> list[Proposal]:
        if len(signals.ids) > 2:
            return []
        return [Proposal("spawn", (signals.ids[0],), "a test asks for it")]


class Automatic(pl.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16),
            growmoe.MoE(16, growmoe.FFN(32), 2, warmup=2),
            nn.Linear(16, 3),
        )
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        task = F.cross_entropy(self.net(x), y)
        self.losses.append(float(task))
        return task + growmoe.aux_loss(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ZeroedInPlace(Automatic):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


def trainer(folder: Path, callbacks: list[Any], **more: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        **more,
    }
    return pl.Trainer(default_root_dir=str(folder), callbacks=callbacks, **settings)


@pytest.mark.parametrize(
    ("build", "settings", "step"),
    [
        (Automatic, {}, 3),
        (Manual, {}, 3),
        (Automatic, {"accumulate_grad_batches": 2, "max_epochs": 4}, 3),
        (Automatic, {"precision": "bf16-mixed", "gradient_clip_val": 0.5}, 3),
    ],
    ids=["automatic", "manual", "accumulated", "mixed"],
)
def test_a_model_grows_in_lightning_and_the_newborn_learns(
    tmp_path: Path, build: Callable[[], Automatic], settings: dict[str, Any], step: int
) -> None:
    module, callback = build(), OrganizerCallback([SpawnOnce()], every=3)
    born: dict[str, Tensor] = {}

    class Watch(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if callback.events and not born:
                born.update({n: p.detach().clone() for n, p in module.named_parameters()})

    trainer(tmp_path, [callback, Watch()], **settings).fit(module, data())
    (event,) = callback.events
    assert (event.act, event.step, event.child) == ("spawn", step, 2)
    layer: growmoe.MoE = module.net[1]  # type: ignore[assignment]
    assert [event.act for event in layer.lineage] == ["init", "spawn"]
    for name, p in module.named_parameters():
        if ".experts.2." in name:
            assert not torch.equal(p, born[name]), name
    assert all(loss < float("inf") for loss in module.losses)
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    # a manual step returns no loss
    assert (layer.experts[0].statistics["loss_count"] > 0) == (build is not Manual)


def test_idle_experts_stay_put_though_gradients_are_zeroed_in_place(tmp_path: Path) -> None:
    module, callback = ZeroedInPlace(), OrganizerCallback()
    layer: growmoe.MoE = module.net[1]  # type: ignore[assignment]
    layer.router = growmoe.TopK(1)
    before: dict[str, Tensor] = {}

    class Exile(pl.Callback):  # type: ignore[misc,name-defined]
        """From the fourth step on, nothing is routed to expert 0."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 4:
                layer.experts[0].admission = 0.0
                layer.recorder.warmup = 10**12
                body = layer.experts[0].body
                before.update({n: p.detach().clone() for n, p in body.named_parameters()})

    trainer(tmp_path, [callback, Exile()], max_epochs=1).fit(module, data())
    assert before
    for name, p in layer.experts[0].body.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("build", [Automatic, Manual])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, build: Callable[[], Automatic]
) -> None:
    class Save(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "grown.ckpt")

    whole, first = build(), OrganizerCallback([SpawnOnce()], every=3)
    trainer(tmp_path, [first, Save()]).fit(whole, data())
    resumed, second = build(), OrganizerCallback([SpawnOnce()], every=3)
    trainer(tmp_path, [second]).fit(resumed, data(), ckpt_path=tmp_path / "grown.ckpt")
    assert first.organizer is not None and second.organizer is not None
    assert second.events == []  # the birth lies before the checkpoint
    assert second.organizer.state_dict() == first.organizer.state_dict()
    expected = dict(whole.named_parameters())
    assert any(".experts.2." in name for name in expected)
    assert set(dict(resumed.named_parameters())) == set(expected)
    for name, p in resumed.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_a_second_fit_goes_on_with_the_same_organizer_state(tmp_path: Path) -> None:
    module, callback = Automatic(), OrganizerCallback([SpawnOnce()], every=3)
    for _ in range(2):
        trainer(tmp_path, [callback]).fit(module, data())
    assert callback.organizer is not None and callback.organizer.steps == 32


def test_several_processes_are_refused_when_fitting_is_set_up(tmp_path: Path) -> None:
    callback = OrganizerCallback()
    many = trainer(tmp_path, [callback], devices=2, strategy="ddp")
    with pytest.raises(ValueError, match="DDPStrategy with 2 processes"):
        callback.setup(many, Automatic(), "fit")
    callback.setup(many, Automatic(), "test")


def test_a_module_without_mixtures_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Automatic()
    module.net = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"no growmoe\.MoE layer"):
        trainer(tmp_path, [OrganizerCallback()]).fit(module, data())
    assert module.losses == []
