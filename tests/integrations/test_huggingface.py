"""A model grows while transformers.Trainer trains it, and a resumed run goes on unchanged."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import growmoe
from growmoe.models.upcycle import upcycle
from growmoe.rules.rule import Proposal
from growmoe.signals import Signals

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from growmoe.integrations.huggingface import FILE, OrganizerCallback


class SpawnOnce:
    """Clones the first expert of each layer at the first decision."""

    def propose(self, signals: Signals) -> list[Proposal]:
        if len(signals.ids) > 2:
            return []
        return [Proposal("spawn", (signals.ids[0],), "a test asks for it")]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return upcycle(LlamaForCausalLM(config), num_experts=2, warmup=2)


DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 8, (64, 6), generator=torch.Generator().manual_seed(1))
]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }
    return TrainingArguments(**settings)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_empty_cache_steps": 2, "max_grad_norm": 0.1},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_model_grows_in_the_trainer_and_the_newborn_learns(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = llama()
    callback = OrganizerCallback([SpawnOnce()], every=3)
    born: dict[str, Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if callback.events and not born:
                born.update(weights(more["model"]))

    trainer = Trainer(
        model, arguments(tmp_path, **settings), train_dataset=DATA, callbacks=[callback, Watch()]
    )
    trainer.train()
    spawned = [event for event in callback.events if event.act == "spawn"]
    assert [event.step for event in spawned] == [3, 3]
    for name, layer in growmoe.moe_layers(model).items():
        assert list(layer.experts) == [0, 1, 2]
        assert [event.act for event in layer.lineage] == ["init", "spawn"]
        newborn = {n: p for n, p in model.named_parameters() if n.startswith(f"{name}.experts.2.")}
        moved = [n for n, p in newborn.items() if not torch.equal(p, born[n])]
        assert set(moved) == set(newborn)
        held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
        assert {id(p) for p in newborn.values()} <= held
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss == loss and loss < float("inf") for loss in losses)
    assert losses[-1] < losses[0]
    said = [entry for entry in trainer.state.log_history if "growmoe" in entry]
    assert said[0]["step"] == 3 and said[0]["growmoe/spawn"] == 2
    assert callback.organizer is not None
    for layer in callback.organizer.layers.values():
        assert layer.experts[0].statistics["loss_count"] > 0


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def run(folder: Path, **more: Any) -> tuple[LlamaForCausalLM, OrganizerCallback]:
        model, callback = llama(), OrganizerCallback([SpawnOnce()], every=3)
        args = arguments(folder, max_steps=10, save_strategy="steps", save_steps=5)
        Trainer(model, args, train_dataset=DATA, callbacks=[callback]).train(**more)
        return model, callback

    whole, first = run(tmp_path)
    checkpoint = tmp_path / "checkpoint-5"
    assert (checkpoint / FILE).is_file() and not (checkpoint / "optimizer.pt").exists()
    resumed, second = run(tmp_path, resume_from_checkpoint=str(checkpoint))
    assert first.organizer is not None and second.organizer is not None
    assert second.events == []  # the birth lies before the checkpoint
    assert second.organizer.state_dict() == first.organizer.state_dict()
    expected = weights(whole)
    assert set(weights(resumed)) == set(expected)
    for name, p in weights(resumed).items():
        assert torch.equal(p, expected[name]), name


def test_a_resumed_run_without_the_structure_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(llama(), args, train_dataset=DATA, callbacks=[OrganizerCallback()]).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / FILE).unlink()
    trainer = Trainer(llama(), args, train_dataset=DATA, callbacks=[OrganizerCallback()])
    with pytest.raises(ValueError, match="resume_from="):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_comes_back_with_its_structure(tmp_path: Path) -> None:
    model, callback = llama(), OrganizerCallback([SpawnOnce()], every=3)
    args = arguments(
        tmp_path,
        learning_rate=1.0,  # so that it gets worse
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[callback])
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    expected = llama()
    growmoe.load(best / FILE, expected, random_state=False)
    for name, p in weights(expected).items():
        assert torch.equal(p, weights(model)[name])
    sizes = {len(layer.experts) for layer in growmoe.moe_layers(model).values()}
    assert sizes == ({2} if best.name == "checkpoint-2" else {3})


def test_the_auxiliary_loss_is_added_once_and_the_organizer_sees_the_task_alone(
    tmp_path: Path,
) -> None:
    batch = {key: torch.stack([row[key] for row in DATA[:4]]) for key in ("input_ids", "labels")}
    model, callback = llama(), OrganizerCallback()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=DATA, callbacks=[callback]
    )
    trainer.train()
    assert model(**batch).loss is not None
    callback.on_train_begin(
        trainer.args, type(trainer.state)(), trainer.control, model, optimizer=trainer.optimizer
    )
    model.train()
    plain = llama()
    plain.load_state_dict(model.state_dict())
    task = plain.train()(**batch).loss
    aux = growmoe.aux_loss(plain)
    growmoe.aux_loss(model)
    assert aux > 0
    torch.testing.assert_close(model(**batch).loss, task + aux)
    torch.testing.assert_close(callback._loss, task.detach())
    torch.testing.assert_close(model.eval()(**batch).loss, plain.eval()(**batch).loss)


def test_events_reach_the_trainers_log(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(dict(more["logs"]))

    callback = OrganizerCallback([SpawnOnce()], every=3)
    trainer = Trainer(
        llama(), arguments(tmp_path), train_dataset=DATA, callbacks=[callback, Reporter()]
    )
    callback.log = trainer.log
    trainer.train()
    (logged,) = [logs for logs in seen if "growmoe/spawn" in logs]
    assert logged["growmoe/spawn"] == 2
    assert logged["growmoe/model.layers.0.mlp/experts"] == 3


def test_a_model_without_mixtures_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[OrganizerCallback()],
    )
    with pytest.raises(ValueError, match=r"no growmoe\.MoE layer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_optimizer_that_cannot_follow_is_refused_before_the_first_step(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="adafactor")
    trainer = Trainer(llama(), args, train_dataset=DATA, callbacks=[OrganizerCallback()])
    with pytest.raises(ValueError, match="Adafactor"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow
def test_several_processes_are_refused_before_the_first_step(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os, sys
sys.path[:0] = [{str(Path(growmoe.__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
from test_huggingface import *
trainer = Trainer(llama(), arguments(Path({str(tmp_path)!r}), ddp_backend="gloo"),
                  train_dataset=DATA, callbacks=[OrganizerCallback([SpawnOnce()], every=3)])
try:
    trainer.train()
except ValueError as error:
    assert trainer.state.global_step == 0
    # to a file each: what two processes print at once may be mixed
    Path({str(tmp_path)!r}, "refused" + os.environ["RANK"]).write_text(str(error))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    refusals = [path.read_text() for path in tmp_path.glob("refused*")]
    assert len(refusals) == 2, done.stderr[-2000:]
    assert all("OrganizerCallback: 2 processes" in text for text in refusals)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("huggingface", "transformers", "growmoe[hf]"),
        ("torch_lightning", "pytorch_lightning", "growmoe[lightning]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, extra: str
) -> None:
    name = f"growmoe.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for absent in (package, "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=extra.replace("[", r"\[")):
        importlib.import_module(name)
